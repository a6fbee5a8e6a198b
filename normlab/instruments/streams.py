"""What flows between the blocks of a net: size, rank, likeness of tokens, massive activations.

Of a stream x, `[..., T, C]`: T tokens of C channels; all axes before them stay, so that `[N, T, C]`
gives a number for each sequence, and stacked streams `[L, N, T, C]` one for each of each block.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import array, checked, flag, number, one_of
from normlab._checks import promote
from normlab.instruments.vectors import norm, scaled, unit
from normlab.measure import moments

STREAM = array("a stream [..., T, C], a real one", "pass tokens and channels last", rank=2)
SIZE = number("a number of at least 0", "pass a float", lambda v: 0 <= v < np.inf, static=True)
Length = Literal["composite", "frobenius"]
"""How long a matrix is: √(‖X‖₁·‖X‖_∞), of the largest sums of |X| by column and by row; ‖X‖_F."""


@checked("effective rank", x=STREAM)
def effective_rank(x: ArrayLike) -> Array:
    """How many directions a matrix has: exp of the entropy of its singular values.

        exp(−Σ p_i·ln p_i)        p_i = σ_i/Σ_j σ_j

    The definition of Roy & Vetterli 2007 ("The effective rank: a measure of effective
    dimensionality", EUSIPCO): 1 where one singular value is not zero, K where K are equal, at most
    the rank. Neither the scale of `x` nor a rotation of tokens or channels matters.

    Args:
      x: `[..., T, C]`. The mean of the tokens counts; subtract it first for the rank of deviations.

    Returns:
      `[...]`, 1 to min(T, C), in float32 at least; 0 for a matrix of zeros, which the paper leaves
      out, and NaN where a value is not finite.

    >>> effective_rank(jnp.diag(jnp.array([1.0, 1.0, 0.0]))).round(4).item()
    2.0
    """
    return _effective(_spectrum(x))


@checked("stable rank", x=STREAM)
def stable_rank(x: ArrayLike) -> Array:
    """‖X‖_F²/‖X‖₂² = Σ σ_i²/σ_1²: a rank that small singular values hardly change.

    Rudelson & Vershynin 2007 (https://arxiv.org/abs/math/0503442) call it the numerical rank; its
    properties, Ipsen & Saibaba 2024 (https://arxiv.org/abs/2407.21594). Neither scale nor rotations
    matter.

    Args:
      x: `[..., T, C]`.

    Returns:
      `[...]`, 1 to the rank; 0 for a matrix of zeros, NaN where a value is not finite.

    >>> stable_rank(jnp.diag(jnp.array([2.0, 1.0, 0.0]))).round(4).item()
    1.25
    """
    return _stable(_spectrum(x))


@checked("rank residual", x=STREAM, length=one_of(Length, "the name of a length"))
def rank_residual(x: ArrayLike, *, length: Length = "composite") -> Array:
    """How far the tokens are from being one: ‖X − 1x̄ᵀ‖/‖X‖, which rank collapse takes to 0.

    The residual of Dong, Cordonnier & Loukas 2021 (https://arxiv.org/abs/2103.03404), who show that
    attention alone loses it doubly exponentially with depth. They write x̄ = argmin ‖X − 1xᵀ‖; their
    code takes the mean of the tokens, as here, which is the minimum for the Frobenius norm.

    Args:
      x: `[..., T, C]`.
      length: A `Length`: "composite" is the paper's; "frobenius" is rotation-invariant, at most 1.

    Returns:
      `[...]`, without unit; 0 where all tokens are equal.

    >>> x = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    >>> round(rank_residual(x).item(), 4), rank_residual(x - x.mean(0), length="frobenius").item()
    (0.3162, 1.0)
    """
    _, x = scaled(promote(x), (-2, -1))
    d = x - moments(x, x.ndim - 2, algorithm="two_pass").mean
    measure = _composite if length == "composite" else lambda v: norm(v, (-2, -1))
    whole = measure(x)
    return measure(d) / jnp.where(whole == 0, 1, whole)


@checked("token cosine", x=STREAM)
def token_cosine(x: ArrayLike) -> Array:
    """The mean cosine between two tokens of a sequence: 1 where they all point one way.

        Σ_{i≠j} cos(x_i, x_j) / T(T − 1)

    Noci et al. 2022 (https://arxiv.org/abs/2206.03126) follow the angle between tokens with depth.

    Args:
      x: `[..., T, C]`.

    Returns:
      `[...]`, −1/(T − 1) to 1. A token of zeros has cosine 0 with every other; 0 for one token.

    >>> token_cosine(jnp.array([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [0.0, 1.0], [0, 0]])).item()
    0.20000000298023224
    """
    u = unit(promote(x), -1)
    tokens = u.shape[-2]
    pairs = jnp.square(u.sum(-2)).sum(-1) - jnp.square(u).sum((-2, -1))
    return jnp.clip(pairs / max(tokens * (tokens - 1), 1), -1, 1)


class MassiveActivations(NamedTuple):
    """The largest activation of a sequence beside an ordinary one.

    Attributes:
      largest: `[...]`, max |x|.
      median: `[...]`, the median of |x| over tokens and channels.
      token: `[...]`, where the largest stands; the first of several.
      channel: `[...]`, in which channel.
      massive: `[...]`, how many activations fulfil the criterion.

    >>> found = massive_activations(jnp.ones((4, 8)).at[2, 5].set(-3000.0))
    >>> found.largest.item(), found.median.item(), (found.token.item(), found.channel.item())
    (3000.0, 1.0, (2, 5))
    """

    largest: Array
    median: Array
    token: Array
    channel: Array
    massive: Array

    @property
    def ratio(self) -> Array:
        """largest/median; infinite where most are zero, and 0 where all are."""
        zero = self.median == 0
        ratio = self.largest / jnp.where(zero, 1, self.median)
        return jnp.where(zero & (self.largest > 0), jnp.inf, ratio)


@checked("massive activations", x=STREAM, least=SIZE, times=SIZE)
def massive_activations(
    x: ArrayLike, *, least: float = 100.0, times: float = 1000.0
) -> MassiveActivations:
    """Single activations that are far larger than all others, which bias attention to their token.

    Massive, after Sun et al. 2024 (https://arxiv.org/abs/2402.17762), is |x| > 100 with
    |x| ≥ 1000·median |x|, "at least or around" which the paper says of the second. The median is
    that of one sequence after one block, as in their code (of an even number of values they take
    the lower of the middle two, here their mean).

    Args:
      x: `[..., T, C]`, the residual stream after a block.
      least: What |x| has to exceed, in the unit of `x`.
      times: How many medians it has to be.

    Returns:
      `MassiveActivations`; NaN, with none massive, where a value is NaN.

    >>> found = massive_activations(jnp.full((4, 8), 0.1).at[2, 5].set(-300.0))
    >>> found.token.item(), found.channel.item(), found.massive.item(), found.ratio.round().item()
    (2, 5, 1, 3000.0)
    """
    size = jnp.abs(promote(x))
    flat = size.reshape(*size.shape[:-2], math.prod(size.shape[-2:]))
    median, at = jnp.median(flat, -1), jnp.argmax(flat, -1).astype(jnp.int32)
    # Not size ≥ times·median, which may overflow.
    massive = (flat > least) & (flat / max(times, 1e-30) >= median[..., None])
    token, channel = jnp.divmod(at, size.shape[-1])
    return MassiveActivations(flat.max(-1), median, token, channel, massive.sum(-1, dtype=at.dtype))


class StreamStatistics(NamedTuple):
    """Some numbers for each sequence of a stream.

    Attributes:
      variance: The variance over the channels, which layer norm divides by; mean over the tokens.
      mean_square: The mean square of the channels, which RMS norm divides by; mean over the tokens.
      cosine: `token_cosine`.
      residual: `rank_residual`.
      massive: `MassiveActivations`.
      effective_rank: `effective_rank`; `None` where it is not asked for.
      stable_rank: `stable_rank`, or `None`.

    >>> found = stream_statistics(jnp.array([[[1.0, 3.0], [1.0, 3.0]]]), ranks=False)
    >>> found.variance.tolist(), found.mean_square.tolist(), found.effective_rank
    ([1.0], [5.0], None)
    """

    variance: Array
    mean_square: Array
    cosine: Array
    residual: Array
    massive: MassiveActivations
    effective_rank: Array | None
    stable_rank: Array | None


@checked("stream statistics", x=STREAM, ranks=flag())
def stream_statistics(x: ArrayLike, *, ranks: bool = True) -> StreamStatistics:
    """All that is measured here of a residual stream, so that nobody has to keep the stream.

        variance = mean_t mean_c (x_tc − x̄_t)²        mean_square = mean_t mean_c x_tc²

    Take it where the stream is: return it as what `lax.scan` stacks, or sow it under `nn.scan` and
    `nn.remat`. The growth of the variance with depth is what placements of norms differ in (Sun et
    al. 2025, https://arxiv.org/abs/2502.05795, for pre-norm).

    Args:
      x: `[..., T, C]`.
      ranks: Whether to take the two ranks, which cost a singular value decomposition per sequence.

    Returns:
      `StreamStatistics`, fields `[...]`, in float32 at least; squares of 1e20 are infinite.

    >>> x = jnp.array([[[1.0, 3.0], [1.0, 3.0]], [[2.0, -2.0], [4.0, -4.0]]])
    >>> found = stream_statistics(x)
    >>> found.variance.tolist(), found.mean_square.tolist(), found.cosine.round(4).tolist()
    ([1.0, 10.0], [5.0, 10.0], [1.0, 1.0])
    """
    x = promote(x)
    d = x - moments(x, x.ndim - 1, algorithm="two_pass").mean
    spectrum = _spectrum(x) if ranks else None
    return StreamStatistics(
        variance=jnp.square(d).mean((-2, -1)),
        mean_square=jnp.square(x).mean((-2, -1)),
        cosine=token_cosine(x),
        residual=rank_residual(x),
        massive=massive_activations(x),
        effective_rank=None if spectrum is None else _effective(spectrum),
        stable_rank=None if spectrum is None else _stable(spectrum),
    )


def _spectrum(x: ArrayLike) -> Array:
    """The singular values, falling, on a scale that does not matter."""
    return jnp.linalg.svd(scaled(promote(x), (-2, -1))[1], compute_uv=False)


def _effective(sigma: Array) -> Array:
    total = sigma.sum(-1, keepdims=True)
    p = sigma / jnp.where(total == 0, 1, total)
    entropy = -(p * jnp.log(jnp.where(p == 0, 1, p))).sum(-1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def _stable(sigma: Array) -> Array:
    first = sigma[..., :1]
    return jnp.square(sigma / jnp.where(first == 0, 1, first)).sum(-1)


def _composite(x: Array) -> Array:
    size = jnp.abs(x)
    square = size.sum(-2).max(-1) * size.sum(-1).max(-1)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
