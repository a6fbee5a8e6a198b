"""Norms of several tensors at once: of queries and keys, by head.

    logit = h_q · h_k / √D        h_q, h_k: what a norm makes of q and k, before or after RoPE

One norm, or one for each tensor, sees tensors `[N, T, H, D]` so that every token is an example.
`heads` says what the heads share:

    "shared"    [N·T, H, D]     the gains, γ[D]                 ViT-22B, Qwen3, Gemma 3
    "own"       [N·T, D]        nothing: H norms, γ[H, D]       x-transformers
    "all"       [N·T, H·D]      the statistics too, γ[H·D]      OLMo 2

RoPE turns pairs of channels by angles that grow with the position, so that a logit depends on the
distance of its two tokens alone. A norm that treats the channels of a pair unlike, and stands after
RoPE, lets it depend on the positions themselves; told `after_rope`, these functions refuse that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import (
    anything,
    array,
    axis,
    checked,
    declare,
    either,
    flag,
    instance,
    mapping,
    one_of,
)
from normlab._checks import normalize_axes
from normlab._trees import register
from normlab._weights import align_weights
from normlab._xla import partitioned
from normlab.equation import Affine
from normlab.errors import invalid
from normlab.gains import Log, Offset
from normlab.sharded import names_of
from normlab.site import Norm, Site

Heads = Literal["shared", "own", "all"]
"""What the heads of a tensor share: the gains, nothing, or the statistics too."""

Pairing = Literal["half", "interleaved"]
"""Which channels RoPE turns together: i and i + D/2 (GPT-NeoX, transformers), or 2i and 2i + 1."""

_NORM = instance(Norm, "make it with get(name), or Norm(init, parts)", arrays=False)
_WEIGHTS = array("", "", rank=1)
_BY_NAME = "pass a dict, such as {'q': ..., 'k': ...}"
_KINDS = {
    "norm": either("a Norm, or one by name", _NORM.change, _NORM, mapping(_NORM, "", "")),
    "params": mapping(anything, "params by name", _BY_NAME),
    "state": mapping(anything, "states by name", _BY_NAME),
    "weights": either(
        "weights of the tokens, or such by name",
        "pass one for each token, [N, T]",
        _WEIGHTS,
        mapping(_WEIGHTS, "", ""),
    ),
}
declare(
    tensors=mapping(
        array("", "", rank=2, abstract=True),
        "arrays [..., H, D] by name",
        "pass {'q': q, 'k': k}, with the heads before their channels",
    ),
    heads=one_of(Heads, "'shared', 'own' or 'all'"),
    after_rope=either(
        "True, False, 'half' or 'interleaved'",
        "say which channels RoPE turned together, if it did",
        flag(),
        one_of(Pairing, ""),
    ),
    head_axis=axis,
)


class Paired(NamedTuple):
    """Params with one gain for each rotated pair of channels, with which a norm may follow RoPE.

    Attributes:
      of: Params of half as many channels, such as `Affine(g [D/2], None)` or an `Offset`.
      pairing: Which channels are a pair, a `Pairing`.
      size: D, the channels of a head.

    >>> from normlab import Affine
    >>> Paired(Affine(jnp.array([1.0, 2.0]), None), "half", 4).g.tolist()
    [1.0, 2.0, 1.0, 2.0]
    """

    of: Any
    pairing: Pairing
    size: int

    @property
    def g(self) -> Array | None:
        """The gain of each channel."""
        return self._spread(self.of.g)

    @property
    def b(self) -> Array | None:
        """The bias of each channel, which no norm may have after RoPE."""
        return self._spread(self.of.b)

    def _spread(self, v: Array | None) -> Array | None:
        if v is None or v.ndim == 0:
            return v
        by_head = v.reshape(*v.shape[:-1], -1, self.size // 2)
        if self.pairing == "half":
            each = jnp.concatenate([by_head, by_head], axis=-1)
        else:
            each = jnp.repeat(by_head, 2, axis=-1)
        return each.reshape(*v.shape[:-1], -1)


register(Paired, "pairing", "size")


@checked("normalize_heads", norm=_KINDS["norm"])
def init_heads(
    tensors: Mapping[str, Any],
    norm: Norm | Mapping[str, Norm],
    *,
    heads: Heads = "shared",
    after_rope: bool | Pairing = False,
    head_axis: int = -2,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The params and the states of `normalize_heads`, which see, by the names of the tensors.

    With `heads="own"` each leaf has a first axis of H. With a pairing in `after_rope` the gains
    are `Paired`, one for each pair of channels.

    Args:
      tensors: As there; their shapes suffice, as `jax.ShapeDtypeStruct`.
      norm: As there.
      heads: As there.
      after_rope: As there.
      head_axis: As there.

    >>> q, k = jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8))
    >>> from normlab import get
    >>> params, _ = init_heads({"q": q, "k": k}, get("rms", use_bias=False), heads="own")
    >>> params["k"].g.shape
    (2, 8)
    """
    made = {}
    for name, (one, tensor) in _of_each(tensors, norm).items():
        shape = _shape(name, tensor, head_axis)
        _check_rotations(name, one, heads, after_rope, shape)
        params, state = one.init(_shapes(shape, heads, tensor.dtype))
        if isinstance(after_rope, str):
            params = _by_pair(params, after_rope, shape[-1])
        if heads == "own":
            params, state = jax.tree.map(
                lambda v, h=shape[-2]: jnp.broadcast_to(v, (h, *jnp.shape(v))), (params, state)
            )
        _check_rotations(name, one, heads, after_rope, shape, params)
        made[name] = params, state
    return {name: p for name, (p, _) in made.items()}, {name: s for name, (_, s) in made.items()}


@checked("normalize_heads", **_KINDS)
def normalize_heads(
    tensors: Mapping[str, ArrayLike],
    norm: Norm | Mapping[str, Norm],
    params: Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    *,
    train: bool,
    heads: Heads = "shared",
    after_rope: bool | Pairing = False,
    weights: ArrayLike | Mapping[str, ArrayLike] | None = None,
    head_axis: int = -2,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Normalizes queries and keys, and values if they are given, by head: QK norm.

    The logits h_q·h_k/√D then see no lengths of q and k, and are bounded by the gains. With γ the
    largest |γ_q·γ_k| of a channel, and without biases:

        rms, layer            γ·√D              Qwen3, Gemma 3; ViT-22B
        rms, `groups=G`       γ·√D              G groups of channels, each of mean square 1
        rms, `heads="all"`    γ·√(H_q·H_k·D)    OLMo 2
        scale                 γ                 cosine attention, without the 1/√D

    The temperature of the last is the gain of q, of one number, or one for each head with
    `heads="own"`: `norm={"q": get("scale"), "k": get("scale", use_gain=False)}`. Gains are kept as
    the norm says (`gain="offset"` in Gemma). HybridNorm has v normalized too, `{"q": q, "k": k,
    "v": v}`. Llama 4's "L2 norm" after RoPE is RMS norm without a gain in its code. Henry et al.
    2020 (https://arxiv.org/abs/2010.04245), Dehghani et al. 2023, ViT-22B
    (https://arxiv.org/abs/2302.05442), OLMo 2 (https://arxiv.org/abs/2501.00656), Zhuo et al. 2025,
    HybridNorm (https://arxiv.org/abs/2503.04598).

    Any norm will do: one that looks at positions finds the heads there (but with "own" and "all"),
    never other tokens; batch norm pools the tokens, and its states are by name as well.

    **After RoPE** the norm has to commute with the rotation, or logits depend on absolute
    positions. So do RMS and scale norm with no gain, or one for each tensor, head or rotated pair
    (`Paired`). A gain or a bias by channel does not, nor do a mean over channels, groups that part
    a pair, a function of single values, or statistics of the batch. It is tried on random numbers
    in the place of the params, so that a gain that happens to be alike is refused from the start,
    traced or not. Transformer Engine's RMSNorm of q and k, with a γ[D], stands after RoPE unless
    `qk_norm_before_rope=True`, and so does nGPT's s_qk.

    Args:
      tensors: Arrays `[N, T, H, D]` by name, or with other leading axes. Each may have its own
        sizes: there are fewer heads of k than of q in grouped-query attention.
      norm: The norm of all, or one for each by name.
      params: Those of the norm by name, `Affine(g [D], b [D])` or others, as `init_heads` makes
        them; `None` for none. With "own" each leaf has a first axis of H; with "all" they have
        H·D channels, those of the first head first.
      state: The states by name, with a first axis of H for "own"; `None` for none.
      train: As in `Norm.apply`.
      heads: What the heads share, a `Heads`.
      after_rope: Whether the tensors, all of them, were rotated. A `Pairing` says which channels
        are turned together; `True` lets through what is right for any.
      weights: Importance of tokens, `[N, T]` or `[N]`, or, but with "all", of heads,
        `[N, T, H]`; or such by name.
      head_axis: The axis of the heads: -3 for `[N, H, T, D]`. The channels come last.

    Returns:
      The tensors by name, in their shapes and floating types, and the next states.

    Raises:
      ValueError: For names that differ, params or weights that do not fit, or what the paragraph
        on RoPE refuses.

    >>> q, k = 3 * jnp.ones((1, 5, 4, 8)), jnp.ones((1, 5, 2, 8))
    >>> from normlab import get
    >>> h, _ = normalize_heads({"q": q, "k": k}, get("rms"), train=True)
    >>> h["q"].shape, (h["q"][0, 0, 0] @ h["k"][0, 0, 0]).round(3).item()
    ((1, 5, 4, 8), 8.0)
    """
    out, states = {}, {}
    each = _of_each(tensors, norm, params=params, state=state, weights=weights)
    for name, (one, tensor, own, before, w) in each.items():
        shape = _shape(name, tensor, head_axis)
        _check_rotations(name, one, heads, after_rope, shape, own, before)
        a = jnp.moveaxis(jnp.asarray(tensor), head_axis, -2)
        w = _by_token(w, a, heads)
        h, states[name] = _apply(name, one, own, before, a, w, heads, train)
        out[name] = jnp.moveaxis(h, -2, head_axis)
    return out, states


def _of_each(tensors: Any, norm: Any, **by_name: Any) -> dict[str, tuple[Any, ...]]:
    """What belongs to each tensor, by name: its norm, itself, and of what else may be by name."""
    if not tensors:
        expected = "arrays [..., H, D] by name"
        raise invalid("normalize_heads", "no tensors", expected, "pass {'q': q, 'k': k}")
    columns = {"norm": norm, **by_name}
    for word, given in columns.items():
        if isinstance(given, Mapping) and given.keys() != tensors.keys():
            wrong = min(given.keys() ^ tensors.keys(), key=str)
            said = f"{word} for {', '.join(map(str, given)) or 'none'}"
            change = f"give {wrong!r} both or neither"
            raise invalid("normalize_heads", said, f"the names {', '.join(tensors)}", change)
        if not isinstance(given, Mapping):
            columns[word] = dict.fromkeys(tensors, given)
    norms = columns.pop("norm")
    return {
        name: (norms[name], tensor, *(column[name] for column in columns.values()))
        for name, tensor in tensors.items()
    }


def _shape(name: str, tensor: Any, head_axis: int) -> tuple[int, int, int]:
    """The numbers of tokens, heads and channels."""
    shape = list(jnp.shape(tensor))
    (axis,) = normalize_axes("normalize_heads", head_axis, len(shape))
    if axis == len(shape) - 1:
        given = f"head_axis={head_axis} for {name} of shape {tuple(shape)}"
        raise invalid("normalize_heads", given, "channels on the last axis", "move the heads")
    heads = shape.pop(axis)
    return math.prod(shape[:-1]), heads, shape[-1]


def _shapes(shape: tuple[int, int, int], heads: Heads, dtype: Any) -> Site:
    """What the norm sees, as shapes."""
    tokens, number, channels = shape
    each = {"shared": (number, channels), "own": (channels,), "all": (number * channels,)}
    a: Any = jax.ShapeDtypeStruct((tokens, *each[heads]), dtype)
    return Site(a)


def _by_token(weights: Any, a: Array, heads: Heads) -> Array | None:
    """The weights of the tokens, `[N·T]`, or of their heads, `[N·T, H]`."""
    if weights is None:
        return None
    where, lead = "normalize_heads", a.shape[:-2]
    by_head = jnp.ndim(weights) > len(lead)
    if by_head and heads == "all":
        given = f"weights of shape {jnp.shape(weights)} for heads that are measured together"
        raise invalid(where, given, f"weights of the tokens, {lead}", "leave the heads out")
    like = jnp.broadcast_to(0, a.shape[:-1] if by_head else lead)
    w: Any = align_weights(where, weights, like.astype(a.dtype))
    w = jnp.broadcast_to(w, like.shape)
    return w.reshape(math.prod(lead), *w.shape[len(lead) :])


def _apply(
    name: str, norm: Norm, params: Any, state: Any, a: Array, w: Any, heads: Heads, train: bool
) -> tuple[Array, Any]:
    """H of `[..., H, D]`, and the state, with every token an example."""

    def one(params: Any, state: Any, a: Array, w: Any) -> tuple[Array, Any]:
        return norm.apply(params, state, Site(a, weights=w), train=train)

    def all_of(a: Array, params: Any, state: Any, w: Any) -> tuple[Array, Any]:
        tokens, (number, channels) = math.prod(a.shape[:-2]), a.shape[-2:]
        flat = a.reshape(tokens, number, channels)
        if heads == "own":
            by_head = 1 if w is not None and w.ndim == 2 else None
            h, state = jax.vmap(one, (0, 0, 1, by_head), (1, 0))(params, state, flat, w)
        else:
            flat = flat.reshape(tokens, number * channels) if heads == "all" else flat
            h, state = one(params, state, flat, w)
        return h.reshape(a.shape), state

    if heads == "own":
        _check_own(name, a.shape[-2], params=params, states=state)
    h, after = partitioned(all_of, a, params, state, w)
    return h, jax.tree.map(_sharded_as, after, state)


def _check_own(name: str, number: int, **trees: Any) -> None:
    """Raises ValueError unless every array has a first axis of so many heads."""
    for word, tree in trees.items():
        for leaf in jax.tree.leaves(tree):
            if jnp.shape(leaf)[:1] != (number,):
                raise invalid(
                    "normalize_heads",
                    f"{word} of {name} of shape {jnp.shape(leaf)} for {number} heads of their own",
                    f"a first axis of {number}",
                    "make them with init_heads(..., heads='own')",
                )


def _sharded_as(v: Array, before: Array) -> Array:
    """A part of the state, sharded as it came, where types say so."""
    sharding = jax.typeof(before).sharding
    return jax.sharding.reshard(v, sharding) if sharding.mesh.explicit_axes else v


def _by_pair(params: Any, pairing: Pairing, size: int) -> Any:
    """Params with one gain for each pair; as they are if they have no gain by channel."""
    by_channel = lambda v: v.ndim and v.shape[-1] % size == 0  # noqa: E731
    known = isinstance(params, Affine | Offset | Log)
    if not known or not any(by_channel(v) for v in jax.tree.leaves(params)):
        return params
    half = jax.tree.map(lambda v: v[..., : v.shape[-1] // 2] if by_channel(v) else v, params)
    return Paired(half, pairing, size)


def _check_rotations(
    name: str,
    norm: Norm,
    heads: Heads,
    after_rope: bool | Pairing,
    shape: tuple[int, int, int],
    *given: Any,
) -> None:
    """Raises ValueError if the norm, or the norm with params of a kind, must not follow RoPE."""
    if not after_rope:
        return
    where, channels = "normalize_heads", shape[-1]
    if channels % 2 and isinstance(after_rope, str):
        said = f"after_rope={after_rope!r} for {name} with {channels} channels"
        raise invalid(where, said, "an even number of channels", "pass after_rope=True")
    expected = "a norm that commutes with the rotation, or logits depend on absolute positions"
    before = "normalize before RoPE, without after_rope"
    if not _commutes(norm, heads, after_rope, shape):
        said = f"{norm} of {name} after RoPE, which treats the channels of a pair unlike"
        raise invalid(where, said, expected, f"{before}, or use RMS or scale norm")
    for tree in given[:1]:
        leaves, structure = jax.tree.flatten(tree)
        shapes = tuple((jnp.shape(v), jnp.result_type(v).name) for v in leaves)
        if not _commutes(norm, heads, after_rope, shape, structure, shapes):
            said = f"{norm} of {name} with a gain or bias by channel after RoPE"
            change = (
                f"{before}; or have no bias and one gain for all channels (gain='scalar', and "
                "heads='own' for one by head), or for each pair: init_heads(..., after_rope='half')"
            )
            raise invalid(where, said, expected, change)


@functools.lru_cache(maxsize=256)
def _commutes(*kind: Any) -> bool:
    """As `_try_rotations`, in a thread that knows no traces and meshes of those who ask."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_try_rotations, *kind).result()


def _try_rotations(
    norm: Norm,
    heads: Heads,
    rope: bool | Pairing,
    shape: tuple[int, int, int],
    structure: Any = None,
    shapes: tuple[tuple[tuple[int, ...], str], ...] = (),
) -> bool:
    """Whether norm(R a) = R norm(a), of random numbers and two rotations R, by turns of the tokens.

    The params are random as well, of the shapes given; without a structure they are the initial
    ones. A norm with a state follows the batch, and is not tried.
    """
    draw, (tokens, number, channels) = np.random.default_rng(0), shape
    tokens = tokens if any(s[:1] == (tokens,) for s, _ in shapes) else 2
    params, state = norm.init(_shapes((tokens, number, channels), heads, jnp.float32))
    if jax.tree.leaves(state):
        return False
    if structure is not None:
        leaves = [jnp.asarray(draw.uniform(0.5, 1.5, size=s), dtype) for s, dtype in shapes]
        params = jax.tree.unflatten(structure, leaves)
    elif heads == "own":
        params = jax.tree.map(lambda v: jnp.broadcast_to(v, (number, *v.shape)), params)

    apply: Callable[[Array], Array] = lambda a: _apply(  # noqa: E731
        "", norm, params, state, a, None, heads, True
    )[0]
    for name in names_of(dict(norm.made.options).get("axis_name") if norm.made else None):
        apply = _alone_on(name, apply)

    def h(a: np.ndarray) -> np.ndarray:
        return np.asarray(apply(jnp.asarray(a, jnp.float32)), np.float64)

    def turn(a: np.ndarray) -> np.ndarray:
        return np.where(odd, a @ first, a @ second)

    a, odd = draw.normal(size=(tokens, number, channels)), np.arange(tokens)[:, None, None] % 2
    first, second = _rotation(rope, channels, draw), _rotation(rope, channels, draw)
    turned, expected = h(turn(a)), turn(h(a))
    return bool(np.abs(turned - expected).max() <= 1e-4 * np.abs(expected).max())


def _alone_on(name: str, f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function on an axis of one device."""
    return lambda a: jax.vmap(f, axis_name=name)(a[None])[0]


def _rotation(rope: bool | Pairing, channels: int, draw: np.random.Generator) -> np.ndarray:
    """A random rotation `[D, D]`: of each pair, or, where no pairing is known, of the space."""
    if rope is True:
        return np.linalg.qr(draw.normal(size=(channels, channels)))[0]
    i = np.arange(channels // 2)
    first, second = (i, i + channels // 2) if rope == "half" else (2 * i, 2 * i + 1)
    angle = draw.uniform(0, 2 * np.pi, size=channels // 2)
    matrix = np.zeros((channels, channels))
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = np.sin(angle), -np.sin(angle)
    return matrix
