"""The norms as `flax.nnx` modules: change the import, keep the model and its checkpoints.

The arguments, their defaults, the names of attributes and the kinds of variables are those of the
modules of the same name in `flax.nnx`, and so are the numbers, except where those are wrong:
`docs/flax.md` has the list. `BatchNorm` has one argument more, `population`. Every norm takes
`use_running_average` at call time, so that one can stand where another stood; only `BatchNorm`
looks at it.
"""

import normlab._flax.installed  # noqa: F401
from normlab.nnx.norms import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from normlab.nnx.replace import RegistryNorm, swap
from normlab.nnx.residual import Residual
from normlab.nnx.transactions import Transaction, begin, commit, settle
from normlab.nnx.weights import (
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
    "Transaction",
    "WeightNorm",
    "begin",
    "commit",
    "settle",
    "swap",
]
