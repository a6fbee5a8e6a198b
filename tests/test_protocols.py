"""What users add from outside: a population, a norm, and values that may be compared."""

import ast
import copy
import dataclasses
import pickle
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normlab as nl
import normlab.linen as nll
import normlab.nnx as nlx
from tests.cases import first_of
from tests.helpers import array, draw, gap, mappers

C = 3
A = draw(0, 8, C, mean=1.0)
HERE = __name__


class Halfway(NamedTuple):
    """Training normalizes with the middle of the batch's statistics and of the last batch's."""

    mean: jax.Array
    var: jax.Array

    def update(self, m, *, decay=None, bad_batch="skip"):
        return self._replace(mean=m.mean.reshape(C), var=m.var().reshape(C))

    def read(self):
        return self.mean, self.var

    def normalizer(self, m, eps, *, train):
        mean, var = self.read()
        if train:
            mean, var = (mean + m.mean) / 2, (var + m.var()) / 2
        return mean, jnp.sqrt(var + eps)


class Adapted(NamedTuple):
    mean: jax.Array
    var: jax.Array
    update, read = Halfway.update, Halfway.read

    def measures(self, train):
        return True

    def normalizer(self, m, eps, *, train):
        return Halfway.normalizer(self, m, eps, train=True)


def halfway(channels):
    return Halfway(jnp.zeros(channels), jnp.ones(channels))


def expected(a=A, mean=0.0, var=1.0):
    mean, var = (mean + a.mean(0)) / 2, (var + a.var(0)) / 2
    return (a - mean) / np.sqrt(var + 1e-5)


class TestPopulation:
    def test_as_an_argument(self):
        h, state = nl.batch_norm(array(A), None, halfway(C), train=True)
        assert gap(h, expected()) < 1e-5
        assert gap(state, (A.mean(0), A.var(0))) < 1e-5
        h, after = nl.batch_norm(array(A), None, state, train=False)
        assert gap(h, (A - A.mean(0)) / np.sqrt(A.var(0) + 1e-5)) < 1e-5
        assert after is state

    @pytest.mark.parametrize("population", [halfway, f"{HERE}:halfway"], ids=["made", "named"])
    def test_by_name(self, population):
        norm = nl.get("batch", population=population)
        site = nl.Site(array(A))
        params, state = norm.init(site)
        h, state = norm.apply(params, state, site, train=True)
        assert isinstance(state, Halfway)
        assert gap(h, expected()) < 1e-5

    @pytest.mark.parametrize("population", [halfway, f"{HERE}:halfway"], ids=["made", "named"])
    def test_in_linen(self, population):
        module = nll.BatchNorm(use_running_average=False, population=population)
        variables = module.init(jax.random.key(0), array(A))
        h, updated = module.apply(variables, array(A), mutable="batch_stats")
        assert gap(h, expected()) < 1e-5
        assert gap(jax.tree.leaves(updated), [A.mean(0), A.var(0)]) < 1e-5

    @pytest.mark.parametrize("population", [halfway, f"{HERE}:halfway"], ids=["made", "named"])
    def test_in_nnx(self, population):
        module = nlx.BatchNorm(C, population=population, rngs=nnx.Rngs(0))
        assert gap(module(array(A)), expected()) < 1e-5
        assert gap(module(array(A)), expected(A, A.mean(0), A.var(0))) < 1e-5

    def test_in_a_transaction(self):
        state = nl.population.begin(halfway(C))
        for part in (A[:2], A[2:]):
            h, state = nl.batch_norm(array(part), None, state, train=True)
            assert gap(h, expected(part)) < 1e-5  # the state is as it was at the beginning
        state = nl.population.commit(state)
        assert isinstance(state, Halfway)
        assert gap(state, (A.mean(0), A.var(0))) < 1e-5

    @pytest.mark.parametrize("way", ["pmap", "shard_map", "vmap"])
    def test_over_devices(self, way):
        def step(state, a):
            return nl.batch_norm(a, None, state, train=True, axis_name="d")

        h, states = mappers(4)[way](step)(halfway(C), array(A).reshape(4, 2, C))
        assert gap(h.reshape(A.shape), expected()) < 1e-5
        pooled = nl.population.merge_running(states)
        assert gap(pooled, (A.mean(0), A.var(0))) < 1e-5

    def test_whose_answers_pass_through_what_holds_it(self):
        frozen = nl.population.freeze(halfway(C))
        h, after = nl.batch_norm(array(A), None, frozen, train=True)
        assert gap(h, A / np.sqrt(1 + 1e-5)) < 1e-5
        assert after is frozen
        state = nl.population.begin(halfway(C))
        _, state = nl.batch_norm(array(A), None, state, train=True)
        with pytest.raises(ValueError, match=r"settle: got statistics of type Halfway.*settled"):
            nl.population.settle(state)

    @pytest.mark.parametrize("kind", ["NaN", "masked", "not ok"])
    def test_a_bad_batch_does_not_reach_it(self, kind):
        state = halfway(C)
        a = array(np.where(np.arange(8)[:, None] == 3, np.nan, A) if kind == "NaN" else A)
        weights = jnp.zeros(8) if kind == "masked" else None
        _, after = nl.batch_norm(a, None, state, train=True, weights=weights)
        if kind != "not ok":
            assert gap(after, state) == 0
        pending = nl.population.begin(state)
        _, pending = nl.batch_norm(a, None, pending, train=True, weights=weights)
        after = nl.population.commit(pending, ok=kind != "not ok")
        assert gap(after, state) == 0

    def test_that_measures_in_inference_too(self):
        """The middle of the batch's and of the kept statistics: test-time adaptation."""
        state = Adapted(jnp.zeros(C), jnp.ones(C))
        for train in (True, False):
            h, _ = nl.batch_norm(array(A), None, state, train=train)
            assert gap(h, expected()) < 1e-5
            h, _ = nl.batch_norm(array(A), None, nl.population.freeze(state), train=train)
            assert gap(h, expected()) < 1e-5
        norm = nl.get(
            "batch", population=lambda c: Adapted(jnp.zeros(c), jnp.ones(c)), axis_name="d"
        )
        assert isinstance(norm.init(nl.Site(array(A)))[1], Adapted)  # outside of any map

    def test_inside_another_by_name(self):
        for name in ("domains", "frozen"):
            state = nl.population.init_population(name, C, inner="cumulative")
            assert isinstance(state.inner, nl.population.Cumulative)

    def test_an_unknown_path_is_said(self):
        with pytest.raises(ValueError, match=r"'tests\.nowhere:x': No module named"):
            nl.population.init_population("tests.nowhere:x", C)
        with pytest.raises(ValueError, match=r"did you mean 'halfway'"):
            nl.population.init_population(f"{HERE}:halfwai", C)


def test_no_file_outside_population_names_a_kind_of_it():
    root = Path(nl.__file__).parent
    kinds = {
        name
        for name, value in vars(nl.population).items()
        if isinstance(value, type) and hasattr(value, "update") and name != "Population"
    }
    known = {"Running", "Renorm", "Frozen", "Domains", "Delayed", "Cumulative", "Pending"}
    assert known | {"Digits", "Prior", "Streaming", "Window", "Rms", "Power", "Mabn"} == kinds
    for file in root.rglob("*.py"):
        if file.is_relative_to(root / "population") or file == root / "_public.py":
            continue
        tree = ast.walk(ast.parse(file.read_text()))
        names = {getattr(n, "id", getattr(n, "attr", getattr(n, "name", ""))) for n in tree}
        assert not names & kinds, f"{file.relative_to(root)} names {names & kinds}"


def third_parts(a, params=None, *, order: float = 3.0, eps: float = 1e-5, channel_axis: int = -1):
    """σ is the mean of |a|^order, to the power of 1/order."""
    mean = (jnp.abs(a) ** order).mean(channel_axis, keepdims=True)
    g, b = nl.learned(a, params, channel_axis=channel_axis)
    return nl.Parts(jnp.zeros(()), (mean + eps) ** (1 / order), g, b)


third = nl.stateless(third_parts)
third_row = nl.Row("another", third_parts)
third_norm = third()


def third_options(order=3.0):
    return third(order=order)


@pytest.fixture
def registered():
    return nl.register(nl.Row("third", third_parts, mu="0", sigma="(mean |a|³ + ε)^⅓"))


class TestNorm:
    """From outside, by name everywhere."""

    def expected(self, order=3.0, eps=1e-5):
        return A / ((np.abs(A) ** order).mean(-1, keepdims=True) + eps) ** (1 / order)

    def apply(self, norm):
        site = nl.Site(array(A))
        params, state = norm.init(site)
        return norm.apply(params, state, site, train=True)[0]

    def test_it_is_a_row(self, registered):
        assert nl.names()[-1] == "third"
        assert nl.row("third") is registered
        nl.unregister("third")
        assert "third" not in nl.names()
        nl.register(registered)
        assert gap(self.apply(nl.get("third")), self.expected()) < 1e-5
        assert gap(self.apply(nl.get("third", order=2.0, eps=0.1)), self.expected(2.0, 0.1)) < 1e-5
        assert repr(nl.get("third", order=2.0)) == "get('third', order=2.0)"
        with pytest.raises(ValueError, match="unknown option 'oder': did you mean 'order'"):
            nl.get("third", oder=2.0)

    @pytest.mark.parametrize("name", ["third_parts", "third"])
    def test_by_path(self, name):
        norm = nl.get(f"{HERE}:{name}", order=2.0)
        assert gap(self.apply(norm), self.expected(2.0)) < 1e-5
        assert f"{HERE}:{name}" not in nl.names()

    def test_in_the_skins(self, registered):
        x = array(A)
        module = nll.RegistryNorm("third")
        assert gap(module.apply(module.init(jax.random.key(0), x), x), self.expected()) < 1e-5
        assert gap(nlx.RegistryNorm("third", C)(x), self.expected()) < 1e-5
        net = nll.swap(nn.Sequential([nll.LayerNorm()]), {".*": "third"})
        assert gap(net.apply(net.init(jax.random.key(0), x), x), self.expected()) < 1e-5

    def test_with_the_options_and_layouts_of_every_norm(self, registered):
        a = draw(0, 2, 3, 4)
        site = nl.Site(array(a), linear=nl.Conv(channel_axis=1))
        size = (np.abs(a) ** 3).mean(1, keepdims=True)
        for options in ({}, {"use_gain": False}, {"use_bias": False}):
            norm = nl.get("third", **options)
            params, state = norm.init(site)
            h, _ = norm.apply(params, state, site, train=True)
            assert gap(h, a / (size + 1e-5) ** (1 / 3)) < 1e-5

    def test_what_may_stand_at_a_place(self):
        names = ("third_row", "third_norm", "third_options")
        for name in names:
            assert gap(self.apply(nl.get(f"{HERE}:{name}")), self.expected()) < 1e-5
        assert (
            gap(self.apply(nl.get(f"{HERE}:third_options", order=2.0)), self.expected(2.0)) < 1e-5
        )
        for name, match in (("A", "a factory that is"), ("C", "a factory that is 3")):
            with pytest.raises(ValueError, match=match):
                nl.get(f"{HERE}:{name}")

    def test_a_notebook_may_register_it_again(self, registered):
        with pytest.raises(ValueError, match="which another norm has"):
            nl.register(registered)
        nl.register(registered._replace(mu="none"), replace=True)
        assert nl.row("third").mu == "none"

    def test_weights_it_does_not_know_are_refused(self, registered):
        site = nl.Site(array(A), weights=jnp.ones(8))
        with pytest.raises(
            ValueError, match=r"third norm: got weights, which third_parts does not take"
        ):
            nl.get("third").init(site)

    def test_the_laws_say_what_is_missing(self, registered):
        with pytest.raises(LookupError, match=r"'third' has no case: add one to CASES"):
            first_of("third")

    @pytest.mark.parametrize(
        ("row", "match"),
        [
            (nl.Row("batch", third), "the name 'batch', which another norm has"),
            (nl.Row("a:b", third), "the name 'a:b'; expected a name of its own, without ':'"),
            (nl.Row("x", third, needs=frozenset({"y"})), "needs=frozenset.*a, batch, w, x"),
            (nl.Row("x", third, needs="batch"), "needs='batch'; expected a set"),
            (nl.Row("x", third, needs=None), "needs=None; expected a set"),
            (nl.Row("x", third, invariances=frozenset({"all"})), "invariances=frozenset.*rescaled"),
            (nl.Row("x", None), "a factory that is None; expected a factory"),
            (nl.Row("x", 3), "a factory that is 3"),
            (nl.Row("x", lambda *x: None), r"the arguments \(\*x\)"),
            (nl.Row("x", lambda a: None), r"the arguments \(a\)"),
            (nl.Row("x", lambda a, params, use_gain: None), "the argument use_gain"),
            ("batch", "row='batch' of type str|a row of type str"),
        ],
    )
    def test_a_row_that_means_nothing_is_refused(self, row, match):
        with pytest.raises(ValueError, match=match):
            nl.register(row)


class TestEquality:
    def test_norms_of_the_same_options_are_one(self):
        one, two = nl.get("group", groups=2, eps=1e-6), nl.get("group", eps=1e-6, groups=2)
        assert one == two
        assert hash(one) == hash(two)
        assert one != nl.get("group", groups=2)
        assert one != nl.get("layer")
        assert repr(one) == "get('group', eps=1e-06, groups=2)"
        assert nl.get("layer", axes=[1]) == nl.get("layer", axes=(1,))
        own = nl.Norm(one.init, one.parts)
        assert own == nl.Norm(one.init, one.parts)
        assert own != one

    def test_a_jit_traces_once(self):
        traced = []

        def f(a, norm):
            traced.append(norm)
            return norm.apply(None, (), nl.Site(a), train=True)[0]

        run = jax.jit(f, static_argnames="norm")
        for _ in range(2):
            run(array(A), norm=nl.get("layer", eps=1e-6))
        assert len(traced) == 1
        assert nl.get("rms").apply == nl.get("rms").apply  # so that jit knows it again

    def test_by_path_and_of_numbers_of_arrays(self):
        path = f"{HERE}:third_parts"
        assert nl.get(path) is nl.get(path)
        assert nl.get("layer", eps=np.float32(0.5)) == nl.get("layer", eps=0.5)
        assert nl.get("layer", eps=jnp.float32(0.5)) == nl.get("layer", eps=0.5)

    def test_copies_are_what_they_copy(self):
        for norm in (nl.get("group", groups=2), nl.get("batch"), nl.get(f"{HERE}:third_parts")):
            assert pickle.loads(pickle.dumps(norm)) == norm
            assert copy.deepcopy(norm) == norm
        changed = dataclasses.replace(nl.get("layer"), parts=nl.get("rms").parts)
        assert changed != nl.get("layer")

    def test_what_was_wrong_stays_wrong(self):
        nl.get("layer", use_gain=True)
        with pytest.raises(ValueError, match="use_gain=1 "):
            nl.get("layer", use_gain=1)
