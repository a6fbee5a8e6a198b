"""Named schemes: where all norms of a residual net stand, its gains, and how its kernels begin.

A scheme is a `Scheme`, whatever it is called; each function here returns one.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import (
    Kind,
    anything,
    checked,
    either,
    flag,
    instance,
    integer,
    mapping,
    number,
    one_of,
    read,
    real,
    sequence,
    text,
)
from normlab._checks import check_options, gain_and_bias, no_mean, promote_dtype
from normlab.equation import Affine, Parts, init_affine
from normlab.errors import invalid, nearest
from normlab.making import norm_of
from normlab.placement.line import FACTOR, Connection, Learned, Placement
from normlab.placement.streams import STEPS, STREAMS, HyperConnection, Siamese, enter, leave
from normlab.registry import get
from normlab.site import Norm, Site

Branch = Literal["attention", "mlp"]
"""Which branch of a block; a residual block of another kind is an `"mlp"`."""

PLACES = ("q", "k", "v", "heads", "out", "up", "gate", "down")
"""Where norms may stand inside the branches: on q, k and v and on the attention's output, by head
[..., H, D]; before the projection `out`; behind the linear maps `up` and `gate`; before `down`."""

_WORDS: dict[str, str] = {
    "q": "q query q_proj wq to_q",
    "k": "k key k_proj wk to_k",
    "v": "v value v_proj wv to_v",
    "out": "out out_proj o_proj wo to_out proj",
    "up": "up up_proj fc1 c_fc w3 conv0 Conv_0",
    "gate": "gate gate_proj w1",
    "down": "down down_proj fc2 w2 conv1 Conv_1",
    "embed": "embed embedding embed_tokens wte",
    "head": "head lm_head",
}
_WORD = {word: place for place, words in _WORDS.items() for word in words.split()}
_FUSED = ("qkv", "c_attn", "query_key_value", "in_proj", "qkv_proj")
_KERNELS = ("kernel", "weight", "w", "embedding")


_BLOCK = integer("a block by number, from 0 on", "count them from 0", 0)


class Made(NamedTuple):
    """The arguments that `scheme` made a scheme of, in the order of their names."""

    name: str
    norm: Norm
    depth: int
    inside: tuple[tuple[str, Norm], ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Scheme:
    """Where all norms of a net of residual blocks stand, and how it begins.

    What `scheme` returned is equal to, and hashes as, what it returns for the same arguments, and
    is pickled by them; one of one's own is equal to itself.

    Attributes:
      name: What it is called.
      depth: How many blocks there are.
      places: `(block, branch) -> Placement`.
      within: Norms inside the branches, by place: see `PLACES`.
      first: The norm of the embedding; `None` for none.
      last: The norm before the output layer.
      logits: The norm of the logits: a gain.
      starts: By what initial kernels are multiplied, by place.
      rows: Which axis of a kernel has unit norm after every step, by place, for `project`.
      streams: How many streams there are between `enter` and `leave`; `None` where x is none.
      merge: The norm of the streams before `leave`, `[N, ..., S, C]`; `None` for none.
      made: How `scheme` made it; `None` for one of one's own.

    >>> peri = scheme("peri", depth=12, norm="rms")
    >>> peri.name, peri.depth, peri.at(3, "attention").inner is not None
    ('peri', 12, True)
    """

    name: str
    depth: int
    places: Callable[[int, Branch], Connection]
    within: Mapping[str, Norm] = field(default_factory=dict)
    first: Norm | None = None
    last: Norm | None = None
    logits: Norm | None = None
    starts: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    streams: int | None = None
    merge: Norm | None = None
    made: Made | None = field(default=None, init=False)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Scheme) and self.made is not None and self.made == other.made
        return self is other or same

    def __hash__(self) -> int:
        return object.__hash__(self) if self.made is None else hash(self.made)

    def enter(self, x: ArrayLike) -> Array:
        """What goes through the blocks: x itself, or streams `[N, ..., S, C]`, behind `first`."""
        return jnp.asarray(x) if self.streams is None else enter(x, self.streams)

    def leave(self, x: ArrayLike) -> Array:
        """What comes out of the blocks: x itself, or the sum of the streams, before `last`."""
        return jnp.asarray(x) if self.streams is None else leave(x)

    @checked("scheme", block=_BLOCK, branch=one_of(Branch, "'attention' or 'mlp'"))
    def at(self, block: int, branch: Branch = "mlp") -> Any:
        """The placement of one branch of a block: with several streams another `Connection`.

        Args:
          block: Which block, from 0 on.
          branch: `"attention"` or `"mlp"`.

        Raises:
          ValueError: If there is no such block or branch.
        """
        self._check(block)
        return self.places(block, branch)

    @checked("scheme", block=_BLOCK)
    def inside(self, block: int) -> Mapping[str, Norm]:
        """The norms inside the branches of a block, by place."""
        self._check(block)  # no scheme known changes them with depth
        return self.within

    def _check(self, block: int) -> None:
        """Raises ValueError if there is no such block."""
        if not block < self.depth:
            expected = f"a block from 0 to {self.depth - 1}"
            where = f"scheme {self.name}"
            raise invalid(where, f"block={block}", expected, "set depth to the net's")

    @property
    def project(self) -> Mapping[str, int] | None:
        """For each axis of unit norm the pattern of the paths, as `normlab.project` takes them."""
        ends, of_axis = "|".join(_KERNELS), {}
        for place, axis in self.rows.items():
            of_axis.setdefault(axis, []).extend(_WORDS[place].split())
        words = {axis: "|".join(map(re.escape, names)) for axis, names in of_axis.items()}
        return {rf"(.*/)?({names})(/({ends}))?": axis for axis, names in words.items()} or None

    def init_scale(self, path: str) -> float:
        """What the initial kernel at a path is multiplied by.

        The last word of the path that names a place decides: `v`, `v_proj`, `value` and so on.

        Args:
          path: Such as `"block3/v/kernel"` or `"layers.3.self_attn.v_proj.weight"`.

        Raises:
          ValueError: For one kernel of q, k and v of which v alone is multiplied.
        """
        words = re.split(r"[/.]", path)
        fused = {*words} & {*_FUSED}
        if fused and len({self.starts.get(place, 1.0) for place in "qkv"}) > 1:
            given = f"the kernel {path!r}, of q, k and v ({min(fused)})"
            change = "keep v in a kernel of its own"
            raise invalid(f"scheme {self.name}", given, "one whose v alone can be scaled", change)
        place = "v" if fused else place_of(words)
        return 1.0 if place is None else self.starts.get(place, 1.0)


def place_of(words: Sequence[str]) -> str | None:
    """Which place the last known word of a path names; `None` if there is none."""
    for i in reversed(range(len(words))):
        if words[i] == "c_proj":  # of the attention and of the MLP, in GPT-2
            return "down" if "mlp" in words[:i] else "out"
        if words[i] in _WORD:
            return _WORD[words[i]]
    return None


@checked(
    "scale_init",
    scheme=instance(Scheme, "make it with scheme(name)", arrays=False),
    params=anything,
)
def scale_init(scheme: Scheme, params: Any) -> Any:
    """Returns a net's initial parameters with the kernels multiplied as a scheme says.

    Args:
      scheme: The scheme; see `Scheme.init_scale` for which kernel is which.
      params: Any pytree of parameters by path.

    Raises:
      ValueError: If there is nothing in the net that the scheme wants to multiply.

    >>> params = {"mlp": {"up": {"kernel": jnp.ones(1)}, "down": {"kernel": jnp.ones(1)}}}
    >>> scale_init(scheme("fixup", depth=4, branches=1), params)["mlp"]["down"]["kernel"].item()
    0.0
    """
    met: set[str | None] = set()

    def scaled(path: Any, leaf: Any) -> Any:
        words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
        words = [part for word in words for part in re.split(r"[/.]", word)]
        if not {*words[-2:]} & {*_KERNELS}:
            return leaf
        met.add(place_of(words))
        factor = scheme.init_scale("/".join(words))
        return leaf if factor == 1 else factor * leaf

    result = jax.tree_util.tree_map_with_path(scaled, params)
    wanted = {place for place, factor in scheme.starts.items() if factor != 1}
    if wanted and not wanted & met:
        given = f"params without a kernel of {', '.join(sorted(wanted))}"
        change = "name the kernels so, or multiply them by scheme.starts"
        raise invalid(f"scheme {scheme.name}", given, "a net that has some", change)
    return result


class _Entry(NamedTuple):
    make: Callable[..., Scheme]
    options: Mapping[str, inspect.Parameter]
    kinds: Mapping[str, Kind]


_SCHEMES: dict[str, _Entry] = {}
_DEPTH = integer("a number of blocks, at least 1", "count the blocks", 1)
_NORM = either(
    "the name of a norm, or a Norm",
    "pass 'rms', or get('rms', eps=1e-6)",
    text("", ""),
    instance(Norm, "", arrays=False),
)


def names() -> tuple[str, ...]:
    """The names of all schemes.

    >>> names()[:3]
    ('post', 'pre', 'sandwich')
    """
    return tuple(_SCHEMES)


@checked(
    "scheme",
    name=text("the name of a scheme", "use one of placement.names()"),
    depth=_DEPTH,
    norm=_NORM,
    inside=mapping(instance(Norm, "", arrays=False), "norms by place", "pass {'q': get('rms')}"),
)
def scheme(
    name: str,
    *,
    depth: int,
    norm: str | Norm = "layer",
    inside: Mapping[str, Norm] | None = None,
    **options: Any,
) -> Scheme:
    """Returns the scheme called `name`; twice the same for the same arguments.

    Args:
      name: One of `names()`.
      depth: How many blocks the net has, each of an attention and an MLP.
      norm: What stands where the scheme has a norm: a name, or what `get` returned. Schemes without
        norms take no notice.
      inside: Norms inside the branches beside the scheme's own, by place: `{"q": get("rms"), "k":
        get("rms")}` is QK norm.
      **options: Those of the scheme, such as `tau` of "unit".

    Raises:
      ValueError: For an unknown name, option or place, with the nearest known one.

    >>> scheme("deepnorm", depth=8).at(0).skip, scheme("lns", depth=4, norm="rms").at(3).scale
    (2.0, 0.5)
    """
    if name not in _SCHEMES:
        given = f"the unknown scheme {name!r}: {nearest(name, _SCHEMES)}"
        raise invalid("scheme", given, "the name of a scheme", "use a known one")
    for place in inside or ():
        if place not in PLACES:
            given = f"the place {place!r}: {nearest(place, PLACES)}"
            raise invalid("scheme", given, "a place inside a branch", "use a known one")
    known, kinds = _SCHEMES[name].options, _SCHEMES[name].kinds
    check_options(name, known, options, of="scheme")
    for option, value in options.items():  # as Python's, which can be hashed
        if value is not None or known[option].default is not None:
            options[option] = read(f"{name} scheme", option, value, kinds[option])
    of = get(norm) if isinstance(norm, str) else norm
    by_place = sorted((inside or {}).items(), key=lambda item: item[0])  # norms have no order
    return _scheme(Made(name, of, depth, tuple(by_place), tuple(sorted(options.items()))))


@functools.lru_cache(maxsize=1024)
def _scheme(made: Made) -> Scheme:
    found = _SCHEMES[made.name].make(made.norm, made.depth, **dict(made.options))
    found = replace(found, name=made.name, within={**found.within, **dict(made.inside)})
    object.__setattr__(found, "made", made)
    return found


def _pickled(one: Scheme) -> Any:
    """By its arguments; one of one's own by its fields."""
    if one.made is None:
        given = {f.name: getattr(one, f.name) for f in dataclasses.fields(one) if f.init}
        return functools.partial(Scheme, **given), ()
    name, norm, depth, inside, options = one.made
    given = {"depth": depth, "norm": norm, "inside": dict(inside), **dict(options)}
    return functools.partial(scheme, name, **given), ()


copyreg.pickle(Scheme, _pickled)


def _named(**kinds: Kind) -> Callable[[Callable[..., Scheme]], Callable[..., Scheme]]:
    """Adds a scheme: a function of the norm, the depth and its options, of these kinds."""

    def decorate(make: Callable[..., Scheme]) -> Callable[..., Scheme]:
        every = inspect.signature(make).parameters
        options = {n: p for n, p in every.items() if p.kind is p.KEYWORD_ONLY}
        assert options.keys() == kinds.keys()
        _SCHEMES[make.__name__.removeprefix("_")] = _Entry(make, options, kinds)
        return make

    return decorate


def _same(depth: int, placement: Placement, **more: Any) -> Scheme:
    """The scheme of one placement everywhere."""
    return Scheme("", depth, lambda block, branch: placement, **more)


@_named()
def _post(norm: Norm, depth: int) -> Scheme:
    """Post-norm (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762): x' = N(x + F(x))."""
    return _same(depth, Placement(total=norm))


@_named()
def _pre(norm: Norm, depth: int) -> Scheme:
    """Pre-norm (Xiong et al. 2020, https://arxiv.org/abs/2002.04745): x' = x + F(N(x))."""
    return _same(depth, Placement(inner=norm), last=norm)


@_named()
def _sandwich(norm: Norm, depth: int) -> Scheme:
    """Sandwich norm (Ding et al. 2021, CogView, https://arxiv.org/abs/2105.13290), Gemma 2 and 3.

    x' = x + N(F(N(x))).
    """
    return _same(depth, Placement(inner=norm, outer=norm), last=norm)


@_named()
def _peri(norm: Norm, depth: int) -> Scheme:
    """Peri-LN (Kim et al. 2025, https://arxiv.org/abs/2502.02732): sandwich, embedding too."""
    return replace(_sandwich(norm, depth), first=norm)


@_named()
def _reordered(norm: Norm, depth: int) -> Scheme:
    """Res-post-norm of Swin V2 (https://arxiv.org/abs/2111.09883) and OLMo 2: x' = x + N(F(x)).

    Both have a QK norm beside it: see `inside` of `scheme`.
    """
    return _same(depth, Placement(outer=norm), last=norm)


Role = Literal["alone", "encoder", "decoder"]
"""Whether a net is one half of an encoder and a decoder."""
_ROLES = {
    "role": one_of(Role, "'alone', 'encoder' or 'decoder'"),
    "other": integer("the depth of the other half, at least 1", "count its blocks", 1),
}
_MAGNETO = ("v", "out", "up", "gate", "down")


@_named(**_ROLES)
def _deepnorm(norm: Norm, depth: int, *, role: Role = "alone", other: int = 1) -> Scheme:
    """DeepNorm (Wang et al. 2022, https://arxiv.org/abs/2203.00555): x' = N(α·x + F(x)).

    With N blocks α = (2N)^¼, and the kernels of v, out and the MLP begin (8N)^¼ times smaller. As
    an encoder beside a decoder of M: 0.81 (N⁴M)^(1/16), and 0.87 (N⁴M)^(−1/16) times as large (the
    paper's; 1/1.15 in torchscale's code); as a decoder (3N)^¼ and (12N)^−¼. Neither has a gated
    MLP: `gate` begins as `up` does.
    """
    both = (depth**4 * other) ** (1 / 16)
    skip, start = {
        "alone": ((2 * depth) ** 0.25, (8 * depth) ** -0.25),
        "encoder": (0.81 * both, 0.87 / both),
        "decoder": ((3 * depth) ** 0.25, (12 * depth) ** -0.25),
    }[role]
    placement = Placement(total=norm, skip=skip)
    return _same(depth, placement, starts=dict.fromkeys(_MAGNETO, start))


@_named(**_ROLES)
def _sub(norm: Norm, depth: int, *, role: Role = "alone", other: int = 1) -> Scheme:
    """Sub-LN (Wang et al. 2022, Magneto, https://arxiv.org/abs/2210.06423).

    Pre-norm with a second norm inside each branch, before its last linear map. The kernels of v,
    out and the MLP begin √(ln 2N) times as large; in an encoder of N beside a decoder of M √(⅓ ln
    3M · ln 2N), in a decoder √(ln 3N). `gate` begins as `up` does.
    """
    start = {
        "alone": math.log(2 * depth),
        "encoder": math.log(3 * other) * math.log(2 * depth) / 3,
        "decoder": math.log(3 * depth),
    }[role] ** 0.5
    within = {"out": norm, "down": norm}
    more: dict[str, Any] = {"within": within, "starts": dict.fromkeys(_MAGNETO, start)}
    return replace(_pre(norm, depth), **more)


@_named(scale_skip=flag())
def _normformer(norm: Norm, depth: int, *, scale_skip: bool = False) -> Scheme:
    """NormFormer (Shleifer et al. 2021, https://arxiv.org/abs/2110.09456).

    Pre-norm, and a norm behind the attention, a gain for each head, a norm before the MLP's last
    map. With `scale_skip` a gain for each channel of the MLP's x, as for its small models. The
    gains of heads stand before `out`, as in the paper; the authors' code in fairseq multiplies as
    many equal parts of what `out` makes.
    """
    attention = Placement(inner=norm, outer=norm)
    mlp = Placement(inner=norm, skip=Learned(1.0, "channel") if scale_skip else 1.0)
    by = {"attention": attention, "mlp": mlp}
    within = {"heads": _gained(per="head"), "down": norm}
    return Scheme("", depth, lambda block, branch: by[branch], within=within, last=norm)


@_named(
    share=number("a share from 0 to 1", "pass 0.25", lambda share: 0 <= share <= 1, static=True)
)
def _mix(norm: Norm, depth: int, *, share: float = 0.25) -> Scheme:
    """Mix-LN (Li et al. 2024, https://arxiv.org/abs/2412.13795): post-norm first, then pre-norm.

    The first ⌊share · depth⌋ blocks are post-norm; the authors' code is told their number.
    """
    first, then = Placement(total=norm), Placement(inner=norm)
    number = math.floor(round(share * depth, 9))  # 0.29 · 100 is 28.999999999999996
    return Scheme("", depth, lambda block, branch: first if block < number else then, last=norm)


@_named(star=flag())
def _hybrid(norm: Norm, depth: int, *, star: bool = False) -> Scheme:
    """HybridNorm (Zhuo et al. 2025, https://arxiv.org/abs/2503.04598).

    q, k and v are normalized and the attention's input is not; the MLP is post-norm in the sense
    that it and its shortcut start from the same normalized sum: y = N(x + attention(x)), x' = y +
    MLP(y). With `star` (HybridNorm*) the first block is pre-norm, its q, k and v normalized too.
    """
    by = {"attention": Placement(total=norm), "mlp": Placement()}
    within: dict[str, Norm] = dict.fromkeys(("q", "k", "v"), norm)
    pre = Placement(inner=norm)

    def at(block: int, branch: Branch) -> Placement:
        return pre if star and block == 0 else by[branch]

    return Scheme("", depth, at, within=within, last=norm)


@_named()
def _lns(norm: Norm, depth: int) -> Scheme:
    """LayerNorm Scaling (Sun et al. 2025, https://arxiv.org/abs/2502.05795).

    x' = x + F(N(x)/√ℓ) for both branches of block ℓ = 1, 2, …
    """
    return Scheme(
        "", depth, lambda block, branch: Placement(inner=norm, scale=(block + 1) ** -0.5), last=norm
    )


_BRANCHES = {"branches": integer("a number of branches in each block, at least 1", "use 2", 1)}


@_named(**_BRANCHES)
def _keel(norm: Norm, depth: int, *, branches: int = 2) -> Scheme:
    """Keel (Chen & Wei 2026, https://arxiv.org/abs/2601.19895): x' = N(L·x + F(N(x))).

    L is the number of all branches, `branches` in each block.
    """
    return _same(depth, Placement(inner=norm, total=norm, skip=float(branches * depth)))


@_named(init=real)
def _layerscale(norm: Norm, depth: int, *, init: float | None = None) -> Scheme:
    """LayerScale (Touvron et al. 2021, CaiT, https://arxiv.org/abs/2103.17239).

    x' = x + γ⊙F(N(x)), γ [C]. It begins with 0.1 up to 18 blocks, 1e-5 up to 24, then 1e-6.
    """
    start = init
    if start is None:
        start = 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6
    return _same(depth, Placement(inner=norm, branch=Learned(start, "channel")), last=norm)


@_named()
def _rezero(norm: Norm, depth: int) -> Scheme:
    """ReZero (Bachlechner et al. 2020, https://arxiv.org/abs/2003.04887): x' = x + α·F(x), no norm.

    α begins at 0. The paper's transformer has one α for both branches of a block; here each has
    its own.
    """
    del norm
    return _same(depth, Placement(branch=Learned(0.0)))


@_named()
def _skipinit(norm: Norm, depth: int) -> Scheme:
    """SkipInit (De & Smith 2020, https://arxiv.org/abs/2002.10444): ReZero, for ResNets."""
    return _rezero(norm, depth)


@_named(**_BRANCHES)
def _fixup(norm: Norm, depth: int, *, branches: int = 2) -> Scheme:
    """Fixup (Zhang et al. 2019, https://arxiv.org/abs/1901.09321): no norm, other initial kernels.

    The last kernel of each of the L branches begins at 0, and so does the output layer; of a branch
    of m linear maps the others begin L^(−1/(2m−2)) times as large: `up` with m = 2, and q, k and v
    with m = 4, as in the authors' transformer. Of a gated MLP, which they do not have, `up` alone,
    which does as much. There is a bias of one number before each linear map and each activation,
    and a gain and a bias behind the branch, as in their ResNets; their transformer has no bias
    before `out` and behind a branch.
    """
    del norm
    both = _gained(per="scalar", use_bias=True)
    bias = _gained(per="scalar", use_gain=False, use_bias=True)
    many = branches * depth
    starts = {"up": many ** (-1 / 2), **dict.fromkeys("qkv", many ** (-1 / 6))}
    return _same(
        depth,
        Placement(inner=bias, outer=both),
        within=dict.fromkeys(("out", "up", "down"), bias),
        last=bias,
        starts={**starts, **dict.fromkeys(("out", "down", "head"), 0.0)},
    )


@_named(
    **_BRANCHES,
    alpha=FACTOR,
    stages=sequence(integer("a block by number", "", 0), "blocks by number", "pass (0, 3, 6)"),
)
def _nfnet(
    norm: Norm,
    depth: int,
    *,
    alpha: float = 0.2,
    branches: int = 2,
    stages: tuple[int, ...] = (0,),
) -> Scheme:
    """NFNet (Brock et al. 2021, https://arxiv.org/abs/2102.06171): x' = x + α·γ·F(x/β), no norm.

    β is the standard deviation that x would have with γ = 1: β² is 1 at first and grows by α² with
    each branch. The first branch of each of the `stages` (blocks by number) has the shortcut x/β,
    which the net puts through a linear map there, so that β² is 1 + α² behind it. γ is learned, 0
    at first. In the paper the activation that F begins with sees x/β; the authors' code divides
    what it returns, which is the same for ReLU. The branches keep their variance by scaled weight
    standardization (`weight_standardization`) and by the constants of their activations, and
    gradients are clipped (`optax.adaptive_grad_clip`): theirs.
    """
    del norm
    if max(stages, default=0) >= depth:
        expected = f"blocks from 0 to {depth - 1}"
        raise invalid("nfnet scheme", f"stages={stages}", expected, "set depth to the net's")
    gain = Learned(0.0, factor=alpha)

    def at(block: int, branch: Branch) -> Placement:
        first = branch == "attention" or branches == 1
        new = first and block in stages
        start = max((stage for stage in stages if stage < block + (not new)), default=0)
        before = branches * (block - start) + (branch == "mlp") * (branches - 1)
        scale = (1 + before * alpha**2) ** -0.5
        return Placement(scale=scale, skip=scale if new else 1.0, branch=gain)

    return Scheme("", depth, at)


@_named(tau=number("a number above 0", "pass 1.0", lambda tau: tau > 0, static=True))
def _unit(norm: Norm, depth: int, *, tau: float = 1.0) -> Scheme:
    """Unit scaling (Blake et al. 2023, https://arxiv.org/abs/2303.11257).

    x' = (x + τ·F(N(x)))/√(1 + τ²), with the gradients of the branch unscaled inside it: the rule of
    the authors' library, in which the paper's has √(1 − τ) and √τ. One τ for all branches, as its
    `residual_split`; that of u-μP falls with depth (https://arxiv.org/abs/2407.17465).
    """
    whole = (1 + tau**2) ** 0.5
    placement = Placement(inner=norm, skip=1 / whole, branch=tau / whole, delayed=True)
    return _same(depth, placement, last=norm)


@_named(
    width=integer("the width of the stream, at least 1", "pass the number of channels", 1),
    init=real,
)
def _ngpt(norm: Norm, depth: int, *, width: int, init: float = 0.05) -> Scheme:
    """NGPT (Loshchilov et al. 2024, https://arxiv.org/abs/2410.01131): everything on a sphere.

    x' = L2(x + |α|⊙(L2(F(x)) − x)), α [C], which Adam trains as α = init·√C·p. The embedding is
    normalized, and the kernels are projected to unit rows after each step (`project`). Gains stand
    on q and k [H, D], behind `up` and `gate`, and on the logits; they begin at 1 (behind `up` and
    `gate` at √C) and are √C times their parameters. The norms are L2 norms, whatever `norm` is.

    q and k are normalized to RMS 1, which with the attention's 1/√D is the paper's √D for unit
    vectors. Their gains stand before the rotation: behind it, as in the authors' code, logits
    depend on absolute positions. That code has one gain for q and k; each has its own here, as in
    OLMo-core. In the paper √C stands behind `gate` alone, in the code behind both, which is the
    same: the branch is normalized.
    """
    del norm
    unit, root = get("scale", use_gain=False), width**0.5
    alpha = Learned(init, "channel", factor=init * root)
    heads = get("rms", use_gain=False, use_bias=False), _gained(per="each", factor=root)
    own = get("normlab.combine:chain", norms=heads)
    wide = _gained(init=root, factor=root)
    return _same(
        depth,
        Placement(outer=unit, total=unit, branch=alpha, lerp=True),
        first=unit,
        within={"q": own, "k": own, "up": wide, "gate": wide},
        logits=_gained(factor=root),
        rows={"embed": -1, "head": -2, **dict.fromkeys(("q", "k", "v", "up", "gate"), -2)}
        | {"out": -1, "down": -1},
    )


@_named()
def _siamese(norm: Norm, depth: int) -> Scheme:
    """SiameseNorm (Li et al. 2026, https://arxiv.org/abs/2602.08064): see `Siamese`.

    β = 1/√(2ℓ) in block ℓ = 1, 2, …. The two streams are normalized before they leave, each with
    its own gain, and their sum is normalized again.
    """

    def at(block: int, branch: Branch) -> Siamese:
        return Siamese(inner=norm, total=norm, read=norm, branch=(2 * (block + 1)) ** -0.5)

    merge = get("normlab.placement.streams:by_stream", norm=norm)
    return Scheme("", depth, at, last=norm, streams=2, merge=merge)


@_named(streams=STREAMS, dynamic=flag(), **_BRANCHES)
def _hyper(
    norm: Norm, depth: int, *, streams: int = 4, dynamic: bool = True, branches: int = 2
) -> Scheme:
    """Hyper-connections (Zhu et al. 2024, https://arxiv.org/abs/2409.19606): `HyperConnection`.

    Around pre-norm branches; the weights look at each stream through a layer norm.
    """
    return _mixed(norm, depth, streams, dynamic, branches, total=get("layer"))


@_named(
    streams=STREAMS,
    dynamic=flag(),
    **_BRANCHES,
    steps=STEPS,
)
def _mhc(
    norm: Norm,
    depth: int,
    *,
    streams: int = 4,
    dynamic: bool = True,
    branches: int = 2,
    steps: int = 20,
) -> Scheme:
    """Manifold-constrained hyper-connections (Xie et al. 2025, https://arxiv.org/abs/2512.24880).

    See `HyperConnection`. The weights look at all streams through an RMS norm, whose gain would be
    one of the kernels' and is left out.
    """
    seen = get("rms", use_gain=False, use_bias=False)
    return _mixed(norm, depth, streams, dynamic, branches, total=seen, sinkhorn=steps)


def _mixed(
    norm: Norm, depth: int, streams: int, dynamic: bool, branches: int, **more: Any
) -> Scheme:
    def at(block: int, branch: Branch) -> HyperConnection:
        reads = branches * block + (branch == "mlp") * (branches - 1)
        return HyperConnection(inner=norm, streams=streams, reads=reads, dynamic=dynamic, **more)

    return Scheme("", depth, at, last=norm, streams=streams)


_PER = {"scalar": (), "channel": (-1,), "head": (-2,), "each": (-2, -1)}
_ONE_OF = one_of(Literal["scalar", "channel", "head", "each"], f"one of {', '.join(_PER)}")


@checked("gained", per=_ONE_OF, init=real, factor=FACTOR)
def gained(
    *,
    per: str = "channel",
    use_gain: bool = True,
    use_bias: bool = False,
    init: float = 1.0,
    factor: float = 1.0,
) -> Norm:
    """Returns the norm that has a gain and a bias and nothing else: h = g·a + b.

    Args:
      per: Whether they are one number (`"scalar"`), or one for each channel, for each head of
        `[..., H, D]`, or for each channel of each head (`"each"`).
      use_gain: Whether there is a gain.
      use_bias: Whether there is a bias, 0 at first.
      init: What the gain is at first.
      factor: The gain is this times its parameter, as in `Learned`.
    """

    def axes(site: Site) -> tuple[int, ...]:
        last = site.linear.channel_axis
        return tuple(site.a.ndim + i if i != -1 else last % site.a.ndim for i in _PER[per])

    def params(site: Site) -> Affine:
        how: Any = {"use_gain": use_gain, "use_bias": use_bias, "dtype": promote_dtype(site.a)}
        return init_affine([site.a.shape[i] for i in axes(site)], g=init / factor, **how)

    def measure(site: Site, params: Any) -> Parts:
        g, b = gain_and_bias("gained", params, site.a, site.linear.channel_axis, axes(site))
        own = params is not None and params.g is not None
        scaled = factor * g if own and factor != 1 else g
        return Parts(no_mean(g.dtype), jnp.ones((), g.dtype), scaled, b)

    return norm_of("gained", measure, params)


def _gained(**options: Any) -> Norm:
    """`gained`, which is equal to, and pickled by, its arguments."""
    return get("normlab.placement.schemes:gained", **options)
