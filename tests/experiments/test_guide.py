"""The guide: its claims are those of the report beside it, and its words lead to them."""

import re
import xml.etree.ElementTree as ET

import pandas as pd
import pytest

from normlab.experiments.asking import guide, numbers
from normlab.experiments.asking.guide import CELLS, Cell, says
from tests.helpers import CHECKOUT

HTML = "{http://www.w3.org/1999/xhtml}"
DOCS = CHECKOUT / "docs"


@pytest.fixture(scope="module")
def claims() -> pd.DataFrame:
    return pd.read_parquet(DOCS / "report-claims.parquet")


@pytest.fixture(scope="module")
def files(claims) -> dict[str, bytes]:
    return guide.files(claims, "report.html", "guide")


def test_the_guide_is_that_of_the_report(files):
    assert (DOCS / "guide.md").read_bytes() == files["guide.md"]
    assert (DOCS / "guide.html").read_bytes() == files["guide.html"]


def test_every_claim_it_cites_is_a_row_of_the_report(files):
    page = (DOCS / "report.html").read_text()
    words = files["guide.md"].decode()
    links = re.findall(r"\(report\.html#([^)]+)\)", words)
    assert {*links} <= {*guide.cited()}
    for id in {*links, *guide.cited()}:
        assert f'id="{id}"' in page, id


def test_a_number_is_the_claims_own(claims, files):
    words = files["guide.md"].decode()
    for row in claims[claims.id.isin(guide.cited())].itertuples():
        lines = [line for line in words.splitlines() if f"#{row.id}) |" in line]
        mean, interval = numbers.estimate(row)
        assert all(mean in line and interval in line and row.decision in line for line in lines)


def test_nothing_is_written_where_a_claim_lacks(claims):
    assert guide.files(claims[claims.id != guide.cited()[0]], "report.html", "guide") == {}


@pytest.mark.parametrize(
    ("decision", "good", "said"),
    [
        ("holds", True, "well"),
        ("holds", False, "badly"),
        ("fails", True, "badly"),
        ("fails", False, "well"),
        ("undecided", True, "undecided"),
        ("undecided", False, "undecided"),
    ],
)
def test_a_cell_is_what_its_claim_says(decision, good, said):
    assert says(Cell("a", "b", "c", good=good), decision) == said


def test_no_cell_is_drawn_over_another():
    places = [(cell.situation, cell.norm) for cell in CELLS]
    assert len({*places}) == len(places)


def test_the_figure_has_a_mark_in_each_cell(claims):
    axes = guide.figure(claims).axes[0]
    assert len(axes.texts) == len(axes.patches) == len(CELLS)


def test_its_page_needs_no_other_file(files):
    page = files["guide.html"].decode()
    tree = ET.fromstring(page.removeprefix("<!DOCTYPE html>"))
    assert [*tree.iter(f"{HTML}script")] == []
    for picture in tree.iter(f"{HTML}img"):
        assert picture.get("src", "").startswith("data:image/svg+xml,")
        assert picture.get("alt")
    for link in tree.iter(f"{HTML}a"):
        assert link.get("href", "").startswith(("report.html", "https://", "#"))
