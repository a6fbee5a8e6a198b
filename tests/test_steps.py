"""What is done with params beside an optimizer's step: projection, and the mask of weight decay."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import normlab as nl
import normlab.linen as nll
from tests.helpers import draw, gap

W = jnp.asarray(draw(0, 4, 3), jnp.float32)


class Layer(NamedTuple):
    kernel: jax.Array
    norm: nl.Affine


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(4, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.embed = nnx.Embed(5, 4, rngs=rngs)


def unit(w, axis):
    return np.asarray(w, np.float64) / np.linalg.norm(
        np.asarray(w, np.float64), axis=axis, keepdims=True
    )


def test_rows_have_length_one_whatever_the_tree():
    boxed = linen.Dense(
        3, kernel_init=linen.with_partitioning(linen.initializers.normal(), (None, "m"))
    )
    trees = {
        "dicts": ({"block0": {"q": {"kernel": W}, "bias": W[0]}}, "block./q/kernel"),
        "named tuples": ([Layer(W, nl.init_affine(3))], "0/kernel"),
        "linen": (linen.Dense(3).init(jax.random.key(0), W.T[:, :4]), "kernel"),
        "boxes": (boxed.init(jax.random.key(0), W.T[:, :4]), "kernel"),
        "nnx": (nnx.state(Mlp(nnx.Rngs(0)), nnx.Param), "up/kernel"),
        "pure": (nnx.to_pure_dict(nnx.state(Mlp(nnx.Rngs(0)), nnx.Param)), "up/kernel"),
        "equinox": (eqx.filter(eqx.nn.Linear(4, 3, key=jax.random.key(0)), eqx.is_array), "weight"),
    }
    for name, (tree, pattern) in trees.items():
        axis = -1 if name == "equinox" else -2
        out = jax.jit(lambda tree, p=pattern, axis=axis: nl.project(tree, {p: axis}))(tree)
        assert jax.tree.structure(out) == jax.tree.structure(tree)
        same = 0
        for new, old in zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True):
            assert new.dtype == old.dtype
            if np.array_equal(new, old):
                same += 1
            else:
                assert gap(new, unit(old, axis)) < 1e-6
        assert same == len(jax.tree.leaves(tree)) - 1


def test_projection_at_the_edges():
    rule = {"w": -1}
    half = nl.project({"w": W.astype(jnp.bfloat16) * 300}, rule)["w"]
    assert half.dtype == jnp.bfloat16
    assert gap(half, unit(W.astype(jnp.bfloat16), -1)) < 2**-8
    float16 = nl.project({"w": jnp.full((2, 4096), 60000.0, jnp.float16)}, rule)["w"]
    assert gap(float16, np.full((2, 4096), 1 / 64)) < 2**-10
    for size in (1e-30, 1e30):
        assert gap(nl.project({"w": W * size}, rule)["w"], unit(W, -1)) < 1e-6
    zero = {"w": jnp.zeros((2, 3)).at[1, 0].set(2.0)}
    assert nl.project(zero, rule)["w"].tolist() == [[0, 0, 0], [1, 0, 0]]
    grad = jax.grad(lambda p: nl.project(p, rule)["w"].sum())(zero)
    assert np.isfinite(grad["w"]).all()
    stacked = {"w": jnp.stack([W, 2 * W])}
    assert gap(nl.project(stacked, {"w": -2})["w"], np.stack([unit(W, 0)] * 2)) < 1e-6
    whole = nl.project(stacked, {"w": (-2, -1)})["w"]
    assert np.abs(np.square(whole).sum((-2, -1)) - 1).max() < 1e-6
    assert nl.project({"w": W[:0]}, {"w": 0})["w"].shape == (0, 3)
    once = nl.project({"w": W}, rule)
    assert gap(nl.project(once, rule), once) < 1e-6
    variables = {"params": {"w": W}, "batch_stats": {"w": W}}
    out = nl.project(variables, rule)
    assert gap(out["params"]["w"], unit(W, -1)) < 1e-6
    assert gap(out["batch_stats"], variables["batch_stats"]) == 0


def test_a_scheme_says_what_is_projected_and_its_gains_do_not_decay():
    """The residual's α is a gain by channel, stacked for a scan."""
    words = ("q", "k", "v", "out", "up", "gate", "down")
    block = {name: {"kernel": W} for name in words}
    params = {"embed": {"embedding": W}, "block0": block, "head": {"kernel": W}}
    scheme = nl.placement.scheme("ngpt", depth=1, width=4)
    out = nl.project(params, scheme.project)
    assert gap(out["block0"]["q"]["kernel"], unit(W, -2)) < 1e-6
    assert gap(out["block0"]["out"]["kernel"], unit(W, -1)) < 1e-6
    residual, _ = nl.placement.init_residual(scheme.at(0, "mlp"), W)
    params["residuals"] = jax.tree.map(lambda v: jnp.stack([v, v]), residual)
    streams = nl.placement.HyperConnection()
    mixing, _ = nl.placement.init_residual(streams, jnp.ones((2, 4, 3)))
    params["streams"] = jax.tree.map(lambda v: jnp.stack([v, v]), mixing)
    kernels = {f"block0/{name}/kernel" for name in words}
    kernels |= {f"streams/{name}/kernel" for name in ("read", "skip", "branch")}
    assert decaying(params) == kernels | {"embed/embedding", "head/kernel"}
    assert decaying(mixing) == {f"{name}/kernel" for name in ("read", "skip", "branch")}


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"kernels": -1}, "fits no parameter. Known: "),
        ({"kernels": -1}, "did you mean 'kernel'"),
        ({"kernel": -1, "k.*": 0}, "names 'kernel' twice"),
        ({"kernel": 2}, "axes 2 for an array of rank 2"),
        ({"rate": -1}, "an array that has axes"),
        ({"step": 0}, "'step' of type int32"),
    ],
)
def test_a_projection_of_nothing_is_an_error(rule, words):
    with pytest.raises(ValueError, match="; expected ") as error:
        nl.project({"kernel": W, "step": jnp.arange(3), "rate": 1.0}, rule)
    text = str(error.value)
    assert all(part in text for part in words.split(". "))


def decaying(tree, rule=None):
    """The paths of what the mask lets decay."""
    found, _ = jax.tree_util.tree_flatten_with_path(nl.decay_mask(tree, rule))
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, on in found if on}


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Embed(5, 4)(x)
        x = nll.RegistryNorm("rms", {"gain": "offset"})(linen.Dense(3)(x))
        x = nll.RegistryNorm("dyt")(linen.LayerNorm()(x))
        return nll.WeightNorm(linen.Dense(2))(x)


def test_matrices_decay_and_nothing_else():
    net = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros(2, int))
    assert {path.removeprefix("params/") for path in decaying(net)} == {
        "Embed_0/embedding",
        "Dense_0/kernel",
        "Dense_1/kernel",
    }
    state = nnx.state(Mlp(nnx.Rngs(0)), nnx.Param)
    assert decaying(state) == {"embed/embedding/value", "up/kernel/value"}
    torch = {"layers.0.q.weight": W, "layers.0.q_norm.weight": W, "ln_1.weight": W, "q.bias": W}
    assert decaying(torch) == {"layers.0.q.weight"}
    haiku = {"mlp/linear": {"w": W, "b": W[0]}, "mlp/layer_norm": {"scale": W[0], "offset": W[0]}}
    assert decaying(haiku) == {"mlp/linear/w"}
    layer = eqx.filter(eqx.nn.MLP(4, 3, 5, 1, key=jax.random.key(0)), eqx.is_array)
    assert decaying(layer) == {"layers/0/weight", "layers/1/weight"}


def test_the_params_of_norms_are_known_by_what_they_are():
    """However many axes they have: stacked for a scan, by head."""
    site = nl.Site(jnp.ones((4, 3)))
    for name, options in (("rms", {"gain": "offset"}), ("layer", {"gain": "log"}), ("dyt", {})):
        params = nl.get(name, **options).init(site)[0]
        stacked = jax.tree.map(lambda v: jnp.stack([v, v]), {"kernel": W, "n": params})
        assert decaying(stacked) == {"kernel"}
    heads, _ = nl.init_heads({"q": jnp.ones((4, 2, 8))}, nl.get("rms"), heads="own")
    assert decaying(heads) == set()
    paired = nl.Paired(nl.Offset(jnp.ones((2, 4)), None), "half", 8)
    assert decaying({"q": paired}) == set()
    assert decaying(nl.init_affine((2, 3))) == set()


def test_a_rule_says_otherwise():
    tree = {"embed": {"embedding": W}, "norm": nl.Offset(W[0], None), "q": {"kernel": W}}
    assert decaying(tree, {"embed/.*": False}) == {"q/kernel"}
    assert decaying(tree, {".*/d": True}) == {"norm/d", "q/kernel", "embed/embedding"}
    assert decaying({"params": tree}, {"q/kernel": False}) == {"params/embed/embedding"}
    with pytest.raises(ValueError, match="fits no parameter"):
        nl.decay_mask(tree, {"embeddings": False})


def test_adamw_moves_what_decays_alone_and_an_offset_to_one():
    params = {"kernel": W, "bias": W[0], "norm": nl.Offset(jnp.full(3, 0.5), jnp.ones(3))}
    params["stack"] = nl.init_affine((2, 3))
    for rule, moves in ((None, {"kernel"}), ({"norm/d": True}, {"kernel", "norm/d"})):
        tx = optax.adamw(0.1, weight_decay=0.5, mask=lambda p, rule=rule: nl.decay_mask(p, rule))

        @jax.jit
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
            return optax.apply_updates(params, updates), state

        with jax.numpy_dtype_promotion("standard"):  # which optax counts on
            after, _ = step(params, tx.init(params))
        found, _ = jax.tree_util.tree_flatten_with_path(after)
        for (path, new), old in zip(found, jax.tree.leaves(params), strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            assert gap(new, np.asarray(old) * (0.95 if name in moves else 1)) < 1e-6
        assert (abs(after["norm"].g - 1) < abs(params["norm"].g - 1)).all() == (rule is not None)
    assert optax.adamw(0.1, mask=nl.decay_mask).init(params)
