"""What the documents name is there."""

import re

import pytest

from tests.test_docs import ROOT


@pytest.mark.parametrize(
    "document",
    ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))],
)
def test_links_and_files_that_are_named_exist(document):
    text = (ROOT / document).read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert ((ROOT / document).parent / target).exists(), target
    for target in re.findall(r"`(tests/[\w./]+|experiments/[\w./]+)`", text):
        assert (ROOT / target).exists(), target
