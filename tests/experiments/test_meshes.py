"""Meshes of several axes: the words of `--sync` that are about them, and what refuses them."""

import jax
import numpy as np
import pytest

import normlab as nl
from normlab.experiments.programs.config import Ledger
from normlab.experiments.programs.ledger import compile_all
from normlab.experiments.rundir import RunError
from normlab.experiments.training.config import Command
from normlab.experiments.training.syncs import alike, delayed, parse
from normlab.experiments.training.trainer import axes_of, mesh_of, on_devices

MESH = ("axis0", "axis1")
OF_A_MESH = {
    "local": None,
    "all": MESH,
    "inner": nl.Sync(MESH, together="axis1"),
    "together=axis0": nl.Sync(MESH, together="axis0"),
    "inner+every=2": nl.Sync(MESH, together="axis1", every=2),
    "inner+gradient=none+second=never": nl.Sync(
        MESH, together="axis1", gradient="none", second="never"
    ),
    "ghost=2+inner": nl.Sync(MESH, together="axis1", shards=2),
    "groups=2": nl.Sync(MESH, groups=2),
    "all+staged": nl.Sync(MESH, staged=True),
}


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("text", OF_A_MESH)
def test_words_are_a_sync_over_a_mesh(text, mapped):
    expected = OF_A_MESH[text]
    if not mapped and text == "local":
        expected = nl.Sync(MESH, groups=1)
    assert parse(text, MESH, 8, mapped=mapped) == expected


def test_of_three_axes_some_are_together():
    axes = axes_of((2, 2, 2))
    assert parse("inner", axes) == nl.Sync(axes, together="axis2")
    assert parse("together=axis0,axis2", axes) == nl.Sync(axes, together=("axis0", "axis2"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inner=2", "'inner=2' is to be written as inner"),
        ("inner+groups=2", "inner and groups exclude each other"),
        ("inner+together=axis0", "inner and together exclude each other"),
        ("inner+staged", "one way to cut the batch"),
        ("together", "together=VALUE"),
        ("together=axis2", "the mesh has no axis 'axis2': did you mean 'axis1'"),
        ("together=host", "the mesh has no axis 'host': Known: axis0, axis1"),
        ("together=axis1,", "the mesh has no axis ''"),
        ("together=axis1,axis1", "axis1 stands there twice"),
        ("together=axis0,axis1", "some of the axes, not all"),
    ],
)
def test_words_that_cannot_be_meant_of_a_mesh_are_refused(text, said):
    with pytest.raises(RunError, match=r"--sync") as error:
        parse(text, MESH)
    assert said in str(error.value)


def test_statistics_are_alike_where_the_population_is_that_of_all():
    for text in ("all", "inner", "together=axis0", "groups=2", "ghost=2+groups=2"):
        assert alike(parse(text, MESH, 8), MESH), text
    for text in ("local", "ghost=2", "all+every=2", "inner+every=2"):
        assert not alike(parse(text, MESH, 8), MESH), text
    assert not alike("axis1", MESH)
    assert delayed(parse("inner+every=2", MESH)) == OF_A_MESH["inner+every=2"]
    assert delayed(parse("inner", MESH)) is delayed(parse("all", MESH)) is delayed(None) is None


def test_neighbours_lie_along_the_last_axis():
    devices = jax.devices()[:8]
    mesh = mesh_of(devices, (4, 2))
    assert mesh.axis_names == axes_of((4, 2)) == MESH
    assert mesh.devices.tolist() == np.array(devices).reshape(4, 2).tolist()
    for sizes in ((), (8,)):
        assert mesh_of(devices, sizes).axis_names == (axes_of(sizes),) == ("data",)


def test_pmap_has_one_axis():
    with pytest.raises(RunError, match=r"--mesh 4 2: pmap has one axis\. Use --form shard_map"):
        on_devices("pmap", mesh_of(jax.devices()[:8], (4, 2)), lambda x: x, in_axes=(0,))
    with pytest.raises(RunError, match=r"--mesh 4 2: pmap has one axis\. Use --mode shard_map"):
        Ledger(mesh=(4, 2), mode="pmap")


@pytest.mark.parametrize("mode", ["shard_map", "jit"])
def test_only_an_axis_is_asked_for_what_normalizes(mode):
    config = Ledger(model="mlp", widths=(6,), per_device=4, mesh=(4, 2), mode=mode, sync=("inner",))
    (account,) = compile_all(config).accounts
    pairs, everyone = ((0, 1), (2, 3), (4, 5), (6, 7)), (tuple(range(8)),)
    asked = {
        direction: {
            one.groups
            for entry in account.entries
            for purpose in entry.purposes
            if purpose.direction == direction
            for one in entry.collectives
        }
        for direction in ("forward", "backward")
    }
    assert asked["forward"] == {pairs, everyone}  # the second for the population
    assert asked["backward"] == {pairs}


@pytest.mark.parametrize("mesh", [(4, 4), (-2, -4), (8, 0)])
def test_a_ledger_of_another_mesh_is_refused(mesh):
    with pytest.raises(RunError, match=r"^--mesh"):
        compile_all(Ledger(model="mlp", widths=(6,), mesh=mesh))


def test_a_norm_of_examples_is_not_told_over_which_devices_the_batch_lies():
    """Its `axis_name` is another: of the axes along which its channels lie."""
    command = Command(dataset="digits", model="mlp")
    assert ("axis_name", "data") in command.norm_of("batch", "data").made.options
    for name in nl.names():
        if "batch" not in nl.row(name).needs:
            options = dict(command.norm_of(name, "data").made.options)
            assert options.get("axis_name") is None, name
