"""The options of the commands that ask the questions."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .. import questions
from ..cluster import require_address
from ..rundir import RunError, runs

REPORT = Path(questions.__file__).with_name("report.json")
"""The verdicts of the last report."""

Rest = Annotated[tuple[str, ...], tyro.conf.Suppress]
"""What followed `--`: options of the questions' configs."""


@dataclasses.dataclass(frozen=True)
class Choose:
    """Which questions, with which data."""

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Which questions (`normlab list`); one of your own by its file or module: my_net.py,
    mypackage.my_question."""

    profile: Literal["quick", "full"] = "quick"
    """Minutes on two cores, or the paper's protocol on a GPU."""

    data_dir: Path | None = None
    """Where prepared data sets are kept; by default $NORMLAB_DATA_DIR or data/."""

    def __post_init__(self) -> None:
        """Raises RunError for an unknown question, before any is run."""
        if wrong := next((name for name in self.names if name.startswith("-")), None):
            raise RunError(
                f"{wrong} came after --, but this command has no options of the questions. Give "
                "its own before it."
            )
        object.__setattr__(self, "names", tuple(map(questions.find, self.names)))


@dataclasses.dataclass(frozen=True)
class Ask(Choose):
    """What the commands that measure have in common."""

    jobs: int | None = None
    """Worker processes: by default one for each core, or one in the full profile. 0 works in this
    process."""

    ray: str | None = None
    """A Ray cluster to measure on, as ray.init(address=...) takes it, or auto; without an address
    one is started on this machine. Each of its cores, or of its GPUs, is a worker."""

    minutes: float | None = None
    """Stop after so long, as Ctrl-C does; the same command goes on. For a machine that is lent for
    some minutes."""

    again: bool = False
    """Measure again what is finished. Without it a question is measured once for a config, a
    version of the code and a checksum of the data."""

    run_dir: Path | None = None
    """Where the results go, a directory for each question in it. By default runs/questions."""

    def __post_init__(self) -> None:
        """Raises RunError for a number that is none, or an address, as well."""
        super().__post_init__()
        if self.jobs is not None and self.jobs < 0:
            raise RunError(f"--jobs: got {self.jobs}; it must be 0 or more.")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise RunError(f"--minutes: got {self.minutes}; it must be positive and finite.")
        require_address(self.ray)
        if self.ray is not None and self.jobs == 0:
            raise RunError("--jobs: got 0; beside --ray it must be 1 or more, or left out.")

    def require_names(self) -> None:
        """Raises RunError if no question is named."""
        if not self.names:
            raise RunError(f"name a question: {', '.join(questions.NAMES)}.")


@dataclasses.dataclass(frozen=True)
class Run(Ask):
    """Run questions: a figure, and for each claim a verdict with its interval over seeds.

    What was measured is kept: the same command goes on where a run was stopped, and shows again
    what is finished. After `--` follow options of the question, as `run NAME -- --help` lists them:
    run NAME -- --model vgg --seeds 5.
    """

    sweep: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """A grid over options of the question, --sweep lr=0.01,0.1 seeds=3: it is asked at every point,
    and one table says what they came to, here and as CSV and JSON beside the runs. Values are read
    as the options after -- are; several words of one are quoted, "norms=none,none batch"."""

    config: Rest = ()


@dataclasses.dataclass(frozen=True)
class Report(Ask):
    """Run questions, by default all of them, and write one page of all their answers."""

    out: Path | None = None
    """The page; by default report.html in --run-dir, or in runs. Beside it, with its name before
    theirs, the verdicts as JSON, the claims and their effects as CSV and Parquet, and the sources
    as BibTeX; and if no claim lacks that it cites, the guide: which norm, where and when. A
    picture, with its name and .png, is for sharing it."""

    url: str = ""
    """Where the page will be found, https://example.org/report.html: where it is shared, its
    picture is looked for beside that."""

    archive: Path | None = None
    """A zip file for the records of these questions: whoever has it has what was measured."""

    def __post_init__(self) -> None:
        """Raises RunError for a page in the place of its data, as well."""
        super().__post_init__()
        out = self.page
        if out.suffix.lower() not in (".html", ".htm", ".xhtml"):
            raise RunError(
                f"--out: got {out}, but it is a page, and its data lie beside it. Name it "
                f"{out.stem or 'report'}.html for example."
            )
        if self.archive is not None and self.archive.suffix.lower() != ".zip":
            raise RunError(
                f"--archive: got {self.archive}, but it is a zip file. Name it "
                f"{self.archive.stem or 'records'}.zip for example."
            )

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return self.out if self.out is not None else (self.run_dir or runs()) / "report.html"


@dataclasses.dataclass(frozen=True)
class Verify(Ask):
    """Run questions, by default those of the last report, and compare the verdicts with it."""

    against: Path = REPORT
    """The verdicts of a report."""


@dataclasses.dataclass(frozen=True)
class Lock(Ask):
    """Write down the bounds of questions, with the commit that has them and a reason.

    The claims of a question are known once it has been asked; a pilot will do:
    lock NAME --reason TEXT -- --seeds 2 --first-seed 0.
    """

    reason: str = ""
    """Where the bounds come from, or why they were changed; it is shown on the page."""

    config: Rest = ()

    def __post_init__(self) -> None:
        """Raises RunError for a question that has no place among those of the report, as well."""
        super().__post_init__()
        for name in self.names:
            if name not in questions.NAMES:
                raise RunError(
                    f"lock: {name} is a question of yours, whose bounds are kept with its records "
                    "when they are first judged: there is nothing to lock."
                )


@dataclasses.dataclass(frozen=True)
class Power(Ask):
    """Say how many seeds would decide what is undecided, from its own spread.

    What was measured is kept, as by `run`. After `--` follow options of the question.
    """

    wanted: float = 0.8
    """The power: how likely the claim is to be decided, if the true effect is the one found."""

    all: bool = False
    """Whether decided claims are listed as well: how many seeds would have done."""

    config: Rest = ()

    def __post_init__(self) -> None:
        """Raises RunError for a power that is none, as well."""
        super().__post_init__()
        if not 0 < self.wanted < 1:
            raise RunError(f"--wanted: got {self.wanted}; it must be between 0 and 1.")


@dataclasses.dataclass(frozen=True)
class Cost(Choose):
    """Say what questions cost on one GPU, by the operations of their programs."""

    profile: Literal["quick", "full"] = "full"
    """The paper's protocol on a GPU, or minutes on two cores."""

    config: Rest = ()
