"""Batch norms with statistics, gains or both for each domain: see `normlab.population.Domains`.

auxiliary batch       μ, σ, g and b of the domain of the batch, or of each example
transferable batch    μ and σ of the domain; channels alike in two domains count more
recurrent batch       μ and σ of the time step; one g and b, which start small
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from normlab._arguments import checked, count, real
from normlab._checks import expand, gain_and_bias, promote_dtype
from normlab.devices.topology import AxisName
from normlab.equation import Affine, Parts
from normlab.family.mixtures import batch_of
from normlab.gains import init_gain
from normlab.making import initial_affine, made_of
from normlab.population.by_name import init_domains
from normlab.population.domains import BY_DOMAIN, domains_of
from normlab.site import Norm, Site, State

_STATE = {"state": BY_DOMAIN}


def _by_domain(
    domains: int, examples: int | None, batch: Mapping[str, Any] | None, **own: Any
) -> Norm:
    kept = functools.partial(init_domains, domains=domains, examples=examples)
    return batch_of(batch, population=kept, **own)


@checked("auxiliary batch norm", domains=count, examples=count)
def auxiliary_batch(
    *,
    domains: int = 2,
    examples: int | None = None,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Auxiliary batch normalization (Xie et al. 2020, AdvProp, https://arxiv.org/abs/1911.09665).

    h = g_d · (a − μ_d) / √(var_d + ε) + b_d for the domain d of the batch, or, with the number of
    `examples` of a batch, of each of them. `normlab.population.select_domain` says which in the
    state. The params are `Affine(g [D, C], b [D, C])`.
    """
    made = _by_domain(domains, examples, batch, eps=eps, axis_name=axis_name)

    def init(site: Site) -> tuple[Any, State]:
        one = initial_affine(site, use_gain=use_gain, use_bias=use_bias)
        return jax.tree.map(lambda v: jnp.tile(v, (domains, 1)), one), made.init(site)[1]

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        found, after = made.parts(None, state, site, train=train)
        both = Affine(None, None) if params is None else Affine(params.g, params.b)
        own = jax.tree.map(lambda v: v[domains_of(state).current], both)
        g, b = gain_and_bias("auxiliary batch norm", own, site.a, site.linear.channel_axis)
        return found._replace(g=g, b=b), after

    return made_of("auxiliary batch norm", init, parts, **_STATE)


@checked("transferable batch norm", examples=count)
def transferable_batch(
    *,
    examples: int | None = None,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Transferable normalization (Wang et al. 2019, TransNorm, NeurIPS).

    h = (1 + α) · (g · (a − μ_d) / √(var_d + ε) + b) for the domain d, of two, and for each channel

        α = C·t / Σ t        t = 1 / (1 + |μ₀/σ₀ − μ₁/σ₁|)

    α is a constant in the derivative. It is taken from the population, this batch included, in
    training too, so that a batch may be of one domain; the paper takes it from the batch, which
    holds both.
    """
    how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
    made = _by_domain(2, examples, batch, eps=eps, axis_name=axis_name, **how)

    def parts(params: Any, state: State, site: Site, *, train: bool) -> tuple[Parts, State]:
        found, after = made.parts(params, state, site, train=train)
        mean, var = jax.vmap(lambda one: one.read())(domains_of(after).inner)
        ratio = mean / jnp.sqrt(var + eps)
        near = 1 / (1 + jnp.abs(ratio[0] - ratio[1]))
        alpha = lax.stop_gradient(near / near.mean())
        factor = expand(1 + alpha, site.a.ndim, site.linear.channel_axis).astype(found.g.dtype)
        return found._replace(g=found.g * factor, b=found.b * factor), after

    return made_of("transferable batch norm", made.init, parts, **_STATE)


@checked("recurrent batch norm", steps=count, g=real)
def recurrent_batch(
    *,
    steps: int,
    g: float = 0.1,
    eps: float = 1e-5,
    axis_name: AxisName | None = None,
    batch: Mapping[str, Any] | None = None,
    use_gain: bool = True,
    use_bias: bool = True,
) -> Norm:
    """Recurrent batch normalization (Cooijmans et al. 2016, https://arxiv.org/abs/1603.09025).

    h = g · (a − μ_t) / √(var_t + ε) + b with statistics of each of the first `steps` time steps;
    `normlab.population.select_step` says which in the state. g, shared by all steps, starts at 0.1,
    so that a tanh does not saturate. In the paper's LSTM it stands on W·x and U·h apart, the second
    without a bias (`use_bias=False`), and on the cell.
    """
    made = _by_domain(steps, None, batch, eps=eps, axis_name=axis_name)

    def init(site: Site) -> tuple[Any, State]:
        how: dict[str, Any] = {"use_gain": use_gain, "use_bias": use_bias}
        params = init_gain(site.channels, g=g, dtype=promote_dtype(site.a), **how)
        return params, made.init(site)[1]

    return made_of("recurrent batch norm", init, made.parts, **_STATE)
