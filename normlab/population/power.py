"""PowerNorm: a running mean of squares in both passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from normlab._arguments import checked, integer, settled_decay
from normlab._trees import register
from normlab.devices.topology import AxisName
from normlab.measure import Moments
from normlab.population._batches import BadBatch, arrays
from normlab.population.backward import Tap, no_tap
from normlab.population.optional import averaged, options_of, pool, read_inner, updated
from normlab.population.rms import about_zero, observe_about_zero
from normlab.population.running import init_running


class Power(NamedTuple):
    """PowerNorm (Shen et al. 2020, https://arxiv.org/abs/2003.07845, algorithm 2).

        h = g · a/ψ + b          ψ² ← decay·ψ² + (1 − decay)·⟨a²⟩, after it was used
        ∂L/∂a = (g − ν·z)/ψ      ν ← ν·(1 − (1 − decay)·⟨z²⟩) + (1 − decay)·⟨g·z⟩, by `take_back`

    with z = a/ψ and g = ∂L/∂z. Up to `begin` updates it is batch norm about zero in both passes.
    The paper's code divides the gradient by the root of the *batch's* mean square; this divides by
    ψ, as the paper, so that the gradient is that of what was computed, but for ν. Its layer scale,
    RMS norm in groups before this, is `chain(get("rms", groups=...), get("batch", ...))`.

    Attributes:
      inner: The average of the means of squares, a `Running`.
      nu: `[C]`, ν.
      tap: Zeros, by whose gradient ν goes on.
      begin: `[]` int32, the number of updates up to which this is batch norm about zero.
      decay: The weight of the old ν; not a leaf.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [7.0]]), init_power(1)
    >>> h, state = batch_norm(a, None, state, train=True)        # by ψ = 1: it is averaged after
    >>> h.round(2).tolist(), [v.tolist() for v in state.read()]
    ([[1.0], [7.0]], [[0.0], [25.0]])
    """

    inner: Any
    nu: Array
    tap: Tap
    begin: Array
    decay: float = 0.9

    observe, read = observe_about_zero, read_inner

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> Power:
        """Takes the mean of squares in."""
        new = updated(self.inner, about_zero(m), decay=decay, bad_batch=bad_batch)
        return self._replace(inner=new)

    def pool(self, axis_name: AxisName) -> Power:
        """Merges `inner`, and averages ν."""
        return self._replace(inner=pool(self.inner, axis_name), nu=averaged(self.nu, axis_name))

    def alone(self, train: bool) -> bool:
        """No: one value is normalized by what was seen."""
        del train
        return False

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        """0 and ψ; until `begin` the root of the batch's mean square."""
        mean, var = self.read()
        sigma = jnp.sqrt(var + eps)
        if m is None or not train:
            return mean, sigma
        own = about_zero(m).sigma(eps)
        sigma = jnp.where(self._begun(), lax.stop_gradient(sigma).astype(own.dtype)[None], own)
        return jnp.zeros_like(sigma), sigma

    def _begun(self) -> Array:
        return jnp.asarray(self.inner.updates >= self.begin)

    def backward(self, m: Moments, eps: Any) -> tuple[Array, Array, Tap]:
        """ν, from `begin` on, ψ and the tap."""
        self = arrays(self)
        _, sigma = self.normalizer(m, eps, train=True)
        nu = jnp.where(self._begun(), self.nu, 0)
        return nu, sigma, self.tap

    def take_back(self, seen: Tap) -> Power:
        """Takes in what the gradient has met."""
        self = arrays(self)
        nu = self.nu + (1 - self.decay) * (seen.gz - seen.zz * self.nu)
        return self._replace(nu=nu.astype(self.nu.dtype))

    def options(self) -> dict[str, Any]:
        """Those of `inner`, with the name of this."""
        return options_of("power", self.inner)


register(Power, "decay")


@checked(
    "power norm",
    decay=settled_decay,
    backward_decay=settled_decay,
    begin=integer("a number of updates, at least 0", "pass an int", 0),
)
def init_power(
    channels: int,
    *,
    decay: float = 0.9,
    backward_decay: float | None = None,
    begin: int = 0,
    debias: bool = True,
    dtype: DTypeLike | None = None,
) -> Power:
    """Returns the state of PowerNorm.

    Args:
      channels: `C`.
      decay: The weight of the old ψ², in [0, 1).
      backward_decay: That of the old ν; `None` for the same.
      begin: The number of updates up to which this is batch norm about zero; the paper's code has
        10000.
      debias: As in `init_running`.
      dtype: As in `init_running`.

    >>> from normlab import batch_norm
    >>> a, state = jnp.array([[1.0], [3.0]]), init_power(1)
    >>> h, state = batch_norm(a, None, state, train=True)
    >>> print(h.round(2))
    [[1.]
     [3.]]
    """
    inner = init_running(channels, decay=decay, debias=debias, dtype=dtype)
    zeros = jnp.zeros_like(inner.mean)
    decay = decay if backward_decay is None else backward_decay
    return Power(inner, zeros, no_tap(zeros), jnp.int32(begin), decay)
