"""What the README and the docs say is what the code does."""

import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import normlab as nl
from tests.cases import NAMES

ROOT = Path(__file__).parent.parent


def python_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_readme_holds_the_registrys_table():
    readme = (ROOT / "README.md").read_text()
    for name in NAMES:
        row = nl.row(name)
        line = f"| `{name}` | {row.looks_at} | {row.mu} | {row.sigma} | {row.paper} |"
        assert line in readme


def test_the_docs_hold_the_registrys_invariances():
    text = (ROOT / "docs/framework.md").read_text()
    assert "| norm | " + " | ".join(nl.INVARIANCES) + " |" in text
    for name in NAMES:
        held = nl.row(name).invariances
        marks = ("yes" if column in held else "–" for column in nl.INVARIANCES)
        assert f"| `{name}` | " + " | ".join(marks) + " |" in text


def test_the_readmes_example_runs_and_ends_in_the_equation():
    (block,) = python_blocks("README.md")
    names: dict = {}
    exec(block, names)
    parts = nl.Parts(*(names[part] for part in ("mu", "sigma", "g", "b")))
    assert jnp.allclose(names["h"], nl.affine(parts, names["a"]), atol=1e-6)


def test_the_docs_examples_run():
    names = {"nl": nl, "jnp": jnp, "x": jnp.ones((2, 8, 8, 3)), "w": jnp.ones((3, 3, 3, 16))}
    for block in python_blocks("docs/framework.md"):
        exec(block, names)
    norm, a = names["norm"], jnp.array([[1.0, -4.0], [0.0, 2.0]])
    params, state = norm.init(nl.Site(a))
    h, _ = norm.apply(params, state, nl.Site(a), train=True)
    assert jnp.abs(h).max(axis=-1).tolist() == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("document", ["docs/instruments.md", "docs/population.md"])
def test_the_examples_of_a_document_run(document):
    names: dict = {"nl": nl, "jnp": jnp}
    for block in python_blocks(document):
        exec(block, names)
