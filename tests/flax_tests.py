"""A plugin of pytest that puts these norms in the place of Flax's, for Flax's own tests.

    git clone https://github.com/google/flax   # and the tag of the flax that is installed
    python -m pytest -p tests.flax_tests flax/tests/linen/linen_test.py \
        flax/tests/nnx/nn/normalization_test.py
"""

import sys

import flax.linen
import flax.nnx

import normlab.linen
import normlab.nnx

NORMS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "WeightNorm")

for flaxs, ours in ((flax.linen, normlab.linen), (flax.nnx, normlab.nnx)):
    swaps = {getattr(flaxs, name): getattr(ours, name) for name in NORMS}
    for module in [m for name, m in sys.modules.items() if name.startswith(flaxs.__name__)]:
        for name in NORMS:
            if getattr(module, name, None) in swaps:
                setattr(module, name, getattr(ours, name))
