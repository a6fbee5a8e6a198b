"""How does the variance of the residual stream grow with depth, and can it be derived?

Claim: At initialization the variance of the stream grows at least linearly with depth with
pre-norm, linearly in Peri-LN, more slowly with LayerNorm Scaling, and not at all with post-norm.
All this follows from where the norms stand, if what a branch returns does not correlate with the
stream: an attention averages tokens, which become alike from block to block, so that pre-norm,
whose stream they dominate, grows more.

Source: Xiong et al. 2020, lemma 2, https://arxiv.org/abs/2002.04745, for pre-norm with uniform
attention: between 1 + l/2 and 1 + 3l/2 after l blocks; Sun et al. 2025,
https://arxiv.org/abs/2502.05795: from linear to exponential, and with LayerNorm Scaling less; Kim
et al. 2025, https://arxiv.org/abs/2502.02732, for Peri-LN. The derivation is
`normlab.placement.stream_variance`; how near it is, and where it is not, is ours, after a pilot. So
is Mix-LN (Li et al. 2024, https://arxiv.org/abs/2412.13795). Unit scaling (Blake et al. 2023,
https://arxiv.org/abs/2303.11257) is here without its unit-scaled branches.

Protocol: A language model of 24 blocks of width 128 at its initialization, RMS norm, a GELU MLP,
and 8 sequences of 64 random tokens. Measured is the mean square of the stream over all tokens and
channels, relative to that of the embedding (for Peri-LN behind its norm), before the first branch
and after each of the 48. The gain of an attention and that of an MLP, by which they multiply the
mean square of what enters them, is taken from the first block of the pre-norm net of the same seed,
and with these two numbers the whole of every curve is derived. A seed draws weights and tokens.

Command: normlab run stream_variance

Found: The derivation holds to a few percent where norms stand behind the branches or where the
stream grows slowly. With pre-norm, Mix-LN and unit scaling the stream ends 1.8 to 2.3 times as
large as derived, and pre-norm's grows as the power 1.25 of the depth. With branches whose kernels
alone decide the gain the derivation holds (tests/test_placement.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from matplotlib.figure import Figure

import normlab as nl

from .. import models
from ..engine import Condition, Config, Record, Records, Source, Verdict, decide, draw, exact

LINEAR = (0.9, 1.1)
"""The exponent of the number of branches with which the variance grows where it grows linearly."""

SLOW = 0.5
"""The exponent with LayerNorm Scaling: ours, a logarithm is below any power in the end."""

STEP = 0.05
"""How far what a branch of Peri-LN adds, on average, may be from 1."""

STILL = 1e-3
"""How far the variance may be from 1 behind a norm: what ε and float32 leave."""

NEAR = (0.8, 1.25)
"""The measured variance over the derived one at the last branch, where it is the derived one."""

DERIVED, MORE = ("peri", "lns"), ("pre", "mix", "unit")
"""Where the derivation held in a pilot, and where the stream grew more than derived. Post-norm's
is 1 by definition."""

BRANCHES: tuple[nl.placement.Branch, ...] = ("attention", "mlp")

SCHEMES = ("post", "pre", "peri", "lns", "mix", "unit")


@dataclasses.dataclass(frozen=True)
class StreamVariance(Config):
    """The config.

    Attributes:
      schemes: Where the norms stand.
      norm: Which norm.
      depth: Blocks.
      width: The width of the stream.
      length: Tokens of a sequence.
    """

    dataset: str = ""
    batch_size: int = 8
    schemes: tuple[str, ...] = SCHEMES
    norm: str = "rms"
    depth: int = 24
    width: int = 128
    length: int = 64


QUICK = StreamVariance()
SECONDS = 80
FULL = StreamVariance(depth=48, width=512, length=256)


def run(config: StreamVariance) -> Iterator[Condition]:
    """Each scheme; the seeds are measured one after the other in one program."""
    for scheme in config.schemes:
        yield Condition({"scheme": scheme}, exact(measure, config, scheme))


def measure(config: StreamVariance, scheme: str) -> Iterator[Record]:
    """The mean square of the stream before the first branch and after each, and what is derived."""
    plan = nl.placement.scheme(scheme, norm=config.norm, depth=config.depth)
    placements = [plan.at(i, branch) for i in range(config.depth) for branch in BRANCHES]
    pre, own = (streams(config, name) for name in ("pre", scheme))
    for seed in config.each_seed:
        # A norm leaves a mean square of 1, which a branch of the first block multiplies by these.
        gains = np.tile(np.diff(pre(seed)[:3]), config.depth)
        squares = own(seed)
        derived = nl.placement.stream_variance(placements, gain=gains, start=squares[0])
        for branch, (square, expected) in enumerate(zip(squares, derived.tolist(), strict=True)):
            yield {"kind": "branch", "seed": seed, "branch": branch, "square": square} | {
                "derived": expected
            }
        begin = next((i for i, p in enumerate(placements) if p.total is None), None)
        yield {
            **{"kind": "stream", "seed": seed, "ratio": float(squares[-1] / derived[-1])},
            **{"largest": float(squares.max()), "smallest": float(squares.min())},
            "added": float(squares[-1] - squares[0]) / len(placements),
            "exponent": None if begin is None else exponent(squares[begin:]),
        }


@functools.lru_cache(maxsize=2)
def streams(config: StreamVariance, scheme: str) -> Callable[[int], np.ndarray]:
    """A function of the seed: the mean square before the first branch and after each."""
    sizes = {"width": config.width, "depth": config.depth, "mlp": "gelu", "scan": True}
    model = models.build("lm", nl.get(config.norm), 256, scheme=scheme, **sizes)

    @jax.jit
    def look(key: Array, tokens: Array) -> Array:
        variables = model.init(key, tokens, train=False)
        _, sown = model.apply(variables, tokens, train=False, mutable=[models.DEPTH])
        keys = [f"after_{branch}/0/mean_square" for branch in BRANCHES]
        return nl.instruments.by_block(
            sown[models.DEPTH], lambda block: jnp.stack([block[key].mean() for key in keys])
        ).ravel()

    def of_seed(seed: int) -> np.ndarray:
        tokens = np.random.default_rng(seed).integers(0, 256, (config.batch_size, config.length))
        return np.array([1.0, *look(jax.random.key(seed), tokens)])

    return of_seed


def exponent(squares: np.ndarray) -> float:
    """That of the power of the number of branches with which what they added grows."""
    added = squares[1:] - squares[0]
    return float(nl.instruments.depth_slope(added).slope)


def verdict(records: Records) -> Iterator[Verdict]:
    """How the stream grows in each scheme, and whether the derivation says so."""
    streams = records.where(kind="stream")

    def of(key: str, scheme: str) -> np.ndarray:
        return streams.by_seed(key, scheme=scheme)

    claim = "pre: the variance grows at least linearly with the branches (exponent)"
    source = Source("sun2025", "", "Θ(L) to Θ(exp L)", "second-hand")
    yield decide("pre.growth", claim, of("exponent", "pre"), at_least=1, source=source)
    claim = "mix: the variance grows at least linearly, from where its pre-norm begins (exponent)"
    yield decide("mix.growth", claim, of("exponent", "mix"), at_least=1)
    claim = "peri: the variance grows linearly with the branches (exponent)"
    source = Source("kim2025", "", "nearly constant for each branch", "second-hand")
    low, high = LINEAR
    growth = of("exponent", "peri")
    yield decide("peri.growth", claim, growth, at_least=low, at_most=high, source=source)
    claim = "peri: a branch adds 1, the squared gain of its norm (on average)"
    yield decide("peri.step", claim, of("added", "peri"), at_least=1 - STEP, at_most=1 + STEP)
    claim = "lns: the variance grows more slowly than linearly (exponent)"
    source = Source("sun2025", "abstract", "", "abstract")
    growth = of("exponent", "lns")
    yield decide("lns.growth", claim, growth, at_most=1, size=SLOW, source=source)
    claim = "post: the variance is 1 behind every branch (largest distance)"
    off = np.maximum(of("largest", "post") - 1, 1 - of("smallest", "post"))
    yield decide("post", claim, off, at_most=STILL, exact=True)
    low, high = NEAR
    for scheme in DERIVED:
        claim = f"{scheme}: the variance at the end is the derived one (ratio)"
        id, ratio = f"{scheme}.derived", of("ratio", scheme)
        yield decide(id, claim, ratio, at_least=low, at_most=high, geometric=True)
    for scheme in MORE:
        claim = f"{scheme}: the variance at the end is more than the derived one (ratio)"
        ratio = of("ratio", scheme)
        yield decide(f"{scheme}.more", claim, ratio, at_least=1, geometric=True)


def figure(records: Records) -> Figure:
    """The variance after each branch by scheme, and beside it the derived one, dashed."""
    picture, (axes,) = draw.canvas(width=6.4, height=4.2)
    here = records.where(kind="branch")
    draw.over_steps(axes, here, "square", x="branch", by="scheme", marker=True, markevery=8)
    for scheme, style in draw.styles(here.values("scheme")).items():
        places, values = draw.along(here.where(scheme=scheme), "branch", "derived")
        look = {"color": style["color"], "lw": 1, "ls": "--"}
        axes.plot(places, [np.median(v) for v in values], **look)
    draw.frame(axes, xlabel="branch", yscale="log", title="dashed: derived")
    axes.set_ylabel("mean square of the stream")
    return draw.finish(picture)
