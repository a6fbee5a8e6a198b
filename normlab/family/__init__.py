"""The rest of the family: what the field has beside the ten norms of the heart of the library.

Each is an `x_norm` with its `x_parts`, and a row of the registry: `normlab.get("scale")`.
"""

from normlab.family.domains import at_step
from normlab.family.evo import (
    Evolved,
    evo_b0_norm,
    evo_b0_parts,
    evo_s0_norm,
    evo_s0_parts,
    evo_s1_norm,
    evo_s1_parts,
    evo_s2_norm,
    evo_s2_parts,
)
from normlab.family.lengths import scale_norm, scale_parts
from normlab.family.mixtures import clip_gates
from normlab.family.pointwise import (
    Dynamic,
    Phi,
    derf_norm,
    derf_parts,
    dyisru_norm,
    dyisru_parts,
    dyt_norm,
    dyt_parts,
    pointwise_norm,
    pointwise_parts,
)
from normlab.family.response import (
    Rescaled,
    Response,
    frn_norm,
    frn_parts,
    grn_norm,
    grn_parts,
    seed_norm,
    seed_parts,
    tlu,
)
from normlab.family.spectral import Spectral, init_spectral, spectral_norm, spectral_parts
from normlab.weight import centred_weight, centred_weight_parts

__all__ = [
    "Dynamic",
    "Evolved",
    "Phi",
    "Rescaled",
    "Response",
    "Spectral",
    "at_step",
    "centred_weight",
    "centred_weight_parts",
    "clip_gates",
    "derf_norm",
    "derf_parts",
    "dyisru_norm",
    "dyisru_parts",
    "dyt_norm",
    "dyt_parts",
    "evo_b0_norm",
    "evo_b0_parts",
    "evo_s0_norm",
    "evo_s0_parts",
    "evo_s1_norm",
    "evo_s1_parts",
    "evo_s2_norm",
    "evo_s2_parts",
    "frn_norm",
    "frn_parts",
    "grn_norm",
    "grn_parts",
    "init_spectral",
    "pointwise_norm",
    "pointwise_parts",
    "scale_norm",
    "scale_parts",
    "seed_norm",
    "seed_parts",
    "spectral_norm",
    "spectral_parts",
    "tlu",
]
