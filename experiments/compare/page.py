"""A comparison as one self-contained page of HTML, which lies in its run directory."""

from __future__ import annotations

import collections
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from .. import contents, pages
from ..data import TEXTS
from ..pages import PROJECT, Shared
from ..rundir import Record, RunError
from ..terminal import PROGRAM, counted
from ..training.config import IMAGES, TEXT
from ..training.tasks import Task
from . import figures
from .config import Compare
from .outcome import Outcome
from .tables import Tabled, heading, remarks, spread, tabled, tabled_sweep
from .tuning import SEEDS

PAGE = "report.html"
"""Its name."""

MOST_CURVES = 12
"""Of how many points of a sweep the page has the learning curves."""

_ORDER = ("curves", "rates", "last_layer", "parts")
"""Of the figures of a comparison."""

_ALWAYS = ("dataset", "norms")
"""Options that the command says, whatever stands without them."""

_HIDDEN = ("sweep", "norms")
"""What the folded list of options leaves out: the table has it."""


class Shown(NamedTuple):
    """A figure on the page.

    Attributes:
      svg: The figure.
      caption: What is seen in it.
      alt: The same for who does not see it.
      least: The width in pixels below which its letters are too small.
      folded: What opens it; empty if it is open.
    """

    svg: str
    caption: str
    alt: str
    least: int
    folded: str = ""


class Fact(NamedTuple):
    """Something that the numbers rest on."""

    name: str
    text: str


class File(NamedTuple):
    """A table that the page holds.

    Attributes:
      name: What a browser saves it as.
      what: What it holds.
      address: Its content, as an address.
    """

    name: str
    what: str
    address: str


def page(outcome: Outcome, drawn: Sequence[str]) -> str:
    """The page of a comparison; the same run directory makes the same bytes.

    Args:
      outcome: The comparison.
      drawn: The names of its figures, which lie in its run directory.
    """
    config, path = outcome.config, outcome.run_dir.path
    options = _plain(config.as_json())
    machine = contents.told(path, "environment")
    nets = [row["net"] for row in figures.named(outcome.summary())]
    score = outcome.task.score
    means = [f"{r['net']} {spread(score, r)}" for r in figures.named(outcome.summary())]
    alone = [t for t in outcome.tracks if t.goes_on]
    notices = [*remarks(outcome)]
    if alone:
        notices.insert(0, "The run was stopped before its end: this is what it came to so far.")
    return _render(
        title=f"{_listed(nets)} on {config.dataset}, {config.model}",
        lead=f"One network ({config.model}) with {counted(len(nets), 'norm')}, trained side by "
        f"side on {config.dataset}: the same minibatches, and for each seed the same initial "
        "weights.",
        description=f"{heading(score)} after {counted(config.steps, 'step')}: {', '.join(means)}; "
        f"mean ± standard deviation over {counted(config.seeds, 'seed')}",
        picture="curves.png",
        picture_alt=f"Learning curves of {', '.join(nets)}",
        command=shlex.join(command(options)),
        table=tabled(outcome),
        notices=notices,
        facts=[*facts(options, machine)],
        figures=[_shown(name, outcome, nets) for name in _ORDER if name in drawn],
        data=_data(path, [path]),
        options=options,
        machine=machine,
    )


def sweep_page(path: Path) -> str:
    """The page of a sweep, of its directory.

    Args:
      path: The directory.

    Raises:
      RunError: If no point of it was begun.
    """
    options, told = contents.told(path, "config"), contents.told(path, "summary")
    points: list[Record] = [point for point in told.get("points", ()) if point["norms"]]
    if not points:
        raise RunError(f"{path}: no point of this sweep was begun, so there is nothing to show.")
    swept: Mapping[str, list[str]] = options["sweep"]
    machines = [contents.told(path / point["run"], "environment") for point in points]
    configs = [contents.told(path / point["run"], "config") for point in points]
    scores = [Task.from_json(machine["task"]).score for machine in machines]
    count = 1
    for values in swept.values():
        count *= len(values)
    table = tabled_sweep(points, scores, count, [config["seeds"] for config in configs])
    nets = dict.fromkeys(row[table.names - 1] for row in table.rows)
    common = ", ".join(options[name] for name in ("dataset", "model") if name in options)
    over = " and ".join(swept)
    told_values = "; ".join(f"{name}: {', '.join(values)}" for name, values in swept.items())
    notices = []
    if not told["complete"]:
        notices.append("The sweep was stopped before its end: this is what it came to so far.")
    paths = [path / point["run"] for point in points]
    return _render(
        title=f"{_listed([*nets])}{f' on {common}' if common else ''}, by {over}",
        lead=f"A comparison at each of {counted(count, 'point')} of a grid ({told_values}). At a "
        "point all norms see the same minibatches and begin with the same weights.",
        description=f"{counted(len(nets), 'norm')} at {counted(count, 'point')}, {told_values}",
        picture="",
        picture_alt="",
        command=shlex.join(command(options)),
        table=table,
        notices=notices,
        facts=[*facts(options, machines[0])],
        figures=[*_points(paths)],
        data=_data(path, paths),
        options=options,
        machine=machines[0],
    )


def command(options: Mapping[str, Any]) -> list[str]:
    """The words that make a run again: what its config.json says that does not stand without it.

    >>> command({"dataset": "digits", "model": "mlp", "norms": ["none", "batch"], "seeds": 3})[1:]
    ['compare', '--dataset', 'digits', '--model', 'mlp', '--norms', 'none', 'batch']

    Args:
      options: What config.json says, of a run or of a sweep.
    """
    swept = options.get("sweep", {})
    first = {name: values[0] for name, values in swept.items()} | dict(options)
    dataset = first["dataset"]
    given = {"dataset": dataset, "model": first["model"], "evaluations": 1}
    default = _plain(Compare(**given, steps=int(first["steps"])).as_json()) | {
        "model": (TEXT if dataset in TEXTS else IMAGES)["model"],
        "steps": Compare.steps,
        "evaluations": Compare.evaluations,
    }
    found = [*shlex.split(PROGRAM), "compare"]
    for name, value in options.items():
        several = name == "lr" and (options.get("rates") or "rates" in swept)
        if name == "sweep" or several or value is None or value == []:
            continue
        if value != default.get(name) or name in _ALWAYS:
            option = name.replace("_", "-")
            if isinstance(value, bool):
                found.append(f"--{option}" if value else f"--no-{option}")
            else:
                words = value if isinstance(value, list) else [value]
                found += [f"--{option}", *map(str, words)]
    grid = [f"{name}={','.join(values)}" for name, values in swept.items()]
    return [*found, *(["--sweep", *grid] if grid else [])]


def facts(options: Mapping[str, Any], machine: Mapping[str, Any]) -> Iterable[Fact]:
    """What the numbers rest on, as far as all points of a sweep have it in common.

    Args:
      options: What config.json says.
      machine: What environment.json says.
    """
    swept = options.get("sweep", {})

    def told(name: str, words: str) -> list[str]:
        """The words with the value of an option, if it has one."""
        value = options.get(name)
        return [words.format(_words(value))] if value not in (None, [], 0, 0.0) else []

    if "dataset" not in swept and "dataset" in machine:
        data = machine["dataset"]
        checksum = f", SHA-256 `{data['sha256'][:12]}`"
        yield Fact("Data", f"{data['name']}, {data['origin']}{checksum}")
    seeds = told("seeds", "{}, of initial weights and minibatches")
    if seeds:
        yield Fact("Seeds", seeds[0])
    trained = [
        *told("steps", "{} steps"),
        *told("batch_size", "batches of {}"),
        *told("optimizer", "{}"),
        *(told("schedule", "{} schedule") if options.get("schedule") != "constant" else ()),
        *told("warmup", "{} steps of warm-up"),
        *told("weight_decay", "weight decay {}"),
        *told("clip", "gradients cut to {}"),
        *told("augment", "augmented: {}"),
        *told("scheme", "scheme {}"),
        *told("schemes", "schemes {}"),
        *told("depth", "depth {}"),
        *told("width", "width {}"),
    ]
    if trained:
        yield Fact("Training", ", ".join(trained))
    if not {"lr", "rates", "lr_of", "tune"} & {*swept}:
        yield Fact("Rate", _rate(options, text=options.get("dataset") in TEXTS))
    devices = []
    if "devices" in options:
        count = options["devices"]
        devices.append(counted(count, "device") + (", which share each batch" if count > 1 else ""))
    devices += [
        *told("mesh", "mesh {}"),
        *(told("microbatches", "{} microbatches") if options.get("microbatches", 1) > 1 else ()),
        *(told("sync", "batch statistics over: {}") if options.get("devices") != 1 else ()),
    ]
    if devices:
        yield Fact("Devices", "; ".join(devices))
    own = [
        word
        for name in ("dataset", "model", "norms")
        for word in _listing(options.get(name, swept.get(name, ())))
        if ":" in word
    ]
    if own:
        modules = ", ".join(f"`{m}`" for m in dict.fromkeys(w.partition(":")[0] for w in own))
        yield Fact("Own", f"The command needs {modules}, which is no part of normlab.")
    there = collections.Counter(machine.get("devices", ()))
    devices = ", ".join(f"{count} × {name}" for name, count in there.items())
    cores = counted(machine["cores"], "core")
    yield Fact("Machine", f"{devices}; {cores}, {machine['processor']}")
    versions = {"Python": machine["python"], **machine["packages"]}
    yield Fact("Versions", ", ".join(f"{name} {v}" for name, v in versions.items() if v))
    commit = f", commit `{machine['commit']}`" if machine.get("commit") else ""
    yield Fact("Date", f"{machine['time'][:10]}{commit}")


def _rate(options: Mapping[str, Any], *, text: bool) -> str:
    """How the learning rate was chosen."""
    rates = _words(options.get("rates") or [])
    if options.get("tune"):
        where = "the validation set" if text else "a tenth of the training images, held out"
        return (
            f"each norm’s own, tuned on {where}, with {counted(SEEDS, 'seed')} that nothing else "
            "has; the test set had no part in it"
        )
    if rates:
        if text:
            return f"each norm at the best of {rates}, chosen on the validation set"
        return (
            f"each norm at the best of {rates}, chosen on the test set, so the scores are a little "
            "too good; --tune holds images out for the choice"
        )
    said = f"{options['lr']:g} for all norms"
    if options.get("lr_of"):
        said = f"given: {_words(options['lr_of'])}; {options['lr']:g} for others"
    return f"{said}, not tuned: at other rates the order may be another"


def _shown(name: str, outcome: Outcome, nets: Sequence[str]) -> Shown:
    """A figure of a comparison."""
    svg = (outcome.run_dir.path / f"{name}.svg").read_text(encoding="utf-8")
    of, score = _listed(nets, most=12), outcome.task.score
    along, _ = outcome.task.along(outcome.config.batch_size)
    captions = {
        "curves": f"Learning curves: the training loss (left) and {score.drawn} (right) against "
        f"the {along}. Lower is better. Lines are the median seed, bands reach over all seeds.",
        "rates": f"The {score.drawn} at the end against the learning rate. Lower is better. Lines "
        "are the median seed, bands reach over all seeds; crosses are runs that diverged.",
        "last_layer": "The four parts of each norm, h = g · (a − μ) / σ + b, in the last layer "
        "with a norm, through training. Lines are medians over channels and examples, bands reach "
        "from 15 % to 85 %.",
        "parts": "The same layer by layer: a column for each layer, a row for each part.",
    }
    kinds = {
        "curves": f"Two panels of curves, for {of}: training loss and {score.drawn}.",
        "rates": f"Curves of the {score.drawn} against the learning rate, for {of}.",
        "last_layer": f"Four panels, shift μ, scale σ, gain g and bias b, with curves for {of}.",
        "parts": f"Panels of shift μ, scale σ, gain g and bias b in each layer, for {of}.",
    }
    folded = "The four parts in every layer" if name == "parts" else ""
    more = " The table has the numbers at the end." if name in ("curves", "rates") else ""
    return Shown(svg, captions[name], kinds[name] + more, _least(svg), folded)


def _points(paths: Sequence[Path]) -> Iterable[Shown]:
    """The learning curves at the points of a sweep, of not too many."""
    if len(paths) > MOST_CURVES:
        return
    for path in paths:
        if (path / "curves.svg").exists():
            svg = (path / "curves.svg").read_text(encoding="utf-8")
            said = f"Learning curves at {path.name.replace(',', ', ')}"
            caption = f"{said}. Lines are the median seed, bands reach over all seeds."
            yield Shown(svg, caption, f"{said}, a curve for each norm.", _least(svg), said)


def _least(svg: str) -> int:
    """Two thirds of its width; of a narrow figure, whose letters are large, nothing."""
    width, _ = pages.size(svg)
    return 0 if width < 640 else round(0.66 * width)


def _data(path: Path, runs: Sequence[Path]) -> list[File]:
    """What was measured: lines as `export` has them, and of a lone run the four parts."""
    lines = [line for run in runs for line in contents.lines(run)]
    scores = [line for line in lines if line.get("kind") != "part"]
    name = path.resolve().name
    found = [
        _file(f"{name}.csv", f"{counted(len(scores), 'measurement')} of loss and score", scores)
    ]
    parts = (
        [record for record in contents.records(path) if record.get("kind") == "part"]
        if ([*runs] == [path])
        else []
    )
    if parts:
        found.append(_file(f"{name}-parts.csv", f"{len(parts):,} of the four parts", parts))
    return found


def _file(name: str, what: str, lines: Sequence[Record]) -> File:
    csv = pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")
    return File(name, what, pages.table(csv))


def _render(
    *,
    title: str,
    lead: str,
    description: str,
    picture: str,
    picture_alt: str,
    command: str,
    table: Tabled,
    notices: Sequence[str],
    facts: Sequence[Fact],
    figures: Sequence[Shown],
    data: Sequence[File],
    options: Mapping[str, Any],
    machine: Mapping[str, Any],
) -> str:
    said = f"{description}."
    return (
        pages.engine(Path(__file__).parent)
        .get_template("page.html.j2")
        .render(
            title=title,
            shared=Shared(said, said, picture, picture_alt),
            date=machine["time"][:10],
            lead=lead,
            command=command,
            table=table,
            notices=notices,
            facts=facts,
            figures=figures,
            data=data,
            options={k: v for k, v in options.items() if k not in _HIDDEN},
            project=PROJECT,
            program=PROGRAM,
        )
    )


def _listed(names: Sequence[str], most: int = 5) -> str:
    """Norms in words: `none, batch and layer`, or how many there are."""
    if len(names) > most:
        return counted(len(names), "norm")
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _listing(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [word for v in value for word in v.split()]


def _words(value: Any) -> str:
    return (
        ", ".join(map(_words, value))
        if isinstance(value, list)
        else (f"{value:g}" if isinstance(value, float) else str(value))
    )


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """As config.json has them."""
    return json.loads(json.dumps(options))
