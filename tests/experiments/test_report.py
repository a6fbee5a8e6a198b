"""The report page: its structure, and what a real browser makes of it."""

import ast
import base64
import hashlib
import io
import itertools
import math
import re
import shutil
import urllib.parse
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from PIL import Image

from normlab.experiments import figures, questions
from normlab.experiments.asking import findings, numbers, references, tables
from normlab.experiments.asking import page as report
from normlab.experiments.asking.findings import Evidence, Finding
from normlab.experiments.asking.section import Row, Section, Tuning, families, row
from normlab.experiments.asking.thresholds import Line
from normlab.experiments.engine import Config
from normlab.experiments.engine.verdict import Source, Verdict, bounds, decide, decide_share
from normlab.experiments.rundir import RunError
from tests.helpers import CHECKOUT

HTML = "{http://www.w3.org/1999/xhtml}"
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' " + "unbreakable" * 30
ENVIRONMENT = {
    "time": "2026-01-02T03:04:05+00:00",
    "commit": None,
    "python": "3.11.7",
    "packages": {"jax": "0.10.2", "absent": None},
    "processor": "a processor",
    "cores": 2,
    "devices": ["cpu: cpu"] * 8,
    "variables": {"XLA_FLAGS": HOSTILE},
}
SVG = "{http://www.w3.org/2000/svg}svg"
WIDTHS = (390, 800, 1400)
SCHEMES = ("light", "dark")


def picture(title: str) -> str:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for at, name in enumerate(("none", "batch")):
        axes.plot([0, 1, 2], [at, 1, 2 * at], label=name, **figures.styles([name])[name])
        axes.fill_between([0, 1, 2], [at - 1] * 3, [at + 1] * 3, alpha=0.1)
    axes.set(title=title, xlabel="optimizer step", ylabel=r"$\sigma^2$ (%)", ylim=(0, 1))
    axes.legend()
    return figures.encode(figure, "svg").decode()


BEGUN = "2026-01-02T03:04:05+00:00"
REFERENCES = {
    key: references.Entry(key, label, authors, title, "2015", venue, links, "@misc{}")
    for key, label, authors, title, venue, links in (
        ("one2015", "One & Two 2015", "A. One and B. Two", "The Title", "A Venue 1 (2), 3–4", ()),
        ("bad2015", HOSTILE, HOSTILE, HOSTILE, HOSTILE, ((HOSTILE, "https://example.org"),)),
        ("uncited2015", "Uncited 2015", "U. Uncited", "Nobody Cites It", "", ()),
    )
}
FILES = {"claims.csv": "report-claims.csv", HOSTILE: HOSTILE}


def question(name: str, **values) -> Section:
    text = {
        "question": f"Does {name} hold?",
        "Claim": "It does (https://arxiv.org/abs/1502.03167).",
        "Source": "Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167).",
        "Protocol": "A net with `g` and `b`, trained.",
        "Command": f"normlab run {name}",
    }
    config = {"lr": 0.1, "norms": ("none", "batch"), "data_dir": None}
    data = {"name": "digits", "origin": "scikit-learn", "sha256": "0123456789abcdef" * 4}
    empty = Section(name, text, config, data=(data,), seconds=12.3, run=f"{name}-0123456789ab")
    return empty._replace(**values)


def line(verdict: Verdict, date: str, reason: str = "the source's") -> Line:
    return Line(verdict.id, *bounds(verdict), date, "0123456789ab", reason)


def rows(*verdicts: Verdict, locked: dict[str, list[Line]] | None = None) -> tuple[Row, ...]:
    config = Config(dataset="", seeds=3)
    return tuple(row(v, config, (locked or {}).get(v.id, ()), BEGUN) for v in verdicts)


def sections() -> tuple[Section, ...]:
    source = Source("one2015", "section 3", "23.7 → 34.7% error", "abstract")
    large = decide(
        *("mixed.large", "it is `large`", [31.0, 33.0, 30.0]),
        **{"at_least": 1, "size": 40, "unit": "times", "geometric": True, "source": source},
    )
    small = decide("mixed.small", "it is small", [1.2, 1.4, 1.1], at_most=0.5, unit="points")
    single = decide("mixed.one", "one seed says little", [2.0], at_least=1, unit="nats")
    bad = decide("mixed.diverged", "a seed diverged", [math.nan, 1.0], at_least=1, at_most=2)
    exact = decide("mixed.exact", "it is zero", [0.0, 0.0, 0.0], at_most=1e-9, exact=True)
    share = decide_share(
        "mixed.share", "most learn", [True, True, False], at_least=0.5, untuned=True, source=source
    )
    history = [line(large._replace(size=20), "2026-01-01"), line(large, "2026-01-03", "a look")]
    locked = {large.id: history, small.id: [line(small, "2026-01-02")]}
    found = rows(large, small, single, bad, exact, share, locked=locked)
    chosen = Tuning("batch", ((0.1, 0.5), (1.0, 0.931), (10.0, None)), "accuracy", 1.0, "")
    edge = Tuning("none", ((0.1, 0.5), (1.0, 0.6)), "accuracy", 1.0, "highest")
    svg = picture("mixed")
    mixed = question("mixed", rows=found, svg=svg, data=(), tunings=(chosen, edge))
    missing = question("absent", missing="cifar10 cannot be had.", config={}, run="")
    text = dict.fromkeys(("question", "Claim", "Source", "Protocol", "Command", "Found"), HOSTILE)
    worst = decide(
        *("hostile.worst", HOSTILE, [1e-8, -1e99, 1e99]),
        at_least=0,
        unit=HOSTILE,
        source=Source("bad2015", HOSTILE, HOSTILE),
    )
    hostile = question(
        "hostile",
        text=text,
        rows=rows(worst, locked={worst.id: [line(worst, HOSTILE, HOSTILE)]}),
        tunings=(Tuning(HOSTILE, ((0.1, None),), "loss", 0.1, HOSTILE),),
        svg=picture(HOSTILE[:40]),
        config={HOSTILE: HOSTILE},
        profile="full",
        data=({"name": HOSTILE, "origin": HOSTILE, "sha256": "f" * 64},),
        diverged=(HOSTILE,),
    )
    return mixed, missing, hostile


FINDINGS = (
    Finding(
        "It is `large`, and small it is not",
        "Of two nets.",
        (
            Evidence("mixed.large", "holds", "how large"),
            Evidence("mixed.small", "fails", "how small"),
            Evidence("mixed.exact", "holds", "how exact"),
        ),
    ),
    Finding("Most learn", "All of them.", (Evidence("mixed.share", "holds", "how many"),)),
    Finding(HOSTILE, HOSTILE, (Evidence("hostile.worst", "undecided", HOSTILE),)),
    Finding("Nobody asked", "So nobody says.", (Evidence("absent.one", "holds", "what"),)),
    Finding("A seed diverged", "So it did.", (Evidence("mixed.diverged", "undecided", "it"),)),
)
URL = "https://example.org/a/report.html"


def write() -> str:
    told = findings.tell(FINDINGS, sections())
    shared = {"told": told, "picture": "report.png", "url": URL}
    return report.page(sections(), ENVIRONMENT, REFERENCES, FILES, **shared)


@pytest.fixture(scope="module")
def page() -> str:
    return write()


@pytest.fixture(scope="module")
def tree(page) -> ET.Element:
    return ET.fromstring(page)


def words(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def of_class(tree: ET.Element, name: str) -> list[ET.Element]:
    return [e for e in tree.iter() if name in e.get("class", "").split()]


# --- Without a browser ------------------------------------------------------------------------


def test_the_same_input_makes_the_same_bytes(page):
    assert page == write()


def test_every_id_is_unique_and_every_link_inside_the_page_arrives(tree):
    ids = [e.get("id") for e in tree.iter() if e.get("id")]
    targets = [a.get("href")[1:] for a in tree.iter(HTML + "a") if a.get("href")[0] == "#"]
    assert len(ids) == len(set(ids))
    assert set(targets) <= set(ids)
    assert {f"q-{name}" for name in ("mixed", "absent", "hostile")} <= set(ids)
    assert {"q-mixed", "q-hostile", "overview", "about"} <= set(targets)
    claims = {v.id for section in sections() for v in section.verdicts}
    assert claims | {"ref-one2015", "ref-bad2015"} <= set(targets)


def test_nothing_is_loaded_from_elsewhere(page, tree):
    for element in tree.iter():
        for key, value in element.items():
            if key in ("src", "srcset", "data", "poster", "action"):
                assert value.startswith("data:image/svg+xml,")
            if key == "href" and element.tag != HTML + "a":
                assert value == {"icon": "data:,", "canonical": URL}[element.get("rel")]
    assert not re.search(r"@import|url\(|src:", "".join(e.text for e in tree.iter(HTML + "style")))
    assert "default-src 'none'" in page


def test_no_script_runs_but_the_pages_own(tree):
    (script,) = tree.iter(HTML + "script")
    (policy,) = [e.get("content") for e in tree.iter() if e.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_what_is_said_is_escaped(tree):
    hostile = next(e for e in tree.iter() if e.get("id") == "q-hostile")
    # headline, lead, claim, unit, the source's number, diverged, four parts, data (2), config (2)
    # and its data; of the evidence the line's commit and reason, the source (3); of tuning the net
    # and the edge
    assert "".join(hostile.itertext()).count("<script>alert(1)</script> &") == 21
    (source,) = [e for e in tree.iter() if e.get("id") == "ref-bad2015"]
    assert "".join(source.itertext()).count("<script>alert(1)</script> &") == 4


def test_every_question_is_a_row_of_the_overview_that_counts_its_verdicts(tree):
    overview = next(e for e in tree.iter() if e.get("id") == "overview")
    rows = [words(e.find(HTML + "summary")) for e in of_class(overview, "question")]
    assert rows[:2] == [
        "1 Does mixed hold? ✓ 2 holds ✗ 1 fails ? 3 undecided",
        "2 Does absent hold? ∅ 1 missing",
    ]
    assert rows[2].endswith("? 1 undecided")
    (missing,) = [e for e in of_class(overview, "claim") if "missing" in e.get("class")]
    assert words(missing) == "∅ missing cifar10 cannot be had."
    shows, kinds = (words(e) for e in overview.iter(HTML + "fieldset"))
    assert shows == "Show all 8 ✓ holds 2 ✗ fails 1 ? undecided 4 ∅ missing 1"
    assert kinds == "of kind any identity 1 literature 3 ours 3"


def test_every_claim_stands_with_its_evidence_under_its_question(tree):
    section = next(e for e in tree.iter() if e.get("id") == "q-mixed")
    (table,) = of_class(section, "claims")
    assert [words(e.find(HTML + "tr")) for e in of_class(table, "claim")] == [
        "it is large mixed.large literature ✓ holds 31.3 times [27.8, 35.3] ≥ 1 "
        "size ≥ 40: ✗ fails 23.7 → 34.7% error 3 < 0.001 Holm < 0.001 BH < 0.001",
        "it is small mixed.small ours ✗ fails 1.23 points [0.85, 1.61] ≤ 0.5 – 3 0.014 "
        "Holm 0.028 BH 0.028",
        "one seed says little mixed.one ours ? undecided 2 nats no interval ≥ 1 – 1 – Holm – BH –",
        "a seed diverged mixed.diverged ours ? undecided not finite no interval 1 to 2 – 2 – "
        "Holm – BH –",
        "it is zero mixed.exact identity ✓ holds 0 [0, 0] ≤ 1 × 10⁻⁹ – 3 < 0.001",
        "most learn mixed.share literature untuned ? undecided 0.67 of the seeds [0.09, 0.99] "
        "≥ 0.5 23.7 → 34.7% error 3 1.00 Holm 1.00 BH 1.00",
    ]


def test_the_first_screen_counts_each_kind(page, tree):
    (table,) = of_class(tree, "tally")
    assert [words(e) for e in table.iter(HTML + "tr")] == [
        "✓ holds ✗ fails ? undecided",
        "literature a source says it 1 0 2",
        "ours no source says it 0 1 2",
        "identity is so exactly or up to rounding 1 0 0",
    ]
    assert "7 claims of 3 questions: 2 hold, 1 fail, 4 undecided." in page


def test_what_shares_the_page_finds_its_title_its_counts_and_its_picture(tree):
    said = {
        e.get("name") or e.get("property"): e.get("content")
        for e in tree.iter(HTML + "meta")
        if e.get("content")
    }
    assert said["og:title"] == said["twitter:title"] == report.TITLE
    assert said["og:image"] == said["twitter:image"] == "https://example.org/a/report.png"
    assert said["twitter:card"] == "summary_large_image"
    for name in ("description", "og:description", "twitter:description"):
        assert said[name].startswith("7 claims of 3 questions: 2 hold, 1 fail, 4 undecided.")
    unshared = ET.fromstring(report.page(sections(), ENVIRONMENT, REFERENCES, FILES))
    assert not [e for e in unshared.iter(HTML + "meta") if "image" in e.get("property", "")]


def test_each_question_leads_to_its_code(page):
    at = "https://github.com/normlab/normlab/blob"
    assert f'href="{at}/main/experiments/questions/mixed.py"' in page
    for commit, place in (("0123456789ab", "0123456789ab"), ("0123456789ab-dirty", "main")):
        known = ENVIRONMENT | {"commit": commit}
        found = report.page(sections(), known, REFERENCES, FILES)
        assert f'href="{at}/{place}/experiments/questions/mixed.py"' in found


def test_the_method_counts_each_kind_and_what_is_decided_still(tree):
    (table,) = of_class(tree, "kinds")
    found = [words(e) for e in table.iter(HTML + "tr")][1:]
    assert found == [
        "identity is so exactly or up to rounding 1 1 – – 0 – – 0",
        "literature a source says it 3 1 1 1 0 0 0 2",
        "ours no source says it 3 0 0 0 1 1 1 2",
    ]


def evidence(tree: ET.Element, claim: str) -> dict[str, str]:
    """What the details of a claim say, by their headings."""
    body = next(e for e in tree.iter() if e.get("id") == claim)
    (found,) = of_class(body, "evidence")
    said, heading = {}, ""
    for element in found:
        if element.tag == HTML + "dt":
            heading = words(element)
        else:
            said[heading] = words(element)
    return said


def test_a_claim_leads_to_its_seeds_its_threshold_its_source_and_a_command(tree):
    said = evidence(tree, "mixed.large")
    assert said["Seeds"] == "100: 31 101: 33 102: 30"
    assert said["Interval"].startswith("Student’s t over the seeds, of the logarithm; standard")
    assert said["Threshold"] == (
        "at_least 1, size 20: set before the run, 2026-01-01, commit 0123456789ab. the source's "
        "at_least 1, size 40: set after the run, 2026-01-03, commit 0123456789ab. a look"
    )
    assert said["Source"] == (
        "One & Two 2015, section 3: 23.7 → 34.7% error; its abstract alone was read."
    )
    assert said["Repeat"] == "normlab run mixed --again"
    assert "mixed-0123456789ab" in said["Records"]
    assert 'normlab.experiments.load("mixed")' in said["Records"]
    assert "set before the run" in evidence(tree, "mixed.small")["Threshold"]
    assert evidence(tree, "mixed.one")["Threshold"].startswith("Not locked")
    assert evidence(tree, "mixed.one")["Seeds"] == "One effect each, not by seed: 2"
    assert evidence(tree, "mixed.one")["Source"] == "None: the claim is ours."
    assert evidence(tree, "hostile.worst")["Repeat"].endswith("hostile --profile full --again")
    summaries = [words(e) for e in tree.iter(HTML + "summary")]
    assert (
        "Seeds, threshold (set after the run, 2026-01-03, changed once), source of mixed.large"
        in (summaries)
    )


def test_the_page_says_how_many_bounds_were_set_when(tree):
    (method,) = [e for e in tree.iter() if e.get("id") == "method"]
    assert (
        "Of 7 bounds 1 were set before their run, 2 after a look at it; 4 are not locked."
    ) in words(method)
    assert "seeds from 100 on" in words(method)
    assert "were written before the run" not in words(tree)


def test_verdicts_of_seeds_that_pilots_have_are_said_to_be():
    pilot = question("pilot", config={"first_seed": 0})
    text = words(ET.fromstring(report.page([pilot], ENVIRONMENT, {}, {})))
    assert "Not every verdict is of seeds that no pilot had: pilot used seeds below 100" in text


def test_chosen_rates_are_shown_and_the_end_of_a_grid_is_flagged(tree):
    section = next(e for e in tree.iter() if e.get("id") == "q-mixed")
    (table,) = of_class(section, "tunings")
    assert [words(e) for e in table.iter(HTML + "tr")][1:] == [
        "batch 1 0.1 (50.0%), 1 (93.1%), 10 (diverged)",
        "none 1 highest of its grid 0.1 (50.0%), 1 (60.0%)",
    ]


def test_every_source_that_is_cited_is_listed_with_the_claims_that_cite_it(tree):
    (listed,) = [e for e in tree.iter() if e.get("id") == "references"]
    assert [e.get("id") for e in listed.iter(HTML + "li")] == ["ref-bad2015", "ref-one2015"]
    assert words(next(listed.iter(HTML + "li"))).endswith("cited by hostile.worst")
    one = words([*listed.iter(HTML + "li")][1])
    assert one == (
        "A. One and B. Two (2015). The Title. A Venue 1 (2), 3–4. cited by mixed.large, mixed.share"
    )


def test_the_data_beside_the_page_are_linked_by_relative_addresses(tree):
    links = [a.get("href") for a in tree.iter(HTML + "a") if a.get("href")[0] not in "#h"]
    assert [urllib.parse.unquote(link) for link in links] == ["report-claims.csv", HOSTILE]
    assert not any(set('<> "') & set(link) for link in links)


def test_holm_counts_the_claims_of_a_question_and_bh_those_of_all():
    def of(name, *p):
        found = [decide(f"{name}.{i}", "", [1.0, 1.0], at_least=0) for i in range(len(p))]
        exact = decide(f"{name}.exact", "", [0.0], exact=True)
        found = [v._replace(p=one) for v, one in zip(found, p, strict=True)]
        return question(name, rows=rows(*found, exact))

    found = families([of("a", 0.01, 0.02), of("b", 0.04, math.nan), of("c")])
    assert {id: one.holm for id, one in found.items() if id != "b.1"} == pytest.approx(
        {"a.0": 0.02, "a.1": 0.02, "b.0": 0.04}
    )
    assert [found[id].bh for id in ("a.0", "a.1", "b.0")] == pytest.approx([0.03, 0.03, 0.04])
    assert math.isnan(found["b.1"].holm)
    assert math.isnan(found["b.1"].bh)


def test_headings_are_in_order_tables_have_scopes_and_figures_are_described(tree):
    levels = [int(e.tag[-1]) for e in tree.iter() if re.fullmatch(HTML + r"h\d", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert tree.get("lang") == "en"
    assert all(th.get("scope") for th in tree.iter(HTML + "th"))
    assert all(table.find(HTML + "caption") is not None for table in tree.iter(HTML + "table"))
    assert all(svg.get("aria-hidden") for svg in tree.iter(SVG))  # the words have its numbers
    alts = [img.get("alt") for img in tree.iter(HTML + "img")]
    assert len(alts) == len(set(alts)) == 2
    assert all("question" in alt for alt in alts)


def test_each_figure_is_a_document_of_its_own_that_refers_to_nothing_outside(tree):
    for img in tree.iter(HTML + "img"):
        svg = urllib.parse.unquote(img.get("src").partition(",")[2])
        ids = {e.get("id") for e in ET.fromstring(svg).iter()}
        uses = set(re.findall(r'url\(#(.+?)\)|href="#(.+?)"', svg))
        assert uses
        assert {a or b for a, b in uses} <= ids
        assert "<text" in svg
        assert "<metadata" not in svg


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_text_colour_has_contrast_on_every_ground(tree, scheme):
    style = "".join(e.text for e in tree.iter(HTML + "style"))
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)[:2]
    colours = dict(re.findall(r"--(\w+): (#\w{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--(\w+): (#\w{6})", dark))
    grounds = {"paper", "tint"}
    texts = colours.keys() - grounds - {"card", "claimed", "line"}
    assert texts == {"ink", "quiet", "link", *report.SYMBOLS}
    for text, ground in itertools.product(texts, grounds):
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast("#000000", colours["card"]) >= 15  # a figure's own text is black


def contrast(one: str, other: str) -> float:
    """That of WCAG 2, of two colours as `#rrggbb` or `rgb(r, g, b)`."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    hexadecimal = colour.startswith("#")
    found = re.findall(r"\w\w", colour) if hexadecimal else re.findall(r"\d+", colour)[:3]
    parts = [int(v, 16 if hexadecimal else 10) / 255 for v in found]
    parts = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5"),
        (-1.2345, "−1.23"),
        (12345.6, "12,346"),
        (1.5e-8, "1.5 × 10⁻⁸"),
        (2.5e7, "2.5 × 10⁷"),
        (-math.inf, "−∞"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_are_set_as_in_print(value, text):
    assert numbers.number(value) == text


def test_a_narrow_range_is_shown_by_its_middle():
    narrow = decide("a", "", [1.0, 1.0], at_least=1 - 1e-6, at_most=1 + 1e-6)
    assert numbers.threshold(narrow) == "1 ± 1 × 10⁻⁶"


def test_a_question_given_twice_is_refused():
    with pytest.raises(RunError, match="'mixed' twice"):
        report.page([question("mixed")] * 2, ENVIRONMENT, {}, {})


def test_no_question_at_all_is_still_a_page():
    assert "all <b>0</b>" in report.page([], ENVIRONMENT, {}, {})


# --- The findings -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told():
    return {one.title: one for one in findings.tell(FINDINGS, sections())}


def test_a_finding_is_told_with_its_effects_and_leads_to_its_question_and_its_source(tree):
    (listed,) = [e for e in tree.iter() if e.get("id") == "findings"]
    first = words(next(listed.iter(HTML + "li")))
    assert first == (
        "1 It is large, and small it is not Of two nets. how large 31.3 times [27.8, 35.3] ✓ holds "
        "0.5 1 2 5 10 20 how small 1.23 points [0.85, 1.61] ✗ fails 0 0.5 1 1.5 "
        "how exact 0 [0, 0] ✓ holds 0 5 × 10⁻¹⁰ 1 × 10⁻⁹ Does mixed hold? One & Two 2015"
    ).replace("0.5 1 2 5 10 20", words(of_class(listed, "axis")[0]))
    links = {a.get("href") for a in next(listed.iter(HTML + "li")).iter(HTML + "a")}
    assert links == {"#mixed.large", "#mixed.small", "#mixed.exact", "#q-mixed", "#ref-one2015"}


def test_a_finding_whose_verdict_came_out_otherwise_is_not_told(tree, told):
    assert "Most learn" not in told
    assert "Most learn" not in words(tree)
    other = told["Does mixed hold?"]
    assert not other.so
    assert other.more == ""
    assert other.panels[0].strips[0].name == "most learn"  # the claim in its own words
    (listed,) = [e for e in tree.iter() if e.get("id") == "findings"]
    said = words([*listed.iter(HTML + "li")][1])
    assert "The verdicts of this report are not those that a finding was written for" in said
    assert "most learn 0.67 of the seeds [0.09, 0.99] ? undecided" in said


def test_a_finding_whose_claims_lack_is_left_out(tree, told):
    assert len(told) == 4
    assert "Nobody asked" not in words(tree)
    assert not findings.tell(FINDINGS, [])
    assert 'id="findings"' not in report.page([], ENVIRONMENT, {}, {})


def test_effects_lie_in_their_order_on_an_axis_with_their_bounds(told):
    large, small, exact = told["It is `large`, and small it is not"].panels
    (strip,) = large.strips
    assert 0 < large.nothing < strip.low < strip.mean < strip.high < 1
    assert strip.claimed == (pytest.approx(large.nothing), 1.0)  # at least 1, of a factor
    assert len(strip.seeds) == 3
    (strip,) = small.strips
    assert 0 < small.nothing < strip.claimed[1] < strip.low < strip.high < 1
    places = [at for at, _ in large.ticks]
    assert places == sorted(places)
    (strip,) = exact.strips
    assert strip.low == strip.mean == strip.high == exact.nothing
    (strip,) = told["A seed diverged"].panels[0].strips
    assert math.isnan(strip.mean)
    assert len(strip.seeds) == 1


def test_the_picture_to_share_is_as_wide_as_asked_and_has_the_first_three(told):
    drawn = findings.picture("A title", "some counts", [*told.values()])
    said = " ".join(text.get_text() for text in drawn.texts)
    assert "A title some counts It is `large`" in said
    assert "31.3 times ✓ holds" in said
    picture = Image.open(io.BytesIO(figures.encode(drawn, "png")))
    assert picture.size == (1200, 630)
    assert findings.picture("A title", "some counts", []).axes == []


def test_the_ten_findings_are_those_of_the_report_beside_the_guide():
    claims = pd.read_parquet(CHECKOUT / "docs/report-claims.parquet").set_index("id")
    found = findings.read()
    assert len(found) == 10
    for finding in found:
        for claim in finding.claims:
            assert claims.loc[claim.id].decision == claim.told, claim.id
        kinds = {claims.loc[claim.id].kind for claim in finding.claims}
        assert "identity" not in kinds
    assert {c.told for f in found for c in f.claims} == {"holds", "fails", "undecided"}
    page = (CHECKOUT / "docs/report.html").read_text(encoding="utf-8")
    for finding in found:
        assert finding.title in page
    assert (CHECKOUT / "docs/report.png").stat().st_size > 1000


def test_the_words_of_a_finding_have_no_number():
    for finding in findings.read():
        for words in (finding.title, finding.more, *(claim.name for claim in finding.claims)):
            assert not re.search(r"\d", words), words


# --- The sources and the tables ---------------------------------------------------------------


def test_every_source_that_a_question_cites_is_in_the_file():
    known = references.read()
    for name in questions.NAMES:
        path = CHECKOUT / f"normlab/experiments/questions/{name}.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(
                r"[a-z]+\d{4}[a-z]?", str(node.value)
            ):
                assert node.value in known, f"{name} cites {node.value}"


def test_every_entry_is_whole_and_named_by_its_first_author_and_year():
    for key, entry in references.read().items():
        assert re.fullmatch(r"[a-z]+\d{4}[a-z]?", key)
        assert entry.year == re.sub(r"\D", "", key)
        assert entry.title
        assert not re.search(r"[{}\\]", "".join(entry[:6])), key
        assert entry.links or entry.venue, f"nobody finds {key}"


BIB = """@article{one2015,
  author = {One, A. and G{\\"u}l, B. and {The Group}},
  title = {The {Title}},
  year = {2015},
  journal = {Venue},
  volume = {1},
  number = {2},
  pages = {3--4},
  url = {https://example.org/a_b%20c}
}
"""


def bib(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "sources.bib"
    path.write_text(text, encoding="utf-8")
    return path


def test_an_entry_is_read_in_words(tmp_path):
    (entry,) = references.read(bib(tmp_path, BIB)).values()
    assert entry.authors == "A. One, B. Gül and The Group"
    assert (entry.label, entry.title, entry.venue) == (
        *("One et al. 2015", "The Title", "Venue 1 (2), 3–4"),
    )
    assert entry.links == (("example.org", "https://example.org/a_b%20c"),)
    assert entry.bibtex == BIB.strip()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BIB + BIB, "sources.bib, line 11: .*one2015"),
        (BIB[:60], "sources.bib, line 1: "),
        (BIB.replace("year", "years"), "line 1: one2015 has no year"),
        (BIB.replace("author", "by"), "line 1: one2015 has no author"),
        (BIB.replace("{The {Title}}", "{}"), "line 1: one2015 has no title"),
    ],
)
def test_a_file_of_sources_that_is_not_well_formed_is_refused(tmp_path, text, said):
    with pytest.raises(RunError, match=said):
        references.read(bib(tmp_path, text))
    with pytest.raises(RunError, match="cannot read the sources"):
        references.read(tmp_path / "none.bib")


def test_an_address_that_is_no_web_page_is_no_link(tmp_path):
    text = BIB.replace("https://example.org/a_b%20c", "javascript:alert(1)")
    assert references.read(bib(tmp_path, text))["one2015"].links == ()


def test_a_key_that_is_not_in_the_file_is_named_with_the_nearest():
    cites = decide("a.one", "", [1.0, 1.0], at_least=0, source=Source("ono2015"))
    with pytest.raises(RunError, match=r"a.one cites 'ono2015' \(did you mean 'one2015'"):
        references.require([cites], REFERENCES)


def test_the_tables_hold_every_claim_and_effect_in_both_formats(tmp_path):
    found = sections()
    for name, content in tables.files(found).items():
        (tmp_path / name).write_bytes(content)
    claims = pd.read_parquet(tmp_path / "claims.parquet").set_index("id")
    assert list(claims.index) == [v.id for section in found for v in section.verdicts]
    large = claims.loc["mixed.large"]
    assert (large.decision, large.sized, large.at_least, large["size"]) == ("holds", "fails", 1, 40)
    assert (large.source, large.read, large.run) == ("one2015", "abstract", "mixed-0123456789ab")
    assert large.effect == pytest.approx(31.3, abs=0.1)
    assert pd.isna(large.at_most)  # no bound
    assert pd.isna(claims.loc["mixed.exact"].p_holm)
    assert claims.loc["hostile.worst"].claim == HOSTILE
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    mine = effects[effects.id == "mixed.large"]
    assert list(mine.seed) == [100, 101, 102]
    assert list(mine.effect) == [31.0, 33.0, 30.0]
    assert pd.isna(effects[effects.id == "mixed.diverged"].effect.iloc[0])
    assert pd.isna(effects[effects.id == "mixed.one"].seed.iloc[0])
    for name, columns in (("claims", tables.CLAIMS), ("effects", tables.EFFECTS)):
        parquet = pd.read_parquet(tmp_path / f"{name}.parquet")
        csv = pd.read_csv(tmp_path / f"{name}.csv", keep_default_na=False, dtype=str)
        assert list(csv) == list(parquet) == list(columns)
        assert len(csv) == len(parquet)
        assert parquet.dtypes.astype(str).to_dict() == columns
        for column in ("id", "question"):
            assert list(csv[column]) == list(parquet[column])


def test_tables_of_nothing_have_their_columns():
    assert list(tables.claims([])) == list(tables.CLAIMS)
    assert tables.files([])["effects.csv"] == b"question,id,seed,effect\n"


def test_the_same_claims_make_the_same_tables():
    assert tables.files(sections()) == tables.files(sections())


def test_every_column_is_described():
    text = (CHECKOUT / "docs/reference/results.md").read_text(encoding="utf-8")
    for column in (*tables.CLAIMS, *tables.EFFECTS):
        assert f"`{column}`" in text, column


# --- In a browser -----------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome")

STICKING_OUT = """() => [...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return !e.parentElement.closest(".scroll") && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.outerHTML.slice(0, 200))"""

TEXT_ON_GROUND = """() => {
  const pairs = new Set(), clear = "rgba(0, 0, 0, 0)";
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) if (walker.currentNode.data.trim()) {
    const style = getComputedStyle(walker.currentNode.parentElement);
    let ground = walker.currentNode.parentElement;
    while (getComputedStyle(ground).backgroundColor == clear) ground = ground.parentElement;
    pairs.add(style.color + "|" + getComputedStyle(ground).backgroundColor);
  }
  return [...pairs].map(pair => pair.split("|"));
}"""


@pytest.fixture(scope="module")
def browser():
    """A Chromium that is installed."""
    reason = "playwright is not installed: pip install playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    with playwright.sync_playwright() as driver:
        found = [path for path in map(shutil.which, BROWSERS) if path]
        own = driver.chromium.executable_path
        path = next(iter(found), own)
        if not Path(path).exists():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH, nor {own}")
        chromium = driver.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(page, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "index.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Opens the page; afterwards nothing may have gone wrong."""
    wrong, requested = [], []

    def open_page(width: int = 1400, scheme: str = "light"):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("requestfailed", lambda request: wrong.append(request.url[:200]))
        tab.on("request", lambda request: requested.append(request.url[:200]))
        tab.goto(address)
        return tab

    yield open_page
    for context in browser.contexts:
        context.close()
    assert wrong == []
    assert {url.split("?")[0] for url in requested if not url.startswith("data:")} == {address}


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_overflows_and_every_figure_is_shown(visit, width):
    tab = visit(width)
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
    assert tab.evaluate(STICKING_OUT) == []
    assert tab.locator("img").count() == 2
    for img in tab.locator("img").all():
        img.scroll_into_view_if_needed()
        assert img.is_visible()
        assert img.evaluate("e => e.decode().then(() => e.naturalWidth)") > 0
        assert min(img.bounding_box()["width"], img.bounding_box()["height"]) > 100


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_has_contrast_on_a_ground_as_light_or_dark_as_asked(visit, width, scheme):
    tab = visit(width, scheme)
    ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.9) if scheme == "light" else (luminance(ground) < 0.02)
    pairs = tab.evaluate(TEXT_ON_GROUND)
    assert len(pairs) > 5
    for text, behind in pairs:
        assert contrast(text, behind) >= 4.5, (text, behind)


def test_a_choice_opens_the_questions_that_have_such_claims_and_shows_these(visit):
    tab = visit()
    claims, questions = (tab.locator(f".{what}:visible") for what in ("claim", "question"))
    assert (claims.count(), questions.count()) == (0, 3)
    for name, count in {"holds": 2, "fails": 1, "undecided": 4, "missing": 1}.items():
        tab.check(f"#show-{name}")
        assert claims.count() == count
        assert tab.locator(".question figure:visible").count() == 0
    tab.check("#show-all")
    assert (claims.count(), questions.count()) == (0, 3)
    for name, count in {"identity": 1, "literature": 3, "ours": 3}.items():
        tab.check(f"#kind-{name}")
        assert claims.count() == count
    tab.check("#show-fails")
    assert (claims.count(), questions.count()) == (1, 1)
    tab.check("#kind-literature")
    assert (claims.count(), questions.count()) == (0, 0)
    tab.check("#show-undecided")
    assert (claims.count(), questions.count()) == (2, 2)


@pytest.mark.parametrize("width", WIDTHS)
def test_findings_stand_on_the_first_screen_and_the_first_figure_soon_after(visit, width):
    tab = visit(width)
    assert tab.locator(".findings li h3").first.bounding_box()["y"] < 844
    for what in (".strip", ".findings figure"):
        box = tab.locator(what).first.bounding_box()
        assert box["y"] < 2000
        assert box["width"] > 300
    assert tab.evaluate("document.scrollingElement.scrollHeight") < 6000
    sizes = tab.evaluate(
        "[...document.querySelectorAll('.findings :is(p, text, h3, .mark)')]"
        ".map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11


@pytest.mark.parametrize("width", WIDTHS)
def test_the_report_of_this_tree_is_short_and_its_findings_fit(browser, width):
    tab = browser.new_page(viewport={"width": width, "height": 844})
    tab.goto((CHECKOUT / "docs/report.html").as_uri())
    assert tab.locator(".findings li").count() == 10
    assert tab.locator(".findings .notice").count() == 0
    assert tab.locator(".findings li h3").first.bounding_box()["y"] < 844
    assert tab.locator(".strip").first.bounding_box()["y"] < 2000
    assert tab.evaluate("document.scrollingElement.scrollHeight") < 15_000
    assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
    assert tab.evaluate(STICKING_OUT) == []
    tab.close()


def test_an_address_of_a_claim_opens_its_question_and_its_evidence(visit, address):
    tab = visit()
    body = tab.locator('[id="mixed.small"]')
    assert not body.is_visible()
    tab.click('.findings a[href="#mixed.small"]')
    assert tab.url.endswith("#mixed.small")
    assert body.evaluate("e => e.matches(':target')")
    assert body.locator(".evidence").is_visible()
    assert 0 <= body.bounding_box()["y"] < 900
    tab.goto(address + "?again#hostile.worst")
    assert tab.locator('[id="hostile.worst"] .evidence').is_visible()
    tab.goto(address + "?again#ref-one2015")
    assert tab.locator("#ref-one2015").is_visible()
    tab.goto(address + "?again#nothing")


def test_a_link_to_a_question_opens_it_and_a_keyboard_its_claims(visit):
    tab = visit()
    tab.click('.findings a[href="#q-mixed"]')
    figure, claim = tab.locator("#q-mixed figure"), tab.locator('[id="mixed.large"]')
    assert figure.is_visible()
    assert figure.bounding_box()["y"] < claim.bounding_box()["y"]
    assert not claim.locator(".evidence").is_visible()
    claim.locator("summary").focus()
    tab.keyboard.press("Enter")
    assert claim.locator(".evidence").is_visible()


def test_a_keyboard_reaches_the_questions_first(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the questions"


def test_without_script_claims_are_found_by_their_address_all_the_same(browser, address):
    tab = browser.new_context(java_script_enabled=False).new_page()
    tab.goto(address + "#mixed.small")
    assert tab.locator('[id="mixed.small"]').is_visible()
    tab.context.close()


def test_in_print_the_page_is_white_short_and_fits(visit):
    tab = visit(700, "dark")
    tab.check("#show-fails")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".claims .claim:visible").count() == 7
    assert all(found.is_visible() for found in tab.locator("figure").all())
    assert not any(found.is_visible() for found in tab.locator(".evidence, .config").all())
    assert all(contrast(*pair) >= 4.5 for pair in tab.evaluate(TEXT_ON_GROUND))
    assert tab.evaluate(STICKING_OUT) == []
    tab.emulate_media()
    pdf = tab.pdf(format="A4")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 6
