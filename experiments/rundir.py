"""A run directory: what was asked, on what machine, and every measurement as a line of JSON."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

CHECKOUT = next(
    (p for p in Path(__file__).resolve().parents[1:2] if (p / "pyproject.toml").is_file()), None
)
"""The checkout that this package runs from; `None` where it is installed from a wheel."""

PACKAGES = ("normlab", "jax", "jaxlib", "flax", "optax", "numpy", "tensorflow-datasets")
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


Record = dict[str, Any]
"""A measurement: JSON values by name; `None` where one is not finite."""


class RunError(ValueError):
    """A run that cannot start or go on; the text says why and what to do."""


def require_positive(config: Any, *fields: str) -> None:
    """Raises RunError, with the option and its value, for a count below 1 or a duration below 0."""
    for name in fields:
        value = getattr(config, name)
        if not (value >= 1 if isinstance(value, int) else 0 < value < math.inf):
            wanted = "at least 1" if isinstance(value, int) else "positive and finite"
            raise RunError(f"--{name.replace('_', '-')}: got {value}; it must be {wanted}.")


def require(holds: bool, option: str, given: Any, expected: str) -> None:
    """Raises RunError about an option unless something holds."""
    if not holds:
        raise RunError(f"--{option.replace('_', '-')}: got {given}; it must be {expected}.")


def require_effect(config: Any, has: bool, option: str, why: str) -> None:
    """Raises RunError for an option that is not at its default, unless it has an effect."""
    [field] = [field for field in dataclasses.fields(config) if field.name == option]
    given = getattr(config, option)
    if not has and given != field.default:
        raise RunError(
            f"--{option.replace('_', '-')} {words(given)}: it has no effect {why}. Leave it out."
        )


def default_path(name: str) -> Path:
    """Where a run goes that is not told."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return runs() / f"{name.replace(':', '.')}-{now}"


def runs() -> Path:
    """Where runs are kept: $NORMLAB_RUNS_DIR, or `runs` of the checkout or this directory."""
    given = os.environ.get("NORMLAB_RUNS_DIR")
    return Path(given).expanduser() if given else (CHECKOUT or Path()) / "runs"


LOCK = ".lock"
"""The file that the program holds which writes into a run directory."""


class RunDirectory:
    """A directory that belongs to one run.

    Args:
      path: Where; `None` for `<name>-<time>` in `runs`.
      name: What the run is, for the default path.
      again: Whether it may be there already.

    Raises:
      RunError: If the directory exists already or cannot be made.
    """

    def __init__(self, path: Path | None, name: str, *, again: bool = False) -> None:
        self.path = path or default_path(name)
        self._lock: Any = None
        try:
            self.path.mkdir(parents=True, exist_ok=again)
        except FileExistsError:
            raise RunError(
                f"the run directory {self.path} exists already, and a run never writes into "
                "another's. Choose another --run-dir, or remove that one."
            ) from None
        except OSError as error:
            raise RunError(f"cannot make the run directory {self.path}: {error}.") from error

    def lock(self) -> None:
        """Takes the directory for this program; raises RunError if another has it."""
        file = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        self._lock = weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise RunError(
                f"another run is writing into {self.path}. Wait for its end, or choose another "
                "place with --run-dir."
            ) from None

    def release(self) -> None:
        """Gives the directory back."""
        if self._lock is not None:
            self._lock()

    def write_json(self, name: str, content: Any) -> Path:
        """Writes a file of JSON; it appears whole or not at all."""
        return self.write_bytes(name, (json.dumps(content, indent=2) + "\n").encode())

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Writes a file; it appears whole or not at all."""
        path = self.path / name
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise self._failed(name, error) from error
        return path

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Appends lines of JSON and hands them to the system before it returns."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        try:
            with (self.path / name).open("a") as file:
                file.write(lines)
        except OSError as error:
            raise self._failed(name, error) from error

    def _failed(self, name: str, error: OSError) -> RunError:
        return RunError(
            f"cannot write {self.path / name}: {error.strerror or error}. What was written before "
            "is whole. Free some space, or choose another place with --run-dir."
        )


def number(value: Any) -> float | None:
    """A JSON number; null where it is not finite."""
    return float(value) if math.isfinite(value) else None


def packed(flags: np.ndarray) -> str:
    """Flags `[N]` as a string for a record: eight in a byte, in base64; `unpacked` reads them.

    >>> import numpy as np
    >>> packed(np.array([True, False, True]))
    '3:oA=='
    """
    import numpy as np  # which the command line does without

    return f"{len(flags)}:{base64.b64encode(np.packbits(flags).tobytes()).decode()}"


def unpacked(text: str) -> np.ndarray:
    """The flags `[N]` that `packed` made a string of."""
    import numpy as np

    count, _, bits = text.partition(":")
    return np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8), count=int(count)) > 0


def words(value: Any) -> str:
    """An option's value as it is given: the words of several beside one another."""
    return " ".join(map(str, value)) or "nothing" if isinstance(value, list | tuple) else str(value)


def shown(value: float | None) -> str:
    """A number of a record for a reader."""
    return "not finite" if value is None else f"{value:.4f}"


def environment() -> dict[str, Any]:
    """What a reader needs to judge or repeat a measurement."""
    import jax  # which the command line does without

    devices = jax.devices()
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in devices],
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _commit() -> str | None:
    if CHECKOUT is None:
        return None
    command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
