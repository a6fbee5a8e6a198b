"""The site that `make docs` built, in a real browser: on a phone, a tablet and a screen."""

import functools
import http.server
import threading

import pytest

from tests.experiments.test_report import browser  # noqa: F401
from tests.test_docs import ROOT

SITE = ROOT / "docs/_build/html"
WIDTHS = (390, 800, 1400)
# Not the code that pages lead to, nor the report, which has tests of its own.
PAGES = sorted(
    path.relative_to(SITE).as_posix()
    for path in SITE.rglob("*.html")
    if not {"_modules", "_static"} & {*path.parts} and path.name != "report.html"
)
built = pytest.mark.skipif(not PAGES, reason="the site is not built: make docs")

STICKING_OUT = """() => [...document.querySelectorAll("main *")].filter(e => {
  if (e.getBoundingClientRect().right <= innerWidth + 0.5) return false;
  for (let p = e; p; p = p.parentElement)
    if (getComputedStyle(p).overflowX != "visible") return false;
  return true;
}).map(e => e.outerHTML.slice(0, 200))"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def visit(browser, address):  # noqa: F811
    """Opens a page; afterwards nothing may have gone wrong, but for what another site answers."""
    wrong, tabs = [], {}

    def open_page(page: str, width: int = 1400, scheme: str = "light"):
        if (width, scheme) not in tabs:
            tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            tab.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.on("response", lambda r: r.status >= 400 and wrong.append((r.status, r.url)))
            tab.route("**/*", lambda r: r.continue_() if address in r.request.url else r.abort())
            tabs[width, scheme] = tab
        tabs[width, scheme].goto(address + page)
        return tabs[width, scheme]

    yield open_page
    for context in browser.contexts:
        context.close()
    assert [text for text in wrong if "ERR_FAILED" not in text] == []


@built
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_is_wider_than_the_screen_and_every_picture_is_shown(visit, width):
    for page in PAGES:
        tab = visit(page, width)
        assert tab.evaluate("document.scrollingElement.scrollWidth") <= width, page
        assert tab.evaluate(STICKING_OUT) == [], page
        for image in tab.locator("main img").all():
            size = image.evaluate(
                "e => (e.loading = 'eager', e.decode()).then(() => e.naturalWidth)"
            )
            assert size > 0, (page, image.get_attribute("src"))


@built
@pytest.mark.slow
@pytest.mark.parametrize("width", WIDTHS)
def test_a_search_for_batch_norm_leads_to_its_page(visit, width):
    found = visit("search.html?q=batch_norm", width).locator("#search-results li a")
    found.first.wait_for()
    links = [a.get_attribute("href") for a in found.all()]
    assert any("reference/api/normlab.html#normlab.batch_norm" in link for link in links)


@built
@pytest.mark.slow
def test_dark_is_what_the_system_asks_for_and_a_button_away(visit):
    ground = "getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        tab = visit("index.html", 1400, scheme)
        assert (max(map(int, tab.evaluate(ground)[4:-1].split(","))) > 128) == (scheme == "light")
    tab = visit("index.html")
    for chosen in ("dark", "light"):
        tab.locator(".theme-switch-button").first.click()
        tab.locator(f"[data-mode={chosen}]:visible").last.click()
        assert tab.evaluate("document.documentElement.dataset.theme") == chosen


@built
@pytest.mark.slow
def test_a_link_to_the_report_or_to_a_file_leads_to_it(visit):
    tab = visit("guide.html")
    assert tab.locator("main a[href='report.html']").count()
    assert (SITE / "report.html").exists()
    tab = visit("placement.html")
    files = tab.locator("main a[href^='https://github.com/normlab/normlab/blob/main/experiments/']")
    assert files.count()
    assert tab.locator("main a[download]").count() == 0


@built
def test_a_page_can_be_shared_and_its_code_copied():
    text = (SITE / "reference/api/normlab.html").read_text(encoding="utf-8")
    assert '<meta property="og:title" content="normlab"' in text
    assert "copybutton" in text
    assert 'href="../../_modules/normlab/batch.html#batch_norm"' in text
