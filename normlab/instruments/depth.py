"""Parameters, gradients and updates by block, and how fast a statistic grows with depth.

A net keeps its blocks written out, `block0/up/kernel`, `block1/up/kernel`, ..., or scanned,
`blocks/up/kernel` with the blocks on a first axis, `[L, ...]`. What is measured here is the same
for both: one number for each block, `[L]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from normlab._arguments import a_function, array, checked, number, text, tree
from normlab._checks import floating, promote
from normlab.errors import invalid
from normlab.instruments.vectors import check_alike, norm
from normlab.instruments.weights import effective_lr

BLOCKS = r"(?i)(?:.*?[/.])??(?:\w*(?:block|layer)s?|h)(?:[_/.]?(\d+)[/_.]|_from(?P<first>\d+)/|/)"
"""How a path to a leaf begins in the nets people write: `block0/`, `layers_3/`, `encoder/layer/3/`,
`TransformerBlock_3/`, `h/3/`, `model.layers.3.`; where the blocks are scanned, `blocks/`,
`decoder/layers/`; where several runs of them are, `blocks_from0/`, `blocks_from4/`. Of blocks or
layers within blocks the outermost count."""

RULE = text("a regular expression", "write one for how the paths into the blocks begin")
LEAVES = tree("a pytree of arrays", "pass parameters, gradients or updates")

Block = dict[str, Array]
"""The leaves of one block by their path inside it."""


@checked(
    "by_block",
    tree=LEAVES,
    measure=a_function("a function of one block", "pass lambda block: ...", of=1),
    rule=RULE,
)
def by_block(tree: Any, measure: Callable[[Block], Any] | None = None, *, rule: str = BLOCKS):
    """What `measure` finds in each block of a net, written out or scanned: `[L, ...]` either way.

    Args:
      tree: Parameters, gradients, updates, or what a model has sown: nested dicts and lists, or an
        `nnx.State`. Leaves outside the blocks are left out.
      measure: A function of one block, `{"up/kernel": array, ...}` by the paths inside it, that
        returns arrays. By default it returns the block, so that the leaves are stacked.
      rule: A regular expression for how a path into a block begins, up to what lies inside; its
        first group is the number of the block. Where there is no number the leaves have the blocks
        on their first axis, as `flax.linen.scan` and `nnx.vmap` stack them; a group that is named
        `first`, `(?P<first>...)`, is then the number of the first of them, 0 without one.

    Returns:
      What `measure` returns, with the blocks on a new first axis, by their numbers (`block10` is
      behind `block2`). If blocks differ and it returns dicts, what a block does not have is NaN.

    Raises:
      ValueError: If no leaf or more than one stack of blocks fits the rule, numbers are missing,
        scanned leaves do not have the same number of blocks, or blocks give other shapes.

    >>> written = {"block0": {"w": jnp.ones(3)}, "block1": {"w": jnp.zeros(3)}, "head": jnp.ones(5)}
    >>> by_block(written, lambda block: block["w"].sum()).tolist()
    [3.0, 0.0]
    >>> scanned = {"blocks": {"w": jnp.array([[1.0, 1, 1], [0, 0, 0]])}, "head": jnp.ones(5)}
    >>> by_block(scanned, lambda block: block["w"].sum()).tolist()
    [3.0, 0.0]
    """
    return _over("by_block", rule, measure or (lambda block: block), tree)


class ByBlock(NamedTuple):
    """A number for each block, and for each leaf in each block.

    Attributes:
      block: `[L]`, of all the leaves of a block as one vector.
      leaves: By the path inside a block, `[L]`, of that leaf; NaN in blocks that do not have it.

    >>> found = block_norms({"block0": {"w": jnp.array([3.0, 4.0])}, "block1": {"w": jnp.ones(4)}})
    >>> found.block.tolist(), found.leaves["w"].shape
    ([5.0, 2.0], (2,))
    """

    block: Array
    leaves: dict[str, Array]


@checked("block norms", tree=LEAVES, rule=RULE)
def block_norms(tree: Any, *, rule: str = BLOCKS) -> ByBlock:
    """‖v‖₂ of each block: of gradients, whether they vanish or explode with depth; of weights.

    Xiong et al. 2020 (https://arxiv.org/abs/2002.04745) compare the gradients of blocks by it at
    initialization: those of post-norm are large near the output, those of pre-norm alike. For
    layers that are no blocks see `gradient_norms`. Values of 1e-30 or 1e30 keep their norm.

    Args:
      tree: Gradients, parameters or updates, as in `by_block`. Only floating leaves count.
      rule: As in `by_block`.

    Returns:
      `ByBlock`, in the unit of the leaves.

    Raises:
      ValueError: As `by_block` does.

    >>> found = block_norms({"blocks": {"up": jnp.array([[3.0], [0.0]]), "b": jnp.array([4.0, 2])}})
    >>> found.block.tolist(), found.leaves["up"].tolist()
    ([5.0, 2.0], [3.0, 0.0])
    """

    def measure(block: Block) -> Block:
        lengths = {path: norm(promote(v)) for path, v in block.items() if _is_floating(v)}
        return lengths | {"": _whole("block norms", lengths, "floating leaves")}

    return _pair(_over("block norms", rule, measure, tree))


@checked("update ratio", params=LEAVES, updates=LEAVES, rule=RULE)
def update_ratio(params: Any, updates: Any, *, rule: str = BLOCKS) -> ByBlock:
    """How large a step is beside the weights: RMS(Δw)/RMS(w) = ‖Δw‖₂/‖w‖₂, by block and by kernel.

    LARS (You, Gitman & Ginsburg 2017, https://arxiv.org/abs/1708.03888) looks at the ratio of
    weights to gradients because steps that are large beside their weights make training diverge;
    of weights whose length does not matter the ratio is the angle of a step, see `angular_update`.

    Only kernels count, leaves of two or more axes in a block: biases begin at 0, and gains of 1
    would outweigh kernels of variance 1/C in small nets.

    Args:
      params: The parameters before the step, as in `by_block`.
      updates: What is added to them, such as `optax` returns: of the same structure.
      rule: As in `by_block`.

    Returns:
      `ByBlock`, without unit. 0 where there is no update; infinite where zero weights have one.

    Raises:
      ValueError: If the trees are not alike, blocks have no kernels, or as `by_block` does.

    >>> params = {"block0": {"kernel": jnp.full((2, 2), 4.0)}}
    >>> update_ratio(params, jax.tree.map(lambda w: -0.01 * w, params)).block.round(4).tolist()
    [0.009999999776482582]
    """
    where = "update ratio"
    check_alike(where, params, updates)

    def measure(block: Block, update: Block) -> Block:
        lengths = {path: (norm(promote(update[path])), norm(w)) for path, w in _kernels(block)}
        ratios = {path: _ratio(*pair) for path, pair in lengths.items()}
        steps, sizes = ({path: pair[i] for path, pair in lengths.items()} for i in (0, 1))
        return ratios | {"": _ratio(_whole(where, steps), _whole(where, sizes))}

    return _pair(_over(where, rule, measure, params, updates))


@checked(
    "block lr",
    params=LEAVES,
    lr=number("a number", "pass a float", lambda v: True),
    rule=RULE,
)
def block_lr(params: Any, lr: ArrayLike, *, rule: str = BLOCKS) -> ByBlock:
    """The effective learning rate lr/‖w‖² of each block and of each kernel in it.

    `effective_lr`, which see, of each kernel, a leaf of two or more axes, and of all kernels of a
    block as one vector. It means something where the loss does not see the length of the weights:
    of a kernel before a norm; of all of a block before a norm where its maps have no other scale.

    Args:
      params: The parameters, as in `by_block`.
      lr: The learning rate, one number.
      rule: As in `by_block`.

    Returns:
      `ByBlock`, in the unit of `lr` over that of the weights squared; infinite where w = 0.

    Raises:
      ValueError: If blocks have no kernels, or as `by_block` does.

    >>> block_lr({"blocks": {"kernel": jnp.ones((3, 2, 2))}}, 0.5).block.tolist()
    [0.125, 0.125, 0.125]
    """

    def measure(block: Block) -> Block:
        kernels = dict(_kernels(block))
        lengths = {path: norm(w) for path, w in kernels.items()}
        rates = {path: effective_lr(w, lr) for path, w in kernels.items()}
        return rates | {"": effective_lr(_whole("block lr", lengths), lr)}

    return _pair(_over("block lr", rule, measure, params))


class DepthSlope(NamedTuple):
    """A power law, value = exp(intercept)·depth^slope.

    Attributes:
      slope: The exponent.
      intercept: ln of the value at depth 1.
      error: The standard error of the slope, from the residuals; 0 for an exact power law.

    >>> found = depth_slope(jnp.array([3.0, 6.0, 9.0]))                # 3·depth
    >>> round(found.slope.item(), 4), round(found.intercept.item(), 4)
    (1.0, 1.0986)
    """

    slope: Array
    intercept: Array
    error: Array


@checked(
    "depth slope",
    values=array("positive numbers, [L, ...]", "pass one for each depth", rank=1),
    depths=array("positive numbers, [L]", "pass the depth of each value", rank=1, most=1),
)
def depth_slope(values: ArrayLike, depths: ArrayLike | None = None) -> DepthSlope:
    """Fits ln(value) = slope·ln(depth) + intercept by least squares, with the error of the slope.

        slope = Sxy/Sxx        error = √(Σ residual² / ((L − 2)·Sxx))

    Over the blocks of one net it says how a statistic grows inside; over nets of several depths,
    how it scales: Xiong et al. 2020 (https://arxiv.org/abs/2002.04745, theorem 1) derive for the
    gradient of the last block's feed-forward weights 0 for post-norm and −½ for pre-norm. The error
    takes residuals for independent; those of neighbouring blocks of one net are not.

    Args:
      values: `[L, ...]`, of each of L ≥ 3 depths.
      depths: `[L]`; by default 1, 2, ..., L.

    Returns:
      `DepthSlope`, fields of the shape of `values` without its first axis. NaN where a value or a
      depth is not positive, or all depths are equal.

    Raises:
      ValueError: If there are fewer than three depths, or not one for each value.

    >>> found = depth_slope(jnp.array([1.0, 0.5, 0.25]), jnp.array([4, 16, 64]))
    >>> found.slope.round(4).item(), abs(found.error.round(4).item())
    (-0.5, 0.0)
    """
    y = promote(values)
    x = jnp.arange(1, len(y) + 1, dtype=y.dtype) if depths is None else promote(depths)
    if len(y) < 3 or x.shape != y.shape[:1]:
        raise invalid(
            "depth slope",
            f"values of shape {y.shape} at depths of shape {x.shape}",
            "values [L, ...] at L depths, three or more",
            "measure more depths, or put them on the first axis",
        )
    x = _log(x).astype(y.dtype).reshape(-1, *[1] * (y.ndim - 1))
    y = _log(y)
    mean_x, mean_y = x.mean(0), y.mean(0)
    dx, dy = x - mean_x[None], y - mean_y[None]
    sxx = jnp.square(dx).sum(0)
    slope = (dx * dy).sum(0) / sxx
    error = norm(dy - slope[None] * dx, 0) / jnp.sqrt((len(y) - 2) * sxx)
    return DepthSlope(slope, mean_y - slope * mean_x, error)


def _log(v: Array) -> Array:
    return jnp.log(jnp.where(v > 0, v, jnp.nan))


def _is_floating(v: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(v), jnp.floating)


def _kernels(block: Block) -> list[tuple[str, Array]]:
    return [(path, promote(w)) for path, w in block.items() if _is_floating(w) and w.ndim >= 2]


def _ratio(step: Array, size: Array) -> Array:
    """step/size; 0 where there is no step, infinite where there is one from zero."""
    zero = size == 0
    ratio = step / jnp.where(zero, 1, size)
    return jnp.where(zero & (step > 0), jnp.inf, ratio)


def _whole(where: str, lengths: Mapping[str, Array], what: str = "kernels") -> Array:
    """The length of vectors put together, from theirs."""
    if not lengths:
        change = "name the blocks that have some with rule="
        raise invalid(where, f"a block without {what}", f"blocks with {what}", change)
    return norm(jnp.stack([*lengths.values()]))


def _pair(found: dict[str, Array]) -> ByBlock:
    return ByBlock(found.pop(""), found)


def _over(where: str, rule: str, measure: Callable[..., Any], *trees: Any) -> Any:
    """`measure` of each block of trees that have the same blocks, stacked."""
    groups = [_grouped(where, rule, tree) for tree in trees]
    found = [
        jax.vmap(measure)(*(group[i] for group in groups))
        if isinstance(i, range)
        else jax.tree.map(lambda v: jnp.asarray(v)[None], measure(*(group[i] for group in groups)))
        for i in groups[0]
    ]
    return _joined(where, found, [len(i) if isinstance(i, range) else 1 for i in groups[0]])


def _grouped(where: str, rule: str, tree: Any) -> dict[int | range, Block]:
    """The leaves of each block by its number, and of each run of scanned blocks by their range."""
    try:
        begins = re.compile(rule)
    except re.error as error:
        expected, change = "a regular expression", "correct it"
        raise invalid(where, f"rule={rule!r}: {error}", expected, change) from error
    stacks, blocks, runs, paths = {}, {}, {}, []
    for keys, leaf in jax.tree.leaves_with_path(tree):
        if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
            keys = keys[:-1]  # a box around its array: nnx.Param, linen's Partitioned
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        paths.append(path)
        found = begins.match(path)
        if found is None:
            continue
        first = found.groupdict().get("first")
        number = found[1] if begins.groups and first is None else None
        starts = [found.start(i) for i in range(1, begins.groups + 1) if found[i] is not None]
        stacks[path[: min(starts, default=found.end())]] = path
        n = number or first or "0"
        if not n.isdecimal():
            expected, change = "a number in its first group", r"write the number alone as (\d+)"
            raise invalid(where, f"rule={rule!r}, which finds {n!r} in {path!r}", expected, change)
        group = (runs if number is None else blocks).setdefault(int(n), {})
        group[path[found.end() :]] = jnp.asarray(leaf)
    if len(stacks) != 1:
        given = f"a rule that fits {', '.join(stacks.values()) or 'no leaf'}"
        change = "write a narrower rule=, or pass one collection or one half of the net"
        if not stacks:
            change = f"write rule= for paths like {', '.join(paths[:3]) or '(there is none)'}"
        raise invalid(where, given, "one stack of blocks", change)
    for first, leaves in runs.items():
        sizes = {v.shape[:1] for v in leaves.values()}
        if len(sizes) != 1 or () in sizes:
            given = f"scanned blocks with first axes of {sorted(sizes)}"
            change = "give all leaves the blocks on axis 0"
            raise invalid(where, given, "one number of blocks, [L, ...]", change)
        blocks[range(first, first + sizes.pop()[0])] = leaves
    ordered = sorted(blocks, key=lambda i: i.start if isinstance(i, range) else i)
    numbers = [n for i in ordered for n in (i if isinstance(i, range) else (i,))]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        change = "pass a tree in which every block has leaves"
        raise invalid(where, f"blocks {numbers}", "blocks with consecutive numbers", change)
    return {i: blocks[i] for i in ordered}


def _joined(where: str, found: list[Any], sizes: list[int]) -> Any:
    """Results `[l, ...]` of runs of blocks, put together; NaN where dicts do not have a name."""
    if all(type(run) is dict for run in found):
        found = [dict(run) for run in found]
        some = {name: value for run in reversed(found) for name, value in run.items()}
        for name in [n for n in some if any(n not in run for run in found)]:
            for run, size in zip(found, sizes, strict=True):
                has = jax.tree.map(floating, run.get(name, some[name]))
                run[name] = has if name in run else jax.tree.map(partial(_nothing, size), has)
    shapes = [jax.tree.map(lambda v: v.shape[1:], run) for run in found]
    if any(shape != shapes[0] for shape in shapes):
        raise invalid(
            where,
            f"blocks of which measure makes {shapes[0]} and others",
            "the same shapes of every block",
            "pass a measure that returns numbers, such as lambda block: {name: v.mean() ...}",
        )
    return jax.tree.map(lambda *values: jnp.concatenate(values), *found)


def _nothing(size: int, like: Array) -> Array:
    return jnp.full((size, *like.shape[1:]), jnp.nan, like.dtype)
