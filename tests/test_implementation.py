"""How a norm is computed: a kernel is the same norm, through every transformation, or an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
import normlab.linen as nll
import normlab.nnx as nlx
from normlab import implementation
from normlab._kernels import table
from tests.helpers import array, draw, gap, mesh

X = array(draw(0, 8, 3, 6, mean=1.0))
STATE = nl.init_running(6)
G, B = array(draw(1, 6)), array(draw(2, 6))


def _layer(i, x, g, b):
    return nl.layer_norm(x, nl.Affine(g, b), implementation=i)


NORMS = {
    "layer": _layer,
    "layer of all": lambda i, x, g, b: nl.layer_norm(
        x, nl.Affine(g, b), axes="all", implementation=i
    ),
    "layer, gains by position": lambda i, x, g, b: nl.layer_norm(
        x,
        nl.Affine(*(v * jnp.arange(1.0, 4)[:, None] for v in (g, b))),
        axes=(1, 2),
        feature_axes=(1, 2),
        implementation=i,
    ),
    "layer, one number": lambda i, x, g, b: nl.layer_norm(
        x, nl.Affine(g[0], b[0]), implementation=i
    ),
    "rms": lambda i, x, g, b: nl.rms_norm(x, nl.Offset(g, None), implementation=i),
    "rms in groups, gated": lambda i, x, g, b: nl.rms_norm(
        x, nl.modulate(nl.Affine(g, b), gate=jax.nn.silu(x)), groups=2, implementation=i
    ),
    "rms, gains by example": lambda i, x, g, b: nl.rms_norm(
        x, nl.Affine(g * jnp.arange(1.0, 9)[:, None], b), implementation=i
    ),
    "group": lambda i, x, g, b: nl.group_norm(x, nl.Affine(g, b), groups=3, implementation=i),
    "group, not centred": lambda i, x, g, b: nl.group_norm(
        x, nl.Affine(g, b), groups=2, centred=False, implementation=i
    ),
    "instance": lambda i, x, g, b: nl.instance_norm(x, nl.Affine(g, b), implementation=i),
    "instance, channels first": lambda i, x, g, b: nl.instance_norm(
        jnp.moveaxis(x, 2, 1), nl.Affine(g, b), channel_axis=1, implementation=i
    ),
    "with an activation": lambda i, x, g, b: nl.affine(
        nl.layer_parts(x, nl.Affine(g, b), implementation=i), x, activation=jax.nn.gelu
    ),
    "of a sum": lambda i, x, g, b: nl.add_norm(
        nl.get("layer", implementation=i), nl.Affine(g, b), (), x, jnp.cos(x), train=True
    )[:2],
    "by name": lambda i, x, g, b: nl.get("rms", implementation=i).apply(
        nl.Affine(g, b), (), nl.Site(x), train=True, activation=jnp.tanh
    )[0],
    "batch": lambda i, x, g, b: nl.batch_norm(x, nl.Affine(g, b), train=True, implementation=i)[0],
    "batch, its statistics": lambda i, x, g, b: (
        nl.batch_norm(x, nl.Affine(g, b), STATE, train=True, state_gradient=True, implementation=i)[
            1
        ].mean
    ),
    "batch with all": lambda i, x, g, b: nl.get("batch", implementation=i).apply(
        nl.Affine(g, b),
        STATE,
        nl.Site(x),
        train=True,
        residual=jnp.cos(x),
        activation=jax.nn.silu,
    )[0],
    "batch in inference": lambda i, x, g, b: nl.affine(
        nl.batch_parts(x, nl.Affine(g, b), STATE, train=False, implementation=i)[0],
        x,
        activation=jax.nn.gelu,
    ),
    "linen": lambda i, x, g, b: nll.LayerNorm(implementation=i).apply(
        {"params": {"scale": g, "bias": b}}, x
    ),
}


def _loss(f):
    return lambda *given: sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(f(*given)))


def _slopes(f):
    return jax.grad(_loss(f), (0, 1, 2))


def _squared_slopes(f):
    return jax.grad(lambda *given: sum(jnp.sum(v**2) for v in _slopes(f)(*given)), (0, 1, 2))


def _of_examples(f):
    return jax.vmap(f, (0, None, None))


BATCHES, GAINS = jnp.stack([X, X**2]), jnp.stack([G, G + 1])
CHANGES = {
    "itself": (lambda f: f, (X, G, B), 2e-6),
    "reverse": (_slopes, (X, G, B), 1e-4),
    "forward": (lambda f: lambda *v: jax.jvp(f, v, v)[1], (X, G, B), 1e-5),
    "reverse over reverse": (_squared_slopes, (X, G, B), 1e-2),
    "forward over reverse": (lambda f: jax.hessian(_loss(f)), (X, G, B), 1e-2),
    "vmap": (_of_examples, (BATCHES, G, B), 2e-6),
    "vmap, gains too": (lambda f: jax.vmap(f, (0, 0, None)), (BATCHES, GAINS, B), 2e-6),
    "reverse of vmap": (lambda f: _slopes(_of_examples(f)), (BATCHES, G, B), 1e-4),
    "vmap of reverse": (lambda f: _of_examples(_slopes(f)), (BATCHES, G, B), 1e-4),
    "remat": (lambda f: _slopes(jax.checkpoint(f)), (X, G, B), 1e-4),
}


WHOLE = ("layer", "of a sum", "batch with all")  # through every transformation


@pytest.mark.parametrize(
    ("name", "change"),
    [(n, c) for n in NORMS for c in (CHANGES if n in WHOLE else ("reverse", "vmap"))],
)
def test_a_kernel_is_the_norm_through_transformations(name, change):
    transformed, given, tolerance = CHANGES[change]
    ours, xla = (
        jax.jit(transformed(lambda *v, i=i: NORMS[name](i, *v)))(*given)
        for i in ("interpret", "xla")
    )
    scale = max(1.0, *(float(jnp.abs(v).max()) for v in jax.tree.leaves(xla)))
    assert gap(ours, xla) < tolerance * scale


@pytest.mark.parametrize("name", ["layer", "group", "of a sum", "batch with all"])
@pytest.mark.parametrize("typed", [True, False])
def test_over_devices_in_shard_map(name, typed):

    def run(i):
        f = jax.shard_map(
            lambda *v: NORMS[name](i, *v),
            mesh=mesh(d=8),
            in_specs=(P("d"), P(), P()),
            out_specs=P("d"),
            check_vma=typed,
        )
        return jax.jit(_slopes(f))(X, G, B)

    assert gap(run("interpret"), run("xla")) < 1e-4


@pytest.mark.parametrize("name", ["layer", "group", "batch with all"])
def test_in_plain_jit_each_device_runs_the_kernel_on_its_examples(name):
    over = mesh(d=8)
    places = [NamedSharding(over, spec) for spec in (P("d"), P(), P())]
    given = [*map(jax.device_put, (X, G, B), places)]
    step = jax.jit(_slopes(lambda *v: NORMS[name]("interpret", *v)))
    compiled = step.lower(*given).compile()
    assert "all-gather" not in compiled.as_text()
    assert gap(compiled(*given), _slopes(lambda *v: NORMS[name]("xla", *v))(X, G, B)) < 1e-4


def test_without_jit_and_with_numpy_it_is_the_kernel_all_the_same(monkeypatch):
    x, ran = np.asarray(X), []
    kernel = implementation._run
    monkeypatch.setattr(implementation, "_run", lambda *v, **k: ran.append(1) or kernel(*v, **k))
    for h in (
        nl.layer_norm(x, nl.Affine(G, B), implementation="interpret"),
        nl.get("layer", implementation="interpret").apply(
            nl.Affine(G, B), (), nl.Site(x), train=True
        )[0],
        nll.LayerNorm(implementation="interpret", epsilon=1e-5).apply(
            {"params": {"scale": G, "bias": B}}, x
        ),
    ):
        assert gap(h, nl.layer_norm(X, nl.Affine(G, B))) < 2e-6
        assert ran.pop()


def test_parts_with_a_kernel_are_parts_of_any_other_array():
    parts = nl.layer_parts(X, nl.Affine(G, B), implementation="interpret")
    plain = nl.layer_parts(X, nl.Affine(G, B))
    assert gap(parts, plain) == 0
    assert gap(nl.affine(parts, 2 * X), nl.affine(plain, 2 * X)) == 0
    assert gap(nl.invert(parts, X), nl.invert(plain, X)) == 0
    assert type(jax.tree.map(jnp.asarray, parts)) is type(parts)
    assert gap(jax.jit(nl.affine)(parts, X), nl.affine(plain, X)) < 2e-6


ASKED = {
    "weights": lambda how: nl.layer_norm(X, weights=jnp.ones(8), **how),
    "axes": lambda how: nl.layer_norm(X, axes=0, **how),
    "one_pass": lambda how: nl.layer_norm(X, algorithm="one_pass", **how),
    "part=0.5": lambda how: nl.rms_norm(X, part=0.5, **how),
    "traced": lambda how: jax.jit(lambda eps: nl.rms_norm(X, eps=eps, **how))(1e-5),
    "int32": lambda how: nl.layer_norm(jnp.ones((2, 3), jnp.int32), **how),
    "groups of channels": lambda how: nl.group_norm(X, groups=3, channel_axis=1, **how),
    "a residual": lambda how: nl.affine(nl.layer_parts(X, **how), X, residual=X),
    "closes over": lambda how: nl.affine(
        nl.layer_parts(X, **how), X, activation=lambda z: z * jnp.float32(2) ** G[0]
    ),
    "reduce_max": lambda how: nl.affine(nl.rms_parts(X, **how), X, activation=jax.nn.softmax),
    "reduce_sum": lambda how: nl.get("batch", **how).apply(
        nl.Affine(G, B), STATE, nl.Site(X), train=False, activation=lambda z: z - z.sum()
    )[0],
    "parts of batches": lambda how: nl.batch_norm(
        X, train=True, axis_name=nl.Sync(groups=1, shards=2), **how
    )[0],
    "channels that are not last": lambda how: nl.batch_norm(X, train=True, channel_axis=1, **how)[
        0
    ],
    "shape": lambda how: nl.layer_norm(jnp.ones((0, 3)), **how),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_no_kernel_does_is_an_error_unless_auto_was_asked(asked):
    with pytest.raises(ValueError, match=rf"implementation='pallas' with .*{asked}.*'xla'"):
        ASKED[asked]({"implementation": "pallas"})
    assert gap(ASKED[asked]({"implementation": "auto"}), ASKED[asked]({})) == 0


def test_auto_takes_a_kernel_where_the_table_has_a_row(monkeypatch):
    """On a chip of another name here: what it then lowers to is the formula, on a CPU."""
    assert table.TABLE == ()  # no clock was read; docs/speed.md says so
    chip = jax.devices()[0].device_kind
    row = table.Faster(chip, True, 1, "float32", 6, 6)
    monkeypatch.setattr(table, "TABLE", (row,))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")

    def chosen(x, **options):
        return getattr(nl.layer_parts(x, **options), "kernel", None) is not None

    assert chosen(X)
    assert not chosen(X, implementation="xla")
    assert not chosen(X, axes="all")
    assert not chosen(X.astype(jnp.bfloat16))
    assert not chosen(X, weights=jnp.ones(8))
    assert getattr(nl.rms_parts(X), "kernel", None) is None
    assert gap(nl.layer_norm(X, nl.Affine(G, B)), NORMS["layer"]("xla", X, G, B)) < 1e-6


def test_weights_of_the_call_and_params_that_do_not_fit_are_as_with_xla():
    x = X.at[0].set(jnp.inf)
    parts, plain = (
        nl.batch_parts(x, None, STATE, train=False, implementation=i)[0]
        for i in ("interpret", "xla")
    )
    w = jnp.ones(8).at[0].set(0)
    assert gap(nl.affine(parts, x, weights=w), nl.affine(plain, x, weights=w)) == 0
    with pytest.raises(ValueError, match="a g of shape"):
        nl.affine(parts._replace(g=jnp.ones(5)), x)


@pytest.mark.parametrize("name", ["layer", "batch with all", "of a sum"])
def test_without_compiling_and_without_promotion_of_ranks(name):
    expected = NORMS[name]("xla", X, G, B)
    with jax.disable_jit():
        assert gap(NORMS[name]("interpret", X, G, B), expected) < 2e-6
    with jax.numpy_rank_promotion("raise"):
        jax.jit(_slopes(lambda *v: NORMS[name]("interpret", *v)))(X, G, B)


class Doubled:
    """Parts of a user's, that know of no residual."""

    def apply(self, a, weights=None):
        return 2 * a

    def invert(self, h):
        return h / 2


def test_parts_of_a_users_get_residual_and_activation_after_them():
    h = nl.affine(Doubled(), X, residual=X, activation=jax.nn.relu)
    assert gap(h, jax.nn.relu(3 * X)) < 1e-6


def test_a_platform_without_kernels_is_an_error():
    expected = r"layer norm: .* on cpu for float32\[24, 1, 6\].* tpu and cuda; .*'auto', or 'xla'"
    with pytest.raises(ValueError, match=expected):
        nl.layer_norm(X, implementation="pallas")


def test_add_norm_is_a_sum_and_a_norm_of_any_kind():
    x, y = array(draw(3, 8, 4)), array(draw(4, 8, 4))
    norm = nl.get("batch")
    params, state = norm.init(nl.Site(x))
    total, h, after = nl.add_norm(norm, params, state, x, y, train=True)
    expected = norm.apply(params, state, nl.Site(x + y), train=True)
    assert gap((total, h, after), (x + y, *expected)) == 0
    with pytest.raises(ValueError, match="one shape and type"):
        nl.add_norm(norm, params, state, x, y[:4], train=True)


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance", "whitening", "frn", "batch"])
def test_residual_and_activation_come_after_the_norm(name):
    x = array(draw(5, 8, 5, 4))
    norm = nl.get(name, **({"groups": 2} if name == "group" else {}))
    params, state = norm.init(nl.Site(x))
    h, _ = norm.apply(params, state, nl.Site(x), train=True)
    found, _ = norm.apply(params, state, nl.Site(x), train=True, residual=x, activation=jax.nn.relu)
    assert gap(found, jax.nn.relu(h + x)) < 1e-6


def test_a_sum_with_a_residual_is_rounded_once():
    x = array(draw(6, 64, 32), jnp.bfloat16)
    exact = nl.layer_norm(x.astype(jnp.float32)) + x.astype(jnp.float32)
    h = nl.affine(nl.layer_parts(x), x, residual=x)
    assert h.dtype == jnp.bfloat16
    assert gap(h, exact.astype(jnp.bfloat16)) == 0


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="residual of shape"):
        nl.affine(nl.layer_parts(X), X, residual=array([1.0]))


@pytest.mark.parametrize("i", ["fast", None, 1])
def test_an_unknown_implementation_is_named(i):
    with pytest.raises(ValueError, match="implementation"):
        nlx.LayerNorm(6, implementation=i, rngs=None)(X)
