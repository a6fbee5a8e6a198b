"""Batch norms over more than the batch at hand, or about zero.

batch RMS          μ = 0, σ² = mean a²
cross-iteration    the last batches together, each as the weights of now would have made it
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from normlab._arguments import checked, instance, integer
from normlab._checks import expand, inputs, kernel, normalize_axes, promote, promote_dtype
from normlab._trees import node
from normlab._weights import align_weights
from normlab.devices.mapped import is_bound, vary, varying_axes
from normlab.devices.topology import AxisName, as_sync
from normlab.equation import Parts
from normlab.errors import invalid
from normlab.family.mixtures import batch_of
from normlab.gains import Gain
from normlab.making import made_of
from normlab.measure import Moments, empty, merge, merge_axes
from normlab.population._batches import BadBatch, arrays, finite
from normlab.population.by_name import init_rms
from normlab.population.optional import normalizer, read_inner, updated
from normlab.population.window import put
from normlab.site import Norm, Site, State


@checked("batch RMS norm")
def batch_rms(
    *,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """Batch norm about zero: h = g · a/√(mean a² + ε) + b, the mean over the batch, per channel.

    The forward pass of PowerNorm before its running statistics (Shen et al. 2020,
    https://arxiv.org/abs/2003.07845, "PN-V"); with `batch={"population": "window"}` that of MABN.
    """
    options = {**(batch or {})}
    inner = options.pop("population", "debiased")
    population = functools.partial(init_rms, inner=inner)
    own: dict[str, Any] = {"eps": eps, "axis_name": axis_name, "population": population}
    own |= {"use_gain": use_gain, "use_bias": use_bias, "gain": gain}
    return batch_of(options, **own)


@node
class CrossIteration(NamedTuple):
    """What cross-iteration batch norm keeps of the batches before: 2·(size − 1) kernels.

    Attributes:
      inner: The population, with which inference normalizes.
      count: `[size − 1, C]`, the number of values (or weight) in each; 0 where there was none.
      mean: `[size − 1, C]`, the means of a.
      var: `[size − 1, C]`, its variances.
      patch: `[size − 1, ..., K, C]`, ⟨x⟩: the input of each weight, the derivative of the mean.
      slope: `[size − 1, ..., K, C]`, ⟨x·a⟩ − ⟨x⟩⟨a⟩: half that of the variance.
      updates: `[]` int32, the number of batches.
    """

    inner: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Array
    var: Array
    patch: Array
    slope: Array
    updates: Array

    def moved(self, w: Array) -> Moments:
        """The moments of all the batches, as the weights `w` would have made them: `[1, C]`.

        μ(w) = ⟨x⟩·w, exactly, and to first order ⟨a²⟩(w) = ⟨a²⟩ + 2⟨x·a⟩·Δw; a variance that would
        be negative is 0.
        """
        self = arrays(self)
        over = tuple(range(1, w.ndim))
        mean, along = ((v.astype(w.dtype) * w[None]).sum(over) for v in (self.patch, self.slope))
        old, var, count = (v.astype(w.dtype) for v in (self.mean, self.var, self.count))
        var = var + 2 * (along - var) - jnp.square(mean - old)
        return merge_axes(Moments(count, mean, count * jnp.maximum(var, 0)), 0)


@node
class _Held(NamedTuple):
    """A population for one call: training merges a batch with others, and its moments are kept."""

    inner: Any
    before: Moments
    own: Moments

    read = read_inner

    def update(self, m: Moments, *, decay: Any = None, bad_batch: BadBatch = "skip") -> _Held:
        own = Moments(*(jnp.broadcast_to(f, m.mean.shape).reshape(1, -1) for f in m))
        inner = updated(self.inner, m, decay=decay, bad_batch=bad_batch)
        return self._replace(inner=inner, own=own)

    def normalizer(self, m: Moments | None, eps: Any, *, train: bool) -> tuple[Array, Array]:
        if m is None or not train:  # frozen
            return normalizer(self.inner, m, eps, train=train)
        whole = merge(m, jax.tree.map(lambda v: v.astype(m.mean.dtype), self.before))
        return whole.mean, whole.sigma(eps)


@checked(
    "cross-iteration batch norm",
    size=integer("a number of batches, at least 2", "use batch norm for one", 2),
)
def cross_iteration(
    *,
    size: int = 4,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
    gain: Gain = "plain",
) -> Norm:
    """Cross-iteration batch normalization (Yao et al. 2021, https://arxiv.org/abs/2002.05712).

    Training normalizes with the moments of the last `size` batches together, each compensated for
    what the weights have moved since (`CrossIteration.moved`), and counted by its number of values.
    The layer is linear, so the mean is exact, and its derivative is the mean input: no gradient is
    taken but two products with the inputs. The gradient sees the batch at hand alone. Negative
    variances become 0, as in the paper; its code leaves such batches out. There is no burn-in: the
    window is of as many batches as there are. The invariances of the row are those of the first.

    Args:
      size: The number of batches, the one at hand included; 2·(size − 1) kernels are kept.
      eps: ε.
      axis_name: Axes over which the batch is one.
      batch: Other options of batch norm.
      use_gain: Whether there is a gain.
      use_bias: Whether there is a bias.
      gain: How it is kept.
    """
    where, sync = "cross-iteration batch norm", as_sync(axis_name)
    if not sync.whole or sync.every:
        change = "name the axes alone, or use batch norm"
        raise invalid(where, f"axis_name={axis_name}", "one batch over all devices", change)
    own: dict[str, Any] = {"eps": eps, "axis_name": axis_name}
    norm = batch_of(batch, **own, use_gain=use_gain, use_bias=use_bias, gain=gain)

    def init(site: Site) -> tuple[Any, State]:
        w, _ = kernel(where, site), inputs(where, site)
        params, inner = norm.init(site)
        dtype, few, wide = promote_dtype(w), (size - 1, site.channels), (size - 1, *w.shape)
        count, mean, var = (jnp.zeros(few, dtype) for _ in range(3))
        patch, slope = (jnp.zeros(wide, dtype) for _ in range(2))
        updates = jnp.zeros((), jnp.int32)
        return params, CrossIteration(inner, count, mean, var, patch, slope, updates)

    def parts(params: Any, state: Any, site: Site, *, train: bool) -> tuple[Parts, State]:
        if not train:
            return norm.parts(params, state.inner, site, train=False)[0], state
        w = lax.stop_gradient(promote(kernel(where, site)))
        x = lax.stop_gradient(promote(inputs(where, site)))
        nothing = empty((1, site.channels), w.dtype)
        held = _Held(state.inner, state.moved(w), nothing)
        found, held = norm.parts(params, held, site, train=True)
        m = jax.tree.map(lax.stop_gradient, held.own)
        good = finite(m) & (m.count > 0).all()
        m = jax.tree.map(lambda v: jnp.where(good, v, 1), m)  # or a NaN for jax_debug_nans
        m = Moments(m.count, m.mean, m.var())
        patch, slope = _derivatives(site, x, w, m)
        place = state.updates % (size - 1)
        state = arrays(state)._replace(inner=held.inner)
        new = put(Moments(state.count, state.mean, state.var), place, m)
        wide = (old.at[place].set(v) for old, v in ((state.patch, patch), (state.slope, slope)))
        names = ("count", "mean", "var", "patch", "slope")
        kept = {
            name: jnp.where(good, v, getattr(state, name))
            for name, v in zip(names, (*new, *wide), strict=True)
        }
        updates = state.updates + good.astype(jnp.int32)
        return found, state._replace(**kept, updates=updates)

    def _derivatives(site: Site, x: Array, w: Array, m: Moments) -> tuple[Array, Array]:
        """⟨x⟩ and ⟨x·(a − μ)⟩ over the batch on all devices, in the shape of `w`."""
        (channel,) = normalize_axes(where, site.linear.channel_axis, site.a.ndim)
        x = jnp.where(jnp.isfinite(x), x, 0)  # what is left out; else nothing of it is kept
        w = vary(w, tuple(varying_axes(x)))

        def mean(w: Array, off: Array | None = None) -> Array:
            a = site.linear(x, w)
            weights = align_weights(where, site.weights, a)
            share = (1 if weights is None else weights) / m.count[0, 0]
            each = share * a if off is None else share * off * a
            return each.sum()

        off = site.linear(x, w) - expand(m.mean[0].astype(w.dtype), site.a.ndim, channel)
        found = jax.grad(mean)(w), jax.grad(mean)(w, off)
        names = sync.names if is_bound(sync.names) else ()  # in plain jit `a` is of all devices
        patch, slope = (lax.psum(v, names) if names else v for v in found)
        return patch, slope

    state = instance(CrossIteration, "make it with norm.init")._replace(saved=True)
    return made_of(where, init, parts, state=state)
