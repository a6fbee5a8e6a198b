"""MABN: means over the last batches in both passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from normlab._arguments import checked, integer, number, settled_decay
from normlab._trees import register
from normlab.devices.mapped import device_count
from normlab.devices.topology import AxisName, as_sync
from normlab.measure import Moments
from normlab.population._batches import (
    BadBatch,
    arrays,
    check_batch,
    statistics_dtype,
    taken_in,
)
from normlab.population.backward import Tap, no_tap
from normlab.population.optional import averaged
from normlab.population.rms import about_zero, observe_about_zero
from normlab.population.window import merged, put


class Mabn(NamedTuple):
    """Moving average batch norm (Yan et al. 2020, https://arxiv.org/abs/2001.06838).

        h = g · r·z + b          z = a/χ      r = clip(χ/χ_EMA, 1/r_max, r_max), held constant
        ∂L/∂a = (g − Ψ·z)/χ      g = ∂L/∂z

    χ² is the mean of a² over the last batches and Ψ that of g·z, with the batch itself in both;
    there is no μ: the paper centres the weights of the layer before instead. Inference divides by
    χ_EMA. As long as there are fewer batches than the window holds, it is of those; the paper's
    code uses the batch alone for 100 iterations.

    Attributes:
      count: `[size, C]`, the number of values (or weight) in each batch; 0 where there was none.
      m2: `[size, C]`, Σ a² of each.
      gz: `[size, C]`, ⟨g·z⟩ of each.
      taken: `[]` int32, the number of batches whose gradient was taken in.
      var: `[C]`, χ²_EMA.
      mass: `[]`, the sum of the weights of all updates, as in `Running`.
      updates: `[]` int32, the number of batches taken in.
      skipped: `[]` int32, the number of batches left out: empty, or not finite.
      tap: Zeros, by whose gradient ⟨g·z⟩ is told.
      r_max: `[]`, the limit of r, at least 1.
      begin: `[]` int32, the number of updates up to which r is 1.
      decay: The weight of the old χ²_EMA; not a leaf.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_mabn(1, size=2)
    >>> for batch in (a, 3 * a):
    ...     h, state = batch_norm(batch, None, state, train=True)
    >>> (5 * h).round(2).tolist()                      # χ² = (5 + 45)/2, of both batches
    [[3.0], [9.0]]
    >>> [round(float(v[0]), 2) for v in state.read()]
    [0.0, 15.1]
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    m2: Array
    gz: Array
    taken: Array
    var: Array
    mass: Array
    updates: Array
    skipped: Array
    tap: Tap
    r_max: Array
    begin: Array
    decay: float = 0.98

    observe = observe_about_zero

    @property
    def size(self) -> int:
        """The number of batches."""
        return self.m2.shape[-2]

    def _window(self, m: Moments) -> tuple[Moments, Array, Moments]:
        """The ring, the place of the batch, and what the window holds with it."""
        self = arrays(self)
        ring, place = (
            Moments(self.count, jnp.zeros_like(self.m2), self.m2),
            self.updates % self.size,
        )
        return ring, place, merged(ring, place, about_zero(m))

    @checked("MABN")
    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Mabn:
        """Takes one batch in, as any `Population`.

        Raises:
          ValueError: If `decay` is outside [0, 1), or the policy is unknown.
          FloatingPointError: For a bad batch with the policy `"raise"`.
        """
        self = arrays(self)
        decay = self.decay if decay is None else decay
        if isinstance(decay, Array):
            decay = decay.astype(self.mass.dtype)
        m = check_batch("MABN", m, bad_batch)
        m = Moments(*(jnp.broadcast_to(f, m.mean.shape).reshape(1, -1) for f in m))
        ring, place, whole = self._window(m)
        ring = put(ring, place, about_zero(m))
        mass = decay * self.mass + (1 - decay)
        rate = (1 - decay) / jnp.where(mass > 0, mass, 1)
        square = jnp.where(jnp.isnan(m.m2.reshape(self.var.shape)), jnp.nan, 0)
        square = square + whole.var().reshape(self.var.shape)
        var = (1 - rate) * self.var + rate * square
        return taken_in(self, m, bad_batch, 0, count=ring.count, m2=ring.m2, var=var, mass=mass)

    def read(self) -> tuple[Array, Array]:
        """Returns 0 and χ²_EMA, `[C]`."""
        var = arrays(self.var)
        return jnp.zeros_like(var), var

    def alone(self, train: bool) -> bool:
        """Only where the window is one batch."""
        return train and self.size == 1

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """0 and χ/r; in inference χ_EMA."""
        mean, var = self.read()
        if m is None or not train:
            return mean, jnp.sqrt(var + eps)
        sigma = self._window(m)[2].sigma(eps)
        r_max = jnp.asarray(self.r_max).astype(sigma.dtype)
        old = jnp.sqrt(var + eps).astype(sigma.dtype)[None]
        r = jnp.clip(lax.stop_gradient(sigma) / old, 1 / r_max, r_max)
        known = (self.updates >= self.begin) & (sigma < jnp.finfo(sigma.dtype).max)
        return jnp.zeros_like(sigma), sigma / jnp.where(known, r, 1)

    def backward(self, m: Moments, eps: Any) -> tuple[Array, Array, Tap]:
        """The share of earlier batches in Ψ, χ and the tap: the batch's own is in χ's gradient."""
        self = arrays(self)
        before = jnp.arange(self.size, dtype=self.taken.dtype)[:, None]
        before = (before < self.taken) & (before != self.taken % self.size)
        number = before.sum(0).astype(self.gz.dtype)
        nu = jnp.where(before, self.gz, 0).sum(0) / (number + 1)
        return nu, self._window(m)[2].sigma(eps), self.tap

    def take_back(self, seen: Tap) -> Mabn:
        """Takes in what the gradient has met."""
        self = arrays(self)
        gz = self.gz.at[self.taken % self.size].set(seen.gz.astype(self.gz.dtype))
        return self._replace(gz=gz, taken=self.taken + 1)

    def pool(self, axis_name: AxisName) -> Mabn:
        """Averages over the devices, χ²_EMA by the number of values in their windows.

        A device that left a batch out still has the one before in its place.
        """
        self, names = arrays(self), as_sync(axis_name).names
        values = self.count.sum(-2)
        whole = lax.psum(values, names)
        devices = device_count(names)
        share = jnp.where(whole > 0, values / jnp.where(whole > 0, whole, 1), 1 / devices)
        weighed = jnp.where(share > 0, share * self.var, 0), share.mean(-1) * self.mass
        var, mass = lax.psum(weighed, names)
        return averaged(self, axis_name)._replace(var=var, mass=mass)

    def options(self) -> dict[str, Any]:
        """The name and the decay."""
        return {"population": "mabn", "decay": self.decay}


register(Mabn, "decay")


@checked(
    "MABN",
    size=integer("a number of batches, at least 1", "pass for example 8", 1),
    decay=settled_decay,
    r_max=number("a number of at least 1", "use 1 for r = 1, 5 as in the code", lambda v: v >= 1),
    begin=integer("a number of updates, at least 0", "pass an int", 0),
)
def init_mabn(
    channels: int,
    *,
    size: int = 8,
    decay: float = 0.98,
    r_max: ArrayLike = 5.0,
    begin: int = 1000,
    dtype: DTypeLike | None = None,
) -> Mabn:
    """Returns the state of MABN, with the defaults of the paper's code.

    Args:
      channels: `C`.
      size: The number of batches in the window: that of the batch whose statistics are wanted, by
        that of the device.
      decay: The weight of the old χ²_EMA.
      r_max: The limit of r; 1 for none of it.
      begin: The number of updates up to which r is 1.
      dtype: As in `init_running`.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_mabn(1)
    >>> h, state = batch_norm(a, None, state, train=True)
    >>> print([round(float(value), 2) for value in h[:, 0]])
    [0.45, 1.34]
    """
    dtype = statistics_dtype(dtype)
    count, m2, gz = (jnp.zeros((size, channels), dtype) for _ in range(3))
    taken, updates, skipped = (jnp.zeros((), jnp.int32) for _ in range(3))
    var, mass = jnp.ones(channels, dtype), jnp.zeros((), dtype)
    tap, r = no_tap(var), jnp.asarray(r_max, dtype)
    ring = (count, m2, gz, taken)
    return Mabn(*ring, var, mass, updates, skipped, tap, r, jnp.int32(begin), decay)
