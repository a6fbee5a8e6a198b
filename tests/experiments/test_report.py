"""The report page: its structure, and what a real browser makes of it."""

import itertools
import math
import re
import shutil
import urllib.parse
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from experiments import figures
from experiments.asking import page as report
from experiments.engine.verdict import Verdict, decide
from experiments.rundir import RunError

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
WIDTHS = (400, 1400)
SCHEMES = ("light", "dark")


def picture(title: str) -> str:
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for at, name in enumerate(("none", "batch")):
        axes.plot([0, 1, 2], [at, 1, 2 * at], label=name, **figures.styles([name])[name])
        axes.fill_between([0, 1, 2], [at - 1] * 3, [at + 1] * 3, alpha=0.1)
    axes.set(title=title, xlabel="optimizer step", ylabel=r"$\sigma^2$ (%)", ylim=(0, 1))
    axes.legend()
    return figures.encode(figure, "svg").decode()


def question(name: str, **values) -> report.Section:
    text = {
        "question": f"Does {name} hold?",
        "Claim": "It does (https://arxiv.org/abs/1502.03167).",
        "Source": "Ioffe & Szegedy 2015 (https://arxiv.org/abs/1502.03167).",
        "Protocol": "A net with `g` and `b`, trained.",
        "Command": f"python -m experiments run {name}",
    }
    config = {"lr": 0.1, "norms": ("none", "batch"), "data_dir": None}
    data = {"name": "digits", "origin": "scikit-learn", "sha256": "0123456789abcdef" * 4}
    empty = report.Section(name, text, (), "", config, (data,), 12.3, (), "")
    return empty._replace(**values)


def sections() -> tuple[report.Section, ...]:
    verdicts = (
        decide("it is large", [31.0, 33.0, 30.0], at_least=10, unit="times", geometric=True),
        decide("it is small", [1.2, 1.4, 1.1], at_most=0.5, unit="points"),
        decide("one seed says little", [2.0], at_least=1, unit="nats"),
        decide("a seed diverged", [math.nan, 1.0], at_least=1, at_most=2),
    )
    mixed = question("mixed", verdicts=verdicts, svg=picture("mixed"), data=())
    missing = question("absent", missing="cifar10 cannot be had.", config={})
    text = dict.fromkeys(("question", "Claim", "Source", "Protocol", "Command", "Found"), HOSTILE)
    bad = Verdict(HOSTILE, "holds", 1e-8, -1e99, 1e99, -math.inf, math.inf, HOSTILE, 3)
    hostile = question(
        "hostile",
        text=text,
        verdicts=(bad,),
        svg=picture(HOSTILE[:40]),
        config={HOSTILE: HOSTILE},
        data=({"name": HOSTILE, "origin": HOSTILE, "sha256": "f" * 64},),
        diverged=(HOSTILE,),
    )
    return mixed, missing, hostile


def write() -> str:
    return report.page(sections(), ENVIRONMENT)


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
    for name in ("mixed", "absent", "hostile"):
        assert {f"q-{name}", f"o-{name}"} <= set(targets)


def test_nothing_is_loaded_from_elsewhere(page, tree):
    for element in tree.iter():
        for key, value in element.items():
            if key in ("src", "srcset", "data", "poster", "action"):
                assert value.startswith("data:image/svg+xml,")
            if key == "href" and element.tag != HTML + "a":
                assert value == "data:,"
    assert not re.search(r"@import|url\(|src:", "".join(e.text for e in tree.iter(HTML + "style")))
    assert "default-src 'none'" in page


def test_what_is_said_is_escaped(tree):
    assert not list(tree.iter(HTML + "script"))
    hostile = next(e for e in tree.iter() if e.get("id") == "q-hostile")
    # headline, lead, claim, unit, diverged, four parts, data (2), config (2) and its data
    assert "".join(hostile.itertext()).count("<script>alert(1)</script> &") == 14


def test_every_claim_stands_in_the_overview_and_in_its_section(tree):
    overview = next(e for e in tree.iter() if e.get("id") == "overview")
    rows = [words(e) for e in of_class(overview, "claim")]
    assert len(rows) == 6
    assert rows[0] == "it is large ✓ holds 31.3 times [27.8, 35.3] ≥ 10 3"
    assert rows[1] == "it is small ✗ fails 1.23 points [0.85, 1.61] ≤ 0.5 3"
    assert rows[2] == "one seed says little ? undecided 2 nats no interval ≥ 1 1"
    assert rows[3] == "a seed diverged ? undecided not finite no interval 1 to 2 2"
    assert rows[4] == "It does (arXiv:1502.03167). ∅ missing cifar10 cannot be had."
    section = next(e for e in tree.iter() if e.get("id") == "q-mixed")
    assert [words(e) for e in of_class(section, "claim")] == rows[:4]
    counts = words(of_class(overview, "counts")[0])
    assert counts == "Show all 6 ✓ holds 2 ✗ fails 1 ? undecided 2 ∅ missing 1"


def test_headings_are_in_order_tables_have_scopes_and_figures_are_described(tree):
    levels = [int(e.tag[-1]) for e in tree.iter() if re.fullmatch(HTML + r"h\d", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert tree.get("lang") == "en"
    assert all(th.get("scope") for th in tree.iter(HTML + "th"))
    assert all(table.find(HTML + "caption") is not None for table in tree.iter(HTML + "table"))
    alts = [img.get("alt") for img in tree.iter(HTML + "img")]
    assert len(alts) == len(set(alts)) == 2
    assert all("question" in alt for alt in alts)


def test_each_figure_is_a_document_of_its_own_that_refers_to_nothing_outside(tree):
    assert not list(tree.iter("{http://www.w3.org/2000/svg}svg"))
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
    texts = colours.keys() - grounds - {"card", "line"}
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
    assert report.number(value) == text


def test_a_question_given_twice_is_refused():
    with pytest.raises(RunError, match="'mixed' twice"):
        report.page([question("mixed")] * 2, ENVIRONMENT)


def test_no_question_at_all_is_still_a_page():
    assert "all <b>0</b>" in report.page([], ENVIRONMENT)


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
    assert {url for url in requested if not url.startswith("data:")} == {address}


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


def test_a_choice_shows_the_claims_of_one_verdict(visit):
    tab = visit()
    assert tab.locator(".overview .claim:visible").count() == 6
    for name, count in {"holds": 2, "fails": 1, "undecided": 2, "missing": 1, "all": 6}.items():
        tab.check(f"#show-{name}")
        assert tab.locator(".overview .claim:visible").count() == count
    tab.check("#show-fails")
    assert tab.locator(".overview tbody:visible").count() == 1


def test_a_keyboard_reaches_the_overview_first_and_links_lead_there_and_back(visit):
    tab = visit()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the overview"
    tab.click("#o-absent")
    assert tab.url.endswith("#q-absent")
    tab.click("#q-absent .back a")
    assert tab.url.endswith("#o-absent")


def test_in_print_the_page_is_white_whole_and_fits(visit):
    tab = visit(700, "dark")
    tab.check("#show-fails")
    tab.emulate_media(media="print")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.locator(".overview .claim:visible").count() == 6
    assert all(config.is_visible() for config in tab.locator(".config").all())
    assert all(contrast(*pair) >= 4.5 for pair in tab.evaluate(TEXT_ON_GROUND))
    assert tab.evaluate(STICKING_OUT) == []
    assert tab.pdf(format="A4").startswith(b"%PDF")
