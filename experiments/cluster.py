"""A Ray cluster: its workers run generators, and what they yield comes home as it is made.

A worker or a node that dies costs what it was doing, which is begun again elsewhere. The code goes
to the nodes with the work, so that they need the packages alone, of the same versions as here.

Nothing of Ray is imported before it is used, and nothing of JAX at all: a worker has its variables
and its core before JAX starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import itertools
import logging
import os
import platform
import re
import shutil
import site
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .rundir import RunError
from .terminal import counted

LOCAL = "local"
"""The address of a Ray that is started for one command, on this machine."""

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # every line: the end says what there is to say
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_WORKER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
"""Ray without telemetry and logs of its own, and with an eye on its workers."""

PATIENCE = 7.0
"""Seconds within which a cluster that is there answers; loading Ray takes another."""

AWAY = 20.0
"""Seconds within which the head of a cluster that was started again answers."""

ROLL_CALL = 120.0
"""Seconds within which each of its nodes unpacks the code and says what it has."""

RETRIES = 3
"""How often what was lost with a worker or a node is begun again."""

ALLOCATION = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""Environment of the workers: memory that was freed is used again, and not given back first."""

ALONE = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
"""Environment of a worker with one core: the libraries under NumPy and SciPy count all of them."""

PREFIX = "normlab-cluster-"
"""Of the folders that are there while a command runs."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy")
"""Those whose versions must be alike."""

SENT = ("JAX_", "XLA_")
"""How the variables begin that numbers depend on: on all nodes they are as here."""

HERE = __name__.rpartition(".")[0]


def spelled(arguments: Sequence[str]) -> list[str]:
    """The arguments with an address after each `--ray`; it may be left out.

    >>> spelled(["--ray", "initialization", "--again"])
    ['--ray', 'local', 'initialization', '--again']
    """
    found: list[str] = []
    for this, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        found.append(this)
        named = not after.startswith("-") and {":", "."} & {*after}  # as a question is not
        if this == "--ray" and after not in ("auto", LOCAL) and not named:
            found.append(LOCAL)
    return found


def require_address(address: str | None) -> None:
    """Raises RunError for what is no address of a cluster, before anything is done."""
    if address is None or address in ("auto", LOCAL):
        return
    if "://" in address:
        raise RunError(
            f"--ray: got {address}; the Ray Client behind it hears of nothing before all is done. "
            "Run this command on a machine of the cluster, with --ray auto."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise RunError(
            f"--ray: got {address}; it must be HOST:PORT as `ray start --head` prints it, auto for "
            "the cluster of this machine, or left out for a Ray of its own."
        )


def imported(module: str) -> Any:
    """Ray, or a part of it; raises RunError if it is not installed."""
    os.environ.update(QUIET)  # Ray reads them when it is imported
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RunError(
            f"Ray is not installed ({error}). To install it: pip install 'normlab[launch]'"
        ) from None


def connect(address: str | None, option: str, env: dict[str, Any], **local: Any) -> None:
    """Starts Ray on this machine, or joins a cluster; Ray's own words are kept from the terminal.

    Args:
      address: As `ray.init` takes it; `None` or `LOCAL` starts one.
      option: By which option the address was given.
      env: The runtime environment of the workers.
      **local: What `ray.init` is told beside where one is started.

    Raises:
      RunError: If Ray is not installed, or does not answer within `PATIENCE`.
    """
    ray = imported("ray")
    if ray.is_initialized():
        raise RunError("this process has a Ray of its own; call ray.shutdown() first.")
    start = address in (None, LOCAL)
    if not start:
        _reach(str(address), option)
    try:
        with warnings.catch_warnings():  # JAX's, of a fork: what Ray forks is another program
            warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
            ray.init(
                address=address or LOCAL,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=env,
                **({"include_dashboard": False, **local} if start else {}),
            )
    except Exception as error:  # Ray raises what it likes
        raise _silent(address, option, gist(error)) from error


def _last(text: str) -> str:
    """The line of what a program said that names its error."""
    lines = [line.strip().rstrip(".") for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "mismatch" in line]
    return next(iter([*named, *lines[-1:]]), "it failed")[:300]


def _silent(address: str | None, option: str, why: str) -> RunError:
    if address in (None, LOCAL):
        return RunError(f"Ray on this machine does not start: {why}.")
    return RunError(
        f"no Ray cluster answers at {option} {address}: {why}. Is it running (`ray status`), and "
        "is this machine one of it? `ray start --head` starts one and prints its address, "
        "`ray start --address HOST:PORT` adds a machine. Ray and Python must be of one version on "
        f"all of them; here they are {importlib.metadata.version('ray')} and "
        f"{platform.python_version()}."
    )


PROBE = """
import logging, sys, ray
print(flush=True)
ray.init(sys.argv[1], log_to_driver=False, logging_level=logging.ERROR)
"""
"""A program that joins a cluster and leaves; it says when it begins."""


def _reach(address: str, option: str) -> None:
    """Raises RunError if nobody answers: Ray itself would try for minutes, and end the process."""
    try:
        if address != "auto":
            host, _, port = address.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except (OSError, ValueError) as error:
        raise _silent(address, option, gist(error)) from None
    with subprocess.Popen(
        [sys.executable, "-c", PROBE, address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()  # loading Ray takes what it takes
            _, said = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            words = re.findall(r"^\[.*?\] \S+: (.*)", process.communicate()[1], re.MULTILINE)
            why = "; ".join([f"nothing came within {PATIENCE:g} s", *words[-1:]])
            raise _silent(address, option, why[:300].rstrip(".")) from None
        finally:
            process.kill()
    if process.returncode:
        raise _silent(address, option, _last(said))


def gist(error: BaseException) -> str:
    """The first line of an error, without the dot."""
    lines = str(error).strip().splitlines()
    return f"{lines[0].rstrip('.')[:300]}" if lines else type(error).__name__


def pin() -> None:
    """Gives this process one core, of those that the fewest others have, where a system can.

    XLA then sees one core, if it has not started yet. The core is taken by the name of a socket,
    which goes with the process, however it ends.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    for lap, core in itertools.product(range(64), cores):
        place = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            place.bind(f"\0normlab-core-{core}-{lap}")
        except OSError:
            place.close()
            continue
        _PLACES.append(place)
        os.sched_setaffinity(0, {core})
        return
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


_PLACES: list[socket.socket] = []


class Call(NamedTuple):
    """What a worker is to run.

    Attributes:
      function: A generator function, "module:name". What it yields must be picklable.
      arguments: Makes what it is given, anew each time that it is begun.
      devices: How many devices its process needs: as many GPUs, or all made of one core.
      cores: How many cores XLA is to believe that it has; `None` for the one that it has.
    """

    function: str
    arguments: Callable[[], Sequence[Any]]
    devices: int = 1
    cores: int | None = None


class Place(NamedTuple):
    """Where a call runs."""

    host: str
    process: int

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}"


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of a call.

    Attributes:
      error: Why it was given up, if it was.
    """

    error: str = ""


class Cluster:
    """A Ray cluster for as long as the `with` statement lasts.

    Args:
      address: As `ray.init` takes it, or `LOCAL`.
      jobs: How many calls at a time, at most; by default as many as there are cores or GPUs.
      say: Receives where it stands.
      warn: Receives what went wrong and was mended.

    Raises:
      RunError: If it does not answer.
    """

    def __init__(
        self,
        address: str,
        *,
        jobs: int | None = None,
        say: Callable[[str], None] = lambda text: None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.address, self.jobs, self.say, self.warn = address, jobs, say, warn
        self.devices = 0
        """GPUs of the node that has most of them; 0 where conditions are measured on cores."""
        self._running: dict[Any, int] = {}
        self._folder: Path | None = None
        self._own: Path | None = None
        self._head = ""
        self._ray: Any = None

    def __enter__(self) -> Cluster:
        """Connects and sends the code."""
        self.say("starting Ray" if self.address == LOCAL else f"connecting to {self.address}")
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX))
            _copy(self._folder / "code")
            local: dict[str, Any] = {"num_cpus": self.jobs or len(cores)}
            if self.address == LOCAL:  # sockets have short names, which not every TMPDIR leaves
                self._own = Path(tempfile.mkdtemp(prefix=PREFIX, dir="/tmp"))
                local["_temp_dir"] = str(self._own)
            connect(self.address, "--ray", {"working_dir": str(self._folder / "code")}, **local)
            self._ray = imported("ray")
            self._head = self._ray.get_runtime_context().gcs_address
        except OSError as error:
            self.__exit__()
            raise RunError(
                f"cannot send the code to the nodes: {error.strerror or error}. It goes by way of "
                f"{tempfile.gettempdir()}; TMPDIR names another directory."
            ) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the cluster, which ends what it still does for this process."""
        if self._ray is not None:
            self._ray.shutdown()
        for folder in filter(None, (self._folder, self._own)):
            shutil.rmtree(folder, ignore_errors=True)

    def share(self, value: Any) -> Any:
        """Puts a value where each node fetches it once, for all of its workers."""
        ray = self._ray
        try:
            return ray.put(value)
        except (ray.exceptions.RayError, OSError) as error:
            raise RunError(
                f"the data do not fit into Ray's object store on this machine: {gist(error)}. Give "
                "it more (`ray start --object-store-memory`), or free some space on its disk."
            ) from error

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Runs calls; returns what yields the number of one and what it yielded, at last `Ended`.

        What was lost with a worker or a node is begun again, up to `RETRIES` times.

        Raises:
          RunError: At once, if a node has other versions than this process.
        """
        self._call_the_roll(calls)
        return self._follow(calls)

    def _follow(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        ray = self._ray
        waiting, losses = deque(range(len(calls))), Counter()
        places: dict[int, Place] = {}
        while waiting or self._running:
            while waiting and (not self.jobs or len(self._running) < self.jobs):
                number = waiting.popleft()
                places.pop(number, None)
                self._running[self._start(calls[number])] = number
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=1.0)
            if not ready:
                self._require_head()
            for generator in ready:
                number, end = self._running[generator], None
                try:
                    found = ray.get(next(generator))
                except StopIteration:
                    end = Ended()
                except ray.exceptions.RayTaskError as error:  # what it does not catch itself
                    end = Ended(_said(error.cause))
                except ray.exceptions.RayError as error:
                    self._require_head()
                    why = _lost(error, places.get(number))
                    losses[number] += 1
                    if losses[number] > RETRIES:
                        end = Ended(f"it was begun {losses[number]} times. At last: {why}")
                    else:
                        self.warn(f"{why} Begun again.")
                        waiting.append(number)
                        del self._running[generator]
                else:
                    if isinstance(found, Place):
                        places[number] = found
                    else:
                        yield number, found
                if end is not None:
                    self._running.pop(generator, None)
                    yield number, end

    def _require_head(self) -> None:
        """Raises RunError if the head is gone: after a minute without it Ray ends the process."""
        host, _, port = self._head.rpartition(":")
        end, why = time.monotonic() + AWAY, ""
        while time.monotonic() < end:
            try:
                socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
            except OSError as error:
                why = gist(error)
                time.sleep(1)
            else:
                return
        raise RunError(
            f"the head of the Ray cluster is gone ({self._head}: {why}). What was measured is "
            "kept, and the same command goes on from there, once it is back."
        )

    def drop(self, number: int) -> None:
        """Stops a call; nothing more is heard of it, not even its end."""
        ray = self._ray
        for generator in [g for g, n in self._running.items() if n == number]:
            del self._running[generator]
            ray.cancel(generator, force=True)

    def _start(self, call: Call) -> Any:
        ray = self._ray
        needs: dict[str, Any] = {"num_cpus": 1}
        if self.devices:
            needs["num_gpus"] = min(call.devices, self.devices)
        task = ray.remote(_run).options(
            num_returns="streaming",
            max_retries=0,  # begun again they would repeat what has come home
            runtime_env=self._environment(call.devices, call.cores),
            **needs,
        )
        return task.remote(self._variables(), not self.devices, call.function, *call.arguments())

    def _environment(self, devices: int, cores: int | None) -> dict[str, Any]:
        """The environment of a worker; Ray gives calls one process only if theirs are alike."""
        env = {**ALLOCATION, "NORMLAB_DEVICES": str(devices)}  # JAX makes its devices once
        if not self.devices:
            env |= ALONE | ({"NPROC": str(cores)} if cores else {})
        return {"env_vars": env | self._variables()}

    def _variables(self) -> dict[str, str]:
        found = {k: v for k, v in os.environ.items() if k.startswith(SENT)}
        return found if self.devices else {"JAX_PLATFORMS": "cpu", **found}

    def _call_the_roll(self, calls: Sequence[Call]) -> None:
        """Raises RunError, by name, for nodes that are not as this process is."""
        ray = self._ray
        strategies = imported("ray.util.scheduling_strategies")
        nodes = [node for node in ray.nodes() if node["Alive"]]
        wanted = os.environ.get("JAX_PLATFORMS", "")
        if not wanted or "cuda" in wanted or "gpu" in wanted or "rocm" in wanted:
            self.devices = int(max((n["Resources"].get("GPU", 0) for n in nodes), default=0))
        kind = "GPU" if self.devices else "CPU"
        nodes = [node for node in nodes if node["Resources"].get(kind, 0) >= 1]
        if not nodes:
            raise RunError("no node of the cluster has a core to measure with (`ray status`).")
        self.say(f"asking {counted(len(nodes), 'node')} for their versions")
        task, asked = ray.remote(_present), {}
        modules = sorted({call.function.partition(":")[0] for call in calls})
        env = self._environment(calls[0].devices, calls[0].cores)  # a process that is used again
        for node in nodes:
            there = strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            one = task.options(
                num_cpus=0, max_retries=0, scheduling_strategy=there, runtime_env=env
            )
            asked[one.remote(self._variables(), not self.devices, modules)] = node
        answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=ROLL_CALL)
        assert self._folder is not None
        code = self._folder / "code"  # what was sent, whatever is edited meanwhile
        here = _versions({name: code.joinpath(*name.split(".")) for name in _roots()})
        wrong = []
        for answer, node in asked.items():
            if answer not in answered:
                found = f"did not answer within {ROLL_CALL:g} s"
            else:
                try:
                    found = _differences(here, ray.get(answer))
                except ray.exceptions.RayTaskError as error:
                    found = f"fails: {_said(error.cause)}"
                except (ray.exceptions.NodeDiedError, ray.exceptions.TaskUnschedulableError):
                    continue  # it is gone
                except ray.exceptions.RayError as error:
                    found = f"cannot work: {_lines(error)}"
            if found:
                wrong.append(f"node {node['NodeManagerAddress']} ({node['NodeID'][:8]}) {found}")
        if wrong:
            raise RunError(
                f"nothing was measured: {'; '.join(wrong)}. Numbers are comparable where the "
                "versions are: install those of this machine there, or take these nodes out of the "
                "cluster (`ray stop` on them)."
            )
        slots = sum(int(node["Resources"][kind]) for node in nodes)
        self.say(f"{counted(len(nodes), 'node')}, {counted(slots, kind)}")


def _said(error: BaseException) -> str:
    """What an error of a call says."""
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {gist(error)}"


def _lost(error: BaseException, place: Place | None) -> str:
    """In words, why a call was lost."""
    ray = imported("ray.exceptions")
    where = f" ({place})" if place else ""
    if isinstance(error, ray.OutOfMemoryError):
        return f"A worker was killed because the memory of its node ran out{where}."
    if isinstance(error, ray.NodeDiedError):
        return f"A node is gone{where}."
    if isinstance(error, ray.WorkerCrashedError):
        return f"A worker was killed, or died without a word{where}."
    return f"A worker was lost{where}: {_lines(error)}."


def _lines(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__


def _copy(folder: Path) -> None:
    """Copies the code that the nodes may not have: this library, and modules of the user's own."""
    for name, path in _own().items():
        place = folder.joinpath(*name.split("."))
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.copytree(path, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, place.with_suffix(path.suffix))


def _own() -> dict[str, Path]:
    """The packages and modules that are loaded here and not installed, and these two."""
    found = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), "")
        if "." in name or name == "__main__" or not file or not Path(file).exists():
            continue
        path = Path(file).resolve()
        if not installed(path):
            found[name] = path.parent if path.name == "__init__.py" else path
    return found | {name: path.resolve() for name, path in _roots().items()}


def installed(path: Path) -> bool:
    """Whether a file is one of Python or of a package that is installed."""
    folders = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
    folders.append(site.getusersitepackages())
    packages = {"site-packages", "dist-packages"} & set(path.parts)
    return bool(packages) or any(path.is_relative_to(Path(f).resolve()) for f in folders if f)


def _roots() -> dict[str, Path]:
    spec = importlib.util.find_spec("normlab")
    assert spec is not None
    assert spec.origin is not None
    library = {"normlab": Path(spec.origin).parent}
    return library if HERE.startswith("normlab.") else {**library, HERE: Path(__file__).parent}


def _versions(roots: Mapping[str, Path]) -> dict[str, str | None]:
    """What must be the same here and on the nodes; of the sources at these places a checksum."""
    found: dict[str, str | None] = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in PACKAGES:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    for name, root in roots.items():
        total = hashlib.sha256()
        for path in sorted(root.rglob("*.py")):
            total.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
        found[name] = f"of checksum {total.hexdigest()[:12]}"
    return found


def _differences(here: dict[str, str | None], there: dict[str, str | None]) -> str:
    """What is not alike, in words.

    >>> _differences({"jax": "0.10.2", "flax": "0.12.8"}, {"jax": "0.9.0", "flax": None})
    'has jax 0.9.0 (here 0.10.2) and no flax (here 0.12.8)'
    """
    wrong = [
        f"{name} {there.get(name)} (here {version or 'none'})"
        if there.get(name)
        else f"no {name} (here {version})"
        for name, version in here.items()
        if there.get(name) != version
    ]
    return f"has {' and '.join(wrong)}" if wrong else ""


def _present(
    variables: dict[str, str], alone: bool, modules: Sequence[str]
) -> dict[str, str | None]:
    """What a node has, if it can import these."""
    _begin(variables, alone)
    for module in modules:
        importlib.import_module(module)
    return _versions(_roots())


def _begin(variables: dict[str, str], alone: bool) -> None:
    """What a worker does first, before JAX starts."""
    for name in [n for n in os.environ if n.startswith(SENT) and n not in variables]:
        del os.environ[name]  # the node's own
    if alone and not _PLACES:
        pin()


def _run(variables: dict[str, str], alone: bool, function: str, *arguments: Any) -> Iterator[Any]:
    """What a worker does.

    Args:
      variables: All variables of `SENT` that it may have.
      alone: Whether it has one core to itself.
      function: As in `Call`.
      *arguments: Of the function.
    """
    yield Place(platform.node(), os.getpid())
    _begin(variables, alone)
    module, _, name = function.partition(":")
    # `yield from` would hand on what Ray sends, which not every iterator takes.
    for made in getattr(importlib.import_module(module), name)(*arguments):  # noqa: UP028
        yield made
