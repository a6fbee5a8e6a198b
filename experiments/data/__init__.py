"""Real data sets as arrays in memory, prepared by TensorFlow Datasets without TensorFlow.

    data = load("mnist")
    data.train_images.shape  # (60000, 28, 28, 1)

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
from typing import NamedTuple

import numpy as np

from . import packages as fetch
from . import prepare
from .prepare import DataError

NAMES = ("mnist", "fashion_mnist", "cifar10", "digits")
CHECKSUMS = {  # of the arrays, in the order in which TFDS stores them
    "mnist": "ea7b9992673149de1a93d4593c0bba97fc7aad7377b67f1c88df64d6e5c7a262",
    "fashion_mnist": "9b9ad6db6b5dc835c100c7694c548dc8306e2587a8fe4b37a530ebafb1d996c1",
    "cifar10": "fefd9d34aaf3187d74b5c2051a44435fec2dccc47f621fca70ca6bd935876629",
}
MEGABYTES = {"mnist": 200, "fashion_mnist": 250, "cifar10": 600}  # needed while preparing


class Dataset(NamedTuple):
    """A data set in memory."""

    name: str
    train_images: np.ndarray  # uint8 [N, H, W, C]
    train_labels: np.ndarray  # int32 [N]
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    origin: str  # where the files came from
    checksum: str  # sha256 over the four arrays


ARRAYS = Dataset._fields[1:5]
Arrays = dict[str, np.ndarray]


def load(
    name: str, data_dir: str | Path | None = None, *, on_progress: fetch.Say | None = None
) -> Dataset:
    """Load a data set into memory, preparing it first where it is not there yet.

    Args:
      name: One of `NAMES`.
      data_dir: Where prepared sets are kept; by default the environment variable
        `NORMLAB_DATA_DIR`, or else the folder `data` of the checkout.
      on_progress: Receives short messages while the set is fetched and prepared.

    Returns:
      The data set: the same arrays in the same order on every machine.

    Raises:
      DataError: If the name is unknown, or the set cannot be had or is damaged.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower().replace("-", "_"), NAMES, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise DataError(f"There is no data set {name!r}{hint} There are: {', '.join(NAMES)}.")
    if name == "digits":
        return _digits()
    say = on_progress or (lambda text: None)
    default = os.environ.get("NORMLAB_DATA_DIR") or Path(__file__).resolve().parents[2] / "data"
    root = Path(data_dir or default).expanduser().resolve() / "normlab"
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
    return _read(name, home, say)


def checksum(arrays: Arrays) -> str:
    """Return the sha256 over types, shapes and contents of the four arrays of a data set."""
    total = hashlib.sha256()
    for key in ARRAYS:
        total.update(f"{arrays[key].dtype.str} {arrays[key].shape}".encode())
        total.update(np.ascontiguousarray(arrays[key]).data)
    return total.hexdigest()


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


def _read(name: str, home: Path, say: fetch.Say) -> Dataset:
    """Read a prepared set: its saved arrays or, where they are damaged, TFDS's records."""
    cure = f"Remove {home} and run again."
    try:
        origin = json.loads((home / "manifest.json").read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{home / 'manifest.json'} is damaged: {error!r}. {cure}") from error
    arrays: Arrays = {}
    with contextlib.suppress(OSError, ValueError, EOFError):
        arrays = {key: np.load(home / "arrays" / f"{key}.npy") for key in ARRAYS}
    if not arrays or checksum(arrays) != CHECKSUMS[name]:
        say(f"reading {name} with TFDS")
        arrays = _records(name, home, cure)
        with contextlib.suppress(OSError):  # a full disk, or one for reading only
            _save(arrays, home / "arrays")
    return Dataset(name, **arrays, classes=10, origin=origin, checksum=CHECKSUMS[name])


def _records(name: str, home: Path, cure: str) -> Arrays:
    """Read TFDS's records of a set into arrays and verify them."""
    tfds, arrays = prepare.import_tfds(), {}
    try:
        [version] = (home / "tfds" / name).iterdir()
        builder = tfds.builder_from_directory(version)
        for split in ("train", "test"):
            source = builder.as_data_source(split=split)
            images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
            labels = np.empty(len(source), np.int32)
            for start in range(0, len(source), 1000):
                chunk = source.__getitems__(list(range(start, min(start + 1000, len(source)))))
                images[start : start + 1000] = [example["image"] for example in chunk]
                labels[start : start + 1000] = [example["label"] for example in chunk]
            arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    except Exception as error:  # TFDS, protobuf and array_record each have their own
        said = fetch.gist(str(error)) or repr(error)
        raise DataError(f"{name} in {home} is damaged or incomplete: {said}. {cure}") from error
    found, published = checksum(arrays), CHECKSUMS[name]
    if found != published:
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
        origin = prepare.prepare_records(name, work, done / "tfds", say)
        say(f"verifying {name}")
        _save(_records(name, done, "Run again."), done / "arrays")
        manifest = {"name": name, "origin": origin, "checksum": CHECKSUMS[name]}
        (done / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            done.rename(home)
        except OSError:
            if not (home / "manifest.json").is_file():
                raise
            # Another process was faster, and its set is as good.
    finally:
        shutil.rmtree(work, ignore_errors=True)
