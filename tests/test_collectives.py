"""The ledger of any program: collectives read from what was compiled, and what is refused."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
import normlab.linen
from normlab.instruments import ledger
from normlab.instruments.collectives import (
    Purpose,
    algorithm,
    by_purpose,
    collectives,
    groups,
    purpose,
    sends,
)
from normlab.instruments.hlo import parse

# --- The text of programs ---------------------------------------------------------------------


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
    found = collectives(PROGRAM, 4)
    assert [(c.kind, c.nbytes, c.shape, c.times, c.when_needed) for c in found] == [
        ("all-reduce", 16 + 12, "all 4", 1, False),  # two arrays, one start and one end
        ("all-gather", 20, "all 4", 1, False),
        ("reduce-scatter", 32, "all 4", 1, False),  # as a TPU writes it
        ("collective-permute", 16, "1 pair: 0↔1", 3, False),  # in a loop of 3
        ("all-reduce", 16, "2 of 2: {0,1}, …", 1, True),  # of one branch
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


BRANCHES = """
HloModule jit_step, num_partitions=4

%both (b: f32[4]) -> f32[4] {
  %b = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%b), replica_groups={}
}

%more (m: f32[4]) -> f32[4] {
  %m = f32[4]{0} parameter(0)
  %r1 = f32[4]{0} all-reduce(%m), replica_groups={}
  %r2 = f32[4]{0} all-reduce(%r1), replica_groups={}
  ROOT %g = f32[16]{0} all-gather(%r2), replica_groups={}, dimensions={0}
}

%rises (c: f32[4]) -> pred[] {
  %c = f32[4]{0} parameter(0)
  %all = f32[4]{0} all-reduce(%c), replica_groups={}
  ROOT %p = pred[] custom-call(%all)
}

ENTRY %main (x: f32[4], i: pred[]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %i = pred[] parameter(1)
  %one = f32[4]{0} conditional(%i, %x, %x), true_computation=%both, false_computation=%more
  ROOT %loop = f32[4]{0} while(%one), condition=%rises, body=%both
}
"""


def test_what_all_branches_have_always_runs_and_a_condition_once_at_least():
    found = [(c.kind, c.times, c.when_needed) for c in collectives(BRANCHES)]
    assert found == [
        ("all-reduce", 1, False),  # of both branches
        ("all-reduce", 1, True),
        ("all-gather", 1, True),
        ("all-reduce", 1, False),  # the loop's condition
        ("all-reduce", 1, True),  # that again
        ("all-reduce", 1, True),  # and the body
    ]


COUNTED = """
%body (t: (s32[], f32[4], s32[])) -> (s32[], f32[4], s32[]) {
  %t = (s32[], f32[4]{0}, s32[]) parameter(0)
  %one = s32[] constant(STEP)
  %i = s32[] get-tuple-element(%t), index=0
  %next = s32[] add(%i, %one)
  %v = f32[4]{0} get-tuple-element(%t), index=1
  %r = f32[4]{0} all-reduce(%v), replica_groups={{0,1}}
  %kept = s32[] get-tuple-element(%t), index=2
  ROOT %u = (s32[], f32[4]{0}, s32[]) tuple(%next, %r, LAST)
}

%fused (f: s32[]) -> pred[] {
  %f = s32[] parameter(0)
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%f, %n), direction=LT
}

%condition (w: (s32[], f32[4], s32[])) -> pred[] {
  %w = (s32[], f32[4]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%w), index=0
  %end = s32[] get-tuple-element(%w), index=2
  %five = s32[] constant(5)
  ROOT %lt = pred[] COMPARE
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4], s32[]) {
  %x = f32[4]{0} parameter(0)
  %zero = s32[] constant(0)
  %copied = s32[] copy(%zero)
  %nine = s32[] constant(9)
  %init = (s32[], f32[4]{0}, s32[]) tuple(%copied, %x, %nine)
  ROOT %loop = (s32[], f32[4]{0}, s32[]) while(%init), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(
    ("compare", "step", "last", "trips"),
    [
        ("compare(%j, %five), direction=LT", 1, "%kept", 5),
        ("compare(%j, %five), direction=LE", 1, "%kept", 6),
        ("compare(%five, %j), direction=GT", 2, "%kept", 3),
        ("compare(%j, %end), direction=LT", 1, "%kept", 9),
        ("fusion(%j), kind=kLoop, calls=%fused", 1, "%kept", 7),
        ("compare(%j, %end), direction=LT", 1, "%next", None),  # the end moves
        ("compare(%j, %five), direction=LT", 0, "%kept", None),
        ("compare(%j, %five), direction=NE", 1, "%kept", None),
        ("custom-call(%j)", 1, "%kept", None),
    ],
)
def test_a_loop_whose_length_the_compiler_does_not_tell_is_counted(compare, step, last, trips):
    text = COUNTED.replace("COMPARE", compare).replace("STEP", str(step)).replace("LAST", last)
    program = parse(text, "test")
    main = program.computations["main"]
    assert program.trips(main, main.instructions["loop"]) == trips
    (one,) = collectives(text, 2)
    assert (one.times, one.when_needed) == (trips or 1, trips is None)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(step)/shard_map/jvp(Net)/BatchNorm_0/psum", ("Net/BatchNorm_0", "forward")),
        ("jit(f)/transpose(jvp(Net))/while/body/closed_call/Dense/dot", ("Net/Dense", "backward")),
        ("jit(f)/pmap(g)/vmap(outer)/cond/branch_1_fun/inner/psum", ("outer/inner", "")),
        ("jit(f)/Lm/Lm.through/block/block.inner/q/dot", ("Lm/block/q", "")),
        ("transpose(jvp(N))/a/jvp(N)/a/mul", ("N/a", "backward")),
        ("jit(f)/jit(g)/jvp()/checkpoint/rematted_computation/psum", ("", "forward")),
        ("psum", ("", "")),
    ],
)
def test_a_name_says_where_and_in_which_direction(name, expected):
    assert purpose(name) == Purpose(*expected)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (((0, 1), (1, 0)), "1 pair: 0↔1"),
        (((0, 2), (1, 3), (2, 0), (3, 1)), "2 pairs: 0↔2, …"),
        (((0, 1), (1, 2), (2, 0)), "3 sends: 0→1, 1→2, …"),
        (((3, 0),), "1 send: 3→0"),
        (((0, 0), (1, 1)), "2 sends: 0→0, 1→1"),
    ],
)
def test_a_permute_is_told_in_few_words(pairs, said):
    assert sends(pairs) == said


# --- Steps ------------------------------------------------------------------------------------

X = jax.ShapeDtypeStruct((16, 4), jnp.float32)


SPLIT, ALIKE = P("data"), P()


def mapped(f, out_specs=SPLIT):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=out_specs)


def several(x):
    """One sum, one when it is needed, three in a loop, one in a loop without an end, a permute."""
    total = lax.psum(x.sum(0), "data")
    big = total[0] > 3
    total = lax.cond(big, lambda s: lax.psum(s * x[0], "data"), lambda s: s, total)
    add = lambda s, _: (lax.pmax(s + x[0], "data"), None)  # noqa: E731
    total, _ = lax.scan(add, total, length=3)
    total = lax.while_loop(lambda s: s[0] < 9, lambda s: 1 + lax.pmin(s * x[0], "data"), total)
    return x + lax.ppermute(total, "data", [(i, i ^ 1) for i in range(8)])


def test_a_step_is_read_jitted_or_not_lowered_or_compiled():
    f = mapped(several)
    lowered = jax.jit(f).lower(X)
    found = ledger(f, X)
    for other in (ledger(jax.jit(f), X), ledger(lowered), ledger(lowered.compile())):
        assert str(other) == str(found)
    assert found.devices == 8
    assert found.memory["arguments"] == 2 * 4 * 4
    assert found.flops > 0
    kinds = [(c.kind, c.times) for c in found.steady]
    assert kinds == [("all-reduce", 1), ("all-reduce", 3), ("collective-permute", 1)]
    assert [c.kind for c in found.when_needed] == ["all-reduce", "all-reduce"]
    assert found.nbytes == 16 * 5


def test_the_table_sets_apart_what_runs_when_needed_and_names_lines():
    found = ledger(mapped(several), X)
    said = str(found)
    assert said.count(", when needed") == 3
    assert said.splitlines()[-2].split()[-3:] == ["2", "all-reduce", "32"]
    assert "4 pairs: 0↔1, …" in said
    rows = json.loads(json.dumps(found.as_dicts()))
    assert all(row["line"].startswith("test_collectives.py:") for row in rows)
    assert {row["when_needed"] for row in rows} == {True, False}


class Net(nn.Module):
    layer: type

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = self.layer(use_running_average=False, axis_name="data")(nn.Dense(3)(x))
        return x


@pytest.mark.parametrize("layer", [nn.BatchNorm, normlab.linen.BatchNorm])
@pytest.mark.parametrize("form", ["shard_map", "pmap"])
def test_a_flax_net_has_a_row_for_each_layer_and_direction(layer, form):
    net = Net(layer)
    plain = Net(functools.partial(layer))

    def loss(params, x):
        out, _ = net.apply(params, x, mutable=["batch_stats"])
        return jnp.square(out - x[:, :3]).mean()

    make = lambda x: plain.init(jax.random.key(0), x)  # noqa: E731
    params = jax.eval_shape(jax.vmap(make, axis_name="data"), jnp.ones((1, 2, 4)))
    params = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape[1:], v.dtype), params)
    grad = lambda params, x: lax.pmean(jax.grad(loss)(params, x), "data")  # noqa: E731
    if form == "pmap":
        step = jax.pmap(grad, "data", in_axes=(None, 0))
        found = ledger(step, params, jax.ShapeDtypeStruct((8, 2, 4), jnp.float32))
    else:
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        found = ledger(jax.shard_map(grad, mesh=mesh, check_vma=False, **specs), params, X)
    said = {str(p) for one in found.collectives for p in one.purposes}  # some are sent as one
    assert {f"Net/BatchNorm_{i} {d}" for i in (0, 1) for d in ("forward", "backward")} <= said
    first = found.collectives[0]
    assert first.purposes == (Purpose("Net/BatchNorm_0", "forward"),)
    assert first.line.startswith("test_collectives.py:")


def test_in_plain_jit_the_compilers_own_collectives_are_named_too():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P("data")))

    def f(x):
        with jax.named_scope("statistics"):
            return x - x.mean(0)

    (row,) = ledger(f, x).as_dicts()
    assert (row["what"], row["collectives"], row["groups"]) == (
        "statistics",
        "1 all-reduce",
        "all 8",
    )


def test_two_programs_that_are_alike_keep_their_own_names():
    def make(name):
        def f(x):
            with jax.named_scope(name):
                return lax.psum(x, "data")

        return mapped(f, ALIKE)

    names = [ledger(make(name), X).as_dicts()[0]["what"] for name in ("first", "second")]
    assert names == ["first", "second"]


def test_jit_of_nnx_is_read():
    f = nnx.jit(mapped(lambda x: lax.psum(x, "data"), ALIKE))
    assert [c.kind for c in ledger(f, X).collectives] == ["all-reduce"]


def test_a_program_without_collectives_says_so():
    found = ledger(lambda x: x + 1, X)
    assert (found.collectives, found.devices, found.nbytes) == ((), 1, 0)
    assert str(found).startswith("no collectives: there is one device")
    assert found.as_dicts() == []
    alone = ledger(mapped(lambda x: x + 1), X)
    assert str(alone).startswith("no collectives: no device asks another one anything\n8 devices.")


def _branching(x):
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("f", "args", "said"),
    [
        (_branching, (X,), "_branching, which jax cannot trace"),
        (lambda x: lax.psum(x, "data"), (X,), "with its shard_map, pmap or mesh"),
        (lambda x: "text", (X,), "static_argnames"),
        (lambda x: x, ("text",), "a function of arrays and the arguments that it takes"),
        (lambda x: x, (), "which jax cannot trace"),
        (X, (), "a function of arrays, or one that is lowered"),
    ],
)
def test_what_is_no_program_is_refused(f, args, said):
    with pytest.raises(ValueError, match=r"^ledger: got ") as error:
        ledger(f, *args)
    assert said in str(error.value)


def test_arguments_of_a_lowered_program_and_one_without_a_text_are_refused():
    lowered = jax.jit(lambda x: x).lower(X)
    with pytest.raises(ValueError, match="leave them out"):
        ledger(lowered, X)
    with pytest.raises(ValueError, match="without a text"):
        collectives("")


def test_entries_of_one_purpose_are_one_row_and_those_for_when_needed_come_last():
    entries = by_purpose(collectives(PROGRAM, 4), lambda one: (Purpose("all"),))
    assert [str(entry) for entry in entries] == ["all", "all, when needed"]
    assert entries[0].kinds == "1 all-reduce, 1 all-gather, 1 reduce-scatter, 3 collective-permute"
    assert entries[0].nbytes == 28 + 20 + 32 + 3 * 16


def test_the_name_of_the_instrument_is_public():
    assert nl.instruments.ledger is ledger
