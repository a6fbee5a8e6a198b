"""The norms of language models by their names in a checkpoint: one row for each convention.

A row says what the library transformers does with the norms of some models (`model_type` in their
config.json): which norm, how its gain is kept, in which order it casts, where ε stands, and what
each name in the state dict means. `from_transformers` reads by these rows; one of your own is
`Family(...)`.

The names alone do not tell: `post_attention_layernorm` is the norm before the mlp in Llama and the
one behind attention in Gemma 2; the gain is 1 + weight in Gemma 1 to 3 and the weight in Gemma 4.
Source: `models/<model_type>/modeling_<model_type>.py` of https://github.com/huggingface/transformers,
version 5.24, every row of it held against the installed library by a slow test. The row "meta" is
`llama/model.py` of https://github.com/meta-llama/llama, read and not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from normlab.gains import Gain

Order = Literal["last", "before gain", "gain too"]
"""When a norm casts what it made in float32 to the type of its input: after gain and bias; before
the gain, which is then multiplied in that type; or last, but with 1 + δ formed in the type of δ."""

Branch = Literal["attention", "mlp", "both", "per-layer input"]
"""The branch of a block; both where one norm serves attention and mlp side by side; or Gemma 4's
third, of an embedding for each layer."""


class Form(NamedTuple):
    """What a norm's class computes.

    Attributes:
      kind: `"rms"` or `"layer"`.
      gain: How the leaf `weight` keeps the gain, g itself or δ = g − 1; `None` for no leaf.
      bias: Whether there is a leaf `bias`.
      order: When it casts to the type of its input, an `Order`.

    >>> Form("rms", gain="offset").leaves                  # Gemma's: 1 + weight, and no bias
    {'g': 'weight'}
    """

    kind: str
    gain: Gain | None = "plain"
    bias: bool = False
    order: Order = "last"

    @property
    def leaves(self) -> dict[str, str]:
        """Its leaves, normlab's name -> the library's."""
        there = {"g": self.gain is not None, "b": self.bias}
        return {ours: name for ours, name in (("g", "weight"), ("b", "bias")) if there[ours]}


class Place(NamedTuple):
    """Where a norm stands.

    Attributes:
      place: On the line x' = S(α·x + β·O(F(I x))): `"inner"`, `"outer"` or `"total"`; inside a
        branch: `"q"`, `"k"`, `"v"`, `"heads"` (attention's output by head), `"q latent"`, `"kv
        latent"` (of latent attention); of the net: `"first"`, `"last"`.
      branch: The branch of a block; `None` for a norm of the net.
      heads: Of q and k, `[..., H, D]`: `"shared"` where a gain `[D]` serves all heads, `"all"`
        where they are one sample, `[..., H·D]`.
      form: What it computes, where that is not what the family's others do.
      eps: Its ε, where that is not the family's.
      optional: Whether some blocks, or models, do without it.
      beside: Of a norm without leaves: the path of the one that is there where it is, if it is not
        everywhere.

    >>> place = FAMILIES["llama"].places["layers.*.post_attention_layernorm"]
    >>> place.place, place.branch                          # before the mlp, whatever its name says
    ('inner', 'mlp')
    """

    place: str
    branch: Branch | None = None
    heads: Literal["shared", "all"] | None = None
    form: Form | None = None
    eps: float | None = None
    optional: bool = False
    beside: str | None = None


class Family(NamedTuple):
    """Checkpoints that are alike in their norms.

    Attributes:
      models: Their names, the `model_type` of config.json.
      form: What their norms compute.
      places: The path of each norm, with `*` for the number of a block -> where it stands.
      eps: ε, or the field of config.json that holds it.
      depth: The field that holds the number of blocks.
      fixed: Fields with the value at which this row is right.

    >>> import numpy as np
    >>> from normlab.convert import from_transformers
    >>> place = {"blocks.*.norm": Place("inner", "mlp")}
    >>> own = Family(("own",), Form("rms"), place, eps="eps", depth="layers")
    >>> leaves = {f"blocks.{i}.norm.weight": np.ones(4, "float32") for i in range(2)}
    >>> norms = from_transformers(leaves, {"layers": 2, "eps": 1e-6}, family=own)
    >>> print(*norms.values(), sep="; ")
    block 0, mlp, inner; block 1, mlp, inner
    """

    models: tuple[str, ...]
    form: Form
    places: Mapping[str, Place]
    eps: str | float = "rms_norm_eps"
    depth: str = "num_hidden_layers"
    fixed: Mapping[str, Any] = {}


_LLAMA = Form("rms", order="before gain")
_RMS = Form("rms")
_OFFSET = Form("rms", gain="offset")
_LAYER = Form("layer", bias=True)

_INPUTS = "per-layer input"
_LAST = {"norm": Place("last")}
_PRE = {
    "layers.*.input_layernorm": Place("inner", "attention"),
    "layers.*.post_attention_layernorm": Place("inner", "mlp"),
}
_REORDERED = {
    "layers.*.post_attention_layernorm": Place("outer", "attention"),
    "layers.*.post_feedforward_layernorm": Place("outer", "mlp"),
}
_PERI = _REORDERED | {
    "layers.*.input_layernorm": Place("inner", "attention"),
    "layers.*.pre_feedforward_layernorm": Place("inner", "mlp"),
}
_PARALLEL = {"layers.*.input_layernorm": Place("inner", "both")}
_GPT2 = {
    "h.*.ln_1": Place("inner", "attention"),
    "h.*.ln_2": Place("inner", "mlp"),
    "ln_f": Place("last"),
}


def _qk(heads: Any = "shared", names: str = "{}_norm", **other: Any) -> dict[str, Place]:
    """The norms of q and k."""
    return {
        f"layers.*.self_attn.{names.format(n)}": Place(n, "attention", heads, **other) for n in "qk"
    }


_LATENT = {
    f"layers.*.self_attn.{name}": Place(place, "attention", eps=1e-6, optional=name[0] == "q")
    for name, place in (("q_a_layernorm", "q latent"), ("kv_a_layernorm", "kv latent"))
}
_LINEAR = {
    "layers.*.linear_attn.norm": Place("heads", "attention", "shared", form=_LLAMA, optional=True)
}

_ROWS = (
    Family(
        (
            *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "phi3", "granite", "smollm3"),
            *("glm", "seed_oss", "ernie4_5", "arcee"),
        ),
        _LLAMA,
        _PRE | _LAST,
    ),
    Family(("qwen3", "qwen3_moe"), _LLAMA, _PRE | _LAST | _qk()),
    Family(("olmoe", "minimax_m2"), _LLAMA, _PRE | _LAST | _qk("all")),
    Family(("deepseek_v2", "deepseek_v3"), _LLAMA, _PRE | _LAST | _LATENT),
    Family(("exaone4",), _LLAMA, _REORDERED | _LAST | _qk()),
    Family(
        ("apertus",),
        _LLAMA,
        _LAST
        | _qk()
        | {
            "layers.*.attention_layernorm": Place("inner", "attention"),
            "layers.*.feedforward_layernorm": Place("inner", "mlp"),
        },
    ),
    Family(
        ("glm4",),
        _LLAMA,
        _LAST
        | _PRE
        | {
            "layers.*.post_self_attn_layernorm": Place("outer", "attention"),
            "layers.*.post_mlp_layernorm": Place("outer", "mlp"),
        },
    ),
    Family(("gpt_oss",), _RMS, _PRE | _LAST),
    Family(("olmo2", "olmo3"), _RMS, _REORDERED | _LAST | _qk("all")),
    Family(("gemma",), _OFFSET, _PRE | _LAST),
    Family(("gemma2",), _OFFSET, _PERI | _LAST),
    Family(("gemma3_text",), _OFFSET, _PERI | _LAST | _qk()),
    Family(
        ("gemma4_text",),
        _RMS,
        _PERI
        | _LAST
        | _qk(optional=True)
        | {
            "layers.*.self_attn.v_norm": Place(
                "v",
                "attention",
                "shared",
                form=Form("rms", gain=None),
                beside="layers.*.self_attn.k_norm",
            ),
            "layers.*.post_per_layer_input_norm": Place("outer", _INPUTS, optional=True),
            "per_layer_projection_norm": Place("first", _INPUTS, optional=True),
        },
        fixed={"enable_moe_block": False},
    ),
    # Blocks of linear attention have a gated norm and no q and k; its gain is the plain one.
    Family(("qwen3_next", "qwen3_5_text"), _OFFSET, _PRE | _LAST | _qk(optional=True) | _LINEAR),
    Family(("nemotron",), Form("layer", "offset", True, "gain too"), _PRE | _LAST, "norm_eps"),
    Family(("olmo",), Form("layer", gain=None), _PRE | _LAST, 1e-5),
    Family(("gpt2", "gpt_bigcode"), _LAYER, _GPT2, "layer_norm_epsilon", "n_layer"),
    Family(
        ("gptj",),
        _LAYER,
        {"h.*.ln_1": Place("inner", "both"), "ln_f": Place("last")},
        "layer_norm_epsilon",
        "n_layer",
    ),
    Family(("gpt_neox",), _LAYER, _PRE | {"final_layer_norm": Place("last")}, "layer_norm_eps"),
    Family(
        ("phi",),
        _LAYER,
        _PARALLEL | {"final_layernorm": Place("last")} | _qk(names="{}_layernorm", optional=True),
        "layer_norm_eps",
    ),
    Family(("starcoder2",), _LAYER, _PRE | _LAST, "norm_epsilon"),
    Family(
        ("cohere", "cohere2"),
        Form("layer"),
        _PARALLEL | _LAST,
        "layer_norm_eps",
        fixed={"use_qk_norm": False},
    ),
    Family(
        ("opt",),
        _LAYER,
        {
            "layers.*.self_attn_layer_norm": Place("inner", "attention"),
            "layers.*.final_layer_norm": Place("inner", "mlp"),
            "final_layer_norm": Place("last"),
        },
        1e-5,
        fixed={"do_layer_norm_before": True, "layer_norm_elementwise_affine": True},
    ),
    Family(
        ("meta",),
        _LLAMA,
        _LAST
        | {
            "layers.*.attention_norm": Place("inner", "attention"),
            "layers.*.ffn_norm": Place("inner", "mlp"),
        },
        "norm_eps",
        "n_layers",
    ),
)

FAMILIES: dict[str, Family] = {model: row for row in _ROWS for model in row.models}
"""The rows by `model_type`; `"meta"` for Llama's own files."""
