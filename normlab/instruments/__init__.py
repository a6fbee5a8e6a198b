"""Instruments: what can be measured in a training loop, as pure functions.

Each takes arrays or pytrees and returns arrays or NamedTuples of them, so that it runs under `jit`
and, over seeds, under `vmap`; `equivalence` makes and runs programs of its own, and `ledger` reads
one. Activations have their channels last, `[N, ..., C]`.
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
from normlab.instruments.attention import (
    AttentionStatistics,
    LogitSize,
    attention_entropy,
    attention_logits,
    attention_statistics,
    logit_size,
)
from normlab.instruments.collectives import Collective
from normlab.instruments.curvature import AlongStep, HessianMax, along_step, hessian_max
from normlab.instruments.depth import (
    ByBlock,
    DepthSlope,
    block_lr,
    block_norms,
    by_block,
    depth_slope,
    update_ratio,
)
from normlab.instruments.gradients import (
    Backward,
    CovariateShift,
    covariate_shift,
    gradient_norms,
    tap,
    tapped,
)
from normlab.instruments.programs import Ledger, ledger
from normlab.instruments.shards import Drift, drift
from normlab.instruments.streams import (
    MassiveActivations,
    StreamStatistics,
    effective_rank,
    massive_activations,
    rank_residual,
    stable_rank,
    stream_statistics,
    token_cosine,
)
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
    "AttentionStatistics",
    "Backward",
    "ByBlock",
    "Collective",
    "CovariateShift",
    "DepthSlope",
    "Drift",
    "Equivalence",
    "Gaussianity",
    "HessianMax",
    "Ledger",
    "LogitSize",
    "MassiveActivations",
    "StreamStatistics",
    "Whitening",
    "along_step",
    "angular_update",
    "attention_entropy",
    "attention_logits",
    "attention_statistics",
    "block_lr",
    "block_norms",
    "by_block",
    "cancellation",
    "condition_number",
    "correlations",
    "covariate_shift",
    "dead_units",
    "depth_slope",
    "distance_to_uncorrelated",
    "distance_to_white",
    "drift",
    "effective_lr",
    "effective_rank",
    "equivalence",
    "gaussianity",
    "gradient_norms",
    "hessian_max",
    "ledger",
    "logit_size",
    "massive_activations",
    "percentiles",
    "rank_residual",
    "saturation",
    "stable_rank",
    "stream_statistics",
    "tap",
    "tapped",
    "token_cosine",
    "update_ratio",
    "whiten",
    "whitening",
]
