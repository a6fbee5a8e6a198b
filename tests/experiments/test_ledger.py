"""The ledger: collectives read from compiled programs, the model of machines, the words of --sync.

For a TPU and a GPU where their compilers are installed; no hardware is looked for.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh

import normlab as nl
from normlab.experiments.bench import sync_jax as bench_sync
from normlab.experiments.console import main
from normlab.experiments.programs import machines
from normlab.experiments.programs.config import Ledger
from normlab.experiments.programs.ledger import (
    Found,
    asked_of_others,
    compile_all,
    group_size,
    remarks,
    table,
)
from normlab.experiments.programs.machines import Cluster, Machine, Torus, machine, missing
from normlab.experiments.rundir import RunError
from normlab.experiments.training.syncs import parse
from normlab.instruments.collectives import (
    Collective,
    Entry,
    Purpose,
    shape_of,
)

# --- The words of --sync ----------------------------------------------------------------------

WORDS = {
    "local": None,
    "all": "data",
    "groups=4": nl.Sync("data", groups=4),
    "groups=0,2|1,3": nl.Sync("data", groups=((0, 2), (1, 3))),
    "ring=1": nl.Sync("data", members=nl.devices.ring(8)),
    "virtual=64": nl.Sync("data", virtual_batch=64),
    "ghost=4": nl.Sync((), shards=4, groups=1),
    "ghost=4+groups=2": nl.Sync("data", shards=4, groups=2),
    "all+staged": nl.Sync("data", staged=True),
    "all+every=2": nl.Sync("data", every=2),
    "groups=4+gradient=forward": nl.Sync("data", groups=4, gradient="forward"),
    "all+second=always": nl.Sync("data", second="always"),
}


@pytest.mark.parametrize("text", WORDS)
def test_words_are_a_sync(text):
    assert parse(text, "data", 8) == WORDS[text]


def test_in_plain_jit_local_names_the_axes_of_the_mesh_or_counts_the_devices():
    assert parse("local", "data", 8, mapped=False) == nl.Sync("data", groups=1)
    assert parse("ghost=4", "data", 8, mapped=False) == nl.Sync("data", shards=4, groups=1)
    assert parse("local", (), 8) == nl.Sync(shards=8, groups=1)
    assert parse("all", (), 8) == nl.Sync(shards=8)
    assert parse("groups=2", (), 8) == nl.Sync(shards=8, groups=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grops=4", "did you mean 'groups'"),
        ("all+gradient=forwrad", "did you mean 'forward'"),
        ("all+local", "local and all exclude each other"),
        ("groups=4+groups=2", "groups stands there twice"),
        ("groups", "groups=VALUE"),
        ("all=3", "'all=3' is to be written as all"),
        ("ring=one", "a number from 1 on"),
        ("groups=a|b", "a partition"),
        ("groups=2+staged", "one way to cut the batch"),
        ("", "unknown word ''"),
        ("all+second=alwys", "did you mean 'always'"),
        ("inner", "inner needs a mesh of several axes; give one, as --mesh 4 2"),
        ("together=data", "together needs a mesh of several axes"),
    ],
)
def test_words_that_cannot_be_meant_are_refused(text, said):
    with pytest.raises(RunError, match=r"--sync") as error:
        parse(text)
    assert said in str(error.value)


# --- Compiled programs ------------------------------------------------------------------------

WIDTHS = (6, 5)


def account(sync, **options):
    options = {"model": "mlp", "widths": WIDTHS, "per_device": 4, **options}
    (found,) = compile_all(Ledger(sync=(sync,) if sync else (), **options)).accounts
    return found


def per_layer(account, direction, *kinds):
    """How many steady collectives each norm layer has in a direction, and of how many bytes."""
    found = {}
    for entry in account.entries:
        for purpose in entry.purposes:
            if purpose.direction == direction and not entry.when_needed:
                count, nbytes = found.get(purpose.what, (0, 0))
                each = [
                    (one.times, one.nbytes)
                    for one in entry.collectives
                    if not kinds or one.kind in kinds
                ]
                if not each:
                    continue
                found[purpose.what] = (
                    count + sum(times for times, _ in each),
                    nbytes + sum(nbytes for _, nbytes in each),
                )
    return found


def counts(account, direction):
    return {layer: count for layer, (count, _) in per_layer(account, direction).items()}


ONE = {f"Normed_{i}": 1 for i in range(len(WIDTHS))}
MODES = ("shard_map", "pmap", "jit")


@pytest.mark.parametrize("mode", MODES)
def test_all_together_costs_one_small_collective_per_layer_and_direction(mode):
    found = account("all", mode=mode)
    more = 4 if mode == "pmap" else 0  # of the running means, whether all devices have the same
    assert per_layer(found, "forward") == {
        f"Normed_{i}": (1, 4 * (2 * c + 1 + more)) for i, c in enumerate(WIDTHS)
    }
    assert counts(found, "backward") == ONE


@pytest.mark.parametrize("mode", MODES)
def test_pairs_exchange_their_moments_and_all_sum_the_running_statistics(mode):
    found = account("groups=2", mode=mode)
    exchange = {f"Normed_{i}": (1, 4 * (2 * c + 1)) for i, c in enumerate(WIDTHS)}
    assert per_layer(found, "forward", "collective-permute") == exchange
    assert per_layer(found, "backward") == exchange
    assert set(per_layer(found, "forward", "all-reduce")) == set(ONE)  # with one another or alone
    assert found.asked == ""


def test_on_their_own_devices_share_nothing_but_the_parameters_gradients():
    layer = account("", norms=("layer",))
    for found in (account("local"), account("local", mode="pmap"), layer):
        (entry,) = found.entries
        assert entry.purposes == (Purpose("gradients"), Purpose("loss"))
        (one,) = entry.collectives
        assert (one.kind, shape_of(one.groups)) == ("all-reduce", "all 8")


def test_on_their_own_in_plain_jit_they_share_the_running_statistics():
    found = account("local", mode="jit")
    assert counts(found, "forward") == ONE
    assert counts(found, "backward") == {}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("sync", "rounds"),
    [("ring=1", 2), ("virtual=8", 1), ("groups=0,2,4,6|1,3,5,7", 2), ("ghost=2+groups=4", 1)],
)
def test_other_topologies_exchange_in_few_rounds(sync, rounds, mode):
    found = account(sync, mode=mode)
    expected = dict.fromkeys(ONE, rounds)
    permutes = per_layer(found, "forward", "collective-permute")
    assert {layer: count for layer, (count, _) in permutes.items()} == expected
    assert counts(found, "backward") == expected
    assert found.asked == ""


def test_without_a_gradient_of_others_there_is_no_collective_backward():
    found = account("all+gradient=forward")
    assert counts(found, "forward") == ONE
    assert counts(found, "backward") == {}


def test_delayed_statistics_cost_one_collective_every_so_many_steps():
    found = account("all+every=2")
    always, exchange = found.entries
    assert always.purposes == (Purpose("gradients"), Purpose("loss"))
    assert (exchange.purposes, exchange.when_needed) == ((Purpose("exchange"),), True)
    first, again = exchange.collectives  # and that where digits were lost
    assert first.nbytes == again.nbytes <= 4 * sum(3 * c for c in WIDTHS)


def test_the_forward_pass_alone_has_the_forward_collectives_of_the_step():
    alone, step = (account("all", program=program) for program in ("forward", "step"))
    assert per_layer(alone, "forward") == per_layer(step, "forward")
    assert {p.direction for e in alone.entries for p in e.purposes} == {"forward"}
    assert len(alone.program.steady) == len(WIDTHS)


def rows(account, by="layer", **options):
    """What the table says of an account: purpose, collectives, bytes."""
    config = Ledger(model="mlp", by=by, **options)
    headings, *found = table(Found(config, [account], []))
    return [row[headings.index("what") :][:3] for row in found]


def test_flaxs_norm_is_a_row_of_the_same_table():
    found = account("all", norms=("flax",))
    assert per_layer(found, "forward") == {f"Normed_{i}": (1, 8 * c) for i, c in enumerate(WIDTHS)}
    assert counts(found, "backward") == ONE
    assert counts(account("all", norms=("flax",), mode="jit"), "forward").keys() == ONE.keys()
    assert counts(account("local", norms=("flax",)), "forward") == {}


def test_what_a_peer_has_not_is_left_out_and_said():
    config = Ledger(model="mlp", widths=(6,), norms=("batch", "flax"), sync=("groups=2",))
    found = compile_all(config)
    assert list(map(str, found.accounts)) == ["batch, groups=2"]
    assert "flax, groups=2: left out; flax is there for all, inner, local." in list(remarks(found))
    with pytest.raises(RunError, match="nothing is left to compile"):
        compile_all(Ledger(norms=("flax",), sync=("ring=1",)))


def test_all_layers_of_a_direction_are_one_row_or_the_step_alone():
    found = account("all")
    assert [what for what, *_ in rows(found, "direction")] == [
        *("norms forward", "norms backward", "gradients, loss", "norms forward, when needed"),
        *("whole step", "whole step, when needed"),
    ]
    assert rows(found, "direction")[0][1] == rows(found)[0][1].replace("1", "2")
    assert rows(found, "step") == rows(found)[-2:]


def rare(axis_name=None, decay=0.9):
    """Centred over neighbours, and over all where the mean is large."""

    def parts(params, state, site, *, train):
        mean = site.a.mean(0)
        if not train:
            return nl.Parts(mean, jnp.ones(()), jnp.ones(()), jnp.zeros(())), state
        pairs = [(i, i ^ 1) for i in range(8)]
        mean = (mean + lax.ppermute(mean, axis_name, pairs)) / 2
        large = lax.pmax(jnp.abs(mean).max(), axis_name) > 9
        mean = lax.cond(large, lambda m: lax.pmean(m, axis_name), lambda m: m, mean)
        return nl.Parts(mean, jnp.ones(()), jnp.ones(()), jnp.zeros(())), state

    return nl.Norm(lambda site: ((), ()), parts)


def test_what_is_sent_when_needed_has_rows_of_its_own_and_is_in_no_sum():
    name = f"{__name__}:rare"
    found = account("all", norms=(name,), mode="pmap", widths=(6,), program="forward")
    assert rows(found, program="forward") == [
        ("Normed_0 forward", "1 collective-permute, 1 all-reduce", "28"),
        ("Normed_0 forward, when needed", "1 all-reduce", "24"),
        ("whole forward", "1 collective-permute, 1 all-reduce", "28"),
        ("whole forward, when needed", "1 all-reduce", "24"),
    ]
    said = " ".join(remarks(Found(Ledger(), [found], [])))
    assert "What runs when needed (in a conditional) is in no sum" in said
    (permute, *_) = found.program.collectives
    assert permute.shape == "4 pairs: 0↔1, …"


def test_of_text_the_model_reads_tokens():
    options = {"model": "lm", "widths": (), "width": 8, "depth": 2, "context": 4}
    config = Ledger(norms=("rms", "batch"), per_device=1, sync=("all",), **options)
    rms, batch = compile_all(config).accounts
    assert [what for what, *_ in rows(rms)] == ["gradients, loss", "whole step"]
    places = [f"block{i}/{branch}" for i in (0, 1) for branch in ("attention", "mlp")]
    assert counts(batch, "forward") == dict.fromkeys([*places, "norm_last"], 1)
    assert Ledger(model="lm").model_options == {"width": 768, "depth": 12, "heads": 12}


def made(kind, nbytes, devices, direction, when_needed=False):
    groups = (tuple(range(devices)),)
    one = Collective(kind, nbytes, groups, (), "", "", 1, when_needed, False, ())
    return Entry((Purpose("layer", direction),), when_needed, (one,))


@pytest.mark.parametrize(
    ("kind", "nbytes", "devices", "direction", "asked"),
    [
        ("all-gather", 4 * 13, 8, "forward", True),
        ("all-reduce", 4 * 13 * 8, 8, "forward", True),  # a row of each device
        ("all-reduce", 4 * 13, 8, "forward", False),  # the population
        ("all-reduce", 4 * 12, 8, "backward", True),
        ("all-reduce", 4 * 12, 2, "backward", False),
        ("all-gather", 4 * 13, 2, "forward", False),
        ("collective-permute", 4 * 13, 8, "forward", False),
    ],
)
def test_who_asks_all_devices_for_the_sake_of_a_group_is_told(
    kind, nbytes, devices, direction, asked
):
    said = asked_of_others([made(kind, nbytes, devices, direction)], 2, {"layer": 6})
    assert bool(said) == asked
    if asked:
        assert f"layer {direction} ask 8 devices, and what normalizes is of 2" in said


@pytest.mark.parametrize(
    ("text", "mesh", "size"),
    [
        ("all", (), None),
        ("all", (4, 2), None),
        ("inner", (4, 2), 2),
        ("local", (), 1),
        ("groups=4", (), 4),
        ("groups=0,1,2|3,4,5,6,7", (), 5),
        ("ring=1", (), 3),
        ("virtual=64", (), 2),
        ("virtual=8", (), 1),
        ("ghost=4", (), 1),
        ("ghost=4+groups=8", (), 2),
    ],
)
def test_how_many_devices_normalize_together(text, mesh, size):
    config = Ledger(mesh=mesh, per_device=32)
    axes = config.axes if isinstance(config.axes, tuple) else (config.axes,)
    there = Mesh(np.array(jax.devices()).reshape(mesh or (8,)), axes)
    assert group_size(parse(text, config.axes, 8), config, there) == size


# --- The model --------------------------------------------------------------------------------


def torus(*shape, network):
    places = [(i % shape[0], i // shape[0]) for i in range(shape[0] * shape[1])]
    return Machine("", "tpu", places, places, network)


NETWORK = Torus(link=1e9, wraps=4, multiples=True, hop=1e-6)


def test_a_ring_is_gathered_in_half_as_many_hops_in_both_directions():
    m = torus(8, 1, network=NETWORK)
    expected = 4e-6 + 8 * 1000 * (7 / 8) / 2e9
    assert m.seconds("all-gather", 1000, [range(8)]) == pytest.approx(expected)
    assert m.seconds("reduce-scatter", 8000, [range(8)]) == pytest.approx(expected)
    assert m.seconds("all-reduce", 8000, [range(8)]) == pytest.approx(2 * expected)


def test_a_part_of_a_ring_is_a_line():
    m = torus(8, 1, network=NETWORK)
    expected = 3e-6 + 4 * 1000 * (3 / 4) / 1e9
    halves = [range(4), range(4, 8)]
    assert m.seconds("all-gather", 1000, halves) == pytest.approx(expected)


def test_a_torus_has_the_links_and_the_hops_of_both_dimensions():
    m = torus(8, 4, network=NETWORK)
    expected = (4 + 2) * 1e-6 + 32 * 1000 * (31 / 32) / 4e9
    assert m.seconds("all-gather", 1000, [range(32)]) == pytest.approx(expected)


def test_where_the_compiler_says_ring_the_group_is_one():
    m = torus(8, 4, network=NETWORK)
    expected = 16e-6 + 32 * 1000 * (31 / 32) / 2e9
    ring = m.seconds("all-gather", 1000, [range(32)], "RotatedPincer, Ring, phases: 1")
    assert ring == pytest.approx(expected)
    assert m.seconds("all-gather", 1000, [range(32)], "SinglePhaseRingSum") == ring
    for several in ("RotatedPincer, ND, phases: 3", "RotatedPincer, UniDirectionNDRing, phases: 2"):
        assert m.seconds("all-gather", 1000, [range(32)], several) < ring


def test_the_slowest_group_counts_and_a_device_alone_waits_for_nobody():
    m = torus(8, 1, network=NETWORK)
    uneven = m.seconds("all-gather", 8, [(0, 1, 2, 3, 4), (5, 6), (7,)])
    assert uneven == m.seconds("all-gather", 8, [range(5)])
    assert m.seconds("all-gather", 8, [(i,) for i in range(8)]) == 0


def test_a_tree_climbs_by_the_logarithm_of_the_hosts_and_a_ring_by_their_number():
    network = machines.GPUS["h100"]
    assert isinstance(network, Cluster)
    start, inner, outer = network.protocols[0].tree

    def seconds(kind, hosts):
        places = [(host, gpu) for host in range(hosts) for gpu in range(8)]
        m = Machine("", "cuda", places, places, network)
        return m.seconds(kind, 8, [range(8 * hosts)])

    assert seconds("all-reduce", 16) == pytest.approx(start + 14 * inner + 8 * outer, rel=1e-3)
    start, _, outer = network.protocols[0].ring
    ring = start + (127 - 15) * 1e-6 + 15 * outer  # 1 µs: the network's overhead in every step
    assert seconds("all-gather", 16) == pytest.approx(ring, rel=1e-3)


def test_a_permute_goes_the_shorter_way_round_and_shares_its_links():
    m = torus(8, 4, network=NETWORK)
    pair = lambda *ends: m.seconds("collective-permute", 1000, [ends])  # noqa: E731
    assert pair(0, 1) == pair(0, 7) == pytest.approx(1e-6 + 1e-6)
    assert pair(0, 2) == pytest.approx(2 * pair(0, 1))
    assert m.seconds("collective-permute", 1000, [(0, 1), (0, 2)]) == pair(0, 2)
    assert pair(3, 3) == 0
    network = machines.GPUS["h100"]
    places = [(host, gpu) for host in range(2) for gpu in range(8)]
    cluster = Machine("", "cuda", places, places, network)
    within, between = (
        cluster.seconds("collective-permute", 10**9, [ends]) for ends in ((0, 1), (0, 8))
    )
    assert within == pytest.approx(1e9 / network.within, rel=0.01)
    assert between == pytest.approx(1e9 / network.between, rel=0.01)


def test_this_host_and_collectives_that_are_not_known_have_no_model():
    assert machine(None, 2).seconds("all-reduce", 8, [(0, 1)]) is None
    assert torus(4, 1, network=NETWORK).seconds("ragged-all-to-all", 8, [range(4)]) is None


# --- Ahead of time ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "target"), [("v5e:4x4", "tpu"), ("v5p:2x2x2", "tpu"), ("h100:1x2x8", "cuda")]
)
def test_compiled_ahead_of_time_a_layer_costs_one_collective_each_way(topology, target):
    if command := missing(target):
        pytest.skip(f"no compiler for {target}; to install it: {command}")
    found = account("all", topology=(topology,))
    assert counts(found, "forward") == counts(found, "backward") == ONE
    there = machine(topology, 0)
    for entry in found.entries:
        for one in entry.collectives:
            assert there.seconds(one.kind, one.nbytes, one.groups) > 0
            assert bool(one.algorithm) == (target == "tpu")


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5:4x4", "did you mean 'v5p'"),
        ("v5e:4x4x4", "2 sizes were expected, as in v5e:16x16"),
        ("v5p:4x4", "3 sizes were expected"),
        ("h100:128x8", "slices x hosts x GPUs"),
        ("v5p", "3 sizes were expected"),
    ],
)
def test_a_topology_that_there_is_not_is_refused(topology, said):
    with pytest.raises(RunError) as error:
        machine(topology, 8)
    assert said in str(error.value)


@pytest.mark.parametrize(("topology", "extra"), [("v5e:4x4", "tpu"), ("h100:1x2x8", "cuda")])
def test_a_missing_compiler_is_named_with_the_line_that_installs_it(
    topology, extra, monkeypatch, capsys
):
    monkeypatch.setitem(machines.TARGETS, extra, "no_such.module")
    assert main(["ledger", "--topology", topology]) == 2
    said = capsys.readouterr().err
    assert f"pip install 'normlab[{extra}]'" in said
    assert "Traceback" not in said


# --- The commands -----------------------------------------------------------------------------


def test_the_command_prints_the_table_or_the_json(capsys):
    words = ["ledger", "--model", "mlp", "--widths", "6", "--sync", "all"]
    assert main([*words, "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| batch, all | Normed_0 forward | 1 all-reduce | 52 | all 8 |" in said
    assert main([*words, "--json"]) == 0
    (content,) = json.loads(capsys.readouterr().out)["programs"]
    assert (content["norm"], content["sync"]) == ("batch", "all")
    first = content["collectives"][0]
    assert (first["purposes"], first["kind"], first["nbytes"]) == (
        ["Normed_0 forward"],
        "all-reduce",
        52,
    )


def test_a_norm_that_there_is_not_and_groups_that_do_not_divide_are_refused(capsys):
    assert main(["ledger", "--norms", "bathc"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err
    assert main(["ledger", "--sync", "groups=3"]) == 2
    assert "use groups of 2" in capsys.readouterr().err


def test_columns_that_say_nothing_are_left_out():
    found = compile_all(Ledger(model="mlp", widths=(6,), sync=("local",), per_device=4))
    headings, *rows = table(found)
    assert headings[:5] == ("norm, sync", "what", "collectives", "bytes", "groups")
    assert headings[5:] == ("MiB, temporary",)
    assert rows[-1][1:3] == ("whole step", "1 all-reduce")


@pytest.mark.parametrize("name", bench_sync.CONTESTANTS)
def test_at_a_mean_of_1000_our_variance_is_right_where_flaxs_default_is_not(name):
    with jax.numpy_dtype_promotion("standard"):  # as haiku pleases
        error = bench_sync.error(name, machine(None, 8), (32, 16))
    assert error > 0.05 if name in ("flax", "haiku") else error < 1e-4


def test_the_bench_counts_one_collective_each_way(capsys):
    here = machine(None, 8)
    said = "1 (132 B) + 1 (128 B); when needed 1 (132 B)"
    assert bench_sync.counted("normlab", here, (4, 16)) == said
    assert bench_sync.counted("flax", here, (4, 16)).startswith("1 (")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"devices": 4, "topology": ("v5e:4x4",)},
            "--devices 4: it has no effect beside --topology",
        ),
        (
            {"norms": ("layer",), "sync": ("all",)},
            "--sync all: it has no effect beside --norms layer",
        ),
        ({"context": 64}, "--context 64: it has no effect beside --model conv"),
        ({"model": "lm", "image": (8, 8, 1)}, "--image 8 8 1: it has no effect beside --model lm"),
    ],
)
def test_an_option_that_does_nothing_beside_another_is_refused(options, said):
    with pytest.raises(RunError, match=said):
        compile_all(Ledger(**options))
