"""The commands that ask the questions: `run`, `report`, `verify` and others."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from .. import figures, questions
from ..rundir import RunError, environment, runs
from ..terminal import console, print_paths
from . import archive, findings, guide, references, tables
from .answers import Ask, answers, print_answer, status
from .cost import Cost, cost
from .kept import as_json, verdict_json
from .page import TITLE, page, summary
from .power import Power, power
from .section import section
from .sweep import sweep
from .thresholds import Lock, history, lock, require
from .verify import Verify, verify


@dataclasses.dataclass(frozen=True)
class Run(Ask):
    """Run questions: a figure, and for each claim a verdict with its interval over seeds.

    What was measured is kept: the same command goes on where a run was stopped, and shows again
    what is finished. After `--` follow fields of the config: run NAME -- --model vgg --seeds 5.
    """

    sweep: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """A grid over fields of the config, --sweep lr=0.01,0.1 seeds=3: the question is asked at every
    point, and one table says what they came to, here and as CSV and JSON beside the runs. Values
    are read as the options after -- are; several words of one are quoted, "norms=none,none batch".
    """

    config: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """What followed `--`."""


@dataclasses.dataclass(frozen=True)
class Report(Ask):
    """Run questions, by default all of them, and write one page of all their answers."""

    out: Path = dataclasses.field(default_factory=lambda: runs() / "report.html")
    """The page. Beside it, with its name before theirs, the verdicts as JSON, the claims and their
    effects as CSV and Parquet, and the sources as BibTeX; and if no claim lacks that it cites, the
    guide: which norm, where and when. A picture, with its name and .png, is for sharing it."""

    url: str = ""
    """Where the page will be found, https://example.org/report.html: where it is shared, its
    picture is looked for beside that."""

    archive: Path | None = None
    """A zip file for the records of these questions: whoever has it has what was measured."""

    def __post_init__(self) -> None:
        """Raises RunError for a page in the place of its data, as well."""
        super().__post_init__()
        if self.out.suffix.lower() not in (".html", ".htm", ".xhtml"):
            raise RunError(
                f"--out: got {self.out}, but it is a page, and its data lie beside it. Name it "
                f"{self.out.stem or 'report'}.html for example."
            )
        if self.archive is not None and self.archive.suffix.lower() != ".zip":
            raise RunError(
                f"--archive: got {self.archive}, but it is a zip file. Name it "
                f"{self.archive.stem or 'records'}.zip for example."
            )


def run(config: Run | Report | Verify | Power | Lock | Cost) -> int:
    """Runs the questions; then prints what each came to, writes the page, or compares."""
    if isinstance(config, Report):
        return report(config)
    if isinstance(config, Verify):
        return verify(config)
    if isinstance(config, Power):
        return power(config)
    if isinstance(config, Lock):
        return lock(config)
    if isinstance(config, Cost):
        return cost(config)
    return show(config)


def show(command: Run) -> int:
    """Runs the questions and prints what each came to."""
    if not command.names:
        raise RunError(f"name a question: {', '.join(questions.NAMES)}.")
    if command.sweep:
        return sweep(command, command.config, [*itertools.chain(*command.sweep)])
    found = []
    for answer in answers(command, command.names, command.config):
        found.append(answer)
        if not answer.failed:
            print_answer(answer)
    return status(found)


def report(command: Report) -> int:
    """Runs the questions and writes the page."""
    names = tuple(dict.fromkeys(command.names or questions.NAMES))
    found = {a.name: a for a in answers(command, names)}
    told = [found[name] for name in names]
    locked, known = history(), references.read()
    require(told, locked)
    references.require((v for a in told for v in a.verdicts), known)
    machine = environment()
    sections = [section(answer, locked) for answer in told]
    out = command.out.expanduser().resolve()
    beside = {f"{out.stem}-{end}": content for end, content in tables.files(sections).items()}
    cited = {v.source.key for a in told for v in a.verdicts if v.source}
    bibtex = "\n\n".join(known[key].bibtex for key in sorted(cited)) + "\n"
    beside[f"{out.stem}-sources.bib"] = bibtex.encode()
    configs = {a.name: as_json(a.config) for a in told}
    verdicts = {a.name: [verdict_json(v) for v in a.verdicts] for a in told}
    said = {"environment": machine, "configs": configs, "verdicts": verdicts}
    beside[f"{out.stem}.json"] = (json.dumps(said, indent=1) + "\n").encode()
    links = {name.removeprefix(f"{out.stem}-"): name for name in beside}
    name = "guide" if out.stem == "report" else f"{out.stem}-guide"
    guided = guide.files(tables.claims(sections), out.name, name)
    whole = {out.with_name(name): content for name, content in {**beside, **guided}.items()}
    link = f"{name}.html" if guided else ""
    opening, image = findings.tell(findings.read(), sections), out.with_suffix(".png")
    shared = {"told": opening, "picture": image.name, "url": command.url}
    whole[out] = page(sections, machine, known, links, link, **shared).encode()
    whole[image] = figures.encode(findings.picture(TITLE, summary(sections), opening), "png")
    if command.archive is not None:
        runs = [a.path for a in told if a.path is not None and not a.failed]
        whole[command.archive.expanduser().resolve()] = archive.pack(runs)
    for path, content in whole.items():
        write(path, content)
    counts = Table("question", "holds", "fails", "undecided", "seconds", title="report")
    for answer in told:
        decisions = [v.decision for v in answer.verdicts]
        cells = (str(decisions.count(d)) for d in ("holds", "fails", "undecided"))
        counts.add_row(answer.name, *cells, f"{answer.seconds:.0f}" if answer.path else "missing")
    console.print(counts)
    print_paths({"page": out, **({"archive": command.archive} if command.archive else {})})
    return status(told)


def write(path: Path, content: bytes) -> None:
    """Writes a file of the report; it appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror}. Choose another place with --out or --archive; "
            "what was measured is kept."
        ) from error
