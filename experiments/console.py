"""The command line: `normlab COMMAND`.

A command has a folder: in `config.py` a dataclass of its options, which says `--help` and refuses
what cannot be run, and in `command.py` a function `run(config)`. What is in `config.py` imports
neither JAX nor what needs it, at the top; `command.py` is imported once the options are accepted.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro

from normlab.errors import nearest

from .cluster import spelled
from .rundir import RunError
from .terminal import EXIT_INTERRUPTED, EXIT_USAGE, PROGRAM, Form, errors, printing, report, stopped

__all__ = ["COMMANDS", "EXIT_INTERRUPTED", "EXIT_USAGE", "main"]

COMMANDS = {
    "compare": (
        "compare:Compare",
        "Train one network under several norms, data-parallel, on real data.",
    ),
    "data": (
        "data:Data",
        "Fetch, verify and prepare data sets, and say where each came from.",
    ),
    "bench": (
        "bench:Bench",
        "Measure speed beside other libraries, and the bytes that programs move.",
    ),
    "numerics": (
        "numerics:Numerics",
        "Measure the error and the cost of each variance algorithm.",
    ),
    "depth": (
        "depth:Depth",
        "Look through the blocks of nets that differ in where their norms stand, or in which.",
    ),
    "invariances": (
        "numerics:Invariances",
        "Show at which spread of the pre-activation ε breaks each invariance.",
    ),
    "family": (
        "numerics:Family",
        "Draw what every norm does to the same batch.",
    ),
    "run": (
        "asking:Run",
        "Run questions: a figure, and for each claim a verdict with its interval over seeds.",
    ),
    "report": (
        "asking:Report",
        "Run questions, by default all of them, and write one page of all their answers.",
    ),
    "verify": (
        "asking:Verify",
        "Run questions, by default those of the last report, and compare the verdicts with it.",
    ),
    "lock": (
        "asking:Lock",
        "Write down the bounds of questions, with the commit that has them and a reason.",
    ),
    "power": (
        "asking:Power",
        "Say how many seeds would decide what is undecided, from its own spread.",
    ),
    "cost": (
        "asking:Cost",
        "Say what questions cost on one GPU, by the operations of their programs.",
    ),
    "ledger": (
        "programs:Ledger",
        "List the collectives of one training step, and what a model says they cost.",
    ),
    "train": (
        "training:Train",
        "Train one network, data-parallel, in one process or many; go on where it was stopped.",
    ),
    "launch": (
        "training:Launch",
        "Run a training run on several processes, and start it again when one dies.",
    ),
    "figures": (
        "redraw:Figures",
        "Draw the figures of runs again, from their directories, and the page of a comparison.",
    ),
    "export": (
        "results:Export",
        "Write what runs measured as one table, or to a dashboard.",
    ),
    "list": (
        "listing:List",
        "Describe the norms, models, schemes, data sets and questions that there are.",
    ),
}
"""Where the dataclass of each command is, and its first sentence."""


def main(arguments: list[str] | None = None, begin: Callable[[], object] = lambda: None) -> int:
    """Runs one command; returns the exit status.

    Args:
      arguments: Its name and its options, by default those of this process.
      begin: Called once the options are accepted and all is imported.
    """
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and not given[0].startswith("-") and given[0] not in COMMANDS:
            raise RunError(f"there is no command {given[0]!r}: {nearest(given[0], COMMANDS)}")
        name, rest = _parser().parse_args(given[:1]).command, given[1:]
        return _run(name, rest, begin)
    except KeyboardInterrupt as error:
        errors.print("[yellow]interrupted[/] before there was anything to keep.")
        return stopped(error)
    except RunError as error:
        return report(error)
    except Exception as error:
        from .data import DataError  # which loads NumPy

        if isinstance(error, DataError):
            return report(error)
        raise


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compare normalizations on real data. Each command has its own --help.",
    )
    version = importlib.metadata.version("normlab")
    parser.add_argument("--version", action="version", version=f"normlab {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, sentence) in COMMANDS.items():
        commands.add_parser(name, help=sentence, add_help=False)
    return parser


def _run(name: str, arguments: list[str], begin: Callable[[], object]) -> int:
    folder, _, options = COMMANDS[name][0].partition(":")
    known: Any = getattr(importlib.import_module(f".{folder}.config", __package__), options)
    arguments, rest = spelled(arguments), None
    fields = {field.name: field for field in dataclasses.fields(known)}
    if "config" in fields and fields["config"].default == ():  # what follows --
        at = arguments.index("--") if "--" in arguments else len(arguments)
        arguments, rest = arguments[:at], tuple(arguments[at + 1 :])
        _require_known(name, known, arguments, rest)
    parts = getattr(known, "SUBCOMMANDS", {})  # whose --help is their own
    part = arguments[0] if arguments and arguments[0] in parts else None
    read = functools.partial(
        _parse,
        known if part is None else parts[part],
        f"{PROGRAM} {name}" if part is None else f"{PROGRAM} {name} {part}",
    )
    parse = getattr(known, "parse", None)  # of a command with options that name files, or grids
    given = arguments if part is None else arguments[1:]
    config, form = parse(read, given) if parse else read(given)
    config = config if part is None else known(config)
    if rest:
        config = dataclasses.replace(config, config=rest)
    command = importlib.import_module(f".{folder}.command", __package__)
    begin()
    with printing(form):
        return command.run(config)


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


def _parse(
    options: Any, program: str, arguments: Sequence[str], default: Any = None
) -> tuple[Any, Form]:
    """The options of a command, and how its results are to be printed.

    Args:
      options: The dataclass.
      program: What is before the arguments.
      arguments: What was given.
      default: What holds where nothing was given, if not the dataclass's own.
    """
    both = dataclasses.make_dataclass(options.__name__, (), bases=(Output, options), frozen=True)
    both.__doc__ = options.__doc__
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    more: dict[str, Any] = {}
    if default is not None:
        names = (field.name for field in dataclasses.fields(options))
        more["default"] = both(**{name: getattr(default, name) for name in names})
    found: Any = tyro.cli(both, prog=program, args=arguments, config=config, **more)
    own = {field.name: getattr(found, field.name) for field in dataclasses.fields(options)}
    if found.json and found.markdown:
        raise RunError("--markdown: it has no effect beside --json. Leave one of them out.")
    return options(**own), found.form


def _require_known(name: str, known: Any, arguments: list[str], rest: Sequence[str]) -> None:
    """Raises RunError for an option that only one of the question can be, with the command.

    What is near an option of the command is left to tyro, which names that.
    """
    fields = (*dataclasses.fields(known), *dataclasses.fields(Output))
    own = [f"--{field.name.replace('_', '-')}" for field in fields]
    own += ["--help", *(f"--no-{option[2:]}" for option in own)]
    mine: list[str] = []
    theirs: list[str] = []
    into = mine
    for word in arguments:
        if word.startswith("-") and not word[1:2].isdigit():  # a negative number is a value
            option = word.partition("=")[0].replace("_", "-")
            near = difflib.get_close_matches(option, own, 1, 0.8)
            into = mine if near or not option.startswith("--") else theirs
        into.append(word)
    if theirs:
        option = theirs[0].partition("=")[0]
        others = [
            other
            for other, (place, _) in COMMANDS.items()
            if (of := getattr(sys.modules[known.__module__], place.partition(":")[2], None))
            and option.removeprefix("--").replace("-", "_")
            in {f.name for f in dataclasses.fields(of)}
        ]
        if others:
            raise RunError(
                f"{option}: it has no effect on {name}, only on {', '.join(others)}. Leave it out."
            )
        command = shlex.join([*mine, "--", *theirs, *rest])
        raise RunError(
            f"{name} has no option {option}. Options of the question come after --: {PROGRAM} "
            f"{name} {command}"
        )
