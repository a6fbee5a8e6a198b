"""The house: what imports what, what is public, and that the documentation runs."""

import ast
import doctest
import functools
import graphlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normlab
from docs import api

ROOT = Path(normlab.__file__).parent
SKINS = ("normlab.linen", "normlab.nnx")  # the one place where flax is at home
EXPERIMENTS = "normlab.experiments"  # which has a house of its own, and may not be there
ALL = sorted(name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "normlab."))
ALL = [name for name in ALL if not name.startswith(EXPERIMENTS)]
MODULES = [name for name in ALL if not name.startswith((*SKINS, "normlab._flax.installed"))]
FOREIGN = {"chex", "equinox", "flax", "haiku", "keras", "matplotlib", "optax", "orbax"}
FOREIGN |= {"tensorflow", "torch", "transformers"}
PACKAGES = (
    importlib.import_module("normlab._public"),
    normlab.convert,
    normlab.family,
    normlab.folding,
    normlab.instruments,
    normlab.placement,
)
PUBLIC = {
    name: getattr(package, name)
    for package in (*PACKAGES, normlab.combine)
    for name in package.__all__
}


def imports(module: str) -> set[str]:
    """Every module that `module` imports, wherever in the file."""
    path = Path(importlib.import_module(module).__file__)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            found.add(node.module)
    return found


def test_there_are_modules_to_test():
    assert {"normlab.equation", "normlab.measure", "normlab.registry"} <= set(MODULES)


@pytest.mark.parametrize("module", ["normlab", *MODULES])
def test_no_module_imports_a_framework(module):
    assert {name.partition(".")[0] for name in imports(module)}.isdisjoint(FOREIGN)


def test_importing_normlab_loads_no_framework():
    code = "import sys, normlab; print(*{name.partition('.')[0] for name in sys.modules})\n"
    code += code.replace("; print", "; normlab.batch_norm; print")
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    bare, used = (set(line.split()) for line in run.stdout.splitlines())
    assert "normlab" in bare
    assert "jax" not in bare
    assert "jax" in used
    assert used.isdisjoint(FOREIGN)


def test_imports_have_no_cycle_and_point_away_from_the_registry():
    graph = {m: {i for i in imports(m) if i.startswith("normlab")} for m in MODULES}
    del graph["normlab._public"]
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("normlab.measure") < order.index("normlab.population.running")
    assert not any("normlab" in found for found in graph.values()), "imports the package itself"
    # What compares any of the norms, or puts any in the place of another, by name.
    above = {"normlab.instruments.agreement", "normlab._flax.layers", "normlab.rows"}
    above |= {"normlab.placement.schemes", "normlab._flax.exchange"}
    assert {m for m, found in graph.items() if "normlab.registry" in found} == above


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_is_complete_and_sorted(package):
    bound = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    named = {name for name in package.__all__ if not inspect.ismodule(getattr(package, name))}
    assert named == bound
    order = sorted(package.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    assert package.__all__ == order
    assert len(package.__all__) == len(set(package.__all__))


def test_importing_normlab_loads_no_family_that_no_norm_needs():
    code = "import sys, normlab; normlab.get; print(*sys.modules); normlab.folding.fold"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    families = ("normlab.convert", "normlab.folding", "normlab.instruments")
    assert not [name for name in run.stdout.split() if name.startswith(families)]
    assert not hasattr(normlab, "fold_norm")


def test_no_module_is_hidden_by_a_value_of_its_name():
    for name in ALL:
        package, _, last = name.rpartition(".")
        module = importlib.import_module(name)
        assert getattr(importlib.import_module(package), last) is module, name


def test_every_namespace_has_a_page_in_the_reference():
    """Every module of names that one may import, and no other."""
    assert set(api.namespaces()) == {
        "normlab",
        *SKINS,
        EXPERIMENTS,
        *(package.__name__.replace("._public", "") for package in PACKAGES),
        *(f"normlab.{name}" for name in ("combine", "devices", "measure", "population")),
    }


@pytest.mark.parametrize("namespace", api.namespaces())
def test_every_public_name_is_on_a_page_of_the_reference_and_says_what_it_is(namespace):
    public = api.namespaces()[namespace]
    shown = re.findall(
        r"^\.\. (?:auto\w+|py:data):: (\w+)$", api.page(namespace, public), re.MULTILINE
    )
    for name, value in public.items():
        home = api.place(value, f"{namespace}.{name}")
        assert inspect.ismodule(value) or (name in shown) == (home == f"{namespace}.{name}"), name
        assert home.rpartition(".")[0] in api.namespaces()
        assert inspect.getdoc(value) if api.kind(value) != "data" else api.held(value), name


def _functions():
    return [name for name, value in PUBLIC.items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", _functions())
def test_every_public_function_documents_its_arguments(name):
    """By its own Args, in the sentence of a short one, or by the function it refers to."""
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    assert doc.splitlines()[0].endswith(".")
    reference = re.search(r"`(\w+)`, which see", doc)
    while reference:
        seen = inspect.getdoc(PUBLIC[reference[1]])
        doc += seen
        reference = re.search(r"`(\w+)`, which see", seen)
    for parameter in inspect.signature(PUBLIC[name]).parameters:
        assert re.search(rf"\b{parameter}\b", doc), f"{name} does not say what {parameter} is"


@pytest.mark.parametrize("name", [n for n, v in PUBLIC.items() if inspect.isclass(v)])
def test_every_public_class_documents_its_fields(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert doc
    for field in getattr(PUBLIC[name], "_fields", ()):
        assert re.search(rf"^ *{field}: ", doc, re.MULTILINE), f"{name}.{field} has no sentence"


@pytest.mark.parametrize("namespace", api.namespaces())
def test_every_public_class_and_function_has_an_example(namespace):
    parse = doctest.DocTestParser().get_examples
    public = api.namespaces()[namespace].items()
    callables = [
        (name, value) for name, value in public if api.kind(value) in ("class", "function")
    ]
    assert not [name for name, value in callables if not parse(inspect.getdoc(value) or "")]


@functools.cache
def _pages():
    """The page of each public class and function, by the name that doctest has for it."""
    return {
        f"{value.__module__}.{value.__qualname__}": api.place(value, full).rpartition(".")[0]
        for namespace, public in api.namespaces().items()
        for full, value in ((f"{namespace}.{name}", value) for name, value in public.items())
        if api.kind(value) in ("class", "function")
    }


@pytest.mark.parametrize("module", ["normlab", *ALL])
def test_the_examples_in_the_documentation_run(module):
    """Those of public names with what their page says that they begin with, and nothing else."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(importlib.import_module(module)):
        if test.name in _pages():
            test.globs = {"__name__": "__main__"}
            exec("\n".join(api.beginning(_pages()[test.name])), test.globs)
        runner.run(test)
    assert runner.summarize().failed == 0


def test_every_row_of_the_registry_is_documented():
    for name in normlab.names():
        row = normlab.row(name)
        assert row.name == name
        assert inspect.getdoc(row.factory)
        assert row.invariances <= set(normlab.INVARIANCES)
        assert all(isinstance(text, str) and text for text in (row.looks_at, row.mu, row.sigma))
