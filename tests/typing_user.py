# pyright: strict
"""What a type checker knows of the library: checked by `make lint`, run by nobody."""

from typing import assert_type

import jax

import normlab as nl

a = jax.random.normal(jax.random.key(0), (4, 3))
params = nl.init_affine(3)

h, running = nl.batch_norm(a, params, nl.init_running(3), train=True)
assert_type(h, jax.Array)
assert_type(running, nl.Running)

h, cumulative = nl.batch_norm(a, params, nl.population.init_cumulative(3), train=True)
assert_type(cumulative, nl.population.Cumulative)

h, nothing = nl.batch_norm(a, params, train=True)
assert_type(nothing, None)

h, empty = nl.batch_norm(a, None, (), train=False)
assert_type(empty, tuple[()])

assert_type(nl.layer_norm(a, params, axes="all", eps=1e-6), jax.Array)
assert_type(nl.group_parts(a, params, groups=3), nl.Parts)
assert_type(nl.weight_norm(a), jax.Array)

norm = nl.get("layer")
h, running = norm.apply(params, running, nl.Site(a), train=True)
assert_type(running, nl.Running)
