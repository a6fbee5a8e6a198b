"""Real data sets as arrays in memory, prepared by TensorFlow Datasets without TensorFlow.

    data = load("mnist")
    data.train_inputs.shape  # (60000, 28, 28, 1)
    data = load("gutenberg", reading=Reading(context=128))
    data.train_inputs.shape  # (82478, 128)
    data = load("mypackage.module:load")  # what a function of your own returns

A set is prepared once, beneath the data directory, and read from there afterwards. What is read
always has the checksum pinned here, wherever its files came from: the official download, or a
package that holds the same files (see `experiments.data.prepare`).
"""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import platformdirs

from normlab.errors import invalid

from ..rundir import CHECKOUT
from . import markov, prepare, text
from . import packages as fetch
from .prepare import DataError
from .text import Reading, Text, Unit

__all__ = ["NAMES", "TEXTS", "DataError", "Dataset", "Reading", "Text", "Unit", "load"]

TEXTS = text.NAMES
NAMES = ("mnist", "fashion_mnist", "cifar10", "digits", *TEXTS)
CHECKSUMS = {  # of the arrays, in the order in which TFDS stores them
    "mnist": "ea7b9992673149de1a93d4593c0bba97fc7aad7377b67f1c88df64d6e5c7a262",
    "fashion_mnist": "9b9ad6db6b5dc835c100c7694c548dc8306e2587a8fe4b37a530ebafb1d996c1",
    "cifar10": "fefd9d34aaf3187d74b5c2051a44435fec2dccc47f621fca70ca6bd935876629",
    "tiny_shakespeare": "88679be9e9994ad1d261b1237528c9826c79641b6cedb0c3f5d555ea99b61650",
    "gutenberg": "8a645c3cf3e3862f57c2ea84fae8918e8a3ae1aa7a89a3a44f19fe9747526ea0",
}
MEGABYTES = {  # needed while preparing
    **{"mnist": 200, "fashion_mnist": 250, "cifar10": 600},
    **{"tiny_shakespeare": 5, "gutenberg": 60, "lm1b": 8000},
}


class Dataset(NamedTuple):
    """A data set in memory: examples, and the label of each or, of a text, its labels."""

    name: str
    train_inputs: np.ndarray  # uint8 [N, H, W, C]; of a text the ids of tokens, [N, T]
    train_labels: np.ndarray  # int32 [N]; of a text the tokens that follow each, [N, T]
    test_inputs: np.ndarray
    test_labels: np.ndarray
    classes: int  # of a text, the size of the vocabulary
    origin: str  # where the files came from
    checksum: str  # sha256 over what is kept of the set
    text: Text | None = None  # what else there is of a text

    def describe(self) -> dict[str, Any]:
        """What a reader needs to get the same data, as JSON values."""
        told: dict[str, Any] = {"name": self.name, "origin": self.origin, "sha256": self.checksum}
        if self.text is not None:
            told |= {"vocabulary": self.text.vocabulary or self.classes}
            told |= {"bytes_per_token": self.text.bytes_per_token, **self.text.reading._asdict()}
        return told


_HANDED: dict[str, Dataset] = {}
"""What `load` has without reading anything."""


def hand(*sets: Dataset) -> None:
    """Gives `load` these sets in the place of a directory, which another machine may not have."""
    _HANDED.update((data.name, data) for data in sets)


ARRAYS = Dataset._fields[1:5]
Arrays = dict[str, np.ndarray]


def load(
    name: str,
    data_dir: str | Path | None = None,
    *,
    reading: Reading | None = None,
    on_progress: fetch.Say | None = None,
) -> Dataset:
    """Load a data set into memory, preparing it first where it is not there yet.

    Args:
      name: One of `NAMES`, or `"mypackage.module:load"`, a function of your own without arguments
        (see `own`).
      data_dir: Where prepared sets are kept; by default the environment variable
        `NORMLAB_DATA_DIR`, or else `data` of the checkout or, where this package is installed,
        the user's cache directory.
      reading: How a text is read, by default as `Reading()`; images are read in one way.
      on_progress: Receives short messages while the set is fetched and prepared.

    Returns:
      The data set: the same arrays in the same order on every machine.

    Raises:
      DataError: If the name is unknown, or the set cannot be had or is damaged.
    """
    if name not in NAMES and not is_own(name):
        near = difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(
            f"There is no data set {name!r}{hint} There are: {', '.join(NAMES)}; one of your own "
            "is mypackage.module:load."
        )
    data = _HANDED.get(name)
    if data is not None and (data.text is None or data.text.reading == (reading or Reading())):
        return data
    if is_own(name):
        return own(name, reading)
    if name == "digits":
        return _digits()
    if name == "markov":
        arrays = markov.draw()
        return _text(name, arrays, "drawn by a seed", checksum(arrays), reading)
    say = on_progress or (lambda text: None)
    root = Path(data_dir or _place()).expanduser().resolve() / "normlab"
    home = root / name
    if not (home / "manifest.json").is_file():
        try:
            root.mkdir(parents=True, exist_ok=True)
            _prepare(name, home, say)
        except DataError:
            raise
        except Exception as error:
            said = "the disk is full" if fetch.disk_full(error) else f"{error!r}"
            raise DataError(
                f"Preparing {name} failed: {said}. It needs {MEGABYTES[name]} MB in {root}, which "
                "must be writable; --data-dir or NORMLAB_DATA_DIR name another directory."
            ) from error
    arrays, origin, found = _read(name, home, say)
    if name in TEXTS:
        return _text(name, arrays, origin, found, reading)
    return Dataset(name, **arrays, classes=10, origin=origin, checksum=found, text=None)


def _place() -> str | Path:
    if given := os.environ.get("NORMLAB_DATA_DIR"):
        return given
    return CHECKOUT / "data" if CHECKOUT else platformdirs.user_cache_path("normlab") / "data"


def checksum(arrays: Arrays) -> str:
    """Return the sha256 over types, shapes and contents of the arrays, in their order."""
    total = hashlib.sha256()
    for array in arrays.values():
        total.update(f"{array.dtype.str} {array.shape}".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def _text(name: str, arrays: Arrays, origin: str, sha256: str, reading: Reading | None) -> Dataset:
    """Return a text, cut into windows."""
    try:
        halves, classes, more = text.windows(arrays, reading or Reading())
    except ValueError as error:
        raise DataError(f"{name}: {error}. Give a shorter --context.") from None
    return Dataset(name, **halves, classes=classes, origin=origin, checksum=sha256, text=more)


def is_own(name: str) -> bool:
    """Whether a name is the path of a function of one's own, and none of `NAMES`."""
    return ":" in name


def is_kept(name: str) -> bool:
    """Whether a data set is prepared once and kept as files; `data_dir` says where."""
    return name in MEGABYTES


def own(name: str, reading: Reading | None = None) -> Dataset:
    """Loads a data set of one's own.

    The function that `name` names takes no argument. It returns `(train_inputs, train_labels,
    test_inputs, test_labels)`, arrays of NumPy or what becomes one: inputs `[N, ...]`, whole
    numbers (which are shifted and scaled as pixels are, by the mean and the standard deviation of
    the training set) or floats (which a model sees as they are); labels `[N]`, 0 to classes − 1.
    Or it returns a text, as one string: its first 90% are trained on, the next 5% validate, the
    last 5% test.

    Args:
      name: `"mypackage.module:load"`.
      reading: How a text is read.

    Raises:
      DataError: For what cannot be imported, or is no data set.
    """
    from normlab._checks import imported  # which takes JAX

    try:
        made = imported("data", "data set", name)
        if not callable(made):
            raise _no_set(name, f"{type(made).__name__}", "a function without arguments")
        made = made()
        if isinstance(made, str):
            arrays = text.divided([made])
            return _text(name, arrays, "a function of one's own", checksum(arrays), reading)
        if not isinstance(made, tuple | list) or len(made) != len(ARRAYS):
            given = f"{len(made)} values" if isinstance(made, tuple | list) else type(made).__name__
            raise _no_set(name, f"a function that returns {given}", f"({', '.join(ARRAYS)})")
        arrays = _checked(name, dict(zip(ARRAYS, map(np.asarray, made), strict=True)))
    except ValueError as error:
        raise DataError(str(error)) from error
    classes = 1 + int(max(arrays[half].max() for half in ("train_labels", "test_labels")))
    sha256 = checksum(arrays)
    return Dataset(name, **arrays, classes=classes, origin="one's own", checksum=sha256, text=None)


def _no_set(name: str, given: str, expected: str) -> ValueError:
    return invalid(
        f"data set {name}", given, expected, "return what `normlab.experiments.data.own` says"
    )


def _checked(name: str, arrays: Arrays) -> Arrays:
    """The arrays of a data set in the types of a `Dataset`; ValueError for what is none."""
    for half in ("train", "test"):
        inputs, labels = (arrays[f"{half}_{what}"] for what in ("inputs", "labels"))
        said = f"{half}_inputs of {inputs.dtype} {list(inputs.shape)}"
        if inputs.ndim < 2 or not len(inputs) or inputs.dtype.kind not in "uif":
            raise _no_set(name, said, "numbers [N, ...], of one example at least")
        if inputs.dtype.kind == "f" and not np.isfinite(inputs).all():
            raise _no_set(name, f"{half}_inputs with values that are not finite", "finite values")
        if labels.shape != inputs.shape[:1] or labels.dtype.kind not in "ui" or labels.min() < 0:
            given = f"{half}_labels of {labels.dtype} {list(labels.shape)} beside {said}"
            raise _no_set(name, given, f"whole numbers [{len(inputs)}], 0 or more")
        kind = {"f": np.float32}.get(inputs.dtype.kind, np.int32)
        arrays[f"{half}_inputs"] = inputs if inputs.dtype == np.uint8 else inputs.astype(kind)
        arrays[f"{half}_labels"] = labels.astype(np.int32)
    train, test = (arrays[f"{half}_inputs"] for half in ("train", "test"))
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        given = f"examples of {train.dtype} {list(train.shape[1:])} to train on, and of"
        given = f"{given} {test.dtype} {list(test.shape[1:])} to test"
        raise _no_set(name, given, "both alike")
    return arrays


def _digits() -> Dataset:
    """Return scikit-learn's 8×8 digits; the last 360 of the 1797 are the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits come with scikit-learn: pip install scikit-learn") from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = np.rint(pixels.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    split = images[:-360], labels[:-360], images[-360:], labels[-360:]
    sha256 = checksum(dict(zip(ARRAYS, split, strict=True)))
    return Dataset("digits", *split, 10, "scikit-learn load_digits, the last 360 as test", sha256)


def _read(name: str, home: Path, say: fetch.Say) -> tuple[Arrays, str, str]:
    """Read a prepared set: its saved arrays or, where they are damaged, its records.

    Returns the arrays, where they came from, and their checksum: the pinned one.
    """
    cure = f"Remove {home} and run again."
    try:
        manifest = json.loads((home / "manifest.json").read_text())
        origin, noted = manifest["origin"], manifest["checksum"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{home / 'manifest.json'} is damaged: {error!r}. {cure}") from error
    published = CHECKSUMS.get(name) or noted
    arrays: Arrays = {}
    keys = text.SPLITS if name in TEXTS else ARRAYS
    with contextlib.suppress(OSError, ValueError, EOFError):
        arrays = {key: np.load(home / "arrays" / f"{key}.npy") for key in keys}
    if not arrays or checksum(arrays) != published:
        say(f"reading {name} again")
        arrays = _records(name, home, cure, published)
        with contextlib.suppress(OSError):  # a full disk, or one for reading only
            _save(arrays, home / "arrays")
    return arrays, origin, published


def _records(name: str, home: Path, cure: str, published: str | None) -> Arrays:
    """Read what a set was prepared as into arrays, and verify them if a checksum is known."""
    read = prepare.books if name == "gutenberg" else prepare.records
    try:
        arrays = read(name, home)
    except Exception as error:  # TFDS, protobuf and array_record each have their own
        said = fetch.gist(str(error)) or repr(error)
        raise DataError(f"{name} in {home} is damaged or incomplete: {said}. {cure}") from error
    found = checksum(arrays)
    if published and found != published:
        raise DataError(
            f"The prepared data in {home} is not the published {name}: its checksum begins "
            f"{found[:16]}, not {published[:16]}. {cure}"
        )
    return arrays


def _save(arrays: Arrays, folder: Path) -> None:
    """Save arrays as .npy files, each complete or not at all."""
    folder.mkdir(exist_ok=True)
    for key, array in arrays.items():
        part = folder / f".{key}.{os.getpid()}"
        try:
            with part.open("wb") as file:
                np.save(file, array)
            part.replace(folder / f"{key}.npy")
        finally:
            part.unlink(missing_ok=True)


def _prepare(name: str, home: Path, say: fetch.Say) -> None:
    """Prepare a set beside its final place and move it there when it is complete and verified."""
    root = home.parent
    if home.exists() and any(home.iterdir()):
        raise DataError(f"{home} holds something other than a prepared {name}: move it away.")
    if shutil.disk_usage(root).free < MEGABYTES[name] * 1e6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for old in root.glob(".*.tmp"):  # left by a run that was killed, a day ago at least
        with contextlib.suppress(OSError):
            if old.stat().st_mtime < time.time() - 86400:
                shutil.rmtree(old)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", suffix=".tmp", dir=root))
    try:
        done = work / "done"
        done.mkdir()
        make = prepare.fetch_books if name == "gutenberg" else prepare.prepare_records
        origin = make(name, work, done, say)
        say(f"verifying {name}")
        arrays = _records(name, done, "Run again.", CHECKSUMS.get(name))
        _save(arrays, done / "arrays")
        manifest = {"name": name, "origin": origin, "checksum": checksum(arrays)}
        (done / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            done.rename(home)
        except OSError:
            if not (home / "manifest.json").is_file():
                raise
            # Another process was faster, and its set is as good.
    finally:
        shutil.rmtree(work, ignore_errors=True)
