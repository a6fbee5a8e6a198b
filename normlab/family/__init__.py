"""The rest of the family: what the field has beside the ten norms of the heart of the library.

Each is an `x_norm` with its `x_parts`, and a row of the registry: `normlab.get("scale")`.
"""

from normlab.family.lengths import scale_norm, scale_parts
from normlab.family.mixtures import clip_gates

__all__ = [
    "clip_gates",
    "scale_norm",
    "scale_parts",
]
