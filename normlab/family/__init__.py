"""The rest of the family: what the field has beside the ten norms of the heart of the library.

Each is an `x_norm` with its `x_parts`, and a row of the registry: `normlab.get("scale")`.
"""

from normlab.family.lengths import scale_norm, scale_parts
from normlab.family.whitening import (
    group_whitening_norm,
    group_whitening_parts,
    switchable_whitening_norm,
    switchable_whitening_parts,
    whitening_norm,
    whitening_parts,
)

__all__ = [
    "group_whitening_norm",
    "group_whitening_parts",
    "scale_norm",
    "scale_parts",
    "switchable_whitening_norm",
    "switchable_whitening_parts",
    "whitening_norm",
    "whitening_parts",
]
