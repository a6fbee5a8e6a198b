"""`equivalence`: every norm, every topology and every form is one device with the whole batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import instruments
from tests.cases import NAMES
from tests.helpers import MAPPERS, draw
from tests.test_sync import TOPOLOGIES

D = 8
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
OPTIONS = {"group": {"groups": 1}}


def maker(name):
    """The norm by name, its batch in groups where it looks across one."""

    def make(axis_name):
        options = dict(OPTIONS.get(name, {}))
        if nl.row(name).axis_of == "batch":
            options["axis_name"] = axis_name
        return nl.get(name, **options)

    return make


def pictures(name, dtype):
    """What the norm needs to be measured on: positions, where it looks at few examples.

    Of few, some lie close together by chance, and σ magnifies the rounding of the linear map.
    """
    shape = (4 * D, 8, 5) if name in ("batch", "instance") else (4 * D, 5)
    return jnp.asarray(
        draw(0, *shape) + np.repeat(draw(1, D), 4).reshape(-1, *(1,) * (len(shape) - 1)), dtype
    )


@pytest.mark.parametrize("topology", [name for name in TOPOLOGIES if name != "alone"])
@pytest.mark.parametrize("precision", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_batch_norm_in_every_topology(topology, precision):
    with jax.enable_x64(precision == "float64"):
        check_batch_norm(topology, precision)


@pytest.mark.parametrize("topology", ["all", "uneven"])
def test_batch_norm_in_float64(topology, x64):
    check_batch_norm(topology, "float64")


def check_batch_norm(topology, precision):
    found = instruments.equivalence(
        "batch", TOPOLOGIES[topology], D, form="pmap", x=pictures("batch", precision), recipes=()
    )
    assert {"h", "dx", "dw", "dg", "db", "state.mean", "state.var"} <= found.errors.keys()
    assert found.worst < TOLERANCE[precision]


@pytest.mark.parametrize("form", ["pmap", pytest.param("shard_map", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("none", "batch")])
def test_every_other_norm_is_the_same_on_many_devices(name, form):
    x = pictures(name, "float32")
    found = instruments.equivalence(maker(name), "d", D, form=form, x=x, recipes=())
    assert found.worst < 5e-6


FACTORS = {
    "typed": {"local loss": (8, 8), "pmean(loss)": (1, 1), "pmean(loss), pmean(grads)": (1, 1)},
    "untyped": {
        "local loss": (None, 8),
        "local loss, pmean(grads)": (1, 8),
        "pmean(loss)": (None, 8),
        "pmean(loss), pmean(grads)": (1, 8),
    },
}


@pytest.mark.parametrize("form", [*MAPPERS, "jit"])
def test_the_convention_of_each_recipe_is_found(form):
    found = instruments.equivalence("batch", "d", D, form=form)
    assert found.worst < 5e-6
    if form == "jit":
        assert found.conventions == {}
    else:
        expected = FACTORS["typed" if form == "shard_map" else "untyped"]
        assert {recipe: found.conventions[recipe] for recipe in expected} == expected


def test_masked_examples_are_left_out():
    weights = jnp.asarray(np.arange(4 * D) % 5 > 0, jnp.float32)
    assert instruments.equivalence("batch", "d", D, form="shard_map", weights=weights).worst < 5e-6


def test_a_norm_that_averages_variances_is_found_out():
    """Batch norm that takes the mean of the devices' variances for that of the batch."""

    def make(axis_name):
        def parts(params, state, site, *, train):
            del train
            m = nl.moments(site.a, 0)
            mean, var = m.mean, m.var()
            if axis_name is not None:
                mean, var = jax.lax.pmean((mean, var), axis_name.names)
            return nl.Parts(mean, jnp.sqrt(var + 1e-5), params.g, params.b), state

        return nl.Norm(lambda site: (nl.init_affine(site.channels), ()), parts)

    found = instruments.equivalence(make, "d", D)
    assert found.errors["h"] > 0.05
    assert found.errors["dx"] > 0.05


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"axis_name": nl.Sync("d", every=1)}, "no delay"),
        ({"axis_name": ("i", "j")}, "one axis"),
        ({"axis_name": nl.Sync("d", gradient="none")}, "gradient of both passes"),
        ({"devices": 64}, r"64 devices; expected at most the 8.*device_count=64"),
        ({"form": "xmap"}, "'xmap'.*Known: pmap"),
        ({"norm": "bach"}, "did you mean 'batch'"),
    ],
)
def test_what_cannot_be_compared_is_an_error(options, says):
    with pytest.raises(ValueError, match=says):
        instruments.equivalence(**{"norm": "batch", "axis_name": "d", "devices": D} | options)
