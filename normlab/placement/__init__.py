"""Where norms stand in a net: one connection as a value, and the named schemes."""

from normlab.placement.line import Learned, Placement, Residual, init_residual, residual

__all__ = ["Learned", "Placement", "Residual", "init_residual", "residual"]
