"""What becomes of a batch that cannot be used, and in which types statistics are kept."""

from __future__ import annotations

import functools
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from normlab._arguments import declare, one_of
from normlab.errors import invalid
from normlab.measure import Moments

Tree = TypeVar("Tree")

BadBatch = Literal["skip", "propagate", "raise"]
"""What becomes of a batch that is empty, fully masked, or holds a NaN or an Inf.

`"skip"`: the running statistics stay as they were, and `skipped` counts it. `"propagate"`: the
batch is taken in as it is, and an empty one as NaN. `"raise"`: as skip, with an error; under `jit`
JAX raises it, as a `JaxRuntimeError`, once the batch has been computed.
"""

declare(bad_batch=one_of(BadBatch, "the name of a policy"))


def arrays(tree: Tree) -> Tree:
    """Returns jax arrays for NumPy's, and in float32 what is in half precision.

    A half-precision average would stall: it cannot take in 1 − decay of a small difference.
    """

    def one(v: Any) -> Array:
        v = jnp.asarray(v)
        half = jnp.issubdtype(v.dtype, jnp.floating) and jnp.finfo(v.dtype).bits < 32
        return v.astype(jnp.float32) if half else v

    return jax.tree.map(one, tree)


def statistics_dtype(dtype: DTypeLike | None) -> Any:
    """The type of statistics that are asked for in a type: float32 for `None` and for half ones."""
    found = jnp.dtype(jnp.float32 if dtype is None else dtype)
    return found if jnp.finfo(found).bits > 32 else jnp.dtype(jnp.float32)


def finite(m: Moments) -> Array:
    """Whether mean and m2 are finite in every channel."""
    return (jnp.isfinite(m.mean) & jnp.isfinite(m.m2)).all()


def check_batch(where: str, m: Moments, bad_batch: BadBatch, ddof: int = 0) -> Moments:
    """Returns the moments of a batch as the policy has them, or says that they are bad.

    `"propagate"` makes mean and m2 of a bad channel NaN, `"raise"` raises. A batch of no more than
    `ddof` values has no variance.
    """
    if bad_batch == "propagate":
        good = (m.count > ddof) & jnp.isfinite(m.mean) & jnp.isfinite(m.squares)
        m2 = jnp.where(m.product(good, good), m.m2, jnp.nan)
        return m._replace(mean=jnp.where(good, m.mean, jnp.nan), m2=m2)
    if bad_batch == "raise":
        check = functools.partial(_raise_if_bad, where, ddof)
        jax.debug.callback(check, *lax.stop_gradient((m.count, m.mean, m.squares)))
    return m


def taken_in(state: Any, m: Moments, bad_batch: BadBatch, ddof: int = 0, **new: Array) -> Any:
    """The state with `new` fields after a batch with a value (more than `ddof`) in every channel.

    After a bad one, unless it is propagated, the fields are as they were; either is counted.
    """
    good = (m.count > ddof).all() & finite(m) | (bad_batch == "propagate")

    def keep(name: str) -> Array:
        old = getattr(state, name)
        return jnp.where(good, new[name], old).astype(old.dtype)

    updates = state.updates + good.astype(jnp.int32)
    skipped = state.skipped + (~good).astype(jnp.int32)
    return state._replace(**{name: keep(name) for name in new}, updates=updates, skipped=skipped)


def _raise_if_bad(where: str, ddof: int, *m: Array) -> None:
    count, mean, m2 = map(np.asarray, m)
    if not (count > ddof).all():
        given = f"a batch with {count.min():g} values (or weight) per channel"
        expected = f"more than {ddof}"
    elif not (np.isfinite(mean).all() and np.isfinite(m2).all()):
        bad = np.flatnonzero(~(np.isfinite(mean) & np.isfinite(m2)))
        given = f"a batch with a NaN or an Inf in {bad.size} of {mean.size} channels, "
        given += f"the first of them {bad[0]}"
        expected = "finite values"
    else:
        return
    change = 'give these examples the weight 0, or pass bad_batch="skip"'
    raise FloatingPointError(str(invalid(where, given, expected, change)))
