"""Instruments: what can be measured in a training loop, as pure functions.

Each takes arrays or pytrees and returns arrays or NamedTuples of them, so that it runs under `jit`
and, over seeds, under `vmap`; `equivalence` alone makes and runs programs of its own. Activations
have their channels last, `[N, ..., C]`.
"""

from normlab.instruments.activations import (
    Gaussianity,
    cancellation,
    dead_units,
    gaussianity,
    percentiles,
    saturation,
)
from normlab.instruments.agreement import Equivalence, equivalence
from normlab.instruments.curvature import AlongStep, HessianMax, along_step, hessian_max
from normlab.instruments.gradients import (
    Backward,
    CovariateShift,
    covariate_shift,
    gradient_norms,
    tap,
    tapped,
)
from normlab.instruments.shards import Drift, drift
from normlab.instruments.weights import angular_update, effective_lr
from normlab.instruments.whiteness import (
    Whitening,
    condition_number,
    correlations,
    distance_to_uncorrelated,
    distance_to_white,
    whiten,
    whitening,
)

__all__ = [
    "AlongStep",
    "Backward",
    "CovariateShift",
    "Drift",
    "Equivalence",
    "Gaussianity",
    "HessianMax",
    "Whitening",
    "along_step",
    "angular_update",
    "cancellation",
    "condition_number",
    "correlations",
    "covariate_shift",
    "dead_units",
    "distance_to_uncorrelated",
    "distance_to_white",
    "drift",
    "effective_lr",
    "equivalence",
    "gaussianity",
    "gradient_norms",
    "hessian_max",
    "percentiles",
    "saturation",
    "tap",
    "tapped",
    "whiten",
    "whitening",
]
