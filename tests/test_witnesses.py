"""flax.linen and torch as witnesses: at their defaults, with conventions translated, one library.

Both compute in float32, as normlab does. Each of the two numbers compared is a few dozen roundings
of 6e-8 from the truth, so they are within FORWARD of each other; gradients within BACKWARD.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from tests.helpers import array, draw, gap

FORWARD, BACKWARD = 4e-6, 1e-5


@pytest.fixture(scope="module")
def torch():
    """The library, if it is there."""
    return pytest.importorskip("torch")


def tensor(torch, value, grad=True):
    return torch.tensor(np.asarray(value, np.float32), requires_grad=grad)


def gradients(f, cotangent, *args):
    """`f(*args)` and the gradients of Σ c·f by every argument."""

    @jax.jit
    def both(*args):
        h, pull = jax.vjp(f, *args)
        return h, pull(array(cotangent, h.dtype))

    return both(*map(array, args))


def torch_gradients(torch, f, cotangent, *args):
    """The same by torch."""
    args = [tensor(torch, arg) for arg in args]
    h = f(*args)
    h.backward(tensor(torch, cotangent, grad=False))
    return h.detach().numpy(), tuple(arg.grad.numpy() for arg in args)


def same(ours, theirs):
    """Values and gradients of two libraries."""
    assert gap(ours[0], theirs[0]) < FORWARD
    assert gap(ours[1], theirs[1]) < BACKWARD


# 1. Norms that measure each example by itself.


class Pair(NamedTuple):
    """One norm in two libraries.

    Attributes:
      shape: The input's, channels last.
      ours: normlab's function of `(a, params)`, with the other's ε; torch's has channels first.
      theirs: The linen module; or torch's function, of `(torch, a, g, b)`.
      with_bias: Whether the other has one.
    """

    shape: tuple[int, ...]
    ours: Any
    theirs: Any
    with_bias: bool = True


IMAGE, TOKENS = (2, 5, 4, 64), (3, 7, 16)

# linen: ε is 1e-6 but for batch norm, 32 groups.
LINEN = {
    "layer": Pair(TOKENS, functools.partial(nl.layer_norm, eps=1e-6), nn.LayerNorm()),
    "layer-all": Pair(
        IMAGE,
        functools.partial(nl.layer_norm, eps=1e-6, axes="all"),
        nn.LayerNorm(reduction_axes=(1, 2, 3)),
    ),
    "rms": Pair(TOKENS, functools.partial(nl.rms_norm, eps=1e-6), nn.RMSNorm(), False),
    "group": Pair(IMAGE, functools.partial(nl.group_norm, eps=1e-6, groups=32), nn.GroupNorm()),
    "group-tokens": Pair(
        TOKENS,
        functools.partial(nl.group_norm, eps=1e-6, groups=4),
        nn.GroupNorm(num_groups=4),
    ),
    "instance": Pair(IMAGE, functools.partial(nl.instance_norm, eps=1e-6), nn.InstanceNorm()),
}


def numbers(shape):
    """Input, cotangent, gain and bias."""
    channels = shape[-1]
    return (
        draw(0, *shape, mean=0.3),
        draw(1, *shape),
        draw(2, channels, mean=1.0, scale=0.3),
        draw(3, channels, scale=0.3),
    )


@pytest.mark.parametrize("name", LINEN)
def test_linen_agrees(name):
    shape, ours, module, with_bias = LINEN[name]
    a, c, g, b = numbers(shape)
    affine = (g, b) if with_bias else (g,)

    def linen(a, g, b=None):
        params = {"scale": g} if b is None else {"scale": g, "bias": b}
        return module.apply({"params": params}, a)

    def normlab(a, g, b=None):
        return ours(a, nl.Affine(g, b))

    same(gradients(normlab, c, a, *affine), gradients(linen, c, a, *affine))


# torch: ε is 1e-5, for RMS norm the eps of the type; group and instance norm have channels first.
TORCH = {
    "layer": Pair(
        TOKENS,
        nl.layer_norm,
        lambda torch, a, g, b: torch.nn.functional.layer_norm(a, (16,), g, b),
    ),
    "rms": Pair(
        TOKENS,
        functools.partial(nl.rms_norm, eps=float(np.finfo(np.float32).eps)),
        lambda torch, a, g: torch.nn.functional.rms_norm(a, (16,), g),
        False,
    ),
    "group": Pair(
        IMAGE,
        functools.partial(nl.group_norm, groups=8, channel_axis=1),
        lambda torch, a, g, b: torch.nn.functional.group_norm(a, 8, g, b),
    ),
    "instance": Pair(
        IMAGE,
        functools.partial(nl.instance_norm, channel_axis=1),
        lambda torch, a, g, b: torch.nn.functional.instance_norm(a, weight=g, bias=b),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_torch_agrees(name, torch):
    shape, ours, theirs, with_bias = TORCH[name]
    a, c, g, b = numbers(shape)
    if "channel_axis" in getattr(ours, "keywords", {}):
        a, c = (np.moveaxis(v, -1, 1) for v in (a, c))
    affine = (g, b) if with_bias else (g,)
    got = gradients(lambda a, g, b=None: ours(a, nl.Affine(g, b)), c, a, *affine)
    same(got, torch_gradients(torch, functools.partial(theirs, torch), c, a, *affine))


def test_torchs_modules_have_the_defaults_that_are_translated(torch):
    """The functions above take ε by default as the modules do; this is what the modules say."""
    assert torch.nn.LayerNorm(4).eps == 1e-5
    assert torch.nn.GroupNorm(2, 4).eps == 1e-5
    assert torch.nn.InstanceNorm2d(4).eps == 1e-5
    assert torch.nn.RMSNorm(4).eps is None
    assert (torch.nn.BatchNorm1d(4).eps, torch.nn.BatchNorm1d(4).momentum) == (1e-5, 0.1)


# 2. Batch norm, with several updates of the running statistics.

UPDATES = 5
BATCHES = draw(10, UPDATES, 6, 4, 8, mean=2.0, scale=3.0) + draw(11, UPDATES, 1, 1, 8)


def trained(decays, *, ddof, channel_axis=-1, weights=None):
    """`[(h, gradients)], state` of normlab over the batches, each with its own decay."""
    _, _, g, b = numbers((8,))
    options = {"channel_axis": channel_axis, "weights": weights}

    @jax.jit
    def step(state, decay, a, c):
        def run(*args):
            a, g, b = args
            affine = nl.Affine(g, b)
            return nl.batch_norm(a, affine, state, train=True, decay=decay, **options)

        h, pull, state = jax.vjp(run, a, array(g), array(b), has_aux=True)
        return (h, pull(c)), state

    state, steps = nl.init_running(8, ddof=ddof, debias=False), []
    for i, decay in enumerate(decays):
        a, c = (array(np.moveaxis(v, -1, channel_axis)) for v in (BATCHES[i], cotangent(i)))
        values, state = step(state, decay, a, c)
        steps.append(values)
    return steps, state


def cotangent(i):
    """Of the i-th batch."""
    return draw(20 + i, *BATCHES[i].shape)


@pytest.mark.parametrize("masked", [False, True])
def test_linens_batch_norm_agrees(masked):
    """momentum 0.99 is a decay of 0.99; the plain average from 0 and 1, of biased variances.

    In training and in inference, with a mask for the statistics or without.
    """
    _, _, g, b = numbers((8,))
    mask = draw(30, 6, 4) > -0.5 if masked else None
    module = nn.BatchNorm()
    stats = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    steps, state = trained([0.99] * UPDATES, ddof=0, weights=mask)

    def run(a, g, b, stats, train):
        return module.apply(
            {"params": {"scale": g, "bias": b}, "batch_stats": stats},
            a,
            use_running_average=not train,
            mask=None if mask is None or not train else jnp.asarray(mask)[..., None],
            mutable=["batch_stats"],
        )

    @jax.jit
    def step(stats, a, c):
        h, pull, after = jax.vjp(
            lambda *args: run(*args, stats, True), a, array(g), array(b), has_aux=True
        )
        return (h, pull(c)), after["batch_stats"]

    for i, ours in enumerate(steps):
        theirs, stats = step(stats, array(BATCHES[i]), array(cotangent(i)))
        same(ours, theirs)
    assert gap((state.mean, state.var), (stats["mean"], stats["var"])) < FORWARD

    ours, _ = nl.batch_norm(array(BATCHES[0]), nl.Affine(array(g), array(b)), state, train=False)
    theirs, _ = run(*map(array, (BATCHES[0], g, b)), stats, False)
    assert gap(ours, theirs) < FORWARD


@pytest.mark.parametrize("cumulative", [False, True], ids=["momentum", "cumulative"])
def test_torchs_batch_norm_agrees(cumulative, torch):
    """momentum 0.1 is a decay of 0.9, with unbiased variances: ddof=1; channels on axis 1.

    momentum=None averages all batches alike: the n-th has a decay of 1 − 1/n.
    """
    _, _, g, b = numbers((8,))
    module = torch.nn.BatchNorm1d(8, **({"momentum": None} if cumulative else {}))
    with torch.no_grad():
        module.weight.copy_(tensor(torch, g))
        module.bias.copy_(tensor(torch, b))

    def first(a):
        return np.moveaxis(a, -1, 1)

    decays = [1 - 1 / n if cumulative else 0.9 for n in range(1, UPDATES + 1)]
    steps, state = trained(decays, ddof=1, channel_axis=1)
    for i, ours in enumerate(steps):
        module.zero_grad()
        h, (da,) = torch_gradients(torch, module, first(cotangent(i)), first(BATCHES[i]))
        same(ours, (h, (da, module.weight.grad.numpy(), module.bias.grad.numpy())))
    assert module.num_batches_tracked.item() == state.updates == UPDATES
    running = module.running_mean.numpy(), module.running_var.numpy()
    assert gap((state.mean, state.var), running) < FORWARD

    module.eval()
    params = nl.Affine(array(g), array(b))
    ours, _ = nl.batch_norm(array(first(BATCHES[0])), params, state, train=False, channel_axis=1)
    theirs = module(tensor(torch, first(BATCHES[0]))).detach().numpy()
    assert gap(ours, theirs) < FORWARD


def test_linens_synced_batch_norm_agrees_on_equal_shards():
    """Under vmap with a named axis; unequal ones are a case of their own in `test_field.py`."""
    shards = array(BATCHES)
    module = nn.BatchNorm(use_running_average=False, axis_name="d")
    variables = {
        "params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)},
        "batch_stats": {"mean": jnp.zeros(8), "var": jnp.ones(8)},
    }

    @jax.jit
    def both(shards):
        linen = jax.vmap(
            lambda a: module.apply(variables, a, mutable=["batch_stats"]), axis_name="d"
        )
        state = nl.init_running(8, debias=False)
        ours = functools.partial(nl.batch_norm, state=state, train=True, decay=0.99, axis_name="d")
        return linen(shards), jax.vmap(ours, axis_name="d")(shards)

    (h, variables), (ours, state) = both(shards)
    stats = variables["batch_stats"]
    assert gap(ours, h) < FORWARD
    assert gap((state.mean, state.var), (stats["mean"], stats["var"])) < FORWARD


# 3. Weight norm and the cosines.


def kernels(*shape):
    """Input, kernel, gain and bias."""
    return (
        draw(0, 6, 5, 5, shape[-2]),
        draw(1, *shape),
        draw(2, shape[-1], mean=1.0),
        draw(3, shape[-1]),
    )


def by_function(linear):
    """h of w = g·v/‖v‖ made first."""
    return lambda x, v, g, b: linear(x, nl.weight_norm(v, nl.Affine(g, None))) + b


def by_registry(linear):
    """h of the four parts, measured beside the plain layer."""
    norm = nl.get("weight")

    def h(x, v, g, b):
        site = nl.Site(linear(x, v), x, v, linear=linear)
        return norm.apply(nl.Affine(g, b), (), site, train=True)[0]

    return h


forms = pytest.mark.parametrize("form", [by_function, by_registry], ids=["function", "registry"])


@forms
@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_linens_weight_norm_agrees(form, layer):
    """Gradients by x, v, g and b; linen's ε of 1e-12 in ‖v‖² is below a rounding."""
    if layer == "dense":
        linear, module, shape = nl.Dense(), nn.Dense(4), (3, 4)
    else:
        linear, module, shape = nl.Conv(), nn.Conv(4, (3, 3)), (3, 3, 3, 4)
    x, v, g, b = kernels(*shape)
    name = "layer_instance"
    wrapped = nn.WeightNorm(module)

    def linen(x, v, g, b):
        params = {name: {"kernel": v, "bias": b}, f"{name}/kernel/scale": g}
        return wrapped.apply({"params": params}, x)

    c = draw(4, *linear(array(x), array(v)).shape)
    same(gradients(form(linear), c, x, v, g, b), gradients(linen, c, x, v, g, b))


@forms
@pytest.mark.parametrize("layer", ["dense", "conv"])
def test_torchs_weight_norm_agrees(form, layer, torch):
    """torch has units first and channels first; the gain is `original0`, v is `original1`."""
    dense = layer == "dense"
    linear = nl.Dense() if dense else nl.Conv(channel_axis=1)
    x, v, g, b = kernels(*((3, 4) if dense else (3, 3, 3, 4)))
    module = torch.nn.Linear(3, 4) if dense else torch.nn.Conv2d(3, 4, 3, padding=1)
    torch.nn.utils.parametrizations.weight_norm(module)
    weight = module.parametrizations.weight
    if not dense:
        x, b = np.moveaxis(x, -1, 1), b.reshape(4, 1, 1)
    order = (1, 0) if dense else (3, 2, 0, 1)
    with torch.no_grad():
        weight.original0.copy_(tensor(torch, g.reshape(weight.original0.shape)))
        weight.original1.copy_(tensor(torch, v.transpose(order)))
        module.bias.copy_(tensor(torch, b.ravel()))

    c = draw(4, *linear(array(x), array(v)).shape)
    h, (dx,) = torch_gradients(torch, module, c, x)
    dv = weight.original1.grad.numpy().transpose(np.argsort(order))
    dg, db = (
        weight.original0.grad.numpy().reshape(g.shape),
        module.bias.grad.numpy().reshape(b.shape),
    )
    bias = b.ravel()
    normed = form(linear)
    if form is by_function:
        got = gradients(normed, c, x, v, g, b)
    else:
        got = gradients(normed, c, x, v, g, bias)
        db = db.ravel()
    same(got, (h, (dx, dv, dg, db)))


@pytest.mark.parametrize("centred", [False, True], ids=["cosine", "centred"])
def test_torchs_cosine_similarity_agrees(centred, torch):
    """Of every example with the weights of every unit; centred, of what is left of both means."""
    x, w, c = draw(0, 6, 9, mean=0.5), draw(1, 9, 4, mean=0.5), draw(2, 6, 4)

    def theirs(x, w):
        if centred:
            x, w = x - x.mean(1, keepdim=True), w - w.mean(0, keepdim=True)
        return torch.nn.functional.cosine_similarity(x[:, :, None], w[None], dim=1)

    ours = gradients(functools.partial(nl.cosine_norm, centred=centred), c, x, w)
    same(ours, torch_gradients(torch, theirs, c, x, w))
