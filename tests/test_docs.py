"""What the README and the docs say is what the code does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import normlab as nl
from normlab import convert
from tests import reference
from tests.cases import NAMES

ROOT = Path(__file__).parent.parent


def python_blocks(path: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def test_the_docs_hold_the_registrys_invariances():
    text = (ROOT / "docs/framework.md").read_text()
    assert "| norm | " + " | ".join(nl.INVARIANCES) + " |" in text
    for name in NAMES:
        held = nl.row(name).invariances
        marks = ("yes" if column in held else "–" for column in nl.INVARIANCES)
        assert f"| `{name}` | " + " | ".join(marks) + " |" in text


def test_the_page_of_the_family_holds_the_registry_as_it_is():
    assert reference.FAMILY.read_text() == reference.family(), "renew it: make registry"


CALLS = [
    call
    for line in (ROOT / "docs/family.md").read_text().partition(reference.ROWS)[0].splitlines()
    if line.startswith("| ") and line.count(" | ") == 3
    for call in re.findall(r"`(.*?)`", line.split(" | ")[2])
]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_the_family_runs(call):
    a = jax.random.normal(jax.random.key(0), (4, 3, 6))
    x, w = jax.random.normal(jax.random.key(1), (4, 3, 5)), jnp.eye(5, 6) + 0.1
    names = {"nl": nl, "jax": jax, "jnp": jnp, "a": a, "z": a - 1, "style": 2 * a + 1}
    names |= {"params": nl.init_affine(6), "scale": a[:, 0], "shift": a[:, 1]}
    names["state"] = nl.init_running(6)
    made = eval(call, names)
    if not isinstance(made, nl.Norm):
        return
    segments = jnp.array([0, 2, 0, 3]) if "num_segments" in call else None
    site = nl.Site(x @ w, x, w, segments=segments)
    params, state = made.init(site)
    for train in (True, False):
        h, state = made.apply(params, state, site, train=train)
        assert h.shape == a.shape
        assert jnp.isfinite(h).all()


def test_the_page_of_the_family_has_a_call_for_every_norm():
    called = set(re.findall(r'nl\.get\("(\w+)"', "".join(CALLS)))
    assert called == set(nl.names()) - {"none"}


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


def test_the_training_loops_run_for_many_steps_on_simulated_devices():
    """Without waiting for each step XLA's collectives starve each other, and never end."""
    loops = [b for b in python_blocks("docs/framework.md") if "block_until_ready" in b]
    assert len(loops) == 2
    code = "import jax, jax.numpy as jnp, normlab as nl\n" + "\n".join(loops)
    code = code.replace("range(10)", "range(150)") + "\nassert jax.device_count() == 8"
    run = [sys.executable, "-c", f"{code}\nprint(value)"]
    done = subprocess.run(run, env=os.environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3.2  # 6.7 at first


@pytest.mark.parametrize("path", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_every_loop_over_data_parallel_steps_waits_for_each(path):
    for block in python_blocks(path):
        steps = re.findall(r"(\w+)(?:, \w+)* = jax\.(?:pmap|jit\(jax\.shard_map)", block)
        steps += re.findall(r"(\w+), batch = jax\.jit", block)
        for name in steps:
            looped = re.search(rf"for .*:\n(?: +.*\n)*? +.*\b{name}\((?: *.*\n)*", block)
            assert not looped or "block_until_ready" in looped[0], block


@pytest.mark.parametrize(
    "document",
    [
        f"docs/{n}.md"
        for n in ("family", "heads", "instruments", "kernels", "ledger", "placement", "population")
    ],
)
def test_the_examples_of_a_document_run(document):
    names: dict = {"nl": nl, "jnp": jnp}
    for block in python_blocks(document):
        exec(block, names)


def test_the_page_of_placement_has_a_row_for_every_scheme():
    page = (ROOT / "docs/placement.md").read_text().partition("## Write a scheme")[0]
    cells = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = re.findall(r"`(\w+)`", " ".join(cells))
    assert named == list(nl.placement.names())


def test_the_page_of_conversions_has_a_row_for_every_family_of_models():
    table = (ROOT / "docs/convert.md").read_text().partition("| `model_type` |")[2]
    cells = [line.split(" | ")[0] for line in table.partition("\n\n")[0].splitlines()[2:]]
    named = [name for cell in cells for name in re.findall(r"[a-z]\w*", cell)]
    assert set(convert.FAMILIES) <= set(named)
