"""No wrong call ends raw, and none that means nothing is accepted.

Every argument of every public function is tried with values of every kind: with those that its kind
in `normlab._arguments` refuses, and with those that it lets through.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import normlab as nl
import normlab.linen
import normlab.nnx
from docs.api import namespaces
from normlab import convert, instruments
from tests.cases import NAMES
from tests.family import MEMBERS

A = jnp.asarray(np.arange(24.0).reshape(2, 2, 6) % 5, jnp.float32)
X, W = A[0, :, :3], jnp.asarray(np.arange(1.0, 13.0).reshape(3, 4), jnp.float32)
PARAMS, STATE, M = nl.init_affine(6), nl.init_running(6), nl.moments(A[0], 0)
PARTS = nl.Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 4.0)))
SITE = nl.Site(X @ W, X, W)
NORM = nl.get("batch")
PENDING = nl.population.begin(nl.init_running(6)).update(M)
STACKED = jax.tree.map(lambda v: jnp.stack([v, v]), STATE)
TAPPED = nl.population.init_power(3)
MODEL = {
    "Dense_0": {"kernel": W, "bias": jnp.ones(4)},
    "BatchNorm_0": {"mean": jnp.ones(4), "var": jnp.ones(4)},
}
BATCH = {"a": A, "params": PARAMS, "state": STATE, "train": True, "decay": 0.9, "eps": 1e-5}
BATCH |= {"axis_name": None, "weights": jnp.ones(2), "channel_axis": -1, "algorithm": "auto"}
BATCH |= {"bad_batch": "skip", "state_gradient": False, "implementation": "xla"}
EXAMPLE = {"a": A, "params": PARAMS, "eps": 1e-5, "weights": jnp.ones(2), "channel_axis": -1}
EXAMPLE |= {"axis_name": None, "implementation": "xla"}
SQUARE = jnp.eye(6)
LEARNED = nl.placement.Learned(0.5, "channel")
PLACED = nl.placement.Placement(inner=NORM, branch=LEARNED)
CONNECTED = nl.placement.init_residual(PLACED, A[0])
SCHEME = nl.placement.scheme("deepnorm", depth=2)
BLOCKS = {"blocks": {"kernel": jnp.ones((2, 3, 4))}}

# A right call of every function, with all its arguments.
MEASURED = {"a": A, "weights": None, "channel_axis": -1, "axis_name": None}
FORM = {"form": "timm", "eps": 1e-5}
CALLS = {
    nl.add_norm: {"norm": NORM, "params": PARAMS, "state": STATE, "x": A, "y": A, "train": True},
    nl.affine: {
        "parts": PARTS,
        "a": A,
        "weights": None,
        "channel_axis": -1,
        "residual": A,
        "activation": jnp.tanh,
    },
    nl.devices.all_reduce: {"m": M, "axis_name": None},
    nl.batch_norm: BATCH,
    nl.batch_parts: BATCH,
    nl.population.average_running: {"states": STATE, "average": STATE, "step_size": 0.5},
    nl.population.begin: {"states": STATE},
    nl.population.check_conventions: {"saved": STATE, "states": STATE},
    nl.population.restore_states: {"states": STATE, "saved": STATE._asdict()},
    nl.population.change_ddof: {"state": STATE, "ddof": 1, "count": 4.0},
    nl.population.commit: {"states": PENDING, "ok": True, "decay": 0.9, "bad_batch": "skip"},
    nl.population.conventions: {"states": STATE},
    nl.cosine_norm: {
        "x": X,
        "w": W,
        "params": nl.init_affine(4),
        "linear": nl.Dense(),
        "centred": False,
        "axis_name": None,
    },
    nl.cosine_parts: {
        "params": nl.init_affine(4),
        "site": SITE,
        "centred": False,
        "axis_name": None,
    },
    instruments.drift: {"stats": STACKED, "axis_name": None},
    nl.measure.effective_sample_size: {"weights": jnp.ones(3), "axes": 0},
    nl.measure.empty: {"shape": (3,), "dtype": jnp.float32},
    instruments.equivalence: {
        "norm": "batch",
        "axis_name": "data",
        "devices": 2,
        "form": "vmap",
        "x": jnp.ones((4, 3)),
        "w": W,
        "linear": nl.Dense(),
        "weights": jnp.ones(4),
        "recipes": (),
        "seed": 0,
    },
    nl.population.exchange: {
        "states": nl.population.init_delayed(6),
        "axis_name": nl.Sync("d", every=1),
    },
    nl.folding.fold: {"parts": PARTS, "kernel": W, "bias": jnp.ones(4), "unit_axis": -1},
    nl.folding.fold_model: {
        "variables": MODEL,
        "rule": {"BatchNorm_0": "Dense_0"},
        "eps": 1e-5,
        "unit_axis": -1,
        "remove": False,
        "dtype": None,
        "apply": None,
        "folded_apply": None,
    },
    nl.folding.fold_norm: {
        "norm": NORM,
        "params": nl.init_affine(4),
        "state": nl.init_running(4),
        "kernel": W,
        "bias": jnp.ones(4),
        "x": X,
        "linear": nl.Dense(),
    },
    nl.population.freeze: {"states": {"a": STATE}, "rule": "a"},
    nl.get: {"name": "batch"},
    nl.devices.global_gradient: {"grads": {"w": W}, "axis_name": "d"},
    nl.devices.global_mean: {"values": X, "axis_name": "d", "weights": jnp.ones(2)},
    nl.group_norm: EXAMPLE | {"groups": 2, "algorithm": "auto"},
    nl.group_parts: EXAMPLE | {"groups": 2, "algorithm": "auto"},
    nl.init_affine: {
        "channels": 3,
        "use_gain": True,
        "use_bias": True,
        "g": 1.0,
        "dtype": jnp.float32,
    },
    nl.init_gain: {
        "channels": 3,
        "gain": "offset",
        "use_gain": True,
        "use_bias": True,
        "g": 1.0,
        "dtype": jnp.float32,
    },
    nl.combine.compose: {"inner": PARTS, "outer": PARTS},
    nl.combine.mix: {"parts": [PARTS, PARTS], "weights": jnp.ones(2)},
    nl.combine.blend: {
        "parts": [PARTS, PARTS],
        "weights": jnp.ones(2),
        "scale_weights": jnp.ones(2),
    },
    nl.combine.join: {"shift": PARTS, "scale": PARTS},
    nl.combine.chain: {"norms": [NORM, NORM]},
    nl.combine.mixture: {
        "norms": [NORM, NORM],
        "combine": nl.combine.mix,
        "weights": lambda site: jnp.ones(2),
        "use_gain": True,
        "use_bias": True,
    },
    nl.combine.pair: {"shift": NORM, "scale": NORM, "use_gain": True, "use_bias": True},
    nl.combine.split: {"norms": [NORM, NORM], "sizes": (2, 2)},
    nl.decay_mask: {"params": {"kernel": W}, "rule": {"kernel": False}},
    nl.project: {"params": {"kernel": W}, "rule": {"kernel": -1}},
    nl.init_heads: {"tensors": {"q": A}, "norm": nl.get("rms")},
    nl.normalize_heads: {
        "tensors": {"q": A},
        "norm": nl.get("rms"),
        "params": {"q": PARAMS},
        "state": {"q": ()},
        "train": True,
        "weights": jnp.ones(2),
    },
    nl.modulate: {
        "params": PARAMS,
        "scale": jnp.ones((2, 6)),
        "shift": jnp.ones((2, 6)),
        "channel_axis": -1,
    },
    nl.population.init_cumulative: {
        "channels": 3,
        "ddof": 0,
        "estimator": "pooled",
        "dtype": jnp.float32,
    },
    nl.population.init_delayed: {
        "channels": 3,
        "decay": 0.9,
        "ddof": 0,
        "debias": True,
        "dtype": jnp.float32,
    },
    nl.population.select_step: {"states": STATE, "step": 0},
    nl.population.init_domains: {
        "channels": 3,
        "domains": 2,
        "examples": None,
        "inner": "debiased",
        "dtype": jnp.float32,
    },
    nl.population.init_population: {"population": "debiased", "channels": 3},
    nl.population.adapt: {
        "states": {"a": STATE},
        "count": 16.0,
        "estimator": "within",
        "by_example": False,
        "rule": "a",
    },
    nl.population.init_prior: {
        "channels": 3,
        "count": 16.0,
        "estimator": "within",
        "by_example": False,
        "inner": "debiased",
        "dtype": jnp.float32,
    },
    nl.population.init_streaming: {
        "channels": 3,
        "after": True,
        "count": None,
        "inner": "cumulative",
        "dtype": jnp.float32,
    },
    nl.population.init_digits: {"channels": 3, "inner": "debiased", "dtype": jnp.float32},
    nl.population.init_rms: {"channels": 3, "inner": "debiased", "dtype": jnp.float32},
    nl.population.init_window: {"channels": 3, "size": 2, "dtype": jnp.float32},
    nl.population.init_power: {
        "channels": 3,
        "decay": 0.9,
        "backward_decay": None,
        "begin": 0,
        "debias": True,
        "dtype": jnp.float32,
    },
    nl.population.init_mabn: {
        "channels": 3,
        "size": 2,
        "decay": 0.9,
        "r_max": 5.0,
        "begin": 10,
        "dtype": jnp.float32,
    },
    nl.population.taps: {"states": TAPPED},
    nl.population.tapped: {"states": TAPPED, "taps": nl.population.taps(TAPPED)},
    nl.population.take_back: {"states": TAPPED, "seen": nl.population.taps(TAPPED)},
    instruments.tap: {"parts": PARTS},
    instruments.tapped: {"parts": PARTS, "tap": instruments.tap(PARTS), "a": A},
    nl.population.init_renorm: {
        "channels": 3,
        "r_max": 3.0,
        "d_max": 5.0,
        "begin": 5,
        "r_end": 9,
        "d_end": 8,
        "eps": 1e-5,
        "decay": 0.9,
        "ddof": 0,
        "debias": True,
        "dtype": jnp.float32,
    },
    nl.init_running: {
        "channels": 3,
        "decay": 0.9,
        "ddof": 0,
        "debias": True,
        "estimator": "pooled",
        "dtype": jnp.float32,
    },
    nl.instance_norm: EXAMPLE | {"algorithm": "auto"},
    nl.instance_parts: EXAMPLE | {"algorithm": "auto"},
    nl.invert: {"parts": PARTS, "h": A},
    nl.layer_moments: MEASURED | {"axes": -1, "algorithm": "auto"},
    nl.rms_moments: MEASURED | {"axes": -1},
    nl.group_moments: MEASURED | {"groups": 2, "algorithm": "auto"},
    nl.instance_moments: MEASURED | {"a": jnp.ones((2, 3, 4)), "algorithm": "auto"},
    nl.batch_moments: MEASURED | {"algorithm": "auto"},
    nl.learned: {"a": A, "params": None, "channel_axis": -1, "feature_axes": None},
    nl.placement.Learned: {"init": 0.5, "per": "channel", "factor": 2.0},
    nl.placement.Placement: {
        **{"inner": NORM, "outer": NORM, "total": NORM, "skip": 1.0, "branch": LEARNED},
        **{"scale": 0.5, "lerp": True, "delayed": False},
    },
    nl.placement.HyperConnection: {
        **{"inner": NORM, "outer": NORM, "total": NORM, "streams": 2, "reads": 1},
        **{"dynamic": True, "sinkhorn": 5},
    },
    nl.placement.Siamese: {
        **{"inner": NORM, "outer": NORM, "total": NORM, "read": NORM, "branch": 0.5},
    },
    nl.placement.enter: {"x": A, "streams": 2, "channel_axis": -1},
    nl.placement.leave: {"x": A, "channel_axis": -1},
    nl.placement.sinkhorn: {"logits": SQUARE, "steps": 2},
    nl.placement.init_residual: {
        **{"placement": PLACED, "x": A[0], "shortcut": jnp.tanh, "channel_axis": -1}
    },
    nl.placement.residual: {
        **{"placement": PLACED, "params": CONNECTED[0], "state": CONNECTED[1], "F": jnp.tanh},
        **{"x": A[0], "train": True, "weights": jnp.ones(2), "channel_axis": -1, "has_aux": False},
        "shortcut": jnp.tanh,
    },
    nl.placement.scale_init: {"scheme": SCHEME, "params": {"v": {"kernel": W}}},
    nl.placement.scheme: {"name": "pre", "depth": 2, "norm": "rms", "inside": {"q": NORM}},
    nl.placement.stream_variance: {"placements": [PLACED], "gain": 1.0, "start": 1.0},
    nl.stateless: {"parts": nl.layer_parts, "params": lambda site, use_gain, use_bias: None},
    nl.layer_norm: EXAMPLE | {"axes": -1, "algorithm": "auto"},
    nl.layer_parts: EXAMPLE | {"axes": -1, "algorithm": "auto"},
    nl.measure.merge: {"p": M, "q": M},
    nl.measure.merge_axes: {"m": M, "axes": 0},
    nl.population.merge_running: {"states": STACKED},
    nl.moments: {"x": A, "axes": 0, "weights": jnp.ones(2), "algorithm": "auto"},
    nl.folding.plain_weights: {
        "variables": {"Dense_0": {"kernel": W}},
        "rule": {"Dense_0": nl.weight_norm},
        "unit_axis": -1,
        "dtype": None,
        "apply": None,
        "folded_apply": None,
    },
    nl.population.pool_running: {"states": STATE, "axis_name": "d"},
    nl.population.precise: {
        "step": lambda state, batch: nl.batch_norm(batch, None, state, train=True)[1],
        "states": STATE,
        "batches": [A],
        "estimator": None,
    },
    nl.devices.ring: {"count": 4, "reach": 1},
    nl.rms_norm: EXAMPLE | {"axes": -1},
    nl.rms_parts: EXAMPLE | {"axes": -1},
    nl.row: {"name": "batch"},
    nl.population.select_domain: {"states": nl.population.init_domains(3), "domain": 1},
    nl.population.settle: {"states": PENDING, "estimator": None},
    nl.shapes: {"x": X, "w": W, "linear": nl.Dense(), "weights": None},
    nl.population.share_running: {"states": STATE, "devices": 2},
    nl.population.thaw: {"states": {"a": nl.population.freeze(STATE)}, "rule": "a"},
    nl.weight_map: {
        "measure": lambda w, state, *, linear, x, train: (nl.Mapped(w, None, jnp.ones(())), state),
        "params": lambda site: None,
        "state": lambda w, linear, x: (),
        "name": "identity",
    },
    nl.weight_norm: {"v": W, "params": nl.init_affine(4), "of": "unit"},
    nl.weight_norm_init: {"site": SITE, "eps": 0.0, "axis_name": None, "of": "unit"},
    nl.weight_parts: {"params": nl.init_affine(4), "site": SITE, "of": "unit"},
    nl.weight_standardization: {"v": W, "params": nl.init_affine(4)} | FORM,
    nl.weight_standardization_parts: {"params": nl.init_affine(4), "site": SITE} | FORM,
    instruments.whiten: {"x": SQUARE, "w": instruments.whitening(SQUARE)},
    instruments.whitening: {"x": SQUARE, "method": "zca", "eps": 0.1},
    nl.Sync: {
        "axes": "d",
        "together": None,
        "groups": 2,
        "members": None,
        "shards": 1,
        "virtual_batch": None,
        "staged": False,
        "gradient": "both",
        "every": 0,
        "second": "when_needed",
        "mesh": None,
    },
    nl.Sharded: {"channels": "d", "positions": ("e",)},
    nl.Conv: {
        "strides": 1,
        "padding": "SAME",
        "dilation": 1,
        "groups": 1,
        "channel_axis": -1,
    },
    nl.ConvTranspose: {
        "strides": 1,
        "padding": "SAME",
        "dilation": 1,
        "groups": 1,
        "channel_axis": -1,
    },
    instruments.along_step: {
        "loss": lambda w: sum((v**2).sum() for v in jax.tree.leaves(w)),
        "params": X,
        "direction": X,
        "rates": jnp.ones(2),
    },
    instruments.angular_update: {"before": X, "after": X, "axes": 0},
    instruments.cancellation: {"a": A, "axes": 0},
    instruments.condition_number: {"x": X},
    instruments.correlations: {"h": X},
    instruments.covariate_shift: {
        "loss": lambda p: (p["a"] ** 2).sum(),
        "before": {"a": X},
        "after": {"a": X},
        "layers": ["a"],
    },
    instruments.dead_units: {"h": A, "axes": 0},
    instruments.distance_to_uncorrelated: {"h": X},
    instruments.distance_to_white: {"h": X},
    instruments.effective_lr: {"w": W, "lr": 0.1, "axes": 0},
    instruments.gaussianity: {"a": A, "axes": 0},
    instruments.gradient_norms: {"grads": {"w": W}, "depth": 1},
    instruments.hessian_max: {
        "loss": lambda w: sum((v**2).sum() for v in jax.tree.leaves(w)),
        "params": jnp.ones(8),
        "key": jax.random.key(0),
        "steps": 2,
        "tol": 1e-3,
    },
    instruments.attention_entropy: {"attention": X, "mask": X > 0},
    instruments.attention_logits: {"q": A, "k": A, "scale": 1.0},
    instruments.attention_statistics: {
        "q": A,
        "k": A,
        "scale": 1.0,
        "mask": jnp.ones((2, 2), bool),
    },
    instruments.block_lr: {"params": BLOCKS, "lr": 0.1},
    instruments.block_norms: {"tree": BLOCKS},
    instruments.by_block: {"tree": BLOCKS, "measure": lambda block: block},
    instruments.depth_slope: {"values": jnp.arange(1.0, 4.0), "depths": jnp.arange(1.0, 4.0)},
    instruments.effective_rank: {"x": X},
    instruments.ledger: {"f": jax.jit(lambda x: x).lower(X)},
    instruments.logit_size: {"logits": X, "mask": X > 0},
    instruments.massive_activations: {"x": X},
    instruments.rank_residual: {"x": X},
    instruments.stable_rank: {"x": X},
    instruments.stream_statistics: {"x": X},
    instruments.token_cosine: {"x": X},
    instruments.update_ratio: {"params": BLOCKS, "updates": BLOCKS},
    instruments.percentiles: {"a": A, "q": (0.5,), "axes": 0},
    instruments.saturation: {"h": A, "low": 0.0, "high": 1.0, "margin": 0.1, "axes": 0},
}

for _name in NAMES:
    _own = {"groups": 2, "eps": 1e-5, "axes": "channels", "algorithm": "auto", "bad_batch": "skip"}
    _own |= {"use_gain": True, "use_bias": True, "data_init": False, "axis_name": None, "g": None}
    _own |= {"of": "unit", "bounded": False, "form": "timm"}
    _own |= {
        "estimator": None,
        "decay": 0.9,
        "ddof": 0,
        "population": "debiased",
        "state_gradient": False,
        "gain": "plain",
        "feature_axes": None,
        "part": 1.0,
        "centred": True,
        "implementation": "xla",
    }
    _factory = nl.row(_name).factory
    CALLS[_factory] = {name: _own[name] for name in inspect.signature(_factory).parameters}
    _norm = nl.get(_name, **({"groups": 2} if _name == "group" else {}))
    _params = None if _name == "none" else nl.init_affine(4)
    _site = nl.Site(jnp.ones((2, 3, 4))) if _name == "instance" else SITE
    CALLS[_norm.init] = {"site": _site}
    if isinstance(_norm, nl.WeightMap):
        _at = {"linear": nl.Dense(), "x": X, "w": W}
        CALLS[_norm.init_kernel] = _at
        CALLS[_norm.kernel] = _at | {"params": _params, "state": (), "train": True}
    CALLS[_norm.parts] = {
        "params": _params,
        "state": nl.init_running(4) if _name == "batch" else (),
        "site": _site,
        "train": True,
    }

# The family: every function by its signature, every norm of the table by its values.
WORDS = {"params": PARAMS, "a": A, "x": X, "v": W, "w": W, "site": SITE, "groups": 2}
WORDS |= {"h": A, "tau": jnp.zeros(6), "train": True, "states": nl.init_running(4)}
WORDS |= {"step": 0, "steps": 2, "of": ("instance", "layer"), "sizes": (2, 4)}


def right(f):
    """A right call by the defaults, and by words of which there is none."""
    given = [p for p in inspect.signature(f).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return {p.name: WORDS[p.name] if p.default is p.empty else p.default for p in given}


CALLS |= {f: right(f) for f in vars(nl.family).values() if inspect.isfunction(f)}
for _member in {m.name: m for m in reversed(MEMBERS)}.values():
    _x, _w, _params, _state = _member.values(jnp.float32)
    CALLS[_member.row.factory] = right(_member.row.factory) | _member.options
    CALLS[_member.norm.init] = {"site": _member.site(_x, _w)}
    _site = {"state": _state, "site": _member.site(_x, _w), "train": True}
    CALLS[_member.norm.parts] = {"params": _params, **_site}

NP = np.ones(4, np.float32)
BARE = convert.Converted("layer", nl.Affine(jnp.ones(4), jnp.ones(4)), eps=1e-5)
FLAX = {"params": {"scale": NP, "bias": NP}}
LN = convert.Placed(BARE, 0, "attention", "inner")
LM = convert.Family(
    ("own",),
    convert.Form("layer", bias=True),
    {"h.*.ln_1": convert.Place("inner", "attention")},
    "layer_norm_epsilon",
)
FROM = {"layer": "layer", "path": "", "allow": ()}
TO = {"norm": BARE, "path": "", "allow": ()}
CALLS |= {
    convert.from_torch: FROM
    | {"variables": {"weight": NP, "bias": NP}, "layer": "rms", "count": None, "path": ""},
    convert.from_linen: FROM | {"variables": FLAX},
    convert.from_nnx: FROM | {"variables": FLAX["params"]},
    convert.from_haiku: FROM | {"variables": ({"n": {"scale": NP, "offset": NP}}, {}), "path": "n"},
    convert.from_keras: FROM | {"variables": {"gamma": NP, "beta": NP}},
    convert.from_equinox: {
        "variables": {"weight": NP, "bias": NP},
        "layer": "layer",
        "state": None,
        "allow": (),
    },
    convert.to_torch: TO | {"old_names": False},
    convert.to_linen: TO,
    convert.to_nnx: TO,
    convert.to_haiku: TO | {"path": "n", "ndim": None},
    convert.to_keras: TO,
    convert.to_equinox: {"norm": BARE, "allow": ()},
    convert.from_model: {
        "read": convert.from_linen,
        "variables": {"params": {"n": FLAX["params"]}},
        "rule": {"n": "layer"},
        "allow": (),
    },
    convert.from_transformers: {
        "variables": {f"h.0.ln_1.{n}": NP for n in ("weight", "bias")},
        "config": {"layer_norm_epsilon": 1e-5},
        "family": LM,
        "path": None,
        "eps": None,
        "leave": (),
    },
    convert.to_transformers: {"norms": {"h.0.ln_1": LN}, "variables": None, "allow": ()},
    convert.to_model: {"write": convert.to_linen, "norms": {"n": BARE}, "allow": ()},
}

REQUIRED = {"num_features": 6, "in_features": 6, "out_features": 3, "features": 3}
REQUIRED |= {"kernel_size": (3, 3), "norm": "layer", "rngs": nnx.Rngs(0), "options": {}}
REQUIRED["placement"] = PLACED
FLAX = ("self", "parent", "variable_filter")  # which it judges itself
for _module in (normlab.linen, normlab.nnx):
    for _name in _module.__all__:
        _class = getattr(_module, _name)
        if isinstance(_class, type) and hasattr(_class.__init__, "kinds"):
            _of = inspect.signature(_class.__init__).parameters.values()
            _own = {p.name: REQUIRED.get(p.name, p.default) for p in _of}
            CALLS[_class] = {k: v for k, v in _own.items() if k not in FLAX}
            if _name == "GroupNorm":
                CALLS[_class]["num_groups"] = 2
            if "layer_instance" in _own:
                _nnx = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
                _layer = linen.Dense(3) if _module is normlab.linen else _nnx
                CALLS[_class]["layer_instance"] = _layer
            if _name == "RegistryWeights":
                CALLS[_class]["norm"] = "weight"

for _f, _own in CALLS.items():
    if not isinstance(_f, type):  # what is not said above is as by default
        _rest = inspect.signature(_f).parameters.values()
        _rest = {p.name: p.default for p in _rest if p.default is not p.empty}
        CALLS[_f] = {k: v for k, v in _rest.items() if not k.startswith("_")} | _own

# Those that hand their arguments to another at once.
HANDED = {
    nl.batch_norm: nl.batch_parts,
    nl.layer_norm: nl.layer_parts,
    nl.rms_norm: nl.rms_parts,
    nl.group_norm: nl.group_parts,
    nl.instance_norm: nl.instance_parts,
}

PROBES = {
    "None": None,
    "a string": "zzz",
    "an empty string": "",
    "True": True,
    "np.True_": np.True_,
    "1.5": 1.5,
    "1.0": 1.0,
    "NaN": float("nan"),
    "Inf": float("inf"),
    "-1": -1,
    "-7": -7,
    "0": 0,
    "7": 7,
    "1e-39": 1e-39,
    "a huge number": 10**400,
    "a list": [1.0, 2.0],
    "a list of None": [None],
    "a mixed tuple": (1, "x"),
    "()": (),
    "a dict": {"a": "b"},
    "{}": {},
    "a class": nl.Running,
    "Sync": nl.Sync,
    "Affine": nl.Affine,
    "an object": object(),
    "a complex": 1j,
    "a function": lambda: 0,
    "rank 0": np.float32(1.0),
    "rank 1": np.ones(7, np.float32),
    "rank 6": np.ones((1, 2, 1, 2, 1, 2), np.float32),
    "integers": np.arange(7),
    "strings": np.array(["x"]),
    "objects": np.array([None]),
    "complex numbers": np.ones((3, 4), np.complex64),
    "bytes": b"x",
    "Affine of lists": nl.Affine([1.0] * 6, [1.0] * 6),
    "Parts of lists": nl.Parts([1.0], [1.0], [1.0], [1.0]),
    "Running of lists": nl.Running([1.0], [1.0], 1.0, 1.0, 1, 1),
    "Site of lists": nl.Site([1.0], [1.0], [1.0]),
    "a Running": STATE,
    "Moments": M,
    "a key": jax.random.key(0),
    "a shape": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "a type": np.float32,
}

FUNCTIONS = [
    pytest.param(f, own, id=f"{i}-{f.__name__}") for i, (f, own) in enumerate(CALLS.items())
]
SCOPE = r"(normlab|registry|population|[\w ]*): got "


def declared(f):
    f = HANDED.get(f, f)
    return f.__init__ if isinstance(f, type) else f


def refused(f, name, value):
    """Whether the kind of an argument refuses a value."""
    f = declared(f)
    if value is None and name in f.optional:
        return False
    try:
        f.kinds[name].read(value)
    except (TypeError, ValueError, OverflowError):
        return True
    return False


def run(f, own):
    """The call, within the axis it names."""
    if own.get("axis_name") is None or f is instruments.equivalence or isinstance(f, type):
        return f(**own)
    return jax.vmap(lambda _: (f(**own), 0)[1], axis_name="d")(jnp.zeros(2))


@pytest.mark.parametrize(("f", "own"), FUNCTIONS)
def test_every_argument_is_declared_and_the_right_call_is_right(f, own):
    kinds = declared(f).kinds
    private = {name for name in kinds if name.startswith("_")}
    assert set(own) == set(kinds) - private - set(FLAX)
    for name, value in own.items():
        assert not refused(f, name, value)


@pytest.mark.parametrize(("f", "own"), FUNCTIONS)
def test_a_value_of_another_kind_is_an_error_that_names_it(f, own):
    where = declared(f).where
    for name in own:
        kind = declared(f).kinds[name]
        assert not [
            value for value in kind.wrong if not refused(f, name, value) and value is not None
        ]
        for value in (*kind.wrong, *PROBES.values()):
            if not refused(f, name, value):
                continue
            with pytest.raises(ValueError, match=r"; expected .*\. To fix it, ") as error:
                f(**own | {name: value})
            given = str(error.value).partition("; expected ")[0]
            assert given.startswith(f"{where}: got ")
            assert name in given


def test_what_must_be_known_when_traced_says_so():
    def traced(v):
        for f, own in CALLS.items():
            for name in own:
                if declared(f).kinds[name].static:
                    with pytest.raises(ValueError, match="static_argnames"):
                        f(**own | {name: v})
        return v

    jax.make_jaxpr(traced)(1)


def test_every_public_function_has_a_right_call():
    # The skins see below; the experiments have errors of their own.
    aside = ("normlab.linen", "normlab.nnx", "normlab.experiments")
    there = [names for name, names in namespaces().items() if name not in aside]
    public = [value for names in there for value in names.values()]
    # What changes the registry for all tests is tried in tests/test_protocols.py.
    aside = {nl.names, nl.register, nl.unregister, nl.devices.ring, nl.placement.names}
    functions = {f for f in public if inspect.isfunction(f)} - aside
    assert functions <= set(CALLS)


# Not for use under `jit`: they look at values.
EAGER = (
    nl.folding.fold_norm,
    nl.folding.fold_model,
    nl.folding.plain_weights,
    nl.population.precise,
)


def ends(f, own):
    """How a call ends; without compiling anything where the function allows it."""
    call = functools.partial(run, f, own)
    try:
        if f in EAGER or isinstance(f, type):
            call()
        else:
            jax.eval_shape(lambda: (call(), 0)[1])
    except ValueError as error:
        return "refused" if "; expected " in str(error) else f"foreign: {error}"
    except Exception as error:
        return f"raw: {type(error).__name__} {error}"
    return "accepted"


@pytest.mark.parametrize(
    ("f", "own"),
    [
        case for case in FUNCTIONS if case.values[0] is not instruments.equivalence
    ],  # it compiles and compiles
)
def test_what_the_kind_lets_through_ends_well(f, own):
    for name in own:
        for label, value in PROBES.items():
            # What a function that is handed in does is its own affair.
            if label != "a function" and not refused(f, name, value):
                assert ends(f, own | {name: value}) in ("accepted", "refused"), (name, label)
