"""The figure of docs/ledger.md: what synchronization costs on large machines, ours and flax's.

    python -m normlab.experiments.programs.figure docs/ledger.png mlp    # .[tpu,cuda]; minutes
    python -m normlab.experiments.programs.figure FILE.png    # of ResNet-50: an hour

Every point is a training step that is compiled ahead of time for its machine, of which the
collectives are read; only their times are those of the model in `experiments.programs.machines`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from normlab.instruments.collectives import Entry

from ..figures import encode
from ..rundir import RunError
from ..terminal import errors, report
from .command import Ledger
from .ledger import Account, compile_all, modelled

CHIPS = {
    "v5p": ("2x2x2", "4x4x4", "8x8x8", "8x16x16", "16x16x24"),
    "h100": ("1x1x8", "1x8x8", "1x32x8", "1x128x8"),
}
NAMES = {"v5p": "TPU v5p", "h100": "H100"}
COLOURS = {"v5p": "#0072B2", "h100": "#D55E00"}
STYLES = {
    "batch": {"marker": "o", "ls": "-", "markersize": 5, "zorder": 3},
    "flax": {"marker": "s", "ls": "--", "markersize": 9, "markerfacecolor": "none"},
}
LABELS = {"batch": "normlab", "flax": "flax"}

WIDTHS = (64, 128, 256, 512)
GROUPS_ON = {"v5p": ("8x8x8", 512), "h100": ("1x64x8", 512)}
SIZES = (2, 8, 32, 128, 512)


class Cost(NamedTuple):
    """Of one step, on each device, in the steady state.

    Attributes:
      nbytes: What its norms put in or get, whichever is more.
      gathered: What they would get if every device had a row from each.
      norms: Modelled microseconds in the collectives of the norms.
      others: And in those of the gradients and the loss.
    """

    nbytes: int
    gathered: int
    norms: float
    others: float


def cost(account: Account) -> Cost:
    """What an account says the norms of a step cost."""
    steady = [entry for entry in account.entries if not entry.when_needed]
    ours = [entry for entry in steady if entry.purposes[0].direction]
    nbytes = sum(max(entry.nbytes, entry.received) for entry in ours)
    forward = sum(e.nbytes for e in ours if e.purposes[0].direction == "forward")
    gathered = nbytes + (len(account.machine.devices) - 1) * forward

    def micros(entries: list[Entry]) -> float:
        each = (modelled(account.machine, one) for e in entries for one in e.collectives)
        return 1e6 * sum(seconds or 0.0 for seconds in each)

    return Cost(nbytes, gathered, micros(ours), micros(steady) - micros(ours))


def larger_machines(kind: str, model: str) -> Iterator[tuple[int, dict[str, Cost]]]:
    """All devices together, on larger and larger machines: how many, and the cost of each norm."""
    for sizes in CHIPS[kind]:
        config = Ledger(
            model=model, topology=(f"{kind}:{sizes}",), norms=("batch", "flax"), sync=("all",)
        )
        found = compile_all(config, say=lambda text: errors.print(text)).accounts
        yield len(found[0].machine.devices), {account.norm: cost(account) for account in found}


def larger_groups(kind: str) -> Iterator[tuple[int, Cost]]:
    """Groups of more and more devices that are neighbours, along the last axis of a mesh."""
    sizes, count = GROUPS_ON[kind]
    for size in SIZES:
        mesh = (count // size, size) if size < count else ()
        sync = ("inner" if mesh else "all",)
        topology = (f"{kind}:{sizes}",)
        (account,) = compile_all(
            Ledger(topology=topology, widths=WIDTHS, sync=sync, mesh=mesh)
        ).accounts
        yield size, cost(account)


def main(path: Path, model: str) -> None:
    """Compiles, draws and writes the figure."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    sent, time, grouped = panels
    for kind, colour in COLOURS.items():
        counts, costs = zip(*larger_machines(kind, model), strict=True)
        for norm, style in STYLES.items():
            label = f"{NAMES[kind]}: {LABELS[norm]}"
            each = [of[norm] for of in costs]
            sent.plot(counts, [c.nbytes for c in each], color=colour, label=label, **style)
            time.plot(counts, [c.norms for c in each], color=colour, **style)
        rows = [of["flax"].gathered for of in costs]
        told = {} if kind == "h100" else {"label": "a row from each device, for comparison"}
        sent.plot(counts, rows, color="#7F7F7F", ls=":", **told)
        label = f"{NAMES[kind]}: gradients of the parameters"
        others = [of["batch"].others for of in costs]
        time.plot(counts, others, color=colour, ls=":", label=label)
        sizes, each = zip(*larger_groups(kind), strict=True)
        grouped.plot(sizes, [c.norms for c in each], color=colour, **STYLES["batch"])
    decorate(sent, "devices, all synchronized", "bytes a device puts in for norms")
    decorate(time, "devices, all synchronized", "its norms' collectives, modelled (µs)")
    decorate(grouped, "devices in a group, of 512: four norms", "the same (µs)")
    handles = [axes.get_legend_handles_labels() for axes in (sent, time)]
    figure.legend(
        *(a + b for a, b in zip(*handles, strict=True)), loc="outside lower center", ncols=3
    )
    figure.suptitle(
        f"One training step of {model} with synced batch norms: collectives read from programs "
        "compiled ahead of time,\ntimes of an α-β model. Nothing was measured on these machines.",
        fontsize=10,
    )
    path.write_bytes(encode(figure, "png"))


def decorate(axes: Axes, x: str, y: str) -> None:
    """Labels, and scales on which a power of the number of devices is a line."""
    axes.set(xlabel=x, ylabel=y)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both", lw=0.5)


if __name__ == "__main__":
    try:
        if len(sys.argv) not in (2, 3):
            raise RunError("name the file to write, as docs/ledger.png, and a model if you like")
        main(Path(sys.argv[1]), *sys.argv[2:] or ("resnet50",))
    except RunError as error:
        sys.exit(report(error))
