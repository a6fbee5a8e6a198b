"""A stack of transformer blocks with norms where a scheme says, written out or scanned over."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

import normlab as nl
from normlab.devices.mapped import vary, varying_axes
from normlab.errors import invalid

from .block import BRANCHES, LINEAR, Block, Form, Sizes
from .layers import (
    ACTIVATIONS,
    DEPTH,
    PARTS,
    STATE,
    Activation,
    Network,
    needs_kernel,
)

CONNECTION = ("inner", "outer", "total")
"""Where norms stand on the connection of a branch."""

OUTSIDE = ("first", "merge", "last", "logits")
"""Where norms stand outside the blocks."""


class Transformer(Network):
    """What the language model and the vision transformer have in common.

    The norms of a block stand where its scheme says (`nl.placement.scheme`), on the connections
    (`block{i}/attention/inner`, `/outer`, `/total`, and so on of `mlp`), inside the branches
    (`block{i}/norm_q` and so on), at the beginning and at the end (`norm_first`, `norm_last`,
    `norm_logits`). A norm that looks at w or x has nothing to look at there; it stands in the
    linear layers instead: `block{i}/q`, `/k`, `/v`, `/out`, `/gate`, `/up`, `/down`. `where` may
    name any of these. A place that does not carry a norm is the identity.

    Under `scan` blocks with norms at the same places are one program, and their variables are
    stacked: `blocks`, or, where a scheme changes with depth, `blocks_from0` and so on.

    Attributes:
      scheme: The name of a scheme, or one with norms of its own.
      inside: Where the norm stands beside the scheme's places: `("q", "k")` is QK norm.
      width: C, the size of the residual stream.
      depth: The number of blocks.
      heads: H, the number of heads; divides the width.
      kv_heads: The number of heads of k and v, which divides H; `None` for H.
      hidden: The units of the MLP; `None` for 4 C, or 8/3 C, rounded to 8, where it is gated.
      mlp: What the MLP is.
      activation: f of the MLP; `None` for that of `mlp`.
      use_bias: Whether linear layers without a norm have biases.
      scan: Whether the blocks are scanned over.
      remat: Whether a block's activations are computed anew for the gradient: under `scan` it
        compiles faster so, and needs a fraction of the memory (docs/speed.md).
      implementation: That of `jax.nn.dot_product_attention`; "cudnn" is flash attention, on a GPU
        in half precision. Params that are cast to bfloat16 make everything bfloat16, but for
        what the norms, the rotation and the sums of the connections compute in float32.
    """

    scheme: str | nl.placement.Scheme = "pre"
    inside: tuple[str, ...] = ()
    width: int = 128
    depth: int = 4
    heads: int = 4
    kv_heads: int | None = None
    hidden: int | None = None
    mlp: Form = "swiglu"
    activation: Callable[[Array], Array] | None = None  # pyright: ignore
    use_bias: bool = False
    scan: bool = False
    remat: bool = False
    implementation: Literal["xla", "cudnn"] | None = None
    context: int | None = None
    rope: float | None = None

    flat = True
    causal: ClassVar[bool] = False
    """Whether a token sees none behind it."""

    @property
    def plan(self) -> nl.placement.Scheme:
        """The scheme, before `where` chooses among its places."""
        if not isinstance(self.scheme, str):
            if self.inside:
                raise invalid(
                    type(self).__name__,
                    f"inside={self.inside!r} beside a scheme that is made",
                    "the name of a scheme, to which the norm is added inside",
                    "pass inside to nl.placement.scheme",
                )
            return self.scheme
        inside = dict.fromkeys(self.inside, self.norm)
        more: dict[str, Any] = {"width": self.width} if self.scheme == "ngpt" else {}
        return nl.placement.scheme(
            self.scheme, norm=self.norm, depth=self.depth, inside=inside, **more
        )

    @property
    def places(self) -> tuple[str, ...]:
        """Where in a block a norm may stand."""
        linear = [name for name in LINEAR if name != "gate" or self.mlp == "swiglu"]
        connections = [f"{branch}/{name}" for branch in BRANCHES for name in CONNECTION]
        return (*connections, *linear, *(f"norm_{name}" for name in (*linear, "heads")))

    @property
    def layers(self) -> tuple[str, ...]:
        """`norm_first`, `block0/attention/inner` and so on."""
        blocks = (f"block{i}/{place}" for i in range(self.depth) for place in self.places)
        merge = () if self.plan.merge is None else ("norm_merge",)
        return ("norm_first", *blocks, *merge, "norm_last", "norm_logits")

    def carriers(self) -> frozenset[str]:
        """The names of the layers that carry a norm."""
        return frozenset(self.norms())

    def norms(self) -> dict[str, nl.Norm]:
        """The norm of each layer that carries one: the scheme's there, or the model's."""
        if self.placement != "before":
            raise invalid(
                type(self).__name__,
                f"placement={self.placement!r}",
                "'before': where the norms of a transformer stand is its scheme",
                'use scheme="post" for norm(x + f(x)), scheme="pre" for x + f(norm(x))',
            )
        chosen, plan = super().carriers(), self.plan
        own = {f"norm_{name}": getattr(plan, name) for name in OUTSIDE}
        for i in range(self.depth):
            for branch in BRANCHES:
                placement = plan.at(i, branch)
                own |= {f"block{i}/{branch}/{p}": getattr(placement, p) for p in CONNECTION}
            own |= {f"block{i}/norm_{place}": norm for place, norm in plan.inside(i).items()}
        own = {name: own[name] for name in self.layers if own.get(name) is not None}
        if self.where is not None:
            return {name: own.get(name, self.norm) for name in self.layers if name in chosen}
        if not needs_kernel(self.norm, jnp.zeros((2, self.width))):
            return own
        linear = [name for name in self.layers if name.split("/")[-1] in LINEAR]
        return {n: norm for n, norm in own.items() if norm != self.norm} | dict.fromkeys(
            linear, self.norm
        )

    def runs(self) -> dict[str, range]:
        """Which blocks are one scan, by the name of their variables."""
        plan, chosen = self.plan, self.carriers() if self.where is not None else ()

        def kind(i: int) -> Any:
            placements = [jax.tree.structure(plan.at(i, branch)) for branch in BRANCHES]
            named = [place for place in self.places if f"block{i}/{place}" in chosen]
            return placements, dict(plan.inside(i)), named

        runs = [list(run) for _, run in itertools.groupby(range(self.depth), kind)]
        name = "blocks" if len(runs) == 1 else "blocks_from{}"
        return {name.format(run[0]): range(run[0], run[-1] + 1) for run in runs}

    def stack(self, tree: Any) -> Any:
        """The variables of the unrolled model as those under `scan`; `unstack` undoes it."""
        stacked = {name: v for name, v in tree.items() if not name.startswith("block")}
        for name, run in self.runs().items():
            if blocks := [tree[f"block{i}"] for i in run if f"block{i}" in tree]:
                stacked[name] = jax.tree.map(lambda *v: jnp.stack(v), *blocks)
        return stacked

    def unstack(self, tree: Any) -> Any:
        """The variables of the model under `scan`, sown ones too, as those of the unrolled one."""
        return unstack(tree, self.runs())

    def project(self, params: Any) -> Any:
        """The params after a step, and before the first: with unit rows, where a scheme says so."""
        return nl.project(params, self.plan.project) if self.plan.project else params

    def through(self, x: Array, train: bool) -> Array:
        """What the blocks and the norms around them make of `x [N, T, C]`: `[N·T, C]`."""
        norms, sizes = self.norms(), self.sizes(x.shape[1])
        inside = {p for p in self.places if "/" not in p}

        def placements(i: int) -> dict[str, nl.placement.Placement]:
            at = f"block{i}/{{}}/{{}}".format
            return {
                b: replace(self.plan.at(i, b), **{p: norms.get(at(b, p)) for p in CONNECTION})
                for b in BRANCHES
            }

        def make(name: str, i: int) -> Block:
            own = {p: norms[f"block{i}/{p}"] for p in inside if f"block{i}/{p}" in norms}
            return Block(own, sizes, name=name)

        def call(block: Block, x: Array, placements: Any) -> Array:
            f = lambda block, x: block(x, placements, train)  # noqa: E731
            return nn.remat(f, prevent_cse=not self.scan)(block, x) if self.remat else f(block, x)

        x = self.plan.enter(self.outside("norm_first", x.reshape(-1, self.width), train))
        if not self.scan:
            for i in range(self.depth):
                x = call(make(f"block{i}", i), x, placements(i))
        for name, run in self.runs().items() if self.scan else ():
            x = over_depth(call, make(name, run[0]), x, [placements(i) for i in run])
        x = self.plan.leave(self.outside("norm_merge", x, train))
        return self.outside("norm_last", x, train)

    def outside(self, name: str, x: Array, train: bool) -> Array:
        """The norm of that name, if it stands there."""
        norm = self.norms().get(name)
        return x if norm is None else Activation(norm, name=name)(x, train)

    def sizes(self, length: int) -> Sizes:
        """What the blocks are beside their norms, for sequences of that length."""
        kv_heads, name = self.kv_heads or self.heads, type(self).__name__
        if self.mlp not in get_args(Form):
            raise invalid(name, f"mlp={self.mlp!r}", "'swiglu' or 'gelu'", "use one of the two")
        turned = 2 if self.rope is not None else 1
        if self.width % (turned * self.heads) or self.heads % kv_heads:
            raise invalid(
                name,
                f"width={self.width}, heads={self.heads}, kv_heads={kv_heads}",
                "heads that divide the width, evenly sized where they are turned, and kv_heads "
                "that divide the heads",
                "change one of them",
            )
        gated = self.mlp == "swiglu"
        hidden = self.hidden or (8 * round(self.width / 3) if gated else 4 * self.width)
        activation = self.activation or (nn.silu if gated else nn.gelu)
        own = {name: getattr(self, name) for name in Sizes._fields if hasattr(self, name)}
        more = {"kv_heads": kv_heads, "hidden": hidden, "gated": gated, "activation": activation}
        return Sizes(**own | more, length=length, start=self.plan.init_scale)  # pyright: ignore


def over_depth(
    call: Callable[[Block, Array, Any], Array], block: Block, x: Array, placements: list[Any]
) -> Array:
    """`call(block, x, placements)` with each of the placements, in one scan.

    Numbers that are the same in all blocks stay numbers; others are stacked.
    """
    leaves = [jax.tree.leaves(each) for each in placements]
    structure = jax.tree.structure(placements[0])
    stacked = [
        None
        if all(isinstance(v, int | float) and v == column[0] for v in column)
        else jnp.stack([jnp.asarray(v) for v in column])
        for column in zip(*leaves, strict=True)
    ]

    def body(block: Block, x: Array, numbers: list[Array | None]) -> tuple[Array, None]:
        own = [a if b is None else b for a, b in zip(leaves[0], numbers, strict=True)]
        return call(block, x, jax.tree.unflatten(structure, own)), None

    collections: dict[Any, int] = dict.fromkeys(("params", STATE, PARTS, ACTIVATIONS, DEPTH), 0)
    scan = nn.scan(
        body,
        variable_axes=collections,
        split_rngs={"params": True},
        length=len(leaves),
        check_constancy_invariants=False,  # nothing is broadcast: the body need not be traced twice
    )
    # What is carried has one type throughout: it varies over the devices if anything read does.
    axes = set().union(*map(varying_axes, jax.tree.leaves((x, block.variables))))
    return scan(block, vary(x, tuple(axes)), stacked)[0]


def unstack(tree: Any, runs: Mapping[str, range] | None = None) -> Any:
    """Variables under `scan` as those of the unrolled model; see `Transformer.unstack`.

    Args:
      tree: One collection.
      runs: Those of the model; by default what the leaves say, of which there must be some.

    >>> unstack({"blocks": {"w": jnp.arange(2)}, "embed": 7})
    {'embed': 7, 'block0': {'w': Array(0, dtype=int32)}, 'block1': {'w': Array(1, dtype=int32)}}
    """
    by_block = {name: v for name, v in tree.items() if not name.startswith("blocks")}
    for name in sorted(tree.keys() - by_block.keys(), key=_first):
        first, leaves = _first(name), jax.tree.leaves(tree[name])
        for i in runs[name] if runs else range(first, first + len(leaves[0])):
            by_block[f"block{i}"] = jax.tree.map(lambda v, j=i - first: v[j], tree[name])
    return by_block


def _first(run: str) -> int:
    return int(run.removeprefix("blocks_from").removeprefix("blocks") or 0)
