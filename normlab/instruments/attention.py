"""What attention looks at: its entropy, and how large its logits are.

Queries are `[..., T, H, D]` and keys `[..., S, K, D]`, as `jax.nn.dot_product_attention` takes
them; logits are `[..., H, T, S]`, in float32 at least: in float16 they end at 65504.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import Kind, array, checked, flag, is_array, number, one_of
from normlab._checks import promote
from normlab.errors import invalid
from normlab.instruments.vectors import rms


def _mask(value: Any) -> Any:
    if not (is_array(value) and value.dtype == bool):
        raise TypeError
    return value


MASK = Kind(
    "an array of booleans, True where a query sees a key",
    "compare an additive mask with 0: mask == 0",
    _mask,
    ("x", 1, True, [True], jnp.ones, object()),
)
HEADS = array("an array [..., T, H, D], a real one", "split the channels into heads", rank=3)
LOGITS = array("logits [..., T, S], real ones", "pass queries and keys last", rank=2)
SCALE = number("a finite number", "pass a float")
Of = Literal["logits", "probabilities"]


@checked("attention logits", q=HEADS, k=HEADS, scale=SCALE)
def attention_logits(q: ArrayLike, k: ArrayLike, *, scale: ArrayLike | None = None) -> Array:
    """The logits of dot-product attention, q·k·scale, in float32 at least.

    Args:
      q: Queries, `[..., T, H, D]`, as they enter the attention: rotated and normed.
      k: Keys, `[..., S, K, D]`; K divides H, and head h looks at keys h // (H/K).
      scale: What the products are multiplied by; 1/√D by default.

    Returns:
      `[..., H, T, S]`, without any mask.

    Raises:
      ValueError: If the shapes do not fit.

    >>> attention_logits(jnp.ones((2, 4, 9)), jnp.ones((5, 1, 9))).shape
    (4, 2, 5)
    """
    q, k = promote(q), promote(k)
    heads, keys = q.shape[-2], k.shape[-2]
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1] or heads % keys:
        raise invalid(
            "attention logits",
            f"queries of shape {q.shape} and keys of shape {k.shape}",
            "[..., T, H, D] and [..., S, K, D] of which K divides H",
            "pass them as jax.nn.dot_product_attention takes them",
        )
    dtype = max(q.dtype, k.dtype, key=lambda d: d.itemsize)
    scale = jnp.asarray(q.shape[-1] ** -0.5 if scale is None else scale).astype(dtype)
    q = (q.astype(dtype) * scale).reshape(*q.shape[:-2], keys, heads // keys, q.shape[-1])
    logits = jnp.einsum(
        "...tkgd,...skd->...kgts", q, k.astype(dtype), precision=lax.Precision.HIGHEST
    )
    return logits.reshape(*logits.shape[:-4], heads, *logits.shape[-2:])


@checked(
    "attention entropy",
    attention=LOGITS,
    of=one_of(Of, "'logits' or 'probabilities'"),
    mask=MASK,
    normalized=flag(),
)
def attention_entropy(
    attention: ArrayLike,
    *,
    of: Of = "logits",
    mask: ArrayLike | None = None,
    normalized: bool = False,
) -> Array:
    """The entropy of what each query looks at, in nats: 0 where that is one key.

        H_t = −Σ_s A_ts·ln A_ts        A = softmax of the logits

    Zhai et al. 2023 (https://arxiv.org/abs/2303.06296) follow its mean by head: where it falls to 0
    early in training (entropy collapse), training is unstable.

    Args:
      attention: `[..., T, S]`: logits, of which −∞ is as good as masked, or probabilities.
      of: Which of the two.
      mask: Booleans that broadcast to it, True where a query sees a key. Another filler than −∞
        (−1e9) has no probability, but only the mask says that it does not count.
      normalized: Divides by ln(number of keys that the query sees), which makes 1 of looking at
        all of them alike. Probabilities of 0 count as seen unless a mask says otherwise.

    Returns:
      `[..., T]`, 0 to ln S. A query that sees one key, as the first does under a causal mask, or
      none has entropy 0, normalized or not.

    Raises:
      ValueError: If the mask does not broadcast to the attention.

    >>> causal = jnp.tril(jnp.ones((3, 3), bool))
    >>> attention_entropy(jnp.zeros((3, 3)), mask=causal, normalized=True).round(4).tolist()
    [0.0, 1.0, 1.0]
    """
    a = promote(attention)
    seen = _seen("attention entropy", a, mask, logits=of == "logits")
    if of == "logits":
        peak = lax.stop_gradient(
            jnp.max(jnp.where(seen, a, -jnp.inf), -1, keepdims=True, initial=-jnp.inf)
        )
        d = jnp.where(seen, a - jnp.where(peak == -jnp.inf, 0, peak), 0)
        rate = jnp.where(seen, jnp.exp(d), 0)
        total = rate.sum(-1)
        some = jnp.where(total == 0, 1, total)
        # exp(d) = 0 where d = −∞: a logit of 1e38 below the largest.
        entropy = jnp.log(some) - (rate * jnp.where(rate == 0, 0, d)).sum(-1) / some
    else:
        p = jnp.where(seen, a, 0)
        entropy = -(p * jnp.log(jnp.where(p == 0, 1, p))).sum(-1)
    entropy = jnp.maximum(entropy, 0)  # but for rounding it is
    return entropy / _most(seen, a.dtype) if normalized else entropy


class LogitSize(NamedTuple):
    """How large the logits of a head are.

    Attributes:
      largest: `[...]`, max |logit|.
      rms: `[...]`, √mean logit².

    >>> found = logit_size(jnp.array([[[3.0, -4.0]], [[1.0, 1.0]]]))   # of two heads
    >>> found.largest.tolist(), (found.rms**2).round(2).tolist()
    ([4.0, 1.0], [12.5, 1.0])
    """

    largest: Array
    rms: Array


@checked("logit size", logits=LOGITS, mask=MASK)
def logit_size(logits: ArrayLike, *, mask: ArrayLike | None = None) -> LogitSize:
    """The largest and the root mean square logit of each head: whether logits grow.

    Attention logits that grow in training end in attention to single keys and divergence (Dehghani
    et al. 2023, https://arxiv.org/abs/2302.05442); Wortsman et al. 2023
    (https://arxiv.org/abs/2309.14322) see it in small models at high rates, by the largest logit.

    Args:
      logits: `[..., T, S]`. −∞ is left out.
      mask: Booleans that broadcast to it, True where a query sees a key; others are left out.

    Returns:
      `LogitSize`, in nats, without the last two axes; 0 where nothing is seen.

    Raises:
      ValueError: If the mask does not broadcast to the logits.

    >>> found = logit_size(jnp.array([[3.0, -jnp.inf], [-4.0, 0.0]]))
    >>> found.largest.item(), round(found.rms.item(), 4)
    (4.0, 2.8868)
    """
    z = promote(logits)
    seen = _seen("logit size", z, mask, logits=True)
    z = jnp.where(seen, z, 0)
    share = seen.sum((-2, -1)).astype(z.dtype) / max(math.prod(z.shape[-2:]), 1)
    none = share == 0
    length = jnp.where(none, 0, rms(z, (-2, -1)) / jnp.sqrt(jnp.where(none, 1, share)))
    return LogitSize(jnp.abs(z).max((-2, -1), initial=0), length)


class AttentionStatistics(NamedTuple):
    """Some numbers for each head of an attention.

    Attributes:
      entropy: In nats, mean over the queries that see a key.
      normalized_entropy: The mean of H/ln(keys) over the queries that see two keys or more.
      largest: max |logit|.
      rms: √mean logit².

    >>> found = attention_statistics(jnp.ones((3, 2, 4)), jnp.ones((3, 2, 4)))   # two heads
    >>> found.largest.tolist(), found.normalized_entropy.round(2).tolist()
    ([2.0, 2.0], [1.0, 1.0])
    """

    entropy: Array
    normalized_entropy: Array
    largest: Array
    rms: Array


@checked("attention statistics", q=HEADS, k=HEADS, scale=SCALE, mask=MASK, is_causal=flag())
def attention_statistics(
    q: ArrayLike,
    k: ArrayLike,
    *,
    scale: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    is_causal: bool = False,
) -> AttentionStatistics:
    """Entropy and logits of an attention by head, from its queries and keys, to be sown or scanned.

    `attention_entropy` and `logit_size` of `attention_logits`, which see; the logits are there
    while it runs, and not kept.

    Args:
      q: Queries, `[..., T, H, D]`.
      k: Keys, `[..., S, K, D]`.
      scale: As in `attention_logits`.
      mask: Booleans that broadcast to `[..., H, T, S]`, True where a query sees a key.
      is_causal: Whether query t sees keys up to t alone, as in `jax.nn.dot_product_attention`.

    Returns:
      `AttentionStatistics`, fields `[..., H]`.

    Raises:
      ValueError: If the shapes do not fit.

    >>> found = attention_statistics(jnp.zeros((3, 1, 4)), jnp.ones((3, 1, 4)), is_causal=True)
    >>> round(found.entropy.item(), 4), found.normalized_entropy.item()   # (0 + ln 2 + ln 3)/3
    (0.5973, 1.0)
    """
    z = attention_logits(q, k, scale=scale)
    seen = _seen("attention statistics", z, mask, logits=False)
    if is_causal:
        seen = seen & jnp.tril(jnp.ones(z.shape[-2:], bool))
    keys = seen.sum(-1)

    def over_queries(v: Array, least: int) -> Array:
        count = (keys >= least).sum(-1)
        return jnp.where(keys >= least, v, 0).sum(-1) / jnp.maximum(count, 1).astype(v.dtype)

    entropy = attention_entropy(z, mask=seen)
    share = over_queries(entropy / _most(seen, z.dtype), 2)
    return AttentionStatistics(over_queries(entropy, 1), share, *logit_size(z, mask=seen))


def _most(seen: Array, dtype: Any) -> Array:
    """The entropy of looking at all keys alike; ln 2 for one key or none, whose entropy is 0."""
    return jnp.log(jnp.maximum(seen.sum(-1), 2).astype(dtype))


def _seen(where: str, a: Array, mask: ArrayLike | None, *, logits: bool) -> Array:
    """Which keys each query sees, in the shape of the attention."""
    seen = a != -jnp.inf if logits else jnp.ones(a.shape, bool)
    if mask is None:
        return seen
    try:
        return seen & jnp.broadcast_to(mask, a.shape)
    except ValueError as error:
        raise invalid(
            where,
            f"a mask of shape {jnp.shape(mask)} for an attention of shape {a.shape}",
            "a mask that broadcasts to it",
            "give it the axes of heads, queries and keys, [..., 1, T, S]",
        ) from error
