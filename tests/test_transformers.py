"""Norms of language models, from state dicts written by hand.

Names, shapes and formulas are those of the library transformers 5.24, from its modeling files; it
is not needed here. `tests/test_transformers_slow.py` holds the same rows against its own models.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import convert
from tests.helpers import draw, gap

C, H, KV, D = 8, 4, 2, 6
BF16 = np.dtype(jnp.bfloat16)
EPS = 3e-3  # large enough to show

PRE = {
    "model.layers.{}.input_layernorm.weight": C,
    "model.layers.{}.post_attention_layernorm.weight": C,
    "model.norm.weight": C,
}
POST = {
    "model.layers.{}.post_attention_layernorm.weight": C,
    "model.layers.{}.post_feedforward_layernorm.weight": C,
    "model.norm.weight": C,
}
PERI = PRE | POST | {"model.layers.{}.pre_feedforward_layernorm.weight": C}
SHARED = {f"model.layers.{{}}.self_attn.{n}_norm.weight": D for n in "qk"}
ALL = {
    "model.layers.{}.self_attn.q_norm.weight": H * D,
    "model.layers.{}.self_attn.k_norm.weight": KV * D,
}
NEOX = ("layers.{}.input_layernorm", "layers.{}.post_attention_layernorm", "final_layer_norm")
LATENT = {
    "model.layers.{}.self_attn.q_a_layernorm.weight": 5,
    "model.layers.{}.self_attn.kv_a_layernorm.weight": 3,
}
BARE = {f"model.layers.{{}}.{n}": C for n in ("input_layernorm", "post_attention_layernorm")}


def biased(*names):
    return {f"{name}.{leaf}": C for name in names for leaf in ("weight", "bias")}


# model_type: the leaves, the norms without any, the formula, and the field of ε (or ε itself).
MODELS = {
    "llama": (PRE, {}, "llama", "rms_norm_eps"),
    "mistral": (PRE, {}, "llama", "rms_norm_eps"),
    "phi3": (PRE, {}, "llama", "rms_norm_eps"),
    "qwen3": (PRE | SHARED, {}, "llama", "rms_norm_eps"),
    "olmoe": (PRE | ALL, {}, "llama", "rms_norm_eps"),
    "deepseek_v3": (PRE | LATENT, {}, "llama", "rms_norm_eps"),
    "exaone4": (POST | SHARED, {}, "llama", "rms_norm_eps"),
    "gpt_oss": (PRE, {}, "float32", "rms_norm_eps"),
    "olmo2": (POST | ALL, {}, "float32", "rms_norm_eps"),
    "olmo3": (POST | ALL, {}, "float32", "rms_norm_eps"),
    "gemma": (PRE, {}, "gemma", "rms_norm_eps"),
    "gemma2": (PERI, {}, "gemma", "rms_norm_eps"),
    "gemma3_text": (PERI | SHARED, {}, "gemma", "rms_norm_eps"),
    "gemma4_text": (
        PERI | SHARED,
        {"model.layers.{}.self_attn.v_norm": D},
        "float32",
        "rms_norm_eps",
    ),
    "olmo": ({}, BARE | {"model.norm": C}, "layer", 1e-5),
    "nemotron": (
        biased(*(name.removesuffix(".weight") for name in PRE)),
        {},
        "nemotron",
        "norm_eps",
    ),
    "gpt2": (
        biased("transformer.h.{}.ln_1", "transformer.h.{}.ln_2", "transformer.ln_f"),
        {},
        "layer",
        "layer_norm_epsilon",
    ),
    "gpt_neox": (biased(*(f"gpt_neox.{n}" for n in NEOX)), {}, "layer", "layer_norm_eps"),
    "meta": (
        {
            "layers.{}.attention_norm.weight": C,
            "layers.{}.ffn_norm.weight": C,
            "norm.weight": C,
        },
        {},
        "llama",
        "norm_eps",
    ),
}
STEMS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "meta": "layers"}


def rounded(v, dtype):
    return np.asarray(v, np.float32).astype(dtype)


def formula(name, x, w, b, eps):
    """h of the library, in its order of casts."""
    a = x.astype(np.float64)
    centred = a - a.mean(-1, keepdims=True) * (name in ("layer", "nemotron"))
    h = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    w = None if w is None else w.astype(np.float64)
    if name == "llama":
        return rounded(rounded(h, x.dtype).astype(np.float64) * w, x.dtype)
    if name == "gemma":
        w = 1 + w
    if name == "nemotron":
        w = rounded(1 + w, x.dtype).astype(np.float64)
    h = h if w is None else h * w
    return rounded(h if b is None else h + b.astype(np.float64), x.dtype)


def checkpoint(name, dtype=np.float32, blocks=3):
    """A state dict with leaves that are no norms between them, and its config."""
    shapes, _, _, eps = MODELS[name]
    stem = STEMS.get(name, "model.layers")
    rng = np.random.default_rng(0)
    state = {"model.embed_tokens.weight": rng.normal(size=(11, C)).astype(dtype)}
    for block in range(blocks):
        state[f"{stem}.{block}.self_attn.q_proj.weight"] = np.zeros((H * D, C), dtype)
        state[f"{stem}.{block}.self_attn.q_proj.bias"] = np.zeros(H * D, dtype)
        state[f"{stem}.{block}.self_attn.sinks"] = np.zeros(H, dtype)
        for path, size in shapes.items():
            if "{}" in path:
                state[path.format(block)] = rng.uniform(-1, 2, size).astype(dtype)
    for path, size in shapes.items():
        if "{}" not in path:
            state[path] = rng.uniform(-1, 2, size).astype(dtype)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    depth = "n_layers" if name == "meta" else "n_layer" if name == "gpt2" else "num_hidden_layers"
    config = {"model_type": name, depth: blocks} | ({eps: EPS} if isinstance(eps, str) else {})
    return state, json.loads(json.dumps(config))


def expected(name, state):
    """The formula, the leaves and ε of every norm, by path."""
    shapes, bare, rule, eps = MODELS[name]
    eps = EPS if isinstance(eps, str) else eps
    paths = {key.rpartition(".")[0]: size for key, size in shapes.items()} | bare
    found = {}
    for path, size in paths.items():
        for block in range(3) if "{}" in path else (0,):
            at = path.format(block)
            leaves = [state.get(f"{at}.{leaf}") for leaf in ("weight", "bias")]
            of = 1e-6 if at.endswith("_a_layernorm") else eps
            found[at] = (rule, size, *leaves, of)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_norm_is_found_and_is_the_librarys(name):
    for dtype in (np.dtype(np.float32), BF16):
        state, config = checkpoint(name, dtype)
        norms = convert.from_transformers(state, config)
        wanted = expected(name, state)
        assert set(norms) == set(wanted)
        for path, (rule, size, w, b, eps) in wanted.items():
            placed = norms[path]
            x = draw(len(path), 16, size, mean=0.2).astype(dtype)
            h = placed.apply(jnp.asarray(x))
            assert h.dtype == dtype
            e = formula(rule, x, w, b, eps)
            assert gap(h, e) < (2e-6 if dtype == np.float32 else 1e-2)
            assert dtype == np.float32 or (np.asarray(h) != e).mean() < 0.01
            norm = nl.get(placed.norm.kind, **placed.norm.options)
            by_name, _ = norm.apply(placed.norm.params, (), nl.Site(jnp.asarray(x)), train=False)
            assert gap(by_name, e) < (2e-6 if dtype == np.float32 else 1e-2)
            made, _ = norm.init(nl.Site(jnp.asarray(x)))
            assert jax.tree.structure(made) == jax.tree.structure(placed.norm.params)


PLACES = {
    "llama": ("block 2, attention, inner", "block 2, mlp, inner", "last"),
    "gemma2": (
        "block 2, attention, inner",
        "block 2, attention, outer",
        "block 2, mlp, outer",
        "block 2, mlp, inner",
        "last",
    ),
    "olmo2": (
        "block 2, attention, outer",
        "block 2, mlp, outer",
        "block 2, attention, q, all",
        "block 2, attention, k, all",
        "last",
    ),
    "qwen3": (
        "block 2, attention, inner",
        "block 2, mlp, inner",
        "block 2, attention, q, shared",
        "block 2, attention, k, shared",
        "last",
    ),
    "deepseek_v3": (
        "block 2, attention, inner",
        "block 2, mlp, inner",
        "block 2, attention, q latent",
        "block 2, attention, kv latent",
        "last",
    ),
    "gpt2": ("block 2, attention, inner", "block 2, mlp, inner", "last"),
    "olmo": ("block 2, attention, inner", "block 2, mlp, inner", "last"),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_a_norm_stands_is_said(name):
    norms = convert.from_transformers(*checkpoint(name)).values()
    found = [f"{p}, {p.heads}" if p.heads else str(p) for p in norms if p.block in (2, None)]
    assert sorted(found) == sorted(PLACES[name])


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_nothing_changes(name):
    for dtype in (np.dtype(np.float32), np.dtype(np.float16), BF16):
        state, config = checkpoint(name, dtype)
        norms = convert.from_transformers(state, config)
        alone, arguments = convert.to_transformers(norms)
        eps = MODELS[name][3]
        assert arguments == ({eps: EPS} if isinstance(eps, str) else {})
        assert set(alone) == {key for key in state if re.search(r"norm|ln_", key)}
        for of in (state, {key: jnp.asarray(leaf) for key, leaf in state.items()}):
            back, _ = convert.to_transformers(norms, of)
            assert list(back) == list(of)
            for key, leaf in of.items():
                if key in alone:
                    assert isinstance(back[key], type(leaf))
                    assert back[key].dtype == alone[key].dtype == leaf.dtype
                    np.testing.assert_array_equal(back[key], leaf)
                    np.testing.assert_array_equal(alone[key], leaf)
                else:
                    assert back[key] is leaf


def test_one_plus_delta_is_kept_as_delta_and_formed_in_float32():
    state, config = checkpoint("gemma", BF16)
    small = np.full(C, 2**-9).astype(BF16)
    state["model.norm.weight"] = small
    norm = convert.from_transformers(state, config)["model.norm"].norm
    assert isinstance(norm.params, nl.Offset)
    assert norm.params.d.dtype == jnp.bfloat16
    assert norm.params.g.tolist() == [1 + 2**-9] * C
    assert norm.options["gain"] == "offset"


@pytest.mark.parametrize(
    "write", [convert.to_torch, convert.to_linen, convert.to_nnx, convert.to_keras]
)
def test_a_library_without_such_a_gain_says_so_and_how(write):
    state, config = checkpoint("gemma")
    norm = convert.from_transformers(state, config)["model.norm"].norm
    with pytest.raises(ValueError, match=r"distance from 1.*Affine\(norm.params.g, norm.params.b"):
        write(norm)
    plain = norm._replace(params=nl.Affine(norm.params.g, norm.params.b))
    (gain,) = jax.tree.leaves(write(plain).variables)
    np.testing.assert_array_equal(gain, 1 + state["model.norm.weight"])


def test_changed_norms_are_written_in_the_types_of_the_checkpoint():
    state, config = checkpoint("gemma2", BF16)
    norms = convert.from_transformers(state, config)
    twice = jax.tree.map(lambda v: 2 * v, norms)
    back, _ = convert.to_transformers(twice, state)
    key = "model.layers.1.post_feedforward_layernorm.weight"
    np.testing.assert_array_equal(back[key], 2 * state[key])
    wide = jax.tree.map(lambda v: v.astype(jnp.float32) + 1e-4, norms)
    with pytest.raises(ValueError, match=r"float32, its place in variables bfloat16.*'dtype'"):
        convert.to_transformers(wide, state)
    back, _ = convert.to_transformers(wide, state, allow="dtype")
    assert back[key].dtype == BF16
    np.testing.assert_array_equal(back[key], rounded(state[key].astype("f4") + 1e-4, BF16))


def test_apply_is_a_function_that_jax_transforms():
    for name in ("llama", "gemma", "nemotron"):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            state, config = checkpoint(name, np.dtype(dtype))
            path = next(p for p in state if p.endswith("norm.weight")).removesuffix(".weight")
            placed = convert.from_transformers(state, config)[path]
            a = jnp.asarray(draw(0, 4, 3, C), dtype)
            h = placed.apply(a)
            for same in (jax.jit(convert.Placed.apply)(placed, a), jax.vmap(placed.apply)(a)):
                assert same.dtype == dtype
                assert gap(same, h) < (
                    1e-6 if dtype == jnp.float32 else float(jnp.finfo(dtype).eps)
                )

            def loss(placed, a):
                return (placed.apply(a).astype(jnp.float32) ** 2).sum()

            by_placed, by_a = jax.grad(loss, (0, 1))(placed, a)
            g = by_placed.norm.params[0]
            assert g.dtype == by_a.dtype == dtype
            wide = placed._replace(order="last")
            wide = jax.tree.map(lambda v: v.astype(jnp.float32), wide)
            true = jax.grad(loss, (0, 1))(wide, a.astype(jnp.float32))
            bound = {jnp.float32: 1e-5, jnp.float16: 5e-3, jnp.bfloat16: 4e-2}[dtype]
            assert gap(g, true[0].norm.params[0]) < bound
            assert gap(by_a, true[1]) < bound


def test_a_gain_of_another_type_than_the_input_gives_the_type_that_holds_both():
    state, config = checkpoint("llama")
    placed = convert.from_transformers(state, config)["model.norm"]
    x = draw(0, 4, C).astype(BF16)
    h = placed.apply(jnp.asarray(x))
    assert h.dtype == jnp.float32
    normed = formula("float32", x, None, None, EPS).astype(np.float32)
    assert gap(h, normed * state["model.norm.weight"]) < 1e-6


def gemma3():
    """A model of text and images: its own prefix, and norms of other nets beside."""
    state, config = checkpoint("gemma3_text")
    text = {k.replace("model.", "model.language_model.", 1): v for k, v in state.items()}
    tower = "model.vision_tower.vision_model.encoder.layers.0.layer_norm1"
    others = {f"{tower}.{leaf}": np.ones(C, "f4") for leaf in ("weight", "bias")}
    others["model.multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(C, "f4")
    return others | text, {"model_type": "gemma3", "text_config": config}


def test_the_language_model_of_several_is_found_by_its_path():
    state, config = gemma3()
    with pytest.raises(ValueError, match=r"layer_norm1.*path='model.language_model'"):
        convert.from_transformers(state, config)
    for how in (
        {"path": "model.language_model"},
        {"leave": [r".*vision_tower.*", r".*mm_soft_emb_norm\.weight"]},
    ):
        norms = convert.from_transformers(state, config, **how)
        assert len(norms) == 3 * 6 + 1
        back, _ = convert.to_transformers(norms, state)
        assert list(back) == list(state)
    twice = state | {k.replace("language_model", "draft"): v for k, v in state.items()}
    with pytest.raises(ValueError, match=r"'model.draft.', 'model.language_model.'.*path="):
        convert.from_transformers(twice, config)


def test_blocks_may_differ():
    """Qwen3-Next: a gated norm, whose gain is the plain one, or norms of q and k."""
    state, config = checkpoint("gemma")
    state |= {
        "model.layers.0.linear_attn.norm.weight": np.full(D, 2.0, "f4"),
        "model.layers.1.self_attn.q_norm.weight": np.ones(D, "f4"),
        "model.layers.1.self_attn.k_norm.weight": np.ones(D, "f4"),
    }
    norms = convert.from_transformers(state, config, family="qwen3_next")
    gated = norms["model.layers.0.linear_attn.norm"]
    assert (str(gated), gated.order) == ("block 0, attention, heads", "before gain")
    assert isinstance(gated.norm.params, nl.Affine)
    assert isinstance(norms["model.layers.1.self_attn.q_norm"].norm.params, nl.Offset)
    assert len(norms) == 3 * 2 + 4


def test_a_family_of_ones_own():
    state, _ = checkpoint("qwen3")
    state = {k.replace("self_attn", "mixer"): v for k, v in state.items()}
    row = convert.FAMILIES["llama"]
    places = dict(row.places) | {
        f"layers.*.mixer.{n}_norm": convert.Place(n, "attention", "shared") for n in "qk"
    }
    norms = convert.from_transformers(state, family=row._replace(places=places), eps=1e-6)
    assert len(norms) == 3 * 4 + 1
    assert norms["model.norm"].norm.eps == 1e-6


def broken(name="llama", **changes):
    state, config = checkpoint(name)
    for key, leaf in changes.items():
        state[key.replace("__", ".")] = leaf
    return state, config


def without(*keys, name="llama"):
    state, config = checkpoint(name)
    return {k: v for k, v in state.items() if k not in keys}, config


ONES = np.ones(C, np.float32)
WRONG = {
    "a shard alone": (
        (*without("model.layers.1.input_layernorm.weight"),),
        {},
        "no leaf 'model.layers.1.input_layernorm.weight'",
    ),
    "fewer blocks than the config says": (
        (checkpoint("llama", blocks=2)[0], checkpoint("llama")[1]),
        {},
        "no leaf 'model.layers.2.input_layernorm.weight'",
    ),
    "norms of q and k of a Llama": (
        (checkpoint("qwen3")[0], checkpoint("llama")[1]),
        {},
        "q_norm",
    ),
    "a bias of a Llama": (
        broken(model__norm__bias=ONES),
        {},
        "looks like further norms, 'model.norm.bias'",
    ),
    "a norm by another name": (
        broken(model__layers__0__mlp__sub_ln__weight=ONES),
        {},
        "sub_ln.weight",
    ),
    "a vector called weight": (broken(model__layers__0__mlp__sub__weight=ONES), {}, "sub.weight"),
    "a norm of OLMo 1": (broken("olmo", model__norm__weight=ONES), {}, "model.norm.weight"),
    "no family": ((checkpoint("llama")[0],), {}, "model_type of config.json"),
    "an unknown family": (broken(), {"family": "lama"}, "did you mean 'llama'"),
    "a config that is none": ((checkpoint("llama")[0], [1]), {}, "a config of type list"),
    "no ε": ((checkpoint("llama")[0], {"model_type": "llama"}), {}, "no rms_norm_eps.*eps="),
    "another place of the norms": (
        (checkpoint("llama")[0], {"model_type": "opt", "do_layer_norm_before": False}),
        {},
        "do_layer_norm_before",
    ),
    "no blocks": (({"lm_head.weight": ONES}, {"model_type": "llama"}), {}, "no blocks"),
    "a path of nothing": (broken(), {"path": "decoder"}, "no blocks"),
    "a pattern of nothing": (broken(), {"leave": "vision"}, "leave='vision', which fits no key"),
    "a pattern that is none": (broken(), {"leave": ["("]}, r"leave='\('"),
    "a depth that is none": (
        (checkpoint("llama")[0], checkpoint("llama")[1] | {"num_hidden_layers": "3"}),
        {},
        "num_hidden_layers='3'",
    ),
    "no mapping": ((ONES, {"model_type": "llama"}), {}, "a mapping"),
    "integers": (broken(model__norm__weight=np.ones(C, int)), {}, "model.norm.weight of type int"),
    "a matrix": (
        broken(model__norm__weight=np.ones((C, C), "f4")),
        {},
        "from transformers, model.norm: got",
    ),
    "float64": (broken(model__norm__weight=np.ones(C)), {}, "model.norm.weight in float64"),
}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.replace(" ", "-"))
def test_nothing_fails_in_silence(case):
    (given, how, said) = WRONG[case]
    with pytest.raises(ValueError, match=said) as error:
        convert.from_transformers(*given, **{"eps": None, **how})
    assert re.match(r"from transformers(, model\.norm)?: got ", str(error.value))
    assert "To fix it" in str(error.value)


def test_what_cannot_be_written_is_an_error():
    state, config = checkpoint("llama")
    norms = convert.from_transformers(state, config)
    other = checkpoint("gpt2")[0]
    with pytest.raises(ValueError, match=r"norms with the leaves .*leaves of variables"):
        convert.to_transformers(norms, other)
    wide = state | {"model.norm.weight": np.ones(2 * C, "f4")}
    with pytest.raises(ValueError, match=r"model.norm.weight of shape \(8,\); expected \(16,\)"):
        convert.to_transformers(norms, wide)
    last = norms["model.norm"]
    norms["model.norm"] = last._replace(norm=last.norm._replace(eps=1e-3))
    with pytest.raises(ValueError, match=r"eps=0\.003 and, of 'model\.norm', 0\.001"):
        convert.to_transformers(norms)
