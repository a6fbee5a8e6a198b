"""The ledger: collectives read from compiled programs, the model of machines, the words of --sync.

For a TPU and a GPU where their compilers are installed; no hardware is looked for.
"""

import json

import jax
import pytest

import normlab as nl
from experiments.bench import sync_jax as bench_sync
from experiments.console import main
from experiments.programs import machines
from experiments.programs.collectives import algorithm, collectives, groups, shape_of
from experiments.programs.config import Ledger
from experiments.programs.ledger import Purpose, compile_all, table
from experiments.programs.machines import Cluster, Machine, Torus, machine, missing
from experiments.rundir import RunError
from experiments.training.syncs import parse

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
    ],
)
def test_words_that_cannot_be_meant_are_refused(text, said):
    with pytest.raises(RunError, match=r"--sync") as error:
        parse(text)
    assert said in str(error.value)


# --- Reading programs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("replica_groups={}, to_apply=%add", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", ((0, 1), (2, 3))),
        ("replica_groups={{0,1,2},{3}}", ((0, 1, 2), (3,))),
        ("replica_groups=[4,2]<=[8], x=1", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x=1", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['axis_0'=8] {'axis_0'}, x=1", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("source_target_pairs={{0,1},{1,0}}, x=1", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_form(text, expected):
    assert groups(f"channel_id=1, {text}", 8) == expected


def test_a_form_that_is_not_known_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match="replica_groups=@new"):
        groups("replica_groups=@new<8>", 8)


PROGRAM = """
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (w: f32[5]) -> f32[20] {
  %w = f32[5]{0} parameter(0)
  ROOT %g = f32[20]{0} all-gather(%w), replica_groups=[1,4]<=[4], dimensions={0}
}

%all-reduce-scatter (r: f32[8]) -> f32[2] {
  %r = f32[8]{0} parameter(0)
  %ar = f32[8]{0} all-reduce(%r), replica_groups={}, to_apply=%add
  ROOT %d = f32[2]{0} slice(%ar), slice={[0:2]}
}

%body (t: (f32[4])) -> (f32[4]) {
  %t = (f32[4]{0}) parameter(0)
  %v = f32[4]{0} get-tuple-element(%t), index=0
  %p = f32[4]{0} collective-permute(%v), source_target_pairs={{0,1},{1,0}}
  ROOT %u = (f32[4]{0}) tuple(%p)
}

%condition (t.1: (f32[4])) -> pred[] {
  %t.1 = (f32[4]{0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%none (n: f32[4]) -> f32[4] {
  ROOT %n = f32[4]{0} parameter(0)
}

%some (m: f32[4]) -> f32[4] {
  %m = f32[4]{0} parameter(0)
  ROOT %x = f32[4]{0} all-reduce(%m), replica_groups={{0,1},{2,3}}, to_apply=%add
}

ENTRY %main (x.1: f32[4], y: bf16[6], z: f32[5], i: s32[], q: f32[8]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %y = bf16[6]{0} parameter(1), metadata={op_name="y"}
  %z = f32[5]{0} parameter(2), metadata={op_name="jit(step)/norm/z"}
  %i = s32[] parameter(3), metadata={op_name="i"}
  %q = f32[8]{0} parameter(4)
  %start = (f32[4]{0}, bf16[6]{0}) all-reduce-start(%x.1, %y), replica_groups={}, to_apply=%add
  %done = (f32[4]{0}, bf16[6]{0}) all-reduce-done(%start)
  %first = f32[4]{0} get-tuple-element(%done), index=0
  %async = ((f32[5]{0}), f32[20]{0}) async-start(%z), calls=%wrapped
  %gathered = f32[20]{0} async-done(%async), calls=%wrapped
  %scattered = f32[2]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter
  %init = (f32[4]{0}) tuple(%first)
  %loop = (f32[4]{0}) while(%init), condition=%condition, body=%body, TRIPS
  %looped = f32[4]{0} get-tuple-element(%loop), index=0
  ROOT %either = f32[4]{0} conditional(%i, %looped, %looped), branch_computations={%none, %some}
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')


def test_every_collective_counts_once_with_its_bytes_groups_and_times():
    found = [(c.kind, c.nbytes, shape_of(c.groups), c.times) for c in collectives(PROGRAM, 4)]
    assert found == [
        ("all-reduce", 16 + 12, "all 4", 1),  # two arrays, one start and one end
        ("all-gather", 20, "all 4", 1),
        ("reduce-scatter", 32, "all 4", 1),  # as a TPU writes it
        ("collective-permute", 16, "2 of 2: {0,1}, …", 3),  # in a loop of 3
        ("all-reduce", 16, "2 of 2: {0,1}, …", 1),  # of the longer branch
    ]


def test_names_come_from_what_went_in_where_there_are_none():
    reduced, gathered, *_ = collectives(PROGRAM, 4)
    assert reduced.names == ("y",)
    assert gathered.names == ("jit(step)/norm/z",)


def test_it_is_known_which_collectives_others_need():
    last = {c.kind: c.last for c in collectives(PROGRAM, 4)}
    assert last == {
        "all-reduce": True,  # the second one; the dictionary keeps the last
        "all-gather": True,
        "reduce-scatter": True,
        "collective-permute": False,
    }
    assert not collectives(PROGRAM, 4)[0].last


def test_a_tpus_algorithm_is_read_and_others_have_none():
    text = (
        'backend_config={"flags":[],"collective_algorithm_config":{"emitter":"RotatedPincerEmitter",'
        '"strategy":"StrategyND","debug":"StrategyND{colors:2 phases:3 cores:{4 4}}"},"x":{}}'
    )
    assert algorithm(text) == "RotatedPincer, ND, phases: 3"
    assert algorithm('backend_config={"collective_backend_config":{}}') == ""


# --- Compiled programs ------------------------------------------------------------------------

WIDTHS = (6, 5)


def account(sync, **options):
    options = {"model": "mlp", "widths": WIDTHS, "batch_size": 4, **options}
    (found,) = compile_all(Ledger(sync=(sync,), **options)).accounts
    return found


def per_layer(account, direction):
    """How many collectives each norm layer has in a direction, and of how many bytes."""
    found = {}
    for entry in account.entries:
        for purpose in entry.purposes:
            if purpose.direction == direction:
                count, nbytes = found.get(purpose.what, (0, 0))
                each = [(one.times, one.nbytes) for one in entry.collectives]
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
    assert per_layer(found, "forward") == {
        f"Normed_{i}": (1, 4 * (2 * c + 1)) for i, c in enumerate(WIDTHS)
    }
    assert counts(found, "backward") == ONE


@pytest.mark.parametrize("mode", MODES)
def test_groups_cost_one_collective_per_layer_and_direction(mode):
    found = account("groups=2", mode=mode)
    assert counts(found, "forward") == counts(found, "backward") == ONE


def test_on_their_own_devices_share_nothing_but_the_parameters_gradients():
    layer = account("all", norms=("layer",))  # whatever is asked of batch norm
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
@pytest.mark.parametrize("sync", ["ring=1", "virtual=8", "groups=0,2,4,6|1,3,5,7", "ghost=2+all"])
def test_other_topologies_cost_one_collective_per_layer_and_direction(sync, mode):
    found = account(sync, mode=mode)
    assert counts(found, "forward") == counts(found, "backward") == ONE


def test_without_a_gradient_of_others_there_is_no_collective_backward():
    found = account("all+gradient=forward")
    assert counts(found, "forward") == ONE
    assert counts(found, "backward") == {}


def test_delayed_statistics_cost_one_collective_per_step():
    found = account("all+every=2")
    entries = {entry.purposes: entry.collectives for entry in found.entries}
    assert set(entries) == {(Purpose("exchange"),), (Purpose("gradients"), Purpose("loss"))}
    (one,) = entries[Purpose("exchange"),]
    assert one.nbytes == 4 * sum(3 * c for c in WIDTHS)


def test_the_forward_pass_alone_has_the_forward_collectives_of_the_step():
    alone, step = (account("all", program=program) for program in ("forward", "step"))
    assert per_layer(alone, "forward") == per_layer(step, "forward")
    assert [e.purposes[0].direction for e in alone.entries] == ["forward"] * len(WIDTHS)


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
    found = account("all", topology=topology)
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
    assert f"pip install -c constraints.txt -e '.[{extra}]'" in said
    assert "Traceback" not in said


# --- The commands -----------------------------------------------------------------------------


def test_the_command_prints_the_table_and_writes_the_json(tmp_path, capsys):
    path = tmp_path / "ledger.json"
    words = ["ledger", "--model", "mlp", "--widths", "6", "--sync", "all", "--json", str(path)]
    assert main([*words, "--markdown"]) == 0
    said = capsys.readouterr().out
    assert "| batch, all | Normed_0 forward | 1 all-gather | 52 | all 8 |" in said
    (content,) = json.loads(path.read_text())
    assert content["config"]["sync"] == "all"
    first = content["collectives"][0]
    assert (first["purposes"], first["kind"], first["nbytes"]) == (
        ["Normed_0 forward"],
        "all-gather",
        52,
    )
    with pytest.raises(RunError, match="there is such a file"):
        Ledger(json=path)


def test_a_norm_that_there_is_not_and_groups_that_do_not_divide_are_refused(capsys):
    assert main(["ledger", "--norms", "bathc"]) == 2
    assert "did you mean 'batch'" in capsys.readouterr().err
    assert main(["ledger", "--sync", "groups=3"]) == 2
    assert "use groups of 2" in capsys.readouterr().err


def test_columns_that_say_nothing_are_left_out():
    found = compile_all(Ledger(model="mlp", widths=(6,), sync=("local",), batch_size=4))
    headings, *rows = table(found)
    assert headings == ("norm, sync", "what", "collectives", "bytes", "groups")
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
