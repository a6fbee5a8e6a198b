"""Statistics and gradients across devices: which are merged, and how."""

from normlab.devices.gradients import global_gradient, global_mean
from normlab.devices.topology import AxisName, Gradient, Second, Sync, ring
from normlab.devices.whole import all_reduce

__all__ = [
    "AxisName",
    "Gradient",
    "Second",
    "Sync",
    "all_reduce",
    "global_gradient",
    "global_mean",
    "ring",
]
