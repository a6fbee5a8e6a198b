"""What every population is: two methods. What it may decide beside them is in `optional`."""

from __future__ import annotations

from typing import Any, Protocol, Self, runtime_checkable

from jax import Array

from normlab.measure import Moments
from normlab.population._batches import BadBatch


@runtime_checkable
class Population(Protocol):
    """A state of batch norm: a pytree that takes batches in and says what inference uses.

    Any NamedTuple with these methods is one. What it keeps keeps its structure, shapes and types.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from typing import NamedTuple
    >>> class Last(NamedTuple):
    ...     mean: jax.Array
    ...     var: jax.Array
    ...
    ...     def update(self, m, *, decay=None, bad_batch="skip"):
    ...         return Last(m.mean.ravel(), m.var().ravel())
    ...
    ...     def read(self):
    ...         return self.mean, self.var
    >>> from normlab import batch_norm
    >>> a, last = jnp.array([[1.0], [3.0]]), Last(jnp.zeros(1), jnp.ones(1))
    >>> h, last = batch_norm(a, None, last, train=True)
    >>> last.mean.tolist()
    [2.0]
    """

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Self:
        """Takes one batch in. A gradient passes; `batch_norm` cuts it unless told not to.

        Args:
          m: The batch's moments, `C` values in each of mean and m2, in any shape. `commit` hands
            in a count of 0 for a step that may not count.
          decay: The weight of the old value, if it is not the state's own.
          bad_batch: What becomes of a bad batch: one that is empty (or has no more than `ddof`
            values), or whose statistics are not finite.
        """
        ...

    def read(self) -> tuple[Array, Array]:
        """Returns the mean and the variance that inference normalizes with, `[C]`."""
        ...
