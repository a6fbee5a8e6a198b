"""What a package does that needs another one which is not installed."""

import subprocess
import sys

import pytest

WITHOUT = """
import sys
sys.modules["flax"] = None
import normlab
from normlab import convert, folding, instruments
try:
    import normlab.{name}
except ImportError as error:
    print(error)
try:
    normlab.{name}
except AttributeError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["linen", "nnx"])
def test_the_modules_say_how_to_install_flax(name):
    run = [sys.executable, "-c", WITHOUT.format(name=name)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    how, where = done.stdout.splitlines()
    assert "pip install 'normlab[flax]'" in how
    assert where == f"module 'normlab' has no attribute '{name}': import normlab.{name}"
