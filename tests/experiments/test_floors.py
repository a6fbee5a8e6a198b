"""The house of the experiments: arrows point down, from a floor to one below it."""

import ast
import graphlib
import importlib.util
from pathlib import Path

from normlab import experiments

FLOORS = (
    {"__main__"},
    {"console"},
    {"results"},
    {"asking", "bench", "listing", "redraw"},
    {"questions", "compare", "depth", "programs"},
    {"engine", "numerics"},
    {"training"},
    {"cluster", "contents", "data", "figures", "grids", "models", "pages", "writers"},
    {"rundir", "terminal"},
)
EXPERIMENTS = Path(experiments.__file__).resolve().parent


def imports() -> dict[str, set[str]]:
    """What each module of the experiments imports of them, by name without the package."""
    names = {
        ".".join(path.relative_to(EXPERIMENTS).with_suffix("").parts).removesuffix(".__init__")
        for path in EXPERIMENTS.rglob("*.py")
    }
    graph = {}
    for name in names - {"__init__"}:
        path = EXPERIMENTS.joinpath(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        package = ".".join(("experiments", *path.relative_to(EXPERIMENTS).parent.parts))
        found = set()
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                module = importlib.util.resolve_name(
                    "." * node.level + (node.module or ""), package
                )
                inside = module.removeprefix("experiments").removeprefix(".")
                for alias in node.names:
                    whole = f"{inside}.{alias.name}".removeprefix(".")
                    found.add(whole if whole in names else inside)
            else:  # under another name there is no `experiments`
                assert "experiments" not in getattr(node, "module", "").split("."), path
        graph[name] = found - {name}
    return graph


def test_the_experiments_import_downwards_and_in_no_circle():
    graph = imports()
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    floor = {room: at for at, rooms in enumerate(FLOORS) for room in rooms}
    assert {name.partition(".")[0] for name in graph} == set(floor)
    for name, found in graph.items():
        for other in found:
            here, there = name.partition(".")[0], other.partition(".")[0]
            assert here == there or floor[here] < floor[there], f"{name} imports {other}"
