"""Every way to say no: the norm, the value given, what was expected, and what to change."""

import jax
import jax.numpy as jnp
import pytest

import normlab as nl
from normlab import Affine, Conv, Dense, Parts, Site

A = jnp.ones((4, 3))  # examples, channels
IMAGE = jnp.ones((2, 4, 4, 6))
W = jnp.ones((5, 3))
X = jnp.ones((4, 5))
STATE = nl.init_running(3)


def batch(a=A, params=None, state=None, train=True, **options):
    return nl.batch_norm(a, params, state, train=train, **options)


def init(name, site=None, **options):
    return nl.get(name, **options).init(Site(A, X, W) if site is None else site)


def moments(**options):
    return nl.moments(A, **{"axes": 0} | options)


def case(label, call, *words):
    return pytest.param(call, words, id=label)


# A call and the words its message must have.
TABLE = [
    # parameters
    *(
        case(
            f"{norm}: gain of another size",
            lambda f=f: f(Affine(jnp.ones(2), None)),
            *(name, "g of shape (2,)", "shape (4, 3)", "(3,)", "init_affine(3)"),
        )
        for norm, name, f in (
            ("batch", "batch norm", lambda p: batch(params=p)),
            ("layer", "layer norm", lambda p: nl.layer_norm(A, p)),
            ("rms", "RMS norm", lambda p: nl.rms_norm(A, p)),
            ("group", "group norm", lambda p: nl.group_norm(A, p, groups=1)),
            ("cosine", "cosine norm", lambda p: nl.cosine_norm(X, W, p)),
            ("centred", "centred cosine norm", lambda p: nl.cosine_norm(X, W, p, centred=True)),
        )
    ),
    case(
        "instance: gain of another size",
        lambda: nl.instance_norm(IMAGE, Affine(jnp.ones(2), None)),
        "instance norm",
        "g of shape (2,)",
        "(2, 4, 4, 6)",
        "init_affine(6)",
    ),
    case(
        "bias of another size",
        lambda: nl.layer_norm(A, Affine(None, jnp.ones(4))),
        "layer norm",
        "b of shape (4,)",
        "(3,)",
    ),
    *(
        case(
            f"a gain that a condition made, of {shape}",
            lambda shape=shape: nl.instance_norm(IMAGE, Affine(jnp.ones(shape), None)),
            *("instance norm", f"g of shape {shape}", "example (2, 6)", *words),
        )
        for shape, *words in (
            ((6, 2), "transpose it to one by example, (2, 6)", "nl.modulate(params, scale, shift)"),
            ((2, 12), "jnp.split(..., 2, axis=-1), each (2, 6)", "nl.modulate("),
            ((2, 1, 6), "reshape it to one by example, (2, 6)", "nl.modulate("),
            ((2, 6, 1, 1), "reshape it to one by example, (2, 6)", "set channel_axis"),
            ((10, 6), "its row for each example, g[labels], of shape (2, 6)", "nl.modulate("),
            ((1, 6), "g.reshape(6)", "nl.modulate("),
            ((4, 4, 6), "an axis for the examples, g[None]", "nl.modulate("),
            ((2, 4, 6), "make it one by example, (2, 6)", "nl.modulate("),
            ((2,), "init_affine(6)", "g.reshape(-1, 1, 1, 1)"),
        )
    ),
    case(
        "scale and shift of one net together",
        lambda: nl.modulate(nl.init_affine(3), jnp.ones((4, 6))),
        *("modulate", "scale of shape (4, 6)", "jnp.split(..., 2, axis=-1)"),
    ),
    case(
        "a condition in the place of the params",
        lambda: nl.modulate(jnp.ones((4, 3)), jnp.ones((4, 3))),
        *("modulate", "params of type", "modulate(None, scale, shift)"),
    ),
    case(
        "a condition of several norms",
        lambda: nl.combine.chain([nl.get("batch"), nl.get("rms")]).parts(
            nl.modulate(None, A), (STATE, ()), Site(A), train=True
        ),
        *("chain", "Affine", "(*params[:-1], nl.modulate(params[-1], scale, shift))"),
    ),
    case(
        "gain of integers",
        lambda: nl.layer_norm(A, Affine(jnp.ones(3, int), None)),
        "layer norm",
        "g of type int32",
        "floating",
        "astype",
    ),
    case(
        "weight norm: gain of another size",
        lambda: nl.weight_norm(W, nl.Affine(jnp.ones(5), None)),
        "weight norm",
        "g of shape (5,)",
        "(5, 3)",
        "(3,)",
    ),
    case(
        "channels on another axis",
        lambda: batch(IMAGE, nl.init_affine(6), channel_axis=1),
        "batch norm",
        "(6,)",
        "axis 1",
        "(4,)",
        "channel_axis",
    ),
    # state
    case(
        "no state in inference",
        lambda: batch(train=False),
        "batch norm",
        "train=False without a state",
        "train=True",
    ),
    case(
        "state of another size",
        lambda: batch(state=nl.init_running(2)),
        "batch norm",
        "shape (2,)",
        "(4, 3)",
        "shape (3,)",
        "init_running(3)",
    ),
    case(
        "one value per channel",
        lambda: batch(A[:1]),
        "batch norm",
        "(1, 3)",
        "at least two values",
        "larger batch",
    ),
    case(
        "train is no bool", lambda: batch(train=1), "batch norm", "train=1", "int", "True or False"
    ),
    case(
        "train is traced",
        lambda: jax.jit(lambda t: batch(train=t))(True),
        "batch norm",
        "True or False",
        "static_argnames",
    ),
    # numbers
    *(
        case(
            f"{norm}: eps={eps}",
            lambda f=f, eps=eps: f(eps),
            name,
            f"eps={eps}",
            "positive",
            "eps=1e-5",
        )
        for norm, name, f in (
            ("batch", "batch norm", lambda eps: batch(eps=eps)),
            ("layer", "layer norm", lambda eps: nl.layer_norm(A, eps=eps)),
            ("rms", "RMS norm", lambda eps: nl.rms_norm(A, eps=eps)),
            ("group", "group norm", lambda eps: nl.group_norm(A, groups=1, eps=eps)),
            ("instance", "instance norm", lambda eps: nl.instance_norm(IMAGE, eps=eps)),
        )
        for eps in (0, -1.0, float("nan"), float("inf"))
    ),
    *(
        case(
            f"decay={decay}",
            lambda decay=decay: batch(state=STATE, decay=decay),
            "batch norm",
            f"decay={decay}",
            "[0, 1)",
            "weight of the old value",
            "0.9",
        )
        for decay in (1.0, -0.1, float("nan"))
    ),
    case(
        "groups that do not divide",
        lambda: nl.group_norm(IMAGE, groups=4),
        "group norm",
        "groups=4",
        "6 channels",
        "1, 2, 3, 6",
    ),
    case(
        "no groups", lambda: nl.group_norm(IMAGE, groups=0), "group norm", "groups=0", "1, 2, 3, 6"
    ),
    # axes
    case(
        "axis out of range",
        lambda: nl.layer_norm(A, axes=2),
        "layer norm",
        "axes 2",
        "rank 2",
        "between -2 and 1",
    ),
    case(
        "axis given twice", lambda: nl.rms_norm(A, axes=(1, -1)), "RMS norm", "(1, -1)", "distinct"
    ),
    case("channel axis out of range", lambda: batch(channel_axis=5), "batch norm", "5", "rank 2"),
    case("moments: axis out of range", lambda: moments(axes=(0, 7)), "moments", "(0, 7)", "rank 2"),
    case(
        "merge_axes: axis out of range",
        lambda: nl.measure.merge_axes(moments(), 3),
        "merge_axes",
        "3",
    ),
    case(
        "channels on the axis of the examples",
        lambda: nl.group_norm(A, groups=2, channel_axis=0),
        "group norm",
        "channel_axis=0",
        "(4, 3)",
        "examples on axis 0",
    ),
    case(
        "instance: channels on the axis of the examples",
        lambda: nl.instance_norm(IMAGE, channel_axis=0),
        "instance norm",
        "channel_axis=0",
    ),
    case(
        "instance norm without positions",
        lambda: nl.instance_norm(A),
        "instance norm",
        "(4, 3)",
        "one value per example and channel",
        "layer norm",
    ),
    case(
        "registry: instance norm without positions",
        lambda: init("instance"),
        "instance norm",
        "(4, 3)",
        "layer norm",
    ),
    # weights
    case(
        "weights of channels",
        lambda: moments(weights=jnp.ones(3)),
        "moments",
        "weights of shape (3,)",
        "(4, 3)",
        "leading axes",
        "(4,)",
    ),
    case(
        "weights of a higher rank",
        lambda: moments(weights=jnp.ones((4, 3, 1))),
        "moments",
        "(4, 3, 1)",
        "(4, 3)",
    ),
    case("weights that would broadcast", lambda: moments(weights=jnp.ones(1)), "moments", "(1,)"),
    case("batch norm: weights of channels", lambda: batch(weights=jnp.ones(3)), "(3,)", "(4, 3)"),
    # types
    *(
        case(f"complex: {norm}", call, "complex64", "a real one")
        for norm, call in (
            ("moments", lambda: nl.moments(A.astype(complex), 0)),
            ("layer", lambda: nl.layer_norm(A.astype(complex))),
            ("weight", lambda: nl.weight_norm(W.astype(complex))),
        )
    ),
    # the equation
    case(
        "affine: a part of another shape",
        lambda: nl.affine(Parts(*map(jnp.ones, (1, 1, 1, 4))), A),
        "affine",
        "a b of",
        "(4,)",
        "(4, 3)",
        "broadcasts",
    ),
    case(
        "affine: a part that would widen a",
        lambda: nl.affine(Parts(jnp.ones((2, 1, 1)), *map(jnp.ones, (1, 1, 1))), A),
        "affine",
        "a mu of",
        "(2, 1, 1)",
        "(4, 3)",
    ),
    case(
        "invert: a part of another shape",
        lambda: nl.invert(Parts(*map(jnp.ones, (1, 4, 1, 1))), A),
        "a sigma of",
        "(4,)",
        "(4, 3)",
    ),
    case(
        "fold: parts of examples",
        lambda: nl.folding.fold(nl.layer_parts(A, None), W),
        "fold",
        "mu of shape (4, 1)",
        "3 output channels",
        "train=False",
    ),
    case(
        "fold: parts of another layer",
        lambda: nl.folding.fold(Parts(*map(jnp.ones, (1, 7, 1, 1))), W),
        "fold",
        "sigma of shape (7,)",
        "3 output channels",
    ),
    # sites and layers
    *(
        case(
            f"{name} without w",
            lambda name=name: init(name, Site(A, X)),
            words,
            "without w",
            "kernel",
            "w=w",
        )
        for name, words in (
            ("weight", "weight norm"),
            ("cosine", "cosine norm"),
            ("centred_cosine", "centred cosine norm"),
        )
    ),
    case(
        "cosine without x", lambda: init("cosine", Site(A, w=W)), "cosine norm", "without x", "x=x"
    ),
    case(
        "data-dependent init on shapes",
        lambda: init("weight", nl.shapes(X, W), data_init=True),
        "weight norm",
        "shapes at init",
        "data_init=True",
        "values",
    ),
    case(
        "dense: kernel of another size",
        lambda: Dense()(A, W),
        "Dense",
        "(4, 3)",
        "(5, 3)",
        "[..., K] and [K, C]",
    ),
    case("dense: kernel of another rank", lambda: Dense()(A, IMAGE), "Dense", "(2, 4, 4, 6)"),
    case(
        "conv: channels in the middle",
        lambda: Conv(channel_axis=2),
        "Conv",
        "channel_axis=2",
        "first",
    ),
    case(
        "conv: kernel of another size",
        lambda: Conv()(IMAGE, jnp.ones((3, 3, 5, 2))),
        "Conv",
        "(2, 4, 4, 6)",
        "(3, 3, 5, 2)",
        "5 input channels",
        "[*window, K/groups, C]",
    ),
    case(
        "conv: input of another rank",
        lambda: Conv()(IMAGE[0], jnp.ones((3, 3, 6, 2))),
        "Conv",
        "(4, 4, 6)",
        "rank 4",
    ),
    case(
        "conv: kernel without its groups",
        lambda: Conv(groups=2)(IMAGE, jnp.ones((3, 3, 6, 2))),
        "Conv",
        "12 input channels",
        "K/groups",
    ),
    case(
        "weight: kernel of another layer",
        lambda: nl.weight_parts(Site(A, X, W[:, :1])),
        "weight norm",
        "(5, 1)",
        "(4, 3)",
    ),
    case(
        "cosine: kernel of another layer",
        lambda: nl.cosine_parts(Site(A, X, W[:, :1])),
        "cosine norm",
        "(5, 1)",
        "(4, 3)",
    ),
    case(
        "fold: parts of as many examples as channels",
        lambda: nl.folding.fold(nl.layer_parts(jnp.ones((3, 3)), None), W),
        "fold",
        "mu of shape (3, 1)",
    ),
    case("decay without a state", lambda: batch(decay=1.5), "decay=1.5", "[0, 1)"),
    # the registry
    case(
        "unknown norm", lambda: nl.get("bach"), "unknown norm 'bach'", "did you mean 'batch'", "rms"
    ),
    case("nothing like a norm", lambda: nl.row("zzz"), "unknown norm 'zzz'", "Known: none, batch"),
    *(
        case(
            f"{name}: unknown algorithm",
            lambda f=f: f(algorithm="two-pass"),
            *(name, "algorithm='two-pass'", "did you mean 'two_pass'", "shifted, two_pass"),
        )
        for name, f in (
            ("moments", moments),
            ("batch norm", batch),
            ("layer norm", lambda **o: nl.layer_norm(A, **o)),
            ("group norm", lambda **o: nl.group_norm(A, groups=1, **o)),
            ("instance norm", lambda **o: nl.instance_norm(IMAGE, **o)),
        )
    ),
    case(
        "unknown policy for bad batches",
        lambda: batch(bad_batch="ignore"),
        *("batch norm", "bad_batch='ignore'", "skip, propagate, raise"),
    ),
    case(
        "effective sample size: axis out of range",
        lambda: nl.measure.effective_sample_size(jnp.ones(3), 1),
        *("effective sample size", "axes 1", "rank 1"),
    ),
    case(
        "weight standardization without x",
        lambda: init("weight_standardization", Site(A, w=W)),
        *("weight standardization", "without x", "x=x"),
    ),
    case(
        "unknown option", lambda: nl.get("batch", momentum=0.9), "batch norm", "'momentum'", "decay"
    ),
    case("misspelt option", lambda: nl.get("layer", axis=-1), "layer norm", "did you mean 'axes'"),
    case(
        "registry: groups that do not divide",
        lambda: init("group", groups=2),
        "group norm",
        "groups=2",
        "3 channels",
        "1, 3",
    ),
    case("registry: eps", lambda: init("layer", eps=0), "layer norm", "eps=0"),
]


@pytest.mark.parametrize(("call", "words"), TABLE)
def test_a_bad_value_is_an_error_that_says_what_to_change(call, words, request):
    with pytest.raises(ValueError, match=r".") as error:
        call()
    message = str(error.value)
    for word in words:
        assert word in message
    if words[0].endswith("norm"):  # first, to know where to look in a traceback of forty layers
        assert message.startswith(words[0])
    if "unknown" not in message and "option left out" not in request.node.name:
        assert "got " in message
        assert "; expected " in message
        assert "To fix it, " in message


def test_a_bad_option_is_known_before_training_starts():
    """`init` on shapes alone raises what the first step would."""
    for name, options in (
        ("instance", {}),
        ("group", {"groups": 2}),
        ("layer", {"axes": 5}),
        ("batch", {"eps": -1.0}),
    ):
        with pytest.raises(ValueError, match=f"{name} norm"):
            nl.get(name, **options).init(nl.shapes(X, W))
