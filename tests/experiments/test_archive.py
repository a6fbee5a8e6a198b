"""What is taken away: an archive of runs, and a run as a data frame."""

import json
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from normlab import experiments
from normlab.experiments.asking import archive, kept
from normlab.experiments.rundir import RunError

NAME = "figure1"


def run(root: Path, key: str = "a", name: str = NAME, day: int = 1, value: float = 1.0) -> Path:
    """A finished run of two conditions, of which each has a value for two seeds."""
    path = root / f"{name}-{key * 12}"
    (path / "conditions").mkdir(parents=True)
    for index, norm in enumerate(("none", "batch")):
        records = [
            {"norm": norm, "kind": "value", "seed": seed, "value": value} for seed in (100, 101)
        ]
        records.append({"kind": "cost", "norm": norm, "seconds": 1.5})
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (path / f"conditions/{index:02d}-{norm}.jsonl").write_text(lines)
    whole = {
        "config.json": {"question": name, "seeds": 2},
        "environment.json": {"time": f"2026-01-{day:02d}T00:00:00+00:00", "commit": None},
        "verdict.json": [],
        "bounds.json": {},
    }
    for file, content in whole.items():
        (path / file).write_text(json.dumps(content))
    (path / "figure.svg").write_text("<svg/>")
    return path


@pytest.fixture
def packed(tmp_path) -> Path:
    path = tmp_path / "records.zip"
    path.write_bytes(
        archive.pack([run(tmp_path / "runs"), run(tmp_path / "runs", name="landscape")])
    )
    return path


def test_the_records_of_a_question_are_a_frame_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "place", lambda: tmp_path)
    run(tmp_path)
    frame = experiments.load(NAME)
    values = frame[frame.kind == "value"]
    assert list(values.norm) == ["none", "none", "batch", "batch"]
    assert list(values.seed) == [100, 101, 100, 101]
    assert frame[frame.kind == "cost"].seconds.sum() == 3
    assert pd.isna(frame[frame.kind == "cost"].value).all()
    assert frame.attrs["run"] == "figure1-aaaaaaaaaaaa"
    assert frame.attrs["config"]["seeds"] == 2


def test_of_several_runs_the_newest_counts_that_is_finished(tmp_path):
    run(tmp_path, "a", day=3, value=3.0)
    run(tmp_path, "b", day=9, value=9.0)
    run(tmp_path, "c", day=1, value=1.0)
    unfinished = run(tmp_path, "d", day=20, value=20.0)
    (unfinished / "verdict.json").unlink()
    run(tmp_path, "e", name="figure1_more", day=25, value=25.0)
    assert archive.load(NAME, root=tmp_path).value.max() == 9


def test_an_archive_gives_the_same_frame(tmp_path, packed):
    here = archive.load(NAME, root=tmp_path / "runs")
    there = experiments.load(NAME, str(packed))
    pd.testing.assert_frame_equal(here, there)
    assert here.attrs == there.attrs


def test_the_same_runs_make_the_same_archive_without_pictures(tmp_path, packed):
    runs = sorted((tmp_path / "runs").iterdir())
    for path in runs[0].rglob("*"):
        path.touch()
    assert archive.pack(reversed(runs)) == packed.read_bytes()
    with zipfile.ZipFile(packed) as opened:
        assert opened.testzip() is None
        mine = [name for name in opened.namelist() if name.startswith("figure1-")]
    assert mine == [
        f"figure1-aaaaaaaaaaaa/{file}"
        for file in (
            *("bounds.json", "conditions/00-none.jsonl", "conditions/01-batch.jsonl"),
            *("config.json", "environment.json", "verdict.json"),
        )
    ]


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_a_torn_archive_is_refused(packed, keep):
    content = packed.read_bytes()
    packed.write_bytes(content[: int(keep * len(content)) if 0 < keep < 1 else keep])
    with pytest.raises(RunError, match=r"cannot read the archive .*and whole"):
        experiments.load(NAME, packed)


def test_an_archive_of_which_a_byte_is_wrong_is_refused(packed):
    content = bytearray(packed.read_bytes())
    at = content.index(b"conditions/00-none.jsonl") + len("conditions/00-none.jsonl") + 10
    content[at] ^= 0xFF
    packed.write_bytes(content)
    with pytest.raises(RunError, match=r"does not hold figure1 whole.*Fetch it again"):
        experiments.load(NAME, packed)


@pytest.mark.parametrize("file", ["conditions/00-none.jsonl", "environment.json", "config.json"])
def test_a_run_of_which_a_file_is_gone_is_refused(tmp_path, file):
    (run(tmp_path) / file).unlink()
    with pytest.raises(RunError, match=r"does not hold figure1 whole.*run figure1 --again"):
        archive.load(NAME, root=tmp_path)


def test_a_file_that_is_cut_off_is_refused(tmp_path):
    path = run(tmp_path) / "conditions/01-batch.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(RunError, match="does not hold figure1 whole"):
        archive.load(NAME, root=tmp_path)


def test_what_is_not_there_is_said_with_what_to_do(tmp_path, packed):
    with pytest.raises(RunError, match="unknown question 'figur1': did you mean 'figure1'"):
        archive.load("figur1", root=tmp_path / "runs")
    with pytest.raises(RunError, match=r"no finished run of identity; it has figure1, landscape"):
        experiments.load("identity", packed)
    with pytest.raises(RunError, match=r"no finished run of figure1.*normlab run figure1"):
        archive.load(NAME, root=tmp_path / "nowhere")
    with pytest.raises(RunError, match="cannot read the archive"):
        experiments.load(NAME, tmp_path / "none.zip")
    with pytest.raises(RunError, match="cannot read the archive"):
        experiments.load(NAME, tmp_path)
