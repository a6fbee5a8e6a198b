"""Eight devices on one CPU, cheap programs that are kept, no implicit promotion, for every test."""

import contextlib
import gc
import hashlib
import os
import platform
import shutil
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path

# What makes tests slow is XLA, so it optimizes nothing here. With NORMLAB_TESTS_OPTIMIZED=1 the
# programs are those of a user, as in the nightly run. XLA reads its flags once, when jax is
# imported; those that are set already stay.
_FLAGS = {
    "xla_force_host_platform_device_count": "8",
    "xla_cpu_parallel_codegen_split_count": "1",  # there are as many workers as cores
}
if not os.environ.get("NORMLAB_TESTS_OPTIMIZED"):
    _FLAGS["xla_backend_optimization_level"] = "0"
if version("jax").startswith("0.10."):
    _FLAGS["xla_cpu_use_fusion_emitters"] = "false"  # later versions have no such flag
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join(
    [_GIVEN, *(f"--{flag}={value}" for flag, value in _FLAGS.items() if flag not in _GIVEN)]
).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _cache() -> Path:
    """Where compiled programs are kept: they fit one jaxlib, one Python and one kind of CPU."""
    try:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line]
    except OSError:
        cpu = [platform.processor()]
    of = f"{version('jaxlib')} {sys.version} {platform.machine()} {cpu[:1]}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "normlab-tests" / hashlib.sha256(of.encode()).hexdigest()[:16]


# Workers, and the processes that tests start, share them through the environment.
with contextlib.suppress(OSError):
    _cache().mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_cache()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

from normlab import registry  # noqa: E402

jax.devices()  # made here, before a test asks for another number of them
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=30, deadline=None)
hypothesis.settings.load_profile("fixed")


def pytest_configure(config):
    """Lets Ctrl-C through, and keeps the programs of years of changes from filling a disk."""
    here = threading.current_thread() is threading.main_thread()
    # A shell has what runs behind it (&) ignore Ctrl-C, and what a test starts would inherit that.
    if here and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    coordinates = not hasattr(config, "workerinput")
    if coordinates and _cache().is_dir() and len(os.listdir(_cache())) > 200_000:
        shutil.rmtree(_cache(), ignore_errors=True)


def pytest_collection_finish():
    """Tracing makes millions of objects that are freed by themselves; the collector looks less."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)


@pytest.fixture(scope="module", autouse=True)
def forget():
    """Forgets the programs of a module: the collector would go over all of them again and again."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def as_registered():
    """Forgets the norms that a test, or an example of the documents, registered."""
    before = dict(registry._ROWS)
    yield
    registry._ROWS.clear()
    registry._ROWS.update(before)


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
