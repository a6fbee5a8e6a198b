"""The command line: `normlab COMMAND`.

A command is a dataclass of its options and a function `run(config)`, both in the
`command.py` of its folder, which is imported when it is asked for and not before.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
from typing import Annotated, Any

import tyro
from rich.table import Column, Table

from .cluster import spelled
from .terminal import (
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    PROGRAM,
    Form,
    errors,
    outcome,
    printing,
    remark,
    report,
    rows_table,
    show,
)

__all__ = ["COMMANDS", "EXIT_INTERRUPTED", "EXIT_USAGE", "main"]

COMMANDS = {
    "compare": (
        ".compare.command:Compare",
        "Train one network under several norms, data-parallel, on real data.",
    ),
    "data": (
        ".data.command:Data",
        "Fetch, verify and prepare data sets, and say where each came from.",
    ),
    "bench": (
        ".bench.command:Bench",
        "Measure speed beside other libraries, and the bytes that programs move.",
    ),
    "numerics": (
        ".numerics.command:Numerics",
        "Measure the error and the cost of each variance algorithm.",
    ),
    "depth": (
        ".depth.command:Depth",
        "Look through the blocks of nets that differ in where their norms stand, or in which.",
    ),
    "invariances": (
        ".numerics.command:Invariances",
        "Show at which spread of the pre-activation ε breaks each invariance.",
    ),
    "family": (
        ".numerics.command:Family",
        "Draw what every norm does to the same batch.",
    ),
    "run": (
        ".asking.command:Run",
        "Run questions: a figure, and for each claim a verdict with its interval over seeds.",
    ),
    "report": (
        ".asking.command:Report",
        "Run questions, by default all of them, and write one page of all their answers.",
    ),
    "verify": (
        ".asking.command:Verify",
        "Run questions, by default those of the last report, and compare the verdicts with it.",
    ),
    "lock": (
        ".asking.command:Lock",
        "Write down the bounds of questions, with the commit that has them and a reason.",
    ),
    "power": (
        ".asking.command:Power",
        "Say how many seeds would decide what is undecided, from its own spread.",
    ),
    "cost": (
        ".asking.command:Cost",
        "Say what questions cost on one GPU, by the operations of their programs.",
    ),
    "ledger": (
        ".programs.command:Ledger",
        "List the collectives of one training step, and what a model says they cost.",
    ),
    "train": (
        ".training.command:Train",
        "Train one network, data-parallel, in one process or many; go on where it was stopped.",
    ),
    "launch": (
        ".training.command:Launch",
        "Run a training run on several processes, and start it again when one dies.",
    ),
    "list": (
        ".console:List",
        "Describe the norms, models, schemes, data sets and questions that there are.",
    ),
}
"""Where the dataclass of each command is, and its first sentence."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    name, rest = _parser().parse_args(given[:1]).command, given[1:]
    fields: list[str] = []
    if name in ("run", "lock", "power", "cost") and "--" in rest:
        rest, fields = rest[: rest.index("--")], rest[rest.index("--") + 1 :]
    try:
        return _run(name, spelled(rest), fields)
    except KeyboardInterrupt:
        errors.print("[yellow]interrupted[/] before there was anything to keep.")
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compare normalizations on real data. Each command has its own --help.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, sentence) in COMMANDS.items():
        commands.add_parser(name, help=sentence, add_help=False)
    return parser


def _run(name: str, arguments: list[str], fields: list[str]) -> int:
    where, _, options = COMMANDS[name][0].partition(":")
    command = importlib.import_module(where, __package__)
    from .data import DataError
    from .rundir import RunError

    try:
        config, form = _parse(name, getattr(command, options), arguments)
        if fields:
            config = dataclasses.replace(config, config=tuple(fields))
        with printing(form):
            return command.run(config)
    except (RunError, DataError) as error:
        return report(error)


@dataclasses.dataclass(frozen=True)
class Output:
    """What every command has beside its own options."""

    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print the result as JSON, and nothing else on standard output."""

    markdown: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print tables as Markdown."""

    @property
    def form(self) -> Form:
        """What results are printed as."""
        return "json" if self.json else "markdown" if self.markdown else "table"


def _parse(name: str, options: type, arguments: list[str]) -> tuple[Any, Form]:
    """The options of a command, and how its results are to be printed."""
    both = dataclasses.make_dataclass(name, (), bases=(Output, options), frozen=True)
    both.__doc__ = options.__doc__
    found: Any = tyro.cli(
        both,
        prog=f"{PROGRAM} {name}",
        args=arguments,
        config=(
            tyro.conf.OmitArgPrefixes,
            tyro.conf.OmitSubcommandPrefixes,
            tyro.conf.ConsolidateSubcommandArgs,
        ),
    )
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(options)}
    return options(**own), found.form


@dataclasses.dataclass(frozen=True)
class List:
    """Describe the norms, models, schemes, data sets and questions that there are."""


def run(config: List) -> int:
    """Prints the norms with what they measure, and the names of everything else."""
    import normlab as nl

    from . import models, questions
    from .data import NAMES

    del config
    norms = Table(
        Column("norm", no_wrap=True), "μ and σ look at", "shift μ", "scale σ", title="norms"
    )
    rows = {name: nl.row(name) for name in nl.names()}
    for name, row in rows.items():
        norms.add_row(name, row.looks_at, row.mu, row.sigma)
    show(norms)
    schemes = nl.placement.names()
    others: dict[str, Any] = {"models": models.MODELS, "schemes": schemes, "data sets": NAMES}
    for what, names in others.items():
        remark(f"{what}: {', '.join(names)}")
    asked = {name: questions.describe(name)["question"] for name in questions.NAMES}
    described = rows_table(("question", "asks"), asked.items())
    described.title = "questions, for `run`"
    show(described)
    outcome(
        norms={
            name: {"looks_at": row.looks_at, "mu": row.mu, "sigma": row.sigma}
            for name, row in rows.items()
        },
        models=list(models.MODELS),
        schemes=list(schemes),
        datasets=list(NAMES),
        questions=asked,
    )
    return 0
