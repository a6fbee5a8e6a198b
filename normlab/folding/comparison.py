"""What folding a model reports, and how it is compared with the model before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normlab._paths import Key, unflatten
from normlab.errors import invalid

Apply = Callable[[Any], Any]
"""The outputs of a model for given variables."""

TOLERANCE = 8
"""How many times the model's own response to rounding the error of a fold may be."""


class FoldedLayer(NamedTuple):
    """What was folded into what, and what rounding can make of it.

    While nothing over- or underflows, the output of the norm changes by no more than
    `slope`·max|x| + `offset`, where x is the input of the linear layer.

    Attributes:
      norm: The path of the norm; in `plain_weights`, the path that the rule named.
      linear: The path of the linear layer.
      slope: That of the channel where it is largest.
      offset: That of the channel where it is largest.

    >>> from normlab import weight_norm
    >>> from normlab.folding import plain_weights
    >>> variables = {"Dense_0": {"kernel": jnp.array([[3.0], [4.0]])}}
    >>> [layer] = plain_weights(variables, {"Dense_0": weight_norm})[1].layers
    >>> layer.norm, layer.linear, layer.slope < 1e-5       # of max|x|
    ('Dense_0', 'Dense_0', True)
    """

    norm: str
    linear: str
    slope: float
    offset: float


class FoldReport(NamedTuple):
    """What was done to a model.

    Attributes:
      layers: What was folded, in the order of the rule.
      left: The paths of the norms with population statistics that no pattern named.
      error: The largest |after − before| of an output, relative to the largest |before|;
        `None` without `apply`.
      rounding: The same between the folded variables and those variables with every folded number
        moved by a unit in the last place: what the model itself makes of rounding.

    >>> from normlab.folding import fold_model
    >>> variables = {f"BatchNorm_{i}": {"mean": jnp.zeros(1), "var": jnp.ones(1)} for i in (0, 1)}
    >>> variables |= {"Dense_0": {"kernel": jnp.ones((2, 1))}}
    >>> _, report = fold_model(variables, {"BatchNorm_0": "Dense_0"})
    >>> report.layers[0].linear, report.left
    ('Dense_0', ('BatchNorm_1',))
    """

    layers: tuple[FoldedLayer, ...]
    left: tuple[str, ...] = ()
    error: float | None = None
    rounding: float | None = None


def check_applies(
    where: str, apply: Apply | None, folded_apply: Apply | None, *, another: bool
) -> None:
    """Raises ValueError unless there are functions for both models, or for none."""
    if folded_apply if apply is None else another and folded_apply is None:
        raise invalid(
            where,
            "one of apply and folded_apply",
            "both: the result is for a model without these norms",
            "pass apply for the model as it is, and folded_apply for the one without",
        )


def compared(
    where: str,
    variables: Mapping[str, Any],
    new: dict[Key, Any],
    changed: list[Key],
    report: FoldReport,
    dtype: DTypeLike | None,
    apply: Apply | None,
    folded_apply: Apply | None,
) -> tuple[dict[str, Any], FoldReport]:
    """Returns the new tree and the report, with what `apply` measures if it is given.

    Raises:
      ValueError: If the outputs differ by more than rounding explains.
    """
    if apply is None:
        return unflatten(new), report
    folded_apply = apply if folded_apply is None else folded_apply
    before, after = apply(variables), folded_apply(unflatten(new))
    error, floor = _gap(after, before), 0.0
    for seed in range(2):
        rng, moved = np.random.default_rng(seed), dict(new)
        for key in changed:
            value = np.asarray(new[key])
            eps = max(float(jnp.finfo(t).eps) for t in (value.dtype, dtype or value.dtype))
            by = 1 + rng.choice([-eps, eps], value.shape)
            moved[key] = (value.astype(np.float64) * by).astype(value.dtype)
            floor = max(floor, eps / 2)
        floor = max(floor, _gap(folded_apply(unflatten(moved)), after))
    spoiled = new | {key: jnp.full_like(new[key], jnp.nan) for key in changed}
    if changed and np.isfinite(_gap(folded_apply(unflatten(spoiled)), after)):
        raise invalid(
            where,
            "an apply whose outputs do not depend on the folded numbers",
            "the outputs of the model for the variables it is given",
            "use its argument, lambda variables: model.apply(variables, x, train=False), and "
            "return numbers, not classes",
        )
    if not error <= TOLERANCE * floor:
        raise invalid(
            where,
            f"outputs that folding moves by {error:.1e} of their size, where rounding explains "
            f"{floor:.1e}",
            "the same function",
            "check eps, that nothing stands between the layers and their norms and nothing else "
            "reads these layers, that apply does not train; and pass dtype if they compute in a "
            "coarser type than their kernels have",
        )
    return unflatten(new), report._replace(error=error, rounding=floor)


def _gap(actual: Any, expected: Any) -> float:
    """The largest |actual − expected| of a leaf, relative to its largest |expected|."""
    gap = 0.0
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        gap = np.maximum(gap, np.abs(a - e).max() / (np.abs(e).max() or 1.0))  # keeps a NaN
    return float(gap)
