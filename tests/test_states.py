"""What holds of every population: types, NumPy leaves, debug settings, checkpoints, averages."""

import functools
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import normlab as nl
import normlab.linen
import normlab.nnx
from tests.helpers import array, draw, gap

N, C = 6, 3
A = draw(0, N, C, mean=5.0)
NAMES = ("debiased", "ema", "cumulative", "renorm", "domains", "frozen")
NAMES += ("prior", "streaming", "window", "rms", "power", "mabn")
SYNC = nl.Sync("d", every=1)


def by_example(**options):
    state = nl.population.init_domains(C, domains=3, examples=N, **options)
    return nl.population.select_domain(state, jnp.array([0, 0, 2, 2, 0, 2]))


STATES = {name: functools.partial(nl.population.init_population, name, C) for name in NAMES} | {
    "domains by example": by_example,
    "delayed": functools.partial(nl.population.init_delayed, C),
    "pending": lambda: nl.population.begin(nl.init_running(C)),
    "pending domains": lambda: nl.population.begin(nl.population.init_domains(C)),
}
every_kind = pytest.mark.parametrize("kind", STATES)


def trained(state, a=A, **options):
    """The state after a batch; what is delayed is exchanged, on one device."""
    a = array(a)
    if not isinstance(state, nl.population.Delayed):
        return nl.batch_norm(a, None, state, train=True, **options)[1]

    def step(state):
        state = nl.batch_norm(a, None, state, train=True, axis_name=SYNC, **options)[1]
        return nl.population.exchange(state, SYNC)

    state = jax.vmap(step, axis_name="d")(jax.tree.map(lambda v: jnp.asarray(v)[None], state))
    return jax.tree.map(lambda v: v[0], state)


def as_numpy(tree):
    return jax.tree.map(np.asarray, jax.device_get(tree))


def use(state, convert=lambda tree: tree):
    """What `_use` finds, outside jit and under the debug settings, which are to find no fault."""
    with jax.debug_nans(True), jax.debug_infs(True), jax.numpy_rank_promotion("raise"):
        return _use(state, convert)


def _use(state, convert):
    """Everything that can be done with a state, each on what `convert` makes of the last."""
    state = convert(trained(convert(trained(state))))
    found = {"state": state, "read": state.read()}
    stack = convert(jax.tree.map(lambda *v: jnp.stack(v), state, state))
    found["merged"] = convert(nl.population.merge_running(stack))
    found["shared"] = nl.population.share_running(found["merged"], 3)
    found["average"] = nl.population.average_running(state, found["merged"], 0.5)
    found["frozen"] = nl.population.freeze(state).read()
    if not isinstance(state, nl.population.Pending | nl.population.Delayed):
        found["inference"] = nl.batch_norm(array(A), None, state, train=False)
    if not isinstance(state, nl.population.Delayed):
        pending = convert(trained(convert(nl.population.begin(state))))
        found["committed"] = convert(nl.population.commit(pending))
        for options in ({"ok": False}, {"bad_batch": "propagate"}, {"bad_batch": "raise"}):
            found[str(options)] = nl.population.commit(pending, **options)
    if isinstance(state, nl.population.Domains):
        found["selected"] = nl.population.select_domain(state, np.int32(1))
    if isinstance(state, nl.Running | nl.population.Cumulative):
        found["drift"] = nl.instruments.drift(stack)
        found["settled"] = nl.population.settle(pending)
    if isinstance(state, nl.Running):
        found["ddof"] = nl.population.change_ddof(state, 1)
    jax.effects_barrier()
    return found


@every_kind
def test_numpys_arrays_are_as_good_as_jaxs_and_debug_settings_find_no_fault(kind):
    """As they come from msgpack and from device_get."""
    ours, theirs = use(STATES[kind]()), use(as_numpy(STATES[kind]()), as_numpy)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert gap(theirs, ours) < 1e-6


# Types.


@pytest.mark.parametrize(
    "init",
    [
        nl.init_running,
        nl.population.init_cumulative,
        nl.population.init_renorm,
        nl.population.init_domains,
        nl.population.init_delayed,
        nl.population.init_prior,
        nl.population.init_streaming,
        nl.population.init_window,
        nl.population.init_rms,
        nl.population.init_power,
        nl.population.init_mabn,
        functools.partial(nl.population.init_population, "ema"),
        functools.partial(nl.population.init_population, "frozen"),
        functools.partial(nl.population.init_domains, inner="cumulative"),
    ],
)
def test_statistics_are_kept_in_float32_at_least(init):
    for dtype in (None, "bfloat16", np.float16, jnp.float32):
        state = init(C, dtype=dtype)
        kinds = {v.dtype for v in jax.tree.leaves(state)}
        assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}
    for dtype in (int, jnp.int32, complex, bool, "uint8", "flaot32"):
        with pytest.raises(ValueError, match=r"got dtype=.*; expected a real floating type"):
            init(C, dtype=dtype)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("frozen", "window")])
def test_statistics_that_were_cast_to_half_precision_do_not_stall(name):
    """They are taken back to float32, where 0.99 of an average and 0.01 of a batch can be added."""
    options = {} if name in ("cumulative", "streaming") else {"decay": 0.99}
    state, batch = nl.population.init_population(name, C, **options), array(A)
    step = jax.jit(lambda state: nl.batch_norm(batch, None, state, train=True)[1])
    state, half = step(state), jax.tree.map(lambda v: v.astype(jnp.bfloat16), step(state))
    half = jax.tree.map(lambda h, v: h.astype(v.dtype) if v.dtype == jnp.int32 else h, half, state)
    for _ in range(800):
        half = step(half)
    assert half.read()[0].dtype == jnp.float32
    expected = (
        (A.mean(0), A.var(0))
        if name not in ("rms", "power", "mabn")
        else (np.zeros(C), (A**2).mean(0))
    )
    assert gap(half.read(), expected) < 2e-3


# Checkpoints.


@every_kind
def test_every_state_comes_back_from_msgpack_and_from_orbax_without_a_target(kind, tmp_path):
    tree = {"norms": [trained(STATES[kind]())], "w": jnp.ones(2)}
    fresh = jax.tree.map(jnp.zeros_like, {"norms": [STATES[kind]()], "w": jnp.ones(2)})
    words = nl.population.conventions(tree)
    data = serialization.to_bytes(tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", tree)
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "states")
    for back in (
        serialization.from_bytes(fresh, data),
        nl.population.restore_states(fresh, serialization.msgpack_restore(data)),
        nl.population.restore_states(fresh, plain),
    ):
        nl.population.check_conventions(words, back)
        nl.population.check_conventions(back, fresh)
        assert jax.tree.structure(back) == jax.tree.structure(tree)
        assert gap(back, tree) == 0
        use(back["norms"][0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("running", {}),
        ("running", {"ddof": 1}),
        ("renorm", {"ddof": 1}),
        ("domains", {}),
        ("cumulative", {"ddof": 1}),
        ("streaming", {}),
    ],
)
def test_a_checkpoint_from_before_states_told_how_to_merge_them(kind, options):
    """It is restored as what never was merged."""
    start = getattr(nl.population, f"init_{kind}", nl.init_running)(C, **options)
    states = {"norms": [trained(trained(start))]}

    def earlier(tree):
        if not isinstance(tree, dict):
            return tree
        later = ("fresh", "before", "among")
        return {k: earlier(v) for k, v in tree.items() if k not in later}

    saved = earlier(serialization.msgpack_restore(serialization.to_bytes(states)))
    assert saved != serialization.msgpack_restore(serialization.to_bytes(states))
    (back,) = nl.population.restore_states(states, saved)["norms"]
    (state,) = states["norms"]
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert gap(back.read(), state.read()) == 0
    other = trained(start, A + 3)
    stack = [jax.tree.map(lambda *v: jnp.stack(v), s, other) for s in (back, state)]
    merged = [nl.population.merge_running(s).read() for s in stack]
    assert gap(*merged) < 1e-6
    # msgpack into states: by name.
    with pytest.raises(ValueError, match=r"fresh|among"):
        serialization.from_bytes(states, serialization.msgpack_serialize(saved))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ({"decay": 0.9}, {"decay": 0.99}, r"decay=0.9, ddof=0\).*decay=0.99, ddof=0\)"),
        ({"ddof": 0}, {"ddof": 1}, r"ddof=0\).*ddof=1\)"),
        ({"population": "renorm"}, {"population": "renorm", "eps": 0.1}, r"1e-05.*sigma_eps=0.1"),
        ({"population": "frozen"}, {"population": "frozen", "ddof": 1}, r"Frozen\(inner=.*ddof=1"),
        (
            {"population": "cumulative"},
            {"population": "cumulative", "estimator": "within"},
            "'pooled'.*'within'",
        ),
    ],
)
def test_another_convention_is_an_error_that_names_both(old, new, says):
    def make(population="debiased", **options):
        return {"norm": nl.population.init_population(population, C, **options)}

    old, new = make(**old), make(**new)
    restored = serialization.from_bytes(new, serialization.to_bytes(old))
    plain = serialization.msgpack_restore(serialization.to_bytes(old))
    for check in (
        lambda: nl.population.check_conventions(
            nl.population.conventions(old), new
        ),  # beside Orbax
        lambda: nl.population.check_conventions(restored, new),
        lambda: nl.population.restore_states(new, plain),
    ):
        with pytest.raises(ValueError, match=rf"conventions: got 'norm', which is .*{says}"):
            check()
        nl.population.check_conventions(nl.population.conventions(old), old)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        for population in ("ema", "debiased"):
            x = normlab.linen.BatchNorm(use_running_average=not train, population=population)(x)
        return x


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norms = nnx.List(
            normlab.nnx.BatchNorm(C, population=population, rngs=rngs)
            for population in ("ema", "window")
        )

    def __call__(self, x):
        for norm in self.norms:
            x = norm(x)
        return x


def without_a_target(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "tree", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "tree")


WAYS = {
    "orbax": without_a_target,
    "msgpack": lambda tree, _: serialization.msgpack_restore(serialization.to_bytes(tree)),
    "state dict": lambda tree, _: serialization.to_state_dict(tree),
}
every_way = pytest.mark.parametrize("way", WAYS)


@every_way
def test_the_variables_of_a_linen_model_come_back_from_plain_dicts(way, tmp_path):
    net, x = Net(), array(draw(1, N, 2, C))
    fresh = net.init(jax.random.key(0), x, train=False)
    _, changed = net.apply(fresh, x, train=True, mutable=["batch_stats"])
    old = {**fresh, **changed}
    plain = WAYS[way](old, tmp_path)
    with pytest.raises(ValueError, match=r"of type dict .*nl\.population\.restore_states\("):
        net.apply(plain, x, train=False)
    back = nl.population.restore_states(fresh, plain)
    assert jax.tree.structure(back) == jax.tree.structure(old)
    assert gap(net.apply(back, x, train=False), net.apply(old, x, train=False)) == 0


@pytest.mark.parametrize("pure", [False, True])
def test_an_nnx_model_comes_back_from_plain_dicts(pure, tmp_path):
    model, x = Model(), array(A)
    model(x)
    state = nnx.state(model)
    plain = without_a_target(nnx.to_pure_dict(state) if pure else state, tmp_path)
    new = Model()
    nnx.update(new, nl.population.restore_states(nnx.state(new), plain))
    whole = nl.population.restore_states(Model(), plain)
    for other in (new, whole):
        other.eval()
    model.eval()
    assert gap(new(x), model(x)) == 0
    assert gap(whole(x), model(x)) == 0


@every_way
def test_states_come_back_at_any_depth_beside_those_of_an_optimizer(way, tmp_path):
    norm = nl.get("lp_batch")
    _, inner = norm.init(nl.Site(array(A)))
    states = {"stem": [nl.init_running(C), ()], "blocks": ({"norm": inner}, {"norm": ()})}
    tree = {"states": states, "optimizer": optax.adam(0.1).init({"w": jnp.ones((2, C))})}
    plain = WAYS[way](tree, tmp_path)
    like = jax.eval_shape(lambda: tree)
    back = nl.population.restore_states(like, plain)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    assert gap(back, tree) == 0
    kept = pickle.loads(pickle.dumps(tree))  # which keeps types
    assert gap(nl.population.restore_states(tree, kept), tree) == 0


STATEFUL = {
    "batch": {},
    "batch_channel": {"groups": 2},
    "cross_iteration": {},
    "evo_b0": {},
    "lp_batch": {},
    "recurrent_batch": {"steps": 3},
    "spectral": {},
    "switchable": {},
    "whitening": {},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_norm_refuses_a_state_of_plain_dicts_and_says_what_to_do(name):
    x, w = array(draw(2, 4, 3, 5)), jnp.eye(5, 6) + 0.1
    norm, site = nl.get(name, **STATEFUL[name]), nl.Site(x @ w, x, w)
    params, state = norm.init(site)
    plain = without_types(state)
    with pytest.raises(ValueError, match=r"restore_states\(states, restored\)"):
        norm.apply(params, plain, site, train=True)
    back = nl.population.restore_states(state, plain)
    _, after = norm.apply(params, back, site, train=True)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def without_types(tree):
    """As Orbax without a target: fields by name, tuples as lists, no settings."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        below, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda v: v is not tree)
        return {path[0].name: without_types(v) for path, v in below}
    if isinstance(tree, tuple | list):
        return [without_types(v) for v in tree]
    return tree


def test_what_a_checkpoint_has_too_much_or_of_another_type_is_named():
    states = {"a": nl.init_running(C)}
    saved = {"a": states["a"]._asdict()}
    for extra, says in [
        ({"b": saved["a"]}, r"with 'b', which the states do not have.*Known: a"),
        ({"a": saved["a"] | {"men": jnp.ones(C)}}, r"with 'a/men'.*did you mean 'mean'"),
    ]:
        with pytest.raises(ValueError, match=says):
            nl.population.restore_states(states, saved | extra)
    wrong = {"a": saved["a"] | {"updates": jnp.zeros(())}}
    with pytest.raises(ValueError, match=r"'a/updates' of shape \(\) and type float32.*int32, as"):
        nl.population.restore_states(states, wrong)
    with pytest.raises(ValueError, match=r"begin: got .* nl\.population\.restore_states"):
        nl.population.begin(saved)


def test_what_a_checkpoint_lacks_is_named():
    states = {"a": nl.init_running(C)}
    with pytest.raises(
        ValueError, match=r"'a', which is not there in the checkpoint; expected Run"
    ):
        nl.population.check_conventions({}, states)
    saved = {"a": states["a"]._asdict()}
    del saved["a"]["mass"]
    with pytest.raises(ValueError, match=r"without 'a/mass'.*Known: mean, var"):
        nl.population.restore_states(states, saved)
    with pytest.raises(ValueError, match=r"'a/mean' of shape \(3,\).*shape \(2,\)"):
        nl.population.restore_states({"a": nl.init_running(2)}, {"a": states["a"]._asdict()})


@pytest.mark.parametrize("name", [*(n for n in NAMES if n != "ema"), "batch"])
def test_a_pure_dict_of_an_nnx_model_goes_through_orbax_and_comes_back(name, tmp_path):
    def make():
        return normlab.nnx.BatchNorm(C, momentum=0.9, population=name, rngs=nnx.Rngs(0))

    old, new = make(), make()
    same = nl.population.init_population(name, C, **({"decay": 0.9} if name == "mabn" else {}))
    assert nl.population.conventions(old) == nl.population.conventions({"population": same})
    nl.population.check_conventions(old, new)
    old(array(A))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "pure", nnx.to_pure_dict(nnx.state(old)))
        checkpointer.wait_until_finished()
        plain = checkpointer.restore(tmp_path / "pure")
    state = nnx.state(new)
    nnx.replace_by_pure_dict(state, plain)
    nnx.update(new, state)
    expected = old(array(A), use_running_average=True)
    assert gap(new(array(A), use_running_average=True), expected) == 0
    new(array(A))


# Averages.


@every_kind
def test_the_average_of_a_models_states_keeps_its_counters_whole(kind):
    old, step = trained(STATES[kind]()), jax.jit(nl.population.average_running)
    new = trained(old, A + 1)
    average = step(new, old, 0.25)
    assert jax.tree.structure(average) == jax.tree.structure(new)
    for leaf, before, after in zip(*map(jax.tree.leaves, (average, old, new)), strict=True):
        assert leaf.dtype == after.dtype
        floating = jnp.issubdtype(after.dtype, jnp.floating)
        expected = 0.75 * before + 0.25 * after if floating else after
        assert gap(leaf, expected) < 1e-6
    use(average)
    with pytest.raises(ValueError, match=r"conventions: got '', which is Running.*ddof=1"):
        nl.population.average_running(nl.init_running(C, ddof=1), nl.init_running(C), 0.5)


def test_optax_averages_what_is_no_counter():
    def floats(tree):
        return jax.tree.map(lambda v: jnp.issubdtype(v.dtype, jnp.floating), tree)

    ema = optax.masked(optax.ema(0.9, debias=False), floats)
    state = trained(nl.init_running(C))
    average, _ = ema.update(state, ema.init(state))
    assert (average.updates, average.updates.dtype) == (1, jnp.int32)
    assert gap(average.mean, 0.1 * state.mean) < 1e-6
