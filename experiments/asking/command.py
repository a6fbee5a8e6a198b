"""The commands that ask the questions: `run`, `report`, `verify` and others."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path

from rich.table import Table

from .. import figures, questions, terminal
from ..rundir import RunError, environment
from ..terminal import outcome, print_paths
from . import archive, findings, guide, references, tables
from .answers import answer_json, answers, print_answer, status
from .config import Cost, Lock, Power, Report, Run, Verify
from .cost import cost
from .kept import as_json, verdict_json
from .page import page, summary, title
from .power import power
from .section import section
from .sweep import sweep
from .thresholds import history, lock, require
from .verify import verify

DECISIONS = ("holds", "fails", "undecided")


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
    command.require_names()
    if command.sweep:
        return sweep(command, command.config, [*itertools.chain(*command.sweep)])
    found = []
    for answer in answers(command, command.names, command.config):
        found.append(answer)
        if not answer.failed:
            print_answer(answer)
        outcome(questions=[answer_json(answer) for answer in found])
    return status(found)


def report(command: Report) -> int:
    """Runs the questions and writes the page."""
    names = tuple(dict.fromkeys(command.names or questions.NAMES))
    found = {a.name: a for a in answers(command, names)}
    told = [found[name] for name in names]
    locked, known = history(), references.known(names)
    require(told, locked)
    references.require((v for a in told for v in a.verdicts), known)
    machine = environment()
    sections = [section(answer, locked) for answer in told]
    out = command.page.expanduser().resolve()
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
    shown = {"told": opening or findings.bare(sections), "intervals": not opening}
    drawn = findings.picture(title(sections), summary(sections), **shown)
    whole[image] = figures.encode(drawn, "png")
    if command.archive is not None:
        runs = [a.path for a in told if a.path is not None and not a.failed]
        whole[command.archive.expanduser().resolve()] = archive.pack(runs)
    for path, content in whole.items():
        write(path, content)
    counts = Table("question", *DECISIONS, "seconds", title="report")
    for answer in told:
        decisions = [v.decision for v in answer.verdicts]
        cells = (str(decisions.count(d)) for d in DECISIONS)
        counts.add_row(answer.name, *cells, f"{answer.seconds:.0f}" if answer.path else "missing")
    terminal.show(counts)
    outcome(
        questions=[
            {
                "question": a.name,
                **{d: [v.decision for v in a.verdicts].count(d) for d in DECISIONS},
                "seconds": a.seconds if a.path else None,
                "failed": a.failed,
            }
            for a in told
        ]
    )
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
