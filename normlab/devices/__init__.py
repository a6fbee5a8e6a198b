"""Statistics and gradients across devices: which are merged, and how."""

from normlab.devices.gradients import global_gradient, global_mean
from normlab.devices.merging import all_reduce
from normlab.devices.topology import AxisName, Gradient, Sync, ring

__all__ = [
    "AxisName",
    "Gradient",
    "Sync",
    "all_reduce",
    "global_gradient",
    "global_mean",
    "ring",
]
