"""Eight devices on one CPU, and no implicit dtype promotion, for every test."""

import gc
import os
from importlib.metadata import version

# Before jax is imported: it reads these once.
_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    # Each worker compiles on one thread: there are as many workers as cores.
    _FLAGS = f"{_FLAG}=8 --xla_cpu_parallel_codegen_split_count=1"
    if version("jax").startswith("0.10."):
        # Compiles faster, and the tests do little else. Later versions have no such flag.
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.devices()  # made here, before a test asks for another number of them
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=30, deadline=None)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Forgets the programs of a module: the collector would go over all of them again and again."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """Either precision; float64 with x64 switched on."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param
