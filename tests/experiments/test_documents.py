"""What the documents name is there."""

import re
import tomllib

import pytest
import yaml

from tests.test_docs import ROOT, python_blocks

DOCS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("**/*.md"))]
PAGES = ["README.md", *(path for path in DOCS if "/_build/" not in path)]
HOWTOS = [path for path in PAGES if path.startswith("docs/howto/")]
HOWTOS.remove(
    "docs/howto/own-question.md"
)  # a file, which tests/experiments/test_own_questions.py runs


@pytest.mark.parametrize("document", PAGES)
def test_links_and_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for target in re.findall(r"`tests/[\w./]+`|`experiments/[\w./]+`", text):
        path = ROOT / target.strip("`")  # or, in the sdist, the package
        assert path.exists() or (ROOT / "normlab" / target.strip("`")).exists(), target


def test_the_readmes_links_are_whole_and_lead_to_pages_and_pictures_of_this_tree():
    """A package index shows the page too, and knows no relative links."""
    text = (ROOT / "README.md").read_text()
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert len(targets) > 10
    for target in targets:
        if page := re.fullmatch(r"https://normlab\.github\.io/normlab/(.+)\.html", target):
            paths = [ROOT / f"docs/{page[1]}{end}" for end in (".md", ".html", ".ipynb")]
            assert any(path.is_file() for path in paths), target
        else:
            file = re.fullmatch(
                r"https://(?:raw\.githubusercontent\.com|github\.com)/normlab/normlab/"
                r"(?:blob/)?main/(.+)",
                target,
            )
            assert file, target
            assert (ROOT / file[1]).is_file(), target


@pytest.mark.parametrize("document", ["docs/quickstart.md", *HOWTOS])
def test_the_examples_of_a_how_to_run(document):
    names: dict = {"__name__": "howto"}
    for block in python_blocks(document):
        exec(compile(block, document, "exec"), names)


def test_the_citation_is_of_this_version_and_has_what_the_format_asks_for():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert cited.keys() >= {"cff-version", "message", "title", "authors"}
    assert cited["cff-version"] == "1.2.0"
    assert all(isinstance(value, str) for key, value in cited.items() if key not in LISTS)
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert [author["name"] for author in cited["authors"]] == [
        a["name"] for a in project["authors"]
    ]


LISTS = ("authors", "keywords")
