"""One device with the whole batch against D devices with a share each: any norm, any topology."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from normlab._arguments import array, checked, integer, mode, one_of, sequence
from normlab.devices.gradients import global_gradient, global_mean
from normlab.devices.topology import AxisName, Sync, as_sync, plan
from normlab.errors import invalid
from normlab.linear import Dense, Linear
from normlab.registry import get, row
from normlab.site import Norm, Site

Form = Literal["pmap", "shard_map", "shard_map, check_vma=False", "vmap", "jit"]
"""How the devices are programmed; `vmap` needs one device alone."""

RECIPES = ("local loss", "local loss, pmean(grads)", "pmean(loss)", "pmean(loss), pmean(grads)")
"""The ways to a data-parallel gradient that are in use."""


class Equivalence(NamedTuple):
    """What one device and D devices found, side by side.

    Attributes:
      one: By name, the values of one device: the output `h`, the leaves of the `state`, and the
        gradients of the mean of c·h by the input (`dx`), the kernel (`dw`) and the norm's
        parameters (`dg`, `db`).
      many: Those of D devices, put together in the order of the batch. What should be alike on all
        of them is taken from the device that is furthest from `one`.
      errors: By name, the largest difference, relative to the largest value of `one`.
      conventions: By recipe (of `RECIPES`), by which factors its gradients differ from those of one
        device: `(parameters, inputs)`. `None` where no one factor does, as where the devices'
        gradients differ. Empty for `jit`, which needs no recipe.

    >>> found = equivalence("layer", "data", 2, form="vmap")
    >>> found.one["h"].shape == found.many["h"].shape, found.errors["h"] < 5e-6
    (True, True)
    >>> found.conventions["local loss, pmean(grads)"]                  # parameters, inputs
    (1.0, 2.0)
    """

    one: dict[str, np.ndarray]
    many: dict[str, np.ndarray]
    errors: dict[str, float]
    conventions: dict[str, tuple[float | None, float | None]]

    @property
    def worst(self) -> float:
        """The largest of the errors; NaN if one is."""
        return float(np.max([*self.errors.values()]))


@checked(
    "equivalence",
    norm=mode,
    form=one_of(Form, "the name of a form"),
    x=array("the whole batch, [D·N, ...]", rank=2),
    recipes=sequence(one_of(Literal[RECIPES], ""), "some of RECIPES", "take them from there"),
    seed=integer("a seed, at least 0", "pass an int", 0),
)
def equivalence(
    norm: str | Callable[[AxisName | None], Norm],
    axis_name: AxisName,
    devices: int,
    *,
    form: Form = "pmap",
    x: Array | None = None,
    w: Array | None = None,
    linear: Linear = Dense(),  # noqa: B008
    weights: Array | None = None,
    recipes: Sequence[str] = RECIPES,
    seed: int = 0,
) -> Equivalence:
    """Runs one training step of a norm on one device and on D, and compares all there is.

    On one device every part of the batch is normalized together with the parts that the topology
    names, one after the other, by the norm without an axis name: nothing of the library's
    synchronization takes part in it.

    Args:
      norm: The name of a norm, or a function that makes one for an `axis_name`.
      axis_name: The topology, over one axis: its name, or a `Sync` without `every`, and with the
        gradient of both passes.
      devices: D.
      form: How the devices are programmed.
      x: The whole batch `[D·N, ...]`; by default 4 examples of 5 numbers for each device, whose
        means differ between devices.
      w: The kernel; by default normal numbers.
      linear: The linear map.
      weights: Importance of the examples, `[D·N]`.
      recipes: Those of `RECIPES` of which the convention is to be found.
      seed: For what is drawn.

    Raises:
      ValueError: If there are fewer devices, or the topology cannot be compared.

    >>> found = equivalence("batch", "data", 4, form="vmap")
    >>> found.worst < 5e-6, found.conventions["local loss, pmean(grads)"]
    (True, (1.0, 4.0))
    """
    where = "equivalence"
    sync = as_sync(axis_name)
    if len(sync.names) != 1 or sync.every or sync.gradient != "both":
        raise invalid(
            where,
            f"axis_name={axis_name!r}",
            "one axis, the gradient of both passes, and no delay",
            'name one axis: "data", or Sync("data", groups=...)',
        )
    if form != "vmap" and devices > jax.device_count():
        raise invalid(
            where,
            f"{devices} devices",
            f"at most the {jax.device_count()} there are",
            f'set XLA_FLAGS=--xla_force_host_platform_device_count={devices}, or form="vmap"',
        )
    if weights is not None and x is not None and weights.shape != x.shape[:1]:
        raise invalid(
            where,
            f"weights of shape {weights.shape} for a batch of shape {x.shape}",
            f"shape {x.shape[:1]}",
            "pass one weight per example",
        )
    make = _maker(norm)
    rng = np.random.default_rng(seed)
    if x is None:
        drawn = rng.normal(size=(devices, 4, 5)) + rng.normal(size=(devices, 1, 5))
        x = jnp.asarray(drawn.reshape(-1, 5), dtype=float)
    if w is None:
        w = jnp.asarray(rng.normal(size=(x.shape[-1], 3)), x.dtype)
    site = jax.eval_shape(lambda x, w: Site(linear(x, w), x, w, linear=linear), x, w)
    params, state = make(None).init(Site(linear(x, w), x, w, weights, linear))
    params = jax.tree.map(
        lambda v: v + jnp.asarray(0.5 * rng.normal(size=v.shape), v.dtype), params
    )
    c = jnp.asarray(rng.normal(size=site.a.shape), x.dtype)
    problem = _Problem(make, linear, params, state, w, x, c, weights, sync, devices)

    one = problem.one()
    many, conventions = problem.many(form, recipes)
    found, errors = {}, {}
    for name, value in one.items():
        candidates = [many[name]] if name in ("h", "dx") or form == "jit" else list(many[name])
        gaps = [_gap(v, value) for v in candidates]
        at = int(np.argmax(gaps))
        found[name], errors[name] = np.asarray(candidates[at]), gaps[at]
    return Equivalence(one, found, errors, _factors(conventions, one))


class _Problem(NamedTuple):
    """One step of training, of which the loss is the mean of c·h."""

    make: Callable[[AxisName | None], Norm]
    linear: Linear
    params: Any
    state: Any
    w: Array
    x: Array
    c: Array
    weights: Array | None
    sync: Sync
    devices: int

    def apply(self, norm: Norm, params: Any, w: Array, x: Array, weights: Any) -> tuple[Array, Any]:
        site = Site(self.linear(x, w), x, w, weights, self.linear)
        return norm.apply(params, self.state, site, train=True)

    def gradient(
        self, norm: Norm, mean: Callable[..., Array], x: Array, c: Array, weights: Any
    ) -> Callable[[Any, Array], tuple[Any, tuple[Array, Any]]]:
        """The function (params, w) -> (gradients of mean(c·h), (h, state))."""

        def loss(params: Any, w: Array, x: Array) -> tuple[Array, tuple[Array, Any]]:
            h, state = self.apply(norm, params, w, x, weights)
            return mean(c * h, weights=weights), (h, state)

        return lambda params, w: jax.grad(loss, (0, 1, 2), has_aux=True)(params, w, x)

    def one(self) -> dict[str, np.ndarray]:
        """Every shard among its members, one after the other."""
        norm, x, weights = self.make(None), self.x, self.weights
        cut = plan("equivalence", self.sync, (self.devices,), len(x) // self.devices)
        count = self.devices * cut.shards
        if self.sync.whole:
            groups = [([0], [0])]
            count = 1
        elif cut.members is None:
            blocks = np.arange(count).reshape(-1, cut.block)
            groups = [(list(block), list(block)) for block in blocks]
        else:
            groups = [(sorted({*row}), [i]) for i, row in enumerate(cut.members)]
        index = np.arange(len(x)).reshape(count, -1)

        def loss(params: Any, w: Array, x: Array) -> tuple[Array, Array]:
            rows = []
            for members, own in groups:
                at = index[members].ravel()
                of = None if weights is None else weights[at]
                h, _ = self.apply(norm, params, w, x[at], of)
                rows.append(h[np.isin(at, index[own].ravel())])
            h = jnp.concatenate(rows)
            return _mean(self.c * h, weights), h

        grads, h = jax.grad(loss, (0, 1, 2), has_aux=True)(self.params, self.w, x)
        _, state = self.apply(norm, self.params, self.w, x, weights)
        return _named(h, state, *grads)

    def many(self, form: Form, recipes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values by name, `[D, ...]` but for h and dx; and the gradients of each recipe."""
        devices, (name,) = self.devices, self.sync.names
        chips = np.array(jax.devices()[: devices if form != "vmap" else 1])
        mesh = Mesh(chips, (name,), axis_types=(AxisType.Auto,))
        batch = (self.x, self.c, self.weights)
        if form == "jit":
            norm = self.make(Sync(**{**vars(self.sync), "mesh": mesh}))

            @jax.jit
            def step(params: Any, w: Array, batch: Any) -> Any:
                return self.gradient(norm, _mean, *batch)(params, w)

            batch = jax.device_put(batch, NamedSharding(mesh, P(name)))
            grads, (h, state) = step(self.params, self.w, batch)
            return _named(h, state, *grads), {}
        norm = self.make(self.sync)
        global_ = functools.partial(global_mean, axis_name=name)
        means = {
            "local loss": _mean,
            "pmean(loss)": lambda *v, **k: lax.pmean(_mean(*v, **k), name),
        }

        def on_device(replicated: Any, batch: Any) -> Any:
            (dparams, dw, dx), (h, state) = self.gradient(norm, global_, *batch)(*replicated)
            dparams, dw = global_gradient((dparams, dw), name)
            by_recipe = {}
            for recipe in recipes:
                loss, _, after = recipe.partition(", ")
                (of_params, _, of_x), _ = self.gradient(norm, means[loss], *batch)(*replicated)
                by_recipe[recipe] = (lax.pmean(of_params, name) if after else of_params, of_x)
            return (h, state, dparams, dw, dx), by_recipe

        def on_shard(replicated: Any, batch: Any) -> Any:
            out = on_device(replicated, jax.tree.map(lambda v: v[0], batch))
            return jax.tree.map(lambda v: v[None], out)

        batch = jax.tree.map(lambda v: v.reshape(devices, -1, *v.shape[1:]), batch)
        if form == "vmap":
            run = jax.jit(jax.vmap(on_device, (None, 0), axis_name=name))
        elif form == "pmap":
            run = jax.pmap(on_device, name, in_axes=(None, 0), devices=list(mesh.devices))
        else:
            typed, specs = form == "shard_map", {"in_specs": (P(), P(name)), "out_specs": P(name)}
            run = jax.jit(jax.shard_map(on_shard, mesh=mesh, check_vma=typed, **specs))
        (h, state, dparams, dw, dx), by_recipe = run((self.params, self.w), batch)
        return _named(_whole(h), state, dparams, dw, _whole(dx)), by_recipe


def _maker(norm: str | Callable[[AxisName | None], Norm]) -> Callable[[AxisName | None], Norm]:
    if not isinstance(norm, str):
        return norm
    if row(norm).axis_of == "batch":
        return lambda axis_name: get(norm, axis_name=axis_name)
    return lambda _: get(norm)


def _mean(values: Array, weights: Any) -> Array:
    """Of one device's values, those of weight zero left out."""
    if weights is None:
        return values.mean()
    w = jnp.broadcast_to(weights.reshape(-1, *(1,) * (values.ndim - 1)), values.shape)
    total = jnp.where(w > 0, w * values, 0).sum()
    return total / jnp.maximum(w.sum(), jnp.finfo(w.dtype).tiny)


def _named(h: Array, state: Any, dparams: Any, dw: Array, dx: Array) -> dict[str, np.ndarray]:
    named = {"h": h, "dx": dx, "dw": dw}
    for prefix, tree in (("state", state), ("d", dparams)):
        for path, leaf in jax.tree.leaves_with_path(tree):
            key = jax.tree_util.keystr(path, simple=True, separator=".")
            named[f"d{key}" if prefix == "d" else f"state.{key}"] = leaf
    return {name: np.asarray(value) for name, value in named.items()}


def _whole(v: Array) -> Array:
    return v.reshape(-1, *v.shape[2:])


def _gap(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(found - expected).max(initial=0) / (np.abs(expected).max(initial=0) or 1))


def _factors(recipes: dict[str, Any], one: dict[str, np.ndarray]) -> dict[str, Any]:
    """For each recipe, what its gradients are multiples of, and by how much."""
    found = {}
    for recipe, (dparams, dx) in recipes.items():
        params = [
            (leaf, np.broadcast_to(one[f"d{jax.tree_util.keystr(path, simple=True)}"], leaf.shape))
            for path, leaf in jax.tree.leaves_with_path(dparams)
        ]
        found[recipe] = (_factor(params), _factor([(_whole(dx), one["dx"])]))
    return found


def _factor(pairs: list[tuple[Any, np.ndarray]]) -> float | None:
    found = np.concatenate([np.asarray(v, np.float64).ravel() for v, _ in pairs] or [np.zeros(1)])
    expected = np.concatenate([np.asarray(e, np.float64).ravel() for _, e in pairs] or [np.ones(1)])
    size = np.abs(expected).max()
    ratio = float(found @ expected / (expected @ expected)) if size else 0.0
    return round(ratio, 3) if np.abs(found - ratio * expected).max() <= 1e-4 * size else None
