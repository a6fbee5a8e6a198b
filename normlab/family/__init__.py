"""The rest of the family: what the field has beside the ten norms of the heart of the library.

Each is an `x_norm` with its `x_parts`, and a row of the registry: `normlab.get("scale")`.
"""

from normlab.family.domains import at_step
from normlab.family.lengths import scale_norm, scale_parts
from normlab.family.mixtures import clip_gates

__all__ = [
    "at_step",
    "clip_gates",
    "scale_norm",
    "scale_parts",
]
