"""What `normlab.linen` and `normlab.nnx` share: Flax's arguments in the library's terms.

A module of either measures with a function of this library, and applies what was measured with
`affine`. Here is how Flax says it: by axes instead of by the name of a norm, with a mask instead of
weights, with the type of the result apart from that of the input. Nothing here imports flax.
"""

from normlab._flax.calls import (
    Axes,
    Call,
    algorithm,
    apply,
    check_features,
    feature_shape,
    make_call,
    sync,
    together,
    weights,
)
from normlab._flax.layers import (
    check_weight_epsilon,
    convolution,
    cosine,
    from_registry,
    group_inputs,
    normalized_kernel,
)
from normlab._flax.measure import batch, example, group, groups_of, instance
from normlab._flax.state import (
    average,
    check_momentum,
    check_whole,
    has_average,
    is_training,
    population,
)
from normlab._flax.words import checked, read

__all__ = [
    "Axes",
    "Call",
    "algorithm",
    "apply",
    "average",
    "batch",
    "check_features",
    "check_momentum",
    "check_weight_epsilon",
    "check_whole",
    "checked",
    "convolution",
    "cosine",
    "example",
    "feature_shape",
    "from_registry",
    "group",
    "group_inputs",
    "groups_of",
    "has_average",
    "instance",
    "is_training",
    "make_call",
    "normalized_kernel",
    "population",
    "read",
    "sync",
    "together",
    "weights",
]
