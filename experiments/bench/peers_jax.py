"""The JAX contestants of `bench ops` and `bench bytes`.

All take their parameters as arguments, in float32, and return y in the type of x. Statistics are
float32: flax promotes by itself, and haiku's modules and equinox's batch norm are given x in
float32, which is what a mixed-precision policy does; XLA fuses the casts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

import normlab as nl

from ..rundir import environment
from .turns import first_line
from .worker import (
    BOTH,
    COMMANDS,
    DECAY,
    EPS,
    FORWARD,
    GROUPS,
    Built,
    Case,
    Contestant,
    Family,
)

F = Callable[..., tuple[Array, Any]]


class JaxFamily(Family):
    """The JAX libraries, on the default device."""

    def environment(self) -> dict[str, Any]:
        """As `rundir.environment`, and the backend: cpu, gpu, tpu."""
        return {"backend": jax.default_backend(), **environment()}

    def contestants(self, peer: str, case: Case) -> list[Contestant]:
        return BUILDERS[peer](case)

    def load(self, case: Case) -> None:
        x, dy, params = case.inputs()
        self.x, self.dy = (jnp.asarray(v, case.dtype) for v in (x, dy))
        self.params = tuple(map(jnp.asarray, params))

    def copy(self) -> Callable[[], Array]:
        return copy_of(self.x)

    def build(self, contestant: Contestant) -> Built:
        """Compiles both directions."""
        x, dy, params = self.x, self.dy, self.params
        forward = jax.jit(contestant.f).lower(x, *params).compile()
        both = jax.jit(forward_and_backward(contestant.f)).lower(x, dy, *params).compile()
        memory = both.memory_analysis()
        calls = {FORWARD: lambda: forward(x, *params), BOTH: lambda: both(x, dy, *params)}
        return Built(calls, None if memory is None else memory.temp_size_in_bytes)

    def wait(self, out: Any) -> None:
        jax.block_until_ready(out)


def family(platform: str) -> JaxFamily:
    """The family as a worker serves it; the platform is JAX's own choice."""
    del platform
    return JaxFamily()


def copy_of(x: Array) -> Callable[[], Array]:
    """Flips bits by a mask that the compiler does not know (it is 0): nothing but traffic."""
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    copy, mask = jax.jit(lambda x, m: (x.view(bits) ^ m).view(x.dtype)), jnp.zeros((), bits)
    return lambda: copy(x, mask)


def forward_and_backward(f: F) -> Callable[..., tuple[Array, tuple[Array, ...], Any]]:
    """Returns `(x, dy, *parameters) -> (y, gradients, aux)`."""

    def both(x: Array, dy: Array, *params: Array) -> tuple[Array, tuple[Array, ...], Any]:
        y, pull, aux = jax.vjp(f, x, *params, has_aux=True)
        return y, pull(dy), aux

    return both


def _normlab(case: Case, implementation: nl.Implementation = "auto") -> list[Contestant]:
    state = nl.init_running(case.shape[-1])
    options: dict[str, Any] = {"eps": EPS, "implementation": implementation}

    def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
        params = nl.Affine(g, b)
        match case.op:
            case "batch":
                return nl.batch_norm(x, params, state, train=True, decay=DECAY, **options)
            case "group":
                return nl.group_norm(x, params, groups=GROUPS, **options), ()
            case _:
                norm = {"layer": nl.layer_norm, "rms": nl.rms_norm, "instance": nl.instance_norm}
                return norm[case.op](x, params, **options), ()

    default = implementation == "auto"
    name = "normlab" if default else f"normlab, {implementation}"
    return [Contestant("normlab", name, f, safe=True, default=default)]


def _normlab_fused(case: Case) -> list[Contestant]:
    """The kernels; `fused` has what they do in one with their neighbours."""
    (one,) = _normlab(case, "pallas")
    return [dataclasses.replace(one, name="normlab, pallas, fused")]


def fused(case: Case) -> dict[str, Callable[..., Any]]:
    """The norm of a sum, and a norm that is added to and activated, each as one kernel of ours.

    Returns:
      `add(x, y, *parameters) -> (h, x + y, aux)` and
      `relu(x, residual, *parameters) -> (relu(norm + residual), aux)`.
    """
    options: dict[str, Any] = {"eps": EPS, "implementation": "pallas"}
    options |= {"groups": GROUPS} if case.op == "group" else {}
    norm, state = nl.get(case.op, **options), ()
    if case.op == "batch":
        state = nl.init_running(case.shape[-1], decay=DECAY)

    def add(x: Array, y: Array, g: Array, b: Array | None = None) -> tuple[Array, Array, Any]:
        total, h, new = nl.add_norm(norm, nl.Affine(g, b), state, x, y, train=True)
        return h, total, new

    def relu(
        x: Array, residual: Array | None, g: Array, b: Array | None = None
    ) -> tuple[Array, Any]:
        parts, new = norm.parts(nl.Affine(g, b), state, nl.Site(x), train=True)
        return nl.affine(parts, x, residual=residual, activation=jax.nn.relu), new

    return {"add": add, "relu": relu}


def _numpy(case: Case) -> list[Contestant]:
    """The textbook's formula in float32, its variance that of the deviations from the mean."""
    channels, groups = case.shape[-1], GROUPS if case.op == "group" else None
    axes: tuple[int, ...] = {
        "batch": tuple(range(len(case.shape) - 1)),
        "layer": (-1,),
        "rms": (-1,),
        "group": (1, 2, 4),
        "instance": tuple(range(1, len(case.shape) - 1)),
    }[case.op]
    running = jnp.zeros(channels), jnp.ones(channels)

    def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
        y = x.astype(jnp.float32)
        y = y.reshape(*x.shape[:-1], groups, channels // groups) if groups else y
        mean = 0.0 if case.op == "rms" else y.mean(axes, keepdims=True)
        var = jnp.square(y - mean).mean(axes, keepdims=True)
        h = ((y - mean) / jnp.sqrt(var + EPS)).reshape(x.shape) * g
        h = (h if b is None else h + b).astype(x.dtype)
        if case.op != "batch":
            return h, ()
        new = (jnp.reshape(v, channels) for v in (mean, var))
        return h, tuple(DECAY * old + (1 - DECAY) * v for old, v in zip(running, new, strict=True))

    return [Contestant("jax.numpy", "jax.numpy", f, safe=True)]


def _tokamax(case: Case) -> list[Contestant]:
    try:
        import tokamax  # pyright: ignore[reportMissingImports]
    except Exception as error:  # of a package that it does not go with
        said = f"{first_line(error)}. One that fits: {COMMANDS['tokamax']}"
        raise ValueError(f"it cannot be imported: {said}") from error
    if case.op not in ("layer", "rms"):
        raise ValueError("it has layer and RMS norm alone")
    # What it chooses by itself where the device is there; ahead of time it cannot see one.
    implementation = "triton" if jax.default_backend() == "gpu" else "xla"

    def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
        options = {"epsilon": EPS, "subtract_mean": case.op == "layer"}
        return tokamax.layer_norm(x, g, b, **options, implementation=implementation), ()

    return [Contestant("tokamax", "tokamax", f, safe=True)]


def _linen(case: Case) -> list[Contestant]:
    import flax.linen as nn

    channels = case.shape[-1]
    stats = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}

    def make(**options: Any) -> F:
        modules: dict[str, Callable[[], nn.Module]] = {
            "batch": lambda: nn.BatchNorm(use_running_average=False, momentum=DECAY, **options),
            "layer": lambda: nn.LayerNorm(**options),
            "rms": lambda: nn.RMSNorm(**options),
            "group": lambda: nn.GroupNorm(GROUPS, **options),
            "instance": lambda: nn.InstanceNorm(**options),
        }
        module = modules[case.op]()

        def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
            variables = {"params": {"scale": g} if b is None else {"scale": g, "bias": b}}
            if case.op == "batch":
                variables["batch_stats"] = stats
            return module.apply(variables, x, mutable=["batch_stats"])

        return f

    return _one_and_two_pass("flax.linen", case, make)


def _nnx(case: Case) -> list[Contestant]:
    from flax import nnx

    channels = case.shape[-1]
    modules: dict[str, Callable[..., Any]] = {
        "batch": lambda **o: nnx.BatchNorm(
            channels, use_running_average=False, momentum=DECAY, **o
        ),
        "layer": lambda **o: nnx.LayerNorm(channels, **o),
        "rms": lambda **o: nnx.RMSNorm(channels, **o),
        "group": lambda **o: nnx.GroupNorm(channels, GROUPS, **o),
        "instance": lambda **o: nnx.InstanceNorm(channels, **o),
    }

    def make(**options: Any) -> F:
        def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
            module = modules[case.op](rngs=nnx.Rngs(0), **options)
            module.scale = nnx.Param(g)
            if b is not None:
                module.bias = nnx.Param(b)
            y = module(x)
            return y, (module.mean[...], module.var[...]) if case.op == "batch" else ()

        return f

    return _one_and_two_pass("flax.nnx", case, make)


def _one_and_two_pass(peer: str, case: Case, make: Callable[..., F]) -> list[Contestant]:
    """Flax's default, E[x²] − E[x]², and its option; RMS norm has no mean to lose digits to."""
    one, two = (
        make(epsilon=EPS, dtype=jnp.dtype(case.dtype), use_fast_variance=fast)
        for fast in (True, False)
    )
    if case.op == "rms":
        return [Contestant(peer, peer, one, safe=True)]
    return [
        Contestant(peer, peer, one, safe=False),
        Contestant(peer, f"{peer}, two-pass", two, safe=True, default=False),
    ]


def _haiku(case: Case) -> list[Contestant]:
    import haiku as hk  # pyright: ignore[reportMissingImports]

    learned = {"create_scale": True, "create_offset": True}
    calls: dict[str, Callable[[Array], Array]] = {
        "batch": lambda x: hk.BatchNorm(**learned, decay_rate=DECAY, eps=EPS)(x, is_training=True),
        "layer": lambda x: hk.LayerNorm(-1, **learned, eps=EPS, param_axis=-1)(x),
        "rms": lambda x: hk.RMSNorm(-1, eps=EPS, param_axis=-1)(x),
        "group": lambda x: hk.GroupNorm(GROUPS, eps=EPS)(x),
        "instance": lambda x: hk.InstanceNorm(**learned, eps=EPS)(x),
    }
    init, apply = hk.transform_with_state(calls[case.op])
    abstract = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    params, state = jax.eval_shape(init, jax.random.key(0), abstract)
    state = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), state)
    ((module, shapes),) = params.items()

    def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
        values = {"scale": g, "offset": b}
        mine = {name: values[name].reshape(v.shape) for name, v in shapes.items()}
        y, new = apply({module: mine}, state, None, x.astype(jnp.float32))
        return y.astype(x.dtype), new

    return [Contestant("haiku", "haiku", f, safe=case.op != "batch")]


def _equinox(case: Case) -> list[Contestant]:
    import equinox as eqx  # pyright: ignore[reportMissingImports]

    channels, note, state = case.shape[-1], "", None
    if case.op == "batch":
        note = "mode='batch', vmapped over positions too, so that channels stay last"
        norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
            channels, "n", eps=EPS, momentum=DECAY, mode="batch"
        )
    elif case.op in ("layer", "rms"):
        norm = (
            eqx.nn.RMSNorm(channels, eps=EPS, use_bias=False)
            if case.op == "rms"
            else eqx.nn.LayerNorm(channels, eps=EPS)
        )
    else:
        note = "wants channels first: the transposes are timed"
        groups = GROUPS if case.op == "group" else channels
        norm = eqx.nn.GroupNorm(groups, channels, eps=EPS)

    def f(x: Array, g: Array, b: Array | None = None) -> tuple[Array, Any]:
        learned = (lambda m: m.weight) if b is None else (lambda m: (m.weight, m.bias))
        mine: Any = eqx.tree_at(learned, norm, g if b is None else (g, b))
        if case.op == "batch":
            rows = x.reshape(-1, channels).astype(jnp.float32)
            y, new = jax.vmap(mine, axis_name="n", in_axes=(0, None), out_axes=(0, None))(
                rows, state
            )
            return y.astype(x.dtype).reshape(x.shape), jax.tree.leaves(new)
        if case.op in ("layer", "rms"):
            return jax.vmap(mine)(x.reshape(-1, channels)).reshape(x.shape), ()
        return jnp.moveaxis(jax.vmap(mine)(jnp.moveaxis(x, -1, 1)), 1, -1), ()

    return [Contestant("equinox", "equinox", f, safe=True, note=note)]


BUILDERS: dict[str, Callable[[Case], list[Contestant]]] = {
    "normlab": _normlab,
    "normlab, xla": functools.partial(_normlab, implementation="xla"),
    "normlab, pallas": functools.partial(_normlab, implementation="pallas"),
    "normlab, pallas, fused": _normlab_fused,
    "flax.linen": _linen,
    "flax.nnx": _nnx,
    "haiku": _haiku,
    "equinox": _equinox,
    "jax.numpy": _numpy,
    "tokamax": _tokamax,
}
