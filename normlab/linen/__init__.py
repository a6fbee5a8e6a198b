"""The norms as `flax.linen` modules: change the import, keep the model and its checkpoints.

The arguments, their order and defaults, the names of variables and collections are those of the
modules of the same name in `flax.linen`, and so are the numbers, except where those are wrong:
`docs/flax.md` has the list. `BatchNorm` has one argument more, `population`. Every norm takes
`use_running_average` at call time, so that one can stand where another stood; only `BatchNorm`
looks at it.
"""

import normlab._flax.installed  # noqa: F401
from normlab.linen.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normlab.linen.replace import RegistryNorm, Swapped, swap
from normlab.linen.residual import Residual
from normlab.linen.transactions import commit, settle
from normlab.linen.weights import (
    CosineConv,
    CosineDense,
    RegistryWeights,
    SpectralNorm,
    WeightNorm,
)

__all__ = [
    "BatchNorm",
    "CosineConv",
    "CosineDense",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "RegistryNorm",
    "RegistryWeights",
    "Residual",
    "SpectralNorm",
    "Swapped",
    "WeightNorm",
    "commit",
    "settle",
    "swap",
]
