"""Every row of the families beside the installed transformers: values, ε, casts, places, names."""

import collections
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import convert

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = {
    **{"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4},
    **{"num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 11, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2},
}
EXPERTS = {
    **{"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
    "shared_expert_intermediate_size": 8,
}
LATENT = {
    **{"q_lora_rank": 6, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 4, "n_routed_experts": 4, "moe_intermediate_size": 8, "n_group": 2},
    **{"topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4},
}
LINEAR = {
    **{"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4},
    **{"linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 6},
}
OTHER = {
    "qwen2_moe": EXPERTS,
    "qwen3_moe": EXPERTS,
    "qwen3_next": EXPERTS | LINEAR,
    "qwen3_5_text": LINEAR,
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gptj": {"rotary_dim": 4},
    "gemma4_text": {
        **{"global_head_dim": 4, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1},
        **{"vocab_size_per_layer_input": 11, "num_hidden_layers": 4, "enable_moe_block": False},
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "opt": {"ffn_dim": 8, "word_embed_proj_dim": 16},
}
CASES = {name: (name, {}) for name in convert.FAMILIES if name != "meta"}
CASES |= {
    "phi with norms of q and k": ("phi", {"qk_layernorm": True}),
    "deepseek_v3 without a latent q": ("deepseek_v3", {"q_lora_rank": None}),
    "llama with another ε": ("llama", {"rms_norm_eps": 3e-3}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False}),
}
NORMS = ("RMSNorm", "LayerNorm", "LayerNorm1P", "RMSNormGated", "LayerNormPerHead")
BRANCHES = {
    "attention": ("self_attn", "attn", "attention", "linear_attn"),
    "mlp": ("mlp", "block_sparse_moe"),
}


def built(name, options):
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **SMALL | OTHER.get(name, {}) | options)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for norm in norms_of(model).values():
            for p in norm.parameters():  # of gains about 1, of δ and biases about 0
                p += 1.2 * torch.rand_like(p) - 0.6
    return model


def norms_of(model):
    return {n: m for n, m in model.named_modules() if type(m).__name__.endswith(NORMS)}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.replace(" ", "-"))
def model(request):
    return built(*CASES[request.param])


def of_torch(t):
    t = t.detach()
    return jnp.asarray(t.float().numpy()).astype(str(t.dtype).removeprefix("torch."))


def by_name(placed, a, gate=None):
    params = placed.norm.params if gate is None else nl.modulate(placed.norm.params, gate=gate)
    norm = nl.get(placed.norm.kind, **placed.norm.options)
    return norm.apply(params, (), nl.Site(a), train=False)[0]


def inputs(placed, model, path):
    """Values of several sizes, from near ε to a hundred, for the module under a path."""
    sizes = [v.size for v in placed.norm.params if v is not None]
    config = model.config
    size = sizes[0] if sizes else (config.head_dim if placed.heads else config.hidden_size)
    rng = np.random.default_rng(len(path))
    scale = np.exp(rng.uniform(-7, 5, (64, 1))).astype("float32")
    x = torch.as_tensor(rng.normal(0.3, 1, (64, size)).astype("float32") * scale)
    gated = "Gated" in type(model.get_submodule(path)).__name__
    return x, torch.as_tensor(rng.normal(size=x.shape).astype("float32")) if gated else None


def test_all_norms_are_found_and_compute_the_same_in_float32(model):
    norms = convert.from_transformers(model)
    assert set(norms) == set(norms_of(model))
    for path, placed in norms.items():
        x, z = inputs(placed, model, path)
        with torch.no_grad():
            expected = model.get_submodule(path)(*([x] if z is None else [x, z])).numpy()
        gate = None if z is None else jax.nn.silu(jnp.asarray(z.numpy()))
        a = jnp.asarray(x.numpy())
        ours = placed.apply(a) if gate is None else placed.apply(a) * gate
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-6, err_msg=path)
        np.testing.assert_allclose(by_name(placed, a, gate), expected, rtol=2e-5, atol=2e-6)


def test_they_stand_where_the_table_says(model):
    """By what goes in and out of the modules in a forward pass."""
    seen = collections.defaultdict(list)
    hooks = []

    def remember(path):
        def hook(module, args, kwargs, out):
            given = args[0] if args else kwargs.get("hidden_states")
            seen[path].append((given, out[0] if isinstance(out, tuple) else out))

        return hook

    for path, module in model.named_modules():
        hooks.append(module.register_forward_hook(remember(path), with_kwargs=True))
    with torch.no_grad():
        model(torch.arange(1, 9)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    tested = 0
    for path, placed in convert.from_transformers(model).items():
        (given, made), *_ = seen[path]
        if placed.place in ("inner", "outer"):
            block = path.rpartition(".")[0]
            both = ("attention", "mlp") if placed.branch == "both" else (placed.branch,)
            for branch in both:
                names = [n for n in BRANCHES.get(branch, ()) if f"{block}.{n}" in seen]
                if not names:  # OPT's mlp, and the third branch of Gemma 4, are no modules
                    continue
                ((first, last), *_) = seen[f"{block}.{names[0]}"]
                same = (made, first) if placed.place == "inner" else (given, last)
                assert torch.equal(same[0].flatten(), same[1].flatten()), path
                tested += 1
        elif placed.place == "last":
            assert torch.equal(made, seen["lm_head" if "lm_head" in seen else "embed_out"][0][0])
            tested += 1
        elif placed.place in ("q", "k", "v"):
            heads = 4 if placed.place == "q" else model.config.num_key_value_heads
            assert given.numel() == 8 * heads * 4, path
            assert given.shape[-1] == (4 if placed.heads == "shared" else heads * 4), path
    assert tested > 2


def test_there_and_back_is_the_same_to_the_bit(model):
    for dtype in (torch.float32, torch.bfloat16):
        state = {name: leaf.to(dtype) for name, leaf in model.state_dict().items()}
        norms = convert.from_transformers(state, model.config)
        back, arguments = convert.to_transformers(norms, state)
        assert list(back) == list(state)
        assert all(back[n].dtype == v.dtype and torch.equal(back[n], v) for n, v in state.items())
        assert all(getattr(model.config, name) == value for name, value in arguments.items())


def places(a, e):
    """By how many units in the last place of bfloat16 two arrays differ."""

    def ordered(v):
        bits = np.asarray(v).view(np.int16).astype(int)
        return np.where(bits < 0, -32768 - bits, bits)

    return np.abs(ordered(a) - ordered(e))


def test_in_bfloat16_the_casts_are_those_of_the_library(model):
    """To the bit, but for float32 sums that fall on the other side of a tie.

    By name, where the library casts before the gain, h has one rounding less, so that a part of the
    values is a unit in the last place away, two at most. A gain 1 + δ that is rounded itself, as in
    Nemotron, changes h before the bias, which may leave any small part of it.
    """
    half = model.bfloat16()
    apply = jax.jit(lambda placed, a: placed.apply(a))
    for path, placed in convert.from_transformers(half).items():
        assert all(v is None or v.dtype == jnp.bfloat16 for v in placed.norm.params)
        x, z = inputs(placed, half, path)
        if z is not None:
            continue
        x = x.bfloat16()
        with torch.no_grad():
            expected = of_torch(half.get_submodule(path)(x))
        a = of_torch(x)
        for ours in (placed.apply(a), apply(placed, a)):
            assert ours.dtype == expected.dtype == jnp.bfloat16
            off = places(ours, expected)
            assert off.max() <= 1, path
            assert (off > 0).mean() < 2e-3, path
        if placed.order != "gain too":
            off = places(by_name(placed, a), expected)
            before = placed.order == "before gain"
            assert off.max() <= 1 + before, path
            assert (0.1 < (off > 0).mean() < 0.4) if before else ((off > 0).mean() < 2e-3), path


def test_a_file_of_safetensors_and_a_model_of_text_and_images(tmp_path):
    """Through a file, in bfloat16, read as arrays of torch, of NumPy and of JAX."""
    flax_files = pytest.importorskip("safetensors.flax")
    numpy_files, torch_files = (pytest.importorskip(f"safetensors.{n}") for n in ("numpy", "torch"))
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    config = transformers.Gemma3Config(text_config=SMALL, vision_config=vision)
    model = transformers.Gemma3ForConditionalGeneration(config).bfloat16()
    leaves = {n: v.contiguous() for n, v in model.state_dict().items() if n != "lm_head.weight"}
    torch_files.save_file(leaves, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read = []
    for files in (torch_files, numpy_files, flax_files):
        state = files.load_file(tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"vision.*path='model.language_model'"):
            convert.from_transformers(state, config)
        norms = convert.from_transformers(state, config, path="model.language_model")
        assert len(norms) == 2 * 6 + 1
        read.append(norms)
        back, _ = convert.to_transformers(norms, state)
        files.save_file(back, tmp_path / "again.safetensors")
        again = torch_files.load_file(tmp_path / "again.safetensors")
        assert again.keys() == leaves.keys()
        assert all(again[n].dtype == torch.bfloat16 for n in again)
        assert all(torch.equal(again[n], v) for n, v in leaves.items())
    for norms in read[1:]:
        assert jax.tree.structure(norms) == jax.tree.structure(read[0])
        for a, e in zip(jax.tree.leaves(norms), jax.tree.leaves(read[0]), strict=True):
            assert a.dtype == e.dtype == jnp.bfloat16
            np.testing.assert_array_equal(a, e)
