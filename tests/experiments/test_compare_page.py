"""The page of a comparison: what it holds, that it loads nothing, and that it fits."""

import csv
import dataclasses
import io
import json
import re
import shlex
import shutil
import urllib.parse
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from normlab.experiments import console as cli
from normlab.experiments.compare.config import Compare
from normlab.experiments.compare.outcome import Outcome
from normlab.experiments.compare.page import PAGE, command, facts, sweep_page
from normlab.experiments.compare.page import page as page_of
from normlab.experiments.console import _parse
from normlab.experiments.rundir import RunError
from normlab.experiments.training.again import read_config
from normlab.experiments.training.tasks import Task
from tests.experiments.test_compare import ARGUMENTS, TINY
from tests.experiments.test_compare import run as compare
from tests.experiments.test_report import HTML, STICKING_OUT, browser, of_class, words

__all__ = ["browser"]

RATES = (0.1, 0.5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of two norms at two rates."""
    path = tmp_path_factory.mktemp("page") / "whole"
    compare(dataclasses.replace(TINY, rates=RATES, lr=RATES[0], run_dir=path))
    return path


@pytest.fixture(scope="module")
def page(whole) -> str:
    return (whole / PAGE).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(page) -> ET.Element:
    return ET.fromstring(page)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """One norm, and two."""
    path = tmp_path_factory.mktemp("page") / "sweep"
    common = [v for v in ARGUMENTS if v not in ("--norms", "none", "batch")]
    grid = ["--sweep", "norms=none,none batch", "lr=0.1", "--run-dir", str(path)]
    assert cli.main(["compare", *common, *grid]) == 0
    return path


def cells(tree: ET.Element) -> list[dict[str, str]]:
    """The rows of the table by their headings."""
    (table,) = of_class(tree, "results")
    headings = [words(th) for th in table.iter(HTML + "th") if th.get("scope") == "col"]
    _, *rows = table.iter(HTML + "tr")
    return [dict(zip(headings, map(words, row), strict=True)) for row in rows]


def told(tree: ET.Element) -> dict[str, str]:
    """What the numbers rest on."""
    (basis,) = of_class(tree, "basis")
    return {words(div[0]): words(div[1]) for div in basis}


def test_the_table_has_the_numbers_of_the_summary_and_the_seeds(whole, tree):
    rows = json.loads((whole / "summary.json").read_text())["norms"]
    shown = cells(tree)
    assert [row["norm"] for row in shown] == ["none", "batch"]
    for row, cell in zip(rows, shown, strict=True):
        mean, sd = 100 * row["accuracy_mean"], 100 * row["accuracy_sd"]
        assert cell["test accuracy %"] == f"{mean:.2f} ± {sd:.2f}"
        assert cell["seeds"] == "2"
        assert cell["best rate"] == f"{row['lr']:g}"
    described = next(m.get("content") for m in tree.iter(HTML + "meta") if m.get("name"))
    assert described is not None
    said = {m.get("property") or m.get("name"): m.get("content") for m in tree.iter(HTML + "meta")}
    assert shown[1]["test accuracy %"] in said["description"]
    assert (
        said["og:title"] == words(next(tree.iter(HTML + "h1"))) == "none and batch on digits, mlp"
    )


def test_nothing_is_loaded_and_the_figures_are_those_of_the_run(whole, page, tree):
    for element in tree.iter():
        for key, value in element.items():
            if key in ("src", "srcset", "data", "poster", "action"):
                assert value.startswith("data:image/svg+xml,")
            if key == "href" and element.tag != HTML + "a":
                assert value == "data:,"
    assert not list(tree.iter(HTML + "script"))
    assert not re.search(r"@import|url\(|src:", "".join(e.text for e in tree.iter(HTML + "style")))
    assert "default-src 'none'" in page
    shown = [img.get("src").partition(",")[2] for img in tree.iter(HTML + "img")]
    names = ("curves", "rates", "last_layer", "parts")
    drawn = [(whole / f"{name}.svg").read_text() for name in names]
    flat = [" ".join(svg[svg.index("<svg") :].split()) for svg in drawn]
    assert [urllib.parse.unquote(src) for src in shown] == flat
    assert all(img.get("alt") for img in tree.iter(HTML + "img"))
    assert len(list(tree.iter(HTML + "figcaption"))) == 4


def test_it_says_what_the_table_rests_on(whole, tree):
    machine = json.loads((whole / "environment.json").read_text())
    said = told(tree)
    assert machine["dataset"]["sha256"][:12] in said["Data"]
    assert f"jax {machine['packages']['jax']}" in said["Versions"]
    assert "2 devices" in said["Devices"]
    assert "over: all" in said["Devices"]
    assert "the best of 0.1, 0.5, chosen on the test set" in said["Rate"]
    assert said["Seeds"].startswith("2,")
    assert "6 steps, batches of 32, momentum" in said["Training"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "0.05 for all norms, not tuned"),
        ({"tune": True}, "a tenth of the training images, held out"),
        ({"lr_of": ("batch=0.3",)}, "given: batch=0.3; 0.05 for others, not tuned"),
    ],
)
def test_it_says_how_the_rate_was_chosen(whole, changed, said):
    options = json.loads(json.dumps(dataclasses.replace(TINY, **changed).as_json()))
    machine = json.loads((whole / "environment.json").read_text())
    assert said in dict(facts(options, machine))["Rate"]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"rates": (0.1, 1.0), "lr": 0.1},
        {"tune": True, "optimizer": "sgd:momentum=0.9", "schedule": "cosine"},
        {"model": "conv", "mesh": (2, 1), "seeds": 3, "augment": ("flip", "crop")},
        {"dataset": "markov", "model": "lm", "norms": ("rms", "none"), "batch_size": 16}
        | {"lr": 3e-3, "optimizer": "adamw", "steps": 600, "evaluations": 10},
        {"sync": "groups=1+every=2", "lr_of": ("batch=0.3", "none=0.1"), "decay": 0.5},
    ],
)
def test_the_command_makes_the_same_run(changed):
    config = dataclasses.replace(TINY, **changed)
    words = command(json.loads(json.dumps(config.as_json())))
    words = words[words.index("compare") + 1 :]
    read, _ = Compare.parse(lambda given: _parse(Compare, "compare", given), words)
    assert read.as_json() == config.as_json()


def test_the_page_has_the_command_and_the_tables(whole, tree):
    (shown,) = of_class(tree, "command")
    config = json.loads((whole / "config.json").read_text())
    assert shlex.split("".join(shown.itertext())) == command(config)
    links = {a.get("download"): a.get("href") for a in tree.iter(HTML + "a") if a.get("download")}
    assert [*links] == ["whole.csv", "whole-parts.csv"]
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    for name, kind in (("whole.csv", "evaluation"), ("whole-parts.csv", "part")):
        content = urllib.parse.unquote(links[name].partition(",")[2])
        lines = [*csv.DictReader(io.StringIO(content))]
        assert len(lines) == sum(record["kind"] == kind for record in records)
        assert {line["kind"] for line in lines} == {kind}


def test_figures_makes_the_same_pages_again_of_a_sweep(sweep, capsys):
    before = {path: path.read_bytes() for path in sweep.rglob(PAGE)}
    assert len(before) == 3
    for path in before:
        path.unlink()
    capsys.readouterr()
    assert cli.main(["figures", str(sweep), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["figures"]
    assert said["sweep/page"] == str(sweep / PAGE)
    assert {path: path.read_bytes() for path in before} == before


def test_a_sweep_has_a_page_with_the_norms_of_each_point(sweep):
    tree = ET.fromstring((sweep / PAGE).read_text(encoding="utf-8"))
    rows = cells(tree)
    assert [(row["norms"], row["norm"]) for row in rows] == [
        ("norms none", "norm none"),
        ("norms none batch", "norm none"),
        ("norms none batch", "norm batch"),
    ]
    assert len(list(tree.iter(HTML + "img"))) == 2
    (shown,) = of_class(tree, "command")
    said = shlex.split("".join(shown.itertext()))
    assert said[said.index("--sweep") :] == ["--sweep", "norms=none,none batch", "lr=0.1"]
    (link,) = [a for a in tree.iter(HTML + "a") if a.get("download")]
    content = urllib.parse.unquote(link.get("href", "").partition(",")[2])
    assert {line["lr"] for line in csv.DictReader(io.StringIO(content))} == {"0.1"}


def test_a_run_that_was_stopped_says_so(whole, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(whole, path)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(v for v in lines if json.loads(v)["step"] <= 2))
    task = Task.from_json(json.loads((path / "environment.json").read_text())["task"])
    outcome = Outcome.read(read_config(Compare, path), path, task)
    (notice,) = of_class(ET.fromstring(page_of(outcome, ["curves"])), "notice")
    assert words(notice).startswith("The run was stopped before its end")
    assert "none: stopped after 2 steps" in words(notice)


def test_a_sweep_of_which_nothing_was_begun_has_no_page(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"sweep": {"lr": ["0.1"]}}))
    with pytest.raises(RunError, match="no point of this sweep was begun"):
        sweep_page(tmp_path)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("which", ["whole", "sweep"])
def test_the_page_fits_and_asks_for_nothing(browser, whole, sweep, which, width, scheme):
    address = ({"whole": whole, "sweep": sweep}[which] / PAGE).as_uri()
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked, wrong = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.goto(address)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
    assert tab.evaluate(STICKING_OUT) == []
    for img in tab.locator("img").all():
        assert img.evaluate("e => e.decode().then(() => e.naturalWidth)") > 0
    assert tab.locator(".results td:visible").count() == len(tab.locator(".results td").all())
    with tab.expect_download() as saved:
        tab.locator("a[download]").first.click()
    assert saved.value.suggested_filename == f"{which}.csv"
    tab.close()
    assert wrong == []
    assert {url for url in asked if not url.startswith("data:")} == {address}
