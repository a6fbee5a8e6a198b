"""Where norms stand in a net: a connection as a value, of one stream or several, and schemes."""

from normlab.placement.line import (
    Connection,
    Learned,
    Placement,
    Residual,
    init_residual,
    residual,
)
from normlab.placement.schemes import PLACES, Branch, Scheme, names, scale_init, scheme
from normlab.placement.streams import (
    HyperConnection,
    Mixing,
    Siamese,
    enter,
    leave,
    sinkhorn,
)
from normlab.placement.variance import stream_variance

__all__ = [
    "PLACES",
    "Branch",
    "Connection",
    "HyperConnection",
    "Learned",
    "Mixing",
    "Placement",
    "Residual",
    "Scheme",
    "Siamese",
    "enter",
    "init_residual",
    "leave",
    "names",
    "residual",
    "scale_init",
    "scheme",
    "sinkhorn",
    "stream_variance",
]
