"""QK norm: its seven forms against NumPy, its laws, and what may follow RoPE, by measurement."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normlab as nl
from tests.helpers import draw, gap, mesh

N, T, H, K, D = 2, 3, 4, 2, 8  # examples, tokens, heads of q, heads of k, channels
Q, KEY, V = draw(0, N, T, H, D), draw(1, N, T, K, D), draw(2, N, T, K, D)
QK = {"q": jnp.asarray(Q, jnp.float32), "k": jnp.asarray(KEY, jnp.float32)}
QKV = QK | {"v": jnp.asarray(V, jnp.float32)}


def apply(tensors, norm, params=None, **options):
    return nl.normalize_heads(tensors, norm, params, train=True, **options)[0]


def spoiled(tree, seed=3):
    """Params that a step or two has changed."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda v: v + jnp.asarray(rng.uniform(0.1, 0.9, jnp.shape(v)), v.dtype), tree
    )


def rms(x, axes=-1, eps=1e-6):
    return x / np.sqrt(np.square(x).mean(axes, keepdims=True) + eps)


def length(x, eps=1e-6):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), eps)


def centred(x, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return rms(x, eps=eps)


def grouped(x, groups):
    return length(x.reshape(*x.shape[:-1], groups, -1)).reshape(x.shape)


def rope(x, positions, pairing):
    """RoPE (Su et al. 2021) of `[N, T, H, D]` at positions `[N, T]`."""
    size = x.shape[-1]
    i = np.arange(size // 2)
    first, second = (i, i + size // 2) if pairing == "half" else (2 * i, 2 * i + 1)
    angle = positions[..., None, None] * 100.0 ** (-2 * i / size)
    out = np.empty_like(x)
    out[..., first] = x[..., first] * np.cos(angle) - x[..., second] * np.sin(angle)
    out[..., second] = x[..., first] * np.sin(angle) + x[..., second] * np.cos(angle)
    return out


def logits(h, scale=D**-0.5):
    """Of all pairs of tokens; several heads of q share one of k."""
    k = np.repeat(np.asarray(h["k"], np.float64), h["q"].shape[-2] // h["k"].shape[-2], axis=-2)
    return scale * np.einsum("ntha,nsha->nhts", np.asarray(h["q"], np.float64), k)


# The norm, the options, and what is to come out of q with the params p (a NumPy tree).
_NO_BIAS = {"eps": 1e-6, "use_bias": False}
_COSINE = {"q": nl.get("scale", eps=1e-6), "k": nl.get("scale", eps=1e-6, use_gain=False)}
FORMS = {
    "L2 and a temperature": (_COSINE, {}, lambda x, p: length(x) * (1 if p.g is None else p.g)),
    "a temperature by head": (
        _COSINE,
        {"heads": "own"},
        lambda x, p: length(x) * (1 if p.g is None else p.g[:, None]),
    ),
    "layer, ViT-22B": (nl.get("layer", **_NO_BIAS), {}, lambda x, p: centred(x) * p.g),
    "RMS, Qwen3": (nl.get("rms", **_NO_BIAS), {}, lambda x, p: rms(x) * p.g),
    "RMS, Gemma 3": (
        nl.get("rms", gain="offset", **_NO_BIAS),
        {},
        lambda x, p: rms(x) * (1 + p.d),
    ),
    "RMS by head, x-transformers": (
        nl.get("rms", **_NO_BIAS),
        {"heads": "own"},
        lambda x, p: rms(x) * p.g,
    ),
    "RMS of all heads, OLMo 2": (
        nl.get("rms", **_NO_BIAS),
        {"heads": "all"},
        lambda x, p: rms(x, (-2, -1)) * p.g.reshape(x.shape[-2:]),
    ),
    "L2 after RoPE, Llama 4": (
        nl.get("rms", use_gain=False, **_NO_BIAS),
        {"after_rope": True},
        lambda x, p: rms(x),
    ),
    "a gain by pair after RoPE": (
        nl.get("rms", **_NO_BIAS),
        {"after_rope": "half"},
        lambda x, p: rms(x) * np.concatenate([p.of.g, p.of.g]),
    ),
    "grouped L2": (
        nl.get("rms", groups=2, gain="scalar", eps=1e-12, use_bias=False),
        {},
        lambda x, p: grouped(x, 2) * np.sqrt(D / 2) * p.g,
    ),
    "v too, HybridNorm": (nl.get("rms", **_NO_BIAS), {}, lambda x, p: rms(x) * p.g),
}


@functools.cache
def formed():
    """All forms in one program: their params and what came out."""
    given = {name: QKV if "v too" in name else QK for name in FORMS}
    made = {}
    for name, (norm, options, _) in FORMS.items():
        params, state = nl.init_heads(given[name], norm, **options)
        assert not jax.tree.leaves(state)
        made[name] = spoiled(params)
    run = jax.jit(
        lambda made: {
            name: apply(given[name], norm, made[name], **options)
            for name, (norm, options, _) in FORMS.items()
        }
    )
    return made, run(made)


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_what_numpy_says(name):
    made, out = formed()
    for tensor, x in {"q": Q, "k": KEY, "v": V}.items():
        if tensor in out[name]:
            own = jax.tree.map(lambda v: np.asarray(v, np.float64), made[name][tensor])
            assert gap(out[name][tensor], FORMS[name][2](x, own)) < 1e-5
            assert out[name][tensor].dtype == jnp.float32


def by_head(g, number):
    """The gain of each channel of each head, `[H, D]`."""
    g = np.ones(()) if g is None else np.asarray(g, np.float64)
    g = g[:, None] if g.shape == (number,) else g.reshape(-1, D) if g.size > D else g
    return np.broadcast_to(g, (number, D))


def test_the_bounds_of_the_docstring_hold_and_lengths_are_not_seen():
    made, out = formed()
    for name, (norm, options, _) in FORMS.items():
        if name == "v too, HybridNorm":
            continue
        cosine = norm is _COSINE
        gains = {n: by_head(made[name][n].g, v.shape[-2]) for n, v in QK.items()}
        largest = np.abs(gains["q"] * np.repeat(gains["k"], H // K, axis=0)).max()
        scale = 1.0 if cosine else D**-0.5
        size = 1.0 if cosine else np.sqrt(H * K * D if "all heads" in name else D)
        most = largest * size
        # Tokens that point the same way come near it.
        alike = {n: jnp.broadcast_to(QK["q"][:, :, :1], v.shape) for n, v in QK.items()}
        for tensors in (QK, alike):
            h = apply(tensors, norm, made[name], **options)
            assert np.abs(logits(h, scale)).max() <= most * (1 + 1e-5)
        stretched = {"q": QK["q"] * 300, "k": QK["k"] * 50}  # beside which ε is nothing
        assert gap(logits(apply(stretched, norm, made[name], **options)), logits(out[name])) < 1e-5


def test_no_bound_is_too_large():
    """Where all gains are alike and q points as k, the logit is the bound."""
    alike = {n: jnp.broadcast_to(QK["q"][:, :, :1], v.shape) for n, v in QK.items()}
    for norm in (nl.get("rms"), nl.get("layer")):
        assert abs(np.diagonal(logits(apply(alike, norm)), 0, 2, 3) - np.sqrt(D)).max() < 1e-3
    cosine = apply(alike, nl.get("scale"))
    assert abs(np.diagonal(logits(cosine, 1.0), 0, 2, 3) - 1).max() < 1e-5
    one = {n: jnp.zeros_like(v).at[:, :, 0, 0].set(1.0) for n, v in QK.items()}
    h = apply(one, nl.get("rms"), heads="all")
    assert abs(logits(h)[:, 0].max() - np.sqrt(H * K * D)) < 1e-2


def test_gradients_are_finite_where_q_is_zero():
    made, _ = formed()

    def loss(made, tensors):
        return sum(
            jnp.square(v - 1).sum()
            for name, (norm, options, _) in FORMS.items()
            for v in apply(
                {n: tensors[n] for n in made[name]}, norm, made[name], **options
            ).values()
        )

    grads = jax.jit(jax.grad(loss, (0, 1)))(made, jax.tree.map(jnp.zeros_like, QKV))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_it_is_flaxs_normalize_qk():
    x = jnp.asarray(draw(5, N, T, 16), jnp.float32)
    model = linen.MultiHeadDotProductAttention(4, normalize_qk=True)
    variables = spoiled(model.init(jax.random.key(0), x))
    params = variables["params"]

    def project(name):
        return jnp.einsum("ntc,chd->nthd", x, params[name]["kernel"]) + params[name]["bias"]

    tensors = {"q": project("query"), "k": project("key")}
    gains = {
        n: nl.Affine(params[f"{w}_ln"]["scale"], None) for n, w in (("q", "query"), ("k", "key"))
    }
    h = apply(tensors, nl.get("layer", eps=1e-6), gains)
    out = jax.nn.dot_product_attention(h["q"], h["k"], project("value"))
    out = jnp.einsum("nthd,hdc->ntc", out, params["out"]["kernel"]) + params["out"]["bias"]
    assert gap(out, model.apply(variables, x)) < 1e-5


def test_qwen3s_order_of_casts_differs_by_a_rounding():
    """Qwen3RMSNorm casts to bfloat16, then multiplies by γ; here γ comes first, as in Gemma."""
    half = {n: v.astype(jnp.bfloat16) for n, v in QK.items()}
    gains = {n: spoiled(nl.init_affine(D, use_bias=False)) for n in QK}
    h = apply(half, nl.get("rms", eps=1e-6), gains)
    for name, x in half.items():
        bare = jnp.asarray(rms(np.asarray(x, np.float64)), jnp.bfloat16)
        theirs = gains[name].g.astype(jnp.bfloat16) * bare
        assert h[name].dtype == jnp.bfloat16
        assert gap(h[name], theirs) < 3 * 2**-8
        exact = rms(np.asarray(x, np.float64)) * np.asarray(gains[name].g)
        assert gap(h[name], exact) <= gap(theirs, exact)


def test_any_layout_is_the_same():
    norm, params = nl.get("rms"), {n: spoiled(nl.init_affine(D)) for n in QK}
    expected = apply(QK, norm, params)
    swapped = {n: jnp.swapaxes(v, 1, 2) for n, v in QK.items()}
    out = apply(swapped, norm, params, head_axis=1)
    assert gap({n: jnp.swapaxes(v, 1, 2) for n, v in out.items()}, expected) < 1e-6
    flat = apply({n: v.reshape(-1, *v.shape[2:]) for n, v in QK.items()}, norm, params)
    assert gap({n: v.reshape(QK[n].shape) for n, v in flat.items()}, expected) < 1e-6
    token = apply({n: v[0, 0] for n, v in QK.items()}, norm, params)
    assert gap(token, {n: v[0, 0] for n, v in expected.items()}) < 1e-6
    deep = apply({n: v[None, None] for n, v in QK.items()}, norm, params)
    assert gap(deep, {n: v[None, None] for n, v in expected.items()}) < 1e-6


def test_batch_norm_pools_the_tokens_that_weigh():
    """The heads too, unless they are apart; in one program."""
    norm, kept = nl.get("batch"), np.asarray([[1, 1, 0], [1, 0, 0]], bool)
    bad = {n: jnp.where(kept[..., None, None], v, jnp.nan) for n, v in QK.items()}
    mask = jnp.asarray(kept, jnp.float32)
    made = {heads: nl.init_heads(QK, norm, heads=heads) for heads in ("shared", "own", "all")}

    @functools.partial(jax.jit, static_argnames=("heads", "train"))
    def run(tensors, own, weights, heads, train=True):
        return nl.normalize_heads(tensors, norm, *own, train=train, heads=heads, weights=weights)

    for heads, axes, shape in (("shared", (0, 1), (D,)), ("own", 0, (K, D)), ("all", 0, (K * D,))):
        h, after = run(bad, made[heads], mask, heads)
        state = made[heads][1]
        assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
        read = jax.vmap(lambda s: s.read()) if heads == "own" else lambda s: s.read()
        assert gap(read(after["k"])[0], KEY[kept].mean(axes).reshape(shape)) < 1e-5
        assert np.isfinite(h["k"][kept]).all()
        by_name, _ = run(bad, made[heads], {"q": mask, "k": mask}, heads)
        assert gap(by_name["k"][kept], h["k"][kept]) == 0
        assert gap(run(QK, made[heads], None, heads, train=False)[1], state) == 0
        if heads != "all":
            by_head = {n: jnp.broadcast_to(mask[..., None], v.shape[:-1]) for n, v in QK.items()}
            assert gap(run(bad, made[heads], by_head, heads)[0]["k"][kept], h["k"][kept]) < 1e-6


def test_on_an_explicit_mesh_everything_is_sharded_as_it_came():
    """Examples and heads sharded; batch norm's states, replicated, as the carry of a scan."""
    norm, modes = nl.get("batch"), ("shared", "own", "all")
    made = {heads: nl.init_heads(QK, norm, heads=heads) for heads in modes}

    @jax.jit
    def run(tensors, made):
        def step(states, _):
            both = {
                heads: nl.normalize_heads(
                    tensors, norm, made[heads][0], states[heads], train=True, heads=heads
                )
                for heads in modes
            }
            return {heads: state for heads, (_, state) in both.items()}, both["own"][0]

        return jax.lax.scan(step, {heads: made[heads][1] for heads in modes}, None, length=2)

    expected = run(QK, made)
    with jax.set_mesh(mesh(AxisType.Explicit, i=2, j=2)):
        tensors = jax.device_put(QK, P("i", None, "j", None))
        out = run(tensors, jax.device_put(made, P()))
    assert gap(out, expected) < 1e-5
    assert out[1]["q"].sharding.spec == P(None, "i", None, "j", None)


# After RoPE: the norm, its options, and for which `after_rope` it is let through.
ANY, PAIRS, NONE = (True, "half", "interleaved"), ("half", "interleaved"), ()
AFTER = {
    "rms, no gain": ("rms", {"use_gain": False, "use_bias": False}, ANY),
    "rms, one gain": ("rms", {"gain": "scalar", "use_bias": False}, ANY),
    "rms, a gain by channel": ("rms", {"use_bias": False}, PAIRS),
    "rms, an offset by channel": ("rms", {"gain": "offset", "use_bias": False}, PAIRS),
    "rms, a bias": ("rms", {"use_gain": False}, NONE),
    "rms of groups": ("rms", {"groups": 2, "use_gain": False, "use_bias": False}, ("interleaved",)),
    "rms of a part": ("rms", {"part": 0.5, "use_gain": False, "use_bias": False}, ("interleaved",)),
    "scale": ("scale", {}, ANY),
    "none": ("none", {"use_bias": False}, ANY),
    "layer, no gain": ("layer", {"use_gain": False, "use_bias": False}, NONE),
    "dyt": ("dyt", {"use_bias": False}, NONE),
    "batch": ("batch", {"use_gain": False, "use_bias": False}, NONE),
    "whitening": ("whitening", {"groups": 4, "use_gain": False, "use_bias": False}, NONE),
}


OWN, ALL = ("rms, one gain", "rms, a gain by channel", "batch"), ("rms, a gain by channel",)
CASES = [(name, "shared") for name in AFTER]
CASES += [(name, "own") for name in OWN] + [(name, "all") for name in ALL]


@pytest.mark.parametrize(("name", "heads"), CASES)
def test_what_may_follow_rope_sees_distances_alone(name, heads):
    """By measurement: one example moved by 5 positions; logits may change by rounding only."""
    kind, options, let_through = AFTER[name]
    norm = nl.get(kind, **options)
    run = jax.jit(
        lambda tensors, params, state: nl.normalize_heads(
            tensors, norm, params, state, train=True, heads=heads
        )[0]
    )
    for after in ANY:
        allowed = after in let_through
        if not allowed:
            with pytest.raises(ValueError, match="after RoPE"):
                nl.init_heads(QK, norm, heads=heads, after_rope=after)
        params, state = nl.init_heads(QK, norm, heads=heads, after_rope=allowed and after)
        for pairing in PAIRS if after is True else (after,):
            moved = []
            for shift in (0, 5):
                at = np.arange(T) + np.array([[shift], [0]])
                turned = {
                    n: jnp.asarray(rope(x, at, pairing), jnp.float32)
                    for n, x in (("q", Q), ("k", KEY))
                }
                moved.append(logits(run(turned, spoiled(params), state))[0])
            change = np.abs(moved[1] - moved[0]).max() / np.abs(moved[0]).max()
            if allowed:
                assert change < 1e-5
            elif after is not True:
                assert change > 1e-3


def test_it_is_refused_by_its_shape_traced_or_not():
    norm, ones = nl.get("rms"), {n: nl.init_affine(D, use_bias=False) for n in QK}
    refused = functools.partial(apply, QK, norm, after_rope="half")
    for call in (refused, functools.partial(jax.eval_shape, refused)):
        with pytest.raises(ValueError, match="gain or bias by channel after RoPE"):
            call(ones)
    paired = {n: nl.Paired(nl.Affine(jnp.ones(D // 2), None), "half", D) for n in QK}
    inside = jax.jit(jax.vmap(lambda x, p: apply(x, norm, p, after_rope="half"), (0, None)))
    assert gap(inside(QK, paired), apply(QK, norm)) < 1e-6
    with pytest.raises(ValueError, match="by channel after RoPE"):
        apply(QK, norm, paired, after_rope="interleaved")


@pytest.mark.parametrize("heads", ["shared", "own", "all"])
def test_no_tokens_make_none(heads):
    for shape in ((0, T, H, D), (N, 0, H, D)):
        assert apply({"q": jnp.ones(shape)}, nl.get("rms"), heads=heads)["q"].shape == shape


R = nl.get("rms")
WRONG = {
    "no tensors": (lambda: apply({}, R), "no tensors"),
    "names": (lambda: apply(QK, R, {"q": None}), "give 'k' both or neither"),
    "norms": (lambda: apply(QK, {"q": R}), "norm for q"),
    "gain": (lambda: apply(QK, R, dict.fromkeys(QK, nl.init_affine(3))), "g of shape (3,)"),
    "own gain": (
        lambda: apply(QK, R, dict.fromkeys(QK, nl.init_affine(D)), heads="own"),
        "a first axis of 4",
    ),
    "weights": (lambda: apply(QK, R, weights=jnp.ones(5)), "weights of shape (5,)"),
    "weights by head": (
        lambda: apply({"q": QK["q"]}, R, weights=jnp.ones((N, T, H)), heads="all"),
        "measured together",
    ),
    "no state": (
        lambda: nl.normalize_heads(QK, nl.get("batch"), train=False),
        "train=False without a state",
    ),
    "head axis": (lambda: apply(QK, R, head_axis=-1), "channels on the last axis"),
    "odd": (
        lambda: apply({"q": jnp.ones((2, 2, 3))}, R, after_rope="half"),
        "an even number of channels",
    ),
    "norm of weights": (lambda: apply(QK, nl.get("weight")), "the kernel of the layer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_means_nothing_is_an_error(name):
    call, words = WRONG[name]
    with pytest.raises(ValueError, match=r"; expected .*To fix it") as error:
        call()
    assert words in str(error.value)
