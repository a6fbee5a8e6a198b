"""The last batches, merged: exact, as if they had been one batch, where the weights do not move."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from normlab._arguments import checked, integer
from normlab._trees import node
from normlab.devices.mapped import device_count
from normlab.devices.topology import AxisName, as_sync
from normlab.devices.whole import all_reduce
from normlab.errors import invalid
from normlab.measure import Moments, merge, merge_axes
from normlab.population._batches import BadBatch, arrays, check_batch, statistics_dtype, taken_in


def put(ring: Moments, place: Array, m: Moments) -> Moments:
    """A ring of moments, fields `[size, C]`, with those of a batch on one place."""

    def one(old: Array, field: Array) -> Array:
        field = jnp.broadcast_to(field, m.mean.shape).reshape(old.shape[-1:])
        return old.at[place].set(field.astype(old.dtype))

    return jax.tree.map(one, ring, m)


def merged(ring: Moments, place: Array, m: Moments) -> Moments:
    """A batch with those of the ring but the one on the place, which it is to take."""
    leaves = jnp.arange(ring.mean.shape[0], dtype=place.dtype)[:, None] == place
    ring = jax.tree.map(lambda v: jnp.where(leaves, 0, v).astype(m.mean.dtype), ring)
    return merge(m, merge_axes(ring, 0))


@node
class Window(NamedTuple):
    """The moments of the last batches, a ring; float32 at least.

    Training normalizes by the batch and those before it in the window, merged with their counts.
    The gradient sees the batch alone, with its share n/N of the whole; what came before is
    constant.
    Inference normalizes by the window.

    Attributes:
      count: `[size, C]`, the number of values (or weight) in each batch; 0 where there was none.
      mean: `[size, C]`, their means.
      m2: `[size, C]`, the sums of their squared deviations from these.
      updates: `[]` int32, the number of batches taken in; the next is put on place
        updates mod size.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_window(1, size=2)
    >>> for batch in (a - 9, a, a + 4):
    ...     h, state = batch_norm(batch, None, state, train=True)
    >>> [v.tolist() for v in state.read()]                       # of the last two: 1, 3, 5 and 7
    [[4.0], [5.0]]
    >>> (h * 5**0.5).round(2).tolist()                           # which normalize the third
    [[1.0], [3.0]]
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    m2: Array
    updates: Array
    skipped: Array

    @property
    def size(self) -> int:
        """The number of batches."""
        return self.mean.shape[-2]

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Window:
        """Puts one batch in the place of the oldest.

        Raises:
          ValueError: For a decay, or an unknown policy.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        if decay is not None:
            change = "leave it out, or keep an average that forgets, from init_running"
            expected = "no decay: every value of the window weighs the same"
            raise invalid("window", f"decay={decay!r}", expected, change)
        self = arrays(self)
        m = check_batch("window", m, bad_batch)
        new = put(self.ring(), self.updates % self.size, m)
        return taken_in(self, m, bad_batch, 0, **new._asdict())

    def moments(self) -> Moments:
        """The moments of all values in the window, fields `[C]`."""
        return Moments(*(field[..., 0, :] for field in merge_axes(self.ring(), -2)))

    def ring(self) -> Moments:
        """The moments of each batch."""
        return arrays(Moments(self.count, self.mean, self.m2))

    def read(self) -> tuple[Array, Array]:
        """Returns mean and variance of the window, `[C]`; 0 and 1 before the first batch."""
        m = self.moments()
        return m.mean, jnp.where(m.count > 0, m.var(), jnp.where(jnp.isnan(m.m2), m.m2, 1))

    def alone(self, train: bool) -> bool:
        """Only where the window is one batch."""
        return train and self.size == 1

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """In training those of the batch with the ones before it."""
        if m is None or not train:
            mean, var = self.read()
            return mean, jnp.sqrt(var + eps)
        whole = merged(self.ring(), jnp.asarray(self.updates) % self.size, m)
        return whole.mean, whole.sigma(eps)

    def options(self) -> dict[str, Any]:
        """The name."""
        return {"population": "window"}

    def pool(self, axis_name: AxisName) -> Window:
        """Merges with those of the other devices, batch by batch.

        Each has the mean count of the devices' batches, so that those still to come weigh as much.
        A device that left a batch out still has the one before in its place.
        """
        self = arrays(self)
        if self.updates.ndim:  # stacked
            return jax.vmap(lambda state: state.pool(axis_name))(self)
        m = all_reduce(self.ring(), axis_name)
        names = as_sync(axis_name).names
        devices = device_count(names)
        counters = (lax.pmax(v, names) for v in (self.updates, self.skipped))
        return Window(m.count / devices, m.mean, m.m2 / devices, *counters)


@checked("window", size=integer("a number of batches, at least 1", "pass for example 8", 1))
def init_window(channels: int, *, size: int = 8, dtype: DTypeLike | None = None) -> Window:
    """Returns a window without batches.

    Args:
      channels: `C`.
      size: The number of batches it holds: 3·size·C numbers.
      dtype: As in `init_running`.

    >>> from normlab import batch_norm
    >>> state = init_window(1, size=2)
    >>> for batch in ([[0.0], [0.0]], [[1.0], [3.0]], [[5.0], [7.0]]):
    ...     h, state = batch_norm(jnp.array(batch), None, state, train=True)
    >>> [v.tolist() for v in state.read()]         # of 1, 3, 5 and 7
    [[4.0], [5.0]]
    """
    dtype = statistics_dtype(dtype)
    fields = (jnp.zeros((size, channels), dtype) for _ in range(3))
    return Window(*fields, *(jnp.zeros((), jnp.int32) for _ in range(2)))
