"""All batches pooled into one.

N = Σ n, μ = Σ n·mean / N, and the squared deviations within the batches and between their means,
each of which the variance may count.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from normlab._arguments import checked, declare, one_of
from normlab._trees import register
from normlab.comoments import sample, second_shape, shaped_as
from normlab.devices.mapped import check_bound, device_count
from normlab.devices.topology import AxisName, as_sync
from normlab.devices.whole import all_reduce
from normlab.errors import invalid
from normlab.measure import Moments, merge
from normlab.population._averages import largest, mark_of
from normlab.population._batches import BadBatch, arrays, check_batch, statistics_dtype, taken_in

Estimator = Literal["pooled", "within"]
"""Of which deviations a variance over many batches is made.

`"pooled"`: from the mean of all, as if they had been one batch (Wu & Johnson 2021,
https://arxiv.org/abs/2105.07576). `"within"`: from the mean of their own batch, which is the
average of the batches' variances (Ioffe & Szegedy 2015, algorithm 2).
"""

declare(estimator=one_of(Estimator, "the name of an estimator"))


class Cumulative(NamedTuple):
    """All batches pooled into one, each weighted by its count; float32 at least.

    Sums in float32 hold about a million batches; for more, make it with dtype float64.

    Attributes:
      count: `[C]`, N, the number of values (or weight) of a channel in all batches.
      mean: `[C]`, their mean.
      within: `[C]`, the sum of the squared deviations from the mean of the batch; or `[G, D, D]`,
        of groups of channels.
      between: The sum of the squared deviations of the batches' means, times their counts.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
      rest: `[2]`, what is to be added to `updates` and `skipped` where they are a device's share of
        a pooled state (`share_running`), which need not be whole; else 0.
      among: `[]` int32, on how many devices the same state lies since it was pooled. The next
        update is to a device's share of it, so that what was alike counts once in the next pool; 1
        from then on, and where it never was pooled.
      ddof: 0 for the variance of the values seen, 1 for the unbiased one; not a leaf.
      estimator: The `Estimator` of the variance; not a leaf.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_cumulative(1)
    >>> for batch in (a, a + 4):
    ...     _, state = batch_norm(batch, None, state, train=True)
    >>> [v.tolist() for v in state.read()], state.count.tolist()       # of 1, 3, 5 and 7
    ([[4.0], [5.0]], [4.0])
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    within: Array
    between: Array
    updates: Array
    skipped: Array
    rest: Array
    among: Array = np.ones((), np.int32)  # pyright: ignore[reportAssignmentType]
    ddof: int = 0
    estimator: Estimator = "pooled"

    @checked("cumulative statistics")
    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Cumulative:
        """Takes one batch in, as any `Population`, in which every value weighs the same.

        Raises:
          ValueError: For a decay, or an unknown policy.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        if decay is not None:
            raise invalid(
                "cumulative statistics",
                f"decay={decay!r}",
                "no decay: every value weighs the same",
                "leave it out, or keep an average that forgets, from init_running",
            )
        self = self._divided(jnp.asarray(self.among))
        m = check_batch("cumulative statistics", m, bad_batch)
        means = sample(self.count, self.mean, self.between)
        one = shaped_as(means, jax.tree.map(lambda f: f.astype(self.mean.dtype), m))
        merged = merge(means, one._replace(m2=jnp.zeros_like(one.m2)))
        count, mean = (f.reshape(self.mean.shape) for f in merged[:2])
        new = {"count": count, "mean": mean, "between": merged.m2}
        return taken_in(self, m, bad_batch, 0, within=self.within + one.m2, **new)

    def moments(self) -> Moments:
        """The moments of all values together, fields `[C]`; or co-moments."""
        return arrays(sample(self.count, self.mean, self.within + self.between))

    def options(self) -> dict[str, Any]:
        """Those of this estimator."""
        return {"population": "cumulative", "ddof": self.ddof, "estimator": self.estimator}

    def read(self) -> tuple[Array, Array]:
        """Returns the mean and the variance, `[C]`; 0 and 1 before the first batch.

        The variance is (within + between) / (N − ddof), or with the estimator `"within"`
        within / (N − ddof·batches).
        """
        self = arrays(self)
        if self.estimator == "pooled":
            m, lost = self.moments(), jnp.full((), self.ddof, self.mean.dtype)
        else:
            m = sample(self.count, self.mean, self.within)
            lost = self.ddof * (self.updates.astype(self.mean.dtype) + self.rest[..., 0])
        var = jnp.where(m.count > lost, m._replace(count=m.count - lost).var(), m.one())
        return self.mean, jnp.where(jnp.isnan(m.m2), m.m2, var)

    def pool(self, axis_name: AxisName) -> Cumulative:
        """Merges with those of the other devices, each weighted by its count.

        Of what is counted the result has the sum. What was alike since it was pooled counts once.
        A batch is a device's: by `"within"`, what lies between the devices is left out.
        """
        self = arrays(self)
        if self.updates.ndim:  # stacked
            return jax.vmap(lambda state: state.pool(axis_name))(self)
        names = as_sync(axis_name).names
        check_bound("pool", names)
        mark = mark_of(self.count, self.mean, self.within, self.between)[None]
        gone_on = (self.among == 1).astype(jnp.int32)
        (gone_on, among), (copies,) = largest([gone_on[None], self.among[None]], mark, names)
        gone_on, among = gone_on[0] > 0, among[0]
        devices = device_count(names)
        self = self._divided(jnp.where(gone_on, self.among, copies))
        means = all_reduce(sample(self.count, self.mean, self.between), axis_name)
        counters = jnp.stack([self.updates, self.skipped])
        within, counters, rest = lax.psum((self.within, counters, self.rest), names)
        counters += jnp.round(rest).astype(counters.dtype)
        return self._replace(
            count=means.count.reshape(self.count.shape),
            mean=means.mean.reshape(self.mean.shape),
            within=within,
            between=means.m2,
            updates=counters[0],
            skipped=counters[1],
            rest=rest - jnp.round(rest),
            among=jnp.where(gone_on, devices, among * devices // copies),
        )

    def share(self, devices: int) -> Cumulative:
        """A device's share of what is counted."""
        return self._divided(jnp.int32(devices))

    def _divided(self, devices: Array) -> Cumulative:
        """A share of the state among so many devices, `[]`; or, stacked, of each."""
        self = arrays(self)
        per = lambda v: jnp.expand_dims(devices, range(devices.ndim, v.ndim)).astype(v.dtype)  # noqa: E731
        parts = {n: v / per(v) for n, v in self._asdict().items() if n in SUMS}
        counters = jnp.stack([self.updates, self.skipped], -1)
        whole = -(-counters // per(counters))
        exact = (counters.astype(self.rest.dtype) + self.rest) / per(self.rest)
        parts |= {"rest": exact - whole.astype(exact.dtype)}
        parts |= {"updates": whole[..., 0], "skipped": whole[..., 1]}
        kept = {n: jnp.where(per(v) > 1, v, getattr(self, n)) for n, v in parts.items()}
        return self._replace(**kept, among=jnp.ones_like(self.among))

    def settled(self, seen: Any, estimator: str | None) -> Cumulative:
        """What a transaction saw, with the settings of this."""
        if estimator not in (None, self.estimator):
            raise invalid(
                "settle",
                f"estimator={estimator!r} for statistics with {self.estimator!r}",
                "the estimator that the state names",
                "leave it out, or make the state with init_cumulative(..., estimator=...)",
            )
        return seen._replace(ddof=self.ddof, estimator=self.estimator)

    def lacking(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The fields that a checkpoint from before there were such does not have."""
        return {} if "among" in saved else {"among": jnp.ones_like(self.among)}


register(Cumulative, "ddof", "estimator")

SUMS = ("count", "within", "between")
"""The fields that add up."""


@checked("cumulative statistics")
def init_cumulative(
    channels: int,
    *,
    ddof: int = 0,
    estimator: Estimator = "pooled",
    groups: int | None = None,
    dtype: DTypeLike | None = None,
) -> Cumulative:
    """Returns the statistics of no batch at all; arguments as those of `init_running`, which see.

    With `ddof` 0 the variance is that of the values seen, with 1 the unbiased one; of which
    deviations it is made says `estimator`, an `Estimator`.

    >>> from normlab import moments
    >>> state = init_cumulative(1)
    >>> for batch in ([[1.0], [3.0]], [[8.0]]):
    ...     state = state.update(moments(jnp.array(batch), 0))
    >>> [v.round(3).tolist() for v in state.read()]
    [[4.0], [8.667000770568848]]
    """
    dtype = statistics_dtype(dtype)
    second = second_shape("cumulative statistics", channels, groups)
    sums = (jnp.zeros(shape, dtype) for shape in (channels, channels, second, second))
    counters = (jnp.zeros((), jnp.int32) for _ in range(2))
    rest = jnp.zeros(2, dtype)
    among = jnp.ones((), jnp.int32)
    return Cumulative(*sums, *counters, rest=rest, among=among, ddof=ddof, estimator=estimator)
