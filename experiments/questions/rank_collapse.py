"""Does a deep net at random weights keep examples apart, with batch norm and without?

Claim: Without a norm the rank of what a batch becomes falls towards one as layers are added. With
batch norm it levels off, and that level grows at least as the square root of the width. Layer norm
does not keep it up.

Source: Daneshmand et al. 2020, https://arxiv.org/abs/2003.01652, prove the lower bound of order
√width for linear nets, with a weak skip connection and no mean subtracted, and find it in ReLU nets
by experiment. They say nothing of layer norm: in a linear net a scale for each example cannot
change the rank, so that it is a control. The thresholds of the rank are ours.

Protocol: Random Gaussian kernels of variance 1/width, a batch of as many Gaussian examples as a
layer has units, the norm behind each linear map; ε = 1e-12. Without a norm a layer's output is
scaled to unit root mean square, which leaves the rank and prevents underflow. The rank is the
number of singular values of the batch above a share of the largest, after 1, 2, 4, … layers. With
ReLUs kernels have variance 2/width.

Command: normlab run rank_collapse
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from matplotlib.figure import Figure

import normlab as nl

from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

SHARES = (0.1, 0.01)
"""Of the largest singular value: one above it counts."""

ONE = 1.5
"""The rank at the greatest depth, at most, if it has fallen to one."""

ROOT = 0.5
"""The exponent of the width in the rank with batch norm, at least: that of the theorem."""

LEVEL = 0.8
"""What is left of batch norm's rank over the last two doublings of the depth, at least, if it has
levelled off."""

MORE = 2.0
"""The rank with batch norm over that without at a moderate depth, if the effect is as large as in
our first look at one seed."""

CONTROL = 1.5
"""The rank with layer norm over that without, at most; likewise."""

SOURCE = Source("daneshmand2020", read="abstract")

THEOREM = Source("daneshmand2020", "", "Ω(√width)", "second-hand")


@dataclasses.dataclass(frozen=True)
class RankCollapse(Config):
    """The config.

    Attributes:
      norms: What stands behind each linear map.
      widths: Units of each layer, and examples.
      depth: How many layers; a power of two.
      middle: The width at which norms are compared, and ReLUs are looked at.
    """

    dataset: str = ""
    norms: tuple[str, ...] = ("none", "batch", "layer")
    widths: tuple[int, ...] = (24, 48, 96, 192)
    depth: int = 256
    middle: int = 48


QUICK = RankCollapse()
SECONDS = 29
FULL = RankCollapse(widths=(48, 96, 192, 384, 768), depth=2048)


def run(config: RankCollapse) -> Iterator[Condition]:
    """Each norm in linear nets, and with ReLUs at one width; layer norm at that width alone."""
    for activation in ("linear", "relu"):
        for norm in config.norms:
            whole = activation == "linear" and norm != "layer"
            widths = config.widths if whole else (config.middle,)
            labels = {"norm": norm, "activation": activation}
            yield Condition(labels, exact(ranks, config, widths=widths, **labels))


def ranks(
    config: RankCollapse, *, norm: str, activation: str, widths: tuple[int, ...]
) -> Iterator[Record]:
    """The rank of the batch by depth, for each width and share."""
    options: dict[str, Any] = {"eps": 1e-12} if "a" in nl.row(norm).needs else {}
    layer, relu = nl.get(norm, **options), activation == "relu"

    @jax.jit
    def deeper(h: Array, key: Array, start: int, stop: int) -> tuple[Array, Array]:
        def step(i: Array, h: Array) -> Array:
            n = h.shape[1]
            w = jax.random.normal(jax.random.fold_in(key, i), (n, n)) * ((1 + relu) / n) ** 0.5
            site = nl.Site(h @ w, h, w)
            h = layer.apply(*layer.init(site), site, train=True)[0]
            h = jax.nn.relu(h) if relu else h
            return h / jnp.sqrt(jnp.square(h).mean()) if norm == "none" else h

        h = lax.fori_loop(start, stop, step, h)
        return h, jnp.linalg.svd(h, compute_uv=False)

    for width in widths:
        for seed in config.each_seed:
            key = jax.random.key(seed)
            h, done, depth = jax.random.normal(key, (width, width)), 0, 1
            while depth <= config.depth:
                h, values = deeper(h, key, done, depth)
                for share in SHARES:
                    rank = int((np.asarray(values) > share * values[0]).sum())
                    at = {"width": width, "seed": seed, "depth": depth, "share": share}
                    yield {"kind": "rank", **at, "rank": rank}
                done, depth = depth, 2 * depth


def slope(records: Records) -> float:
    """The exponent of the width in the rank."""
    width, rank = (np.log([r[k] for r in records]) for k in ("width", "rank"))
    return float(np.polyfit(width, rank, 1)[0])


def mean(records: Records) -> float:
    """The geometric mean of the rank over the widths."""
    return float(np.exp(np.log([r["rank"] for r in records]).mean()))


def verdict(records: Records) -> Iterator[Verdict]:
    """The limits of both nets, their scaling, and the norms side by side."""
    deepest, middle = max(records.values("depth")), records.where(activation="relu")[0]["width"]
    moderate = deepest // 8
    linear = records.where(activation="linear")

    def rank(norm: str, depth: int, activation: str = "linear") -> np.ndarray:
        wanted = {"activation": activation, "share": SHARES[0], "width": middle}
        return records.by_seed("rank", norm=norm, depth=depth, **wanted)

    claim = f"no norm: after {deepest} linear layers of {middle} the rank has fallen to one"
    yield decide("none.limit", claim, rank("none", deepest), at_most=ONE, source=SOURCE)
    here = linear.where(norm="batch", share=SHARES[0])
    before, after = (here.where(depth=d).each_seed(mean) for d in (deepest // 4, deepest))
    claim = f"batch norm: from {deepest // 4} to {deepest} layers the rank stays (factor)"
    how: dict[str, Any] = {"geometric": True, "source": SOURCE}
    yield decide("batch.level", claim, after / before, at_least=LEVEL, at_most=1 / LEVEL, **how)
    for share in SHARES:
        found = linear.where(norm="batch", depth=deepest, share=share).each_seed(slope)
        claim = f"batch norm: its rank (singular values above {share:g} of the largest) grows at "
        claim += "least as √width (exponent)"
        yield decide(f"batch.width-{share:g}", claim, found, at_least=ROOT, source=THEOREM)
    for activation in ("linear", "relu"):
        more = rank("batch", moderate, activation) / rank("none", moderate, activation)
        claim = f"{activation}, {moderate} layers of {middle}: the rank with batch norm over none's"
        yield decide(f"{activation}.batch", claim, more, at_least=1, size=MORE, **how)
    more = rank("layer", moderate) / rank("none", moderate)
    claim = f"linear, {moderate} layers of {middle}: layer norm keeps no higher rank (over none's)"
    yield decide("linear.layer", claim, more, at_most=CONTROL, geometric=True)


def figure(records: Records) -> Figure:
    """The rank against the depth and against the width, and with ReLUs."""
    picture, (left, middle, right) = draw.canvas(3, width=4)
    relu = records.where(activation="relu", share=SHARES[0])
    width, deepest = relu[0]["width"], max(records.values("depth"))
    linear = records.where(activation="linear", share=SHARES[0])
    for axes, here in ((left, linear.where(width=width)), (right, relu)):
        draw.over_steps(axes, here, "rank", x="depth", marker=True)
        draw.frame(axes, xlabel="layers", doubling=True, log=True)
        axes.set_title(f"{'linear' if axes is left else 'ReLU'}, width {width}")
    left.set_ylabel(f"singular values above {SHARES[0]:g} of the largest")
    draw.against(middle, linear.where(depth=deepest), "width", "rank")
    widths = np.array(sorted(linear.values("width")))
    start = linear.where(depth=deepest, norm="batch", width=widths[0]).by_seed("rank").mean()
    middle.plot(widths, start * np.sqrt(widths / widths[0]), color="grey", lw=1, ls=":")
    draw.frame(middle, xlabel="width", doubling=True, log=True)
    middle.set_title(f"linear, {deepest} layers; dotted: √width")
    return draw.finish(picture)
