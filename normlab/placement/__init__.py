"""Where norms stand in a net: one connection as a value, and the named schemes."""

from normlab.placement.line import Learned, Placement, Residual, init_residual, residual
from normlab.placement.schemes import PLACES, Branch, Scheme, names, scale_init, scheme
from normlab.placement.variance import stream_variance

__all__ = [
    "PLACES",
    "Branch",
    "Learned",
    "Placement",
    "Residual",
    "Scheme",
    "init_residual",
    "names",
    "residual",
    "scale_init",
    "scheme",
    "stream_variance",
]
