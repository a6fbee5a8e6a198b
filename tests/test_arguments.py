"""No wrong call ends raw: every argument of every public function, with values of every kind."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import normlab as nl
from normlab import instruments

A = jnp.asarray(np.arange(24.0).reshape(2, 2, 6) % 5, jnp.float32)
X, W = A[0, :, :3], jnp.asarray(np.arange(1.0, 13.0).reshape(3, 4), jnp.float32)
PARAMS, STATE, M = nl.init_affine(6), nl.init_running(6), nl.moments(A[0], 0)
PARTS = nl.Parts(*map(jnp.float32, (1.0, 2.0, 3.0, 4.0)))
SITE = nl.Site(X @ W, X, W)
NORM = nl.get("batch")
PENDING = nl.begin(nl.init_running(6)).update(M)
STACKED = jax.tree.map(lambda v: jnp.stack([v, v]), STATE)
MODEL = {
    "Dense_0": {"kernel": W, "bias": jnp.ones(4)},
    "BatchNorm_0": {"mean": jnp.ones(4), "var": jnp.ones(4)},
}
BATCH = {"a": A, "params": PARAMS, "state": STATE, "train": True, "decay": 0.9, "eps": 1e-5}
BATCH |= {"axis_name": None, "weights": jnp.ones(2), "channel_axis": -1, "algorithm": "auto"}
BATCH |= {"bad_batch": "skip"}
EXAMPLE = {"a": A, "params": PARAMS, "eps": 1e-5, "weights": jnp.ones(2), "channel_axis": -1}
SQUARE = jnp.eye(6)

# A right call of every function, with all its arguments.
CALLS = {
    nl.affine: {"parts": PARTS, "a": A, "weights": None, "channel_axis": -1},
    nl.all_reduce: {"m": M, "axis_name": None},
    nl.batch_norm: BATCH,
    nl.batch_parts: BATCH,
    nl.begin: {"states": STATE},
    nl.change_ddof: {"state": STATE, "ddof": 1, "count": 4.0},
    nl.commit: {"states": PENDING, "ok": True, "decay": 0.9, "bad_batch": "skip"},
    nl.conventions: {"states": STATE},
    nl.cosine_norm: {
        "x": X,
        "w": W,
        "params": nl.init_affine(4),
        "linear": nl.Dense(),
        "centred": False,
    },
    nl.cosine_parts: {"params": nl.init_affine(4), "site": SITE, "centred": False},
    nl.drift: {"stats": STACKED, "axis_name": None},
    nl.effective_sample_size: {"weights": jnp.ones(3), "axes": 0},
    nl.empty: {"shape": (3,), "dtype": jnp.float32},
    nl.equivalence: {
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
    nl.exchange: {"states": nl.init_delayed(6), "axis_name": nl.Sync("d", every=1)},
    nl.fold: {"parts": PARTS, "kernel": W, "bias": jnp.ones(4), "unit_axis": -1},
    nl.fold_model: {
        "variables": MODEL,
        "rule": {"BatchNorm_0": "Dense_0"},
        "eps": 1e-5,
        "unit_axis": -1,
        "remove": False,
        "dtype": None,
        "apply": None,
        "folded_apply": None,
    },
    nl.fold_norm: {
        "norm": NORM,
        "params": nl.init_affine(4),
        "state": nl.init_running(4),
        "kernel": W,
        "bias": jnp.ones(4),
        "x": X,
        "linear": nl.Dense(),
    },
    nl.freeze: {"states": {"a": STATE}, "rule": "a"},
    nl.get: {"name": "batch"},
    nl.global_gradient: {"grads": {"w": W}, "axis_name": "d"},
    nl.global_mean: {"values": X, "axis_name": "d", "weights": jnp.ones(2)},
    nl.group_norm: EXAMPLE | {"groups": 2, "algorithm": "auto"},
    nl.group_parts: EXAMPLE | {"groups": 2, "algorithm": "auto"},
    nl.init_affine: {
        "channels": 3,
        "rescale": True,
        "reshift": True,
        "g": 1.0,
        "dtype": jnp.float32,
    },
    nl.init_cumulative: {"channels": 3, "ddof": 0, "estimator": "pooled", "dtype": jnp.float32},
    nl.init_delayed: {
        "channels": 3,
        "decay": 0.9,
        "ddof": 0,
        "debias": True,
        "dtype": jnp.float32,
    },
    nl.init_domains: {
        "channels": 3,
        "domains": 2,
        "examples": None,
        "population": "debiased",
        "dtype": jnp.float32,
    },
    nl.init_population: {"population": "debiased", "channels": 3},
    nl.init_renorm: {
        "channels": 3,
        "r_max": 3.0,
        "d_max": 5.0,
        "begin": 5,
        "r_end": 9,
        "d_end": 8,
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
        "dtype": jnp.float32,
    },
    nl.instance_norm: EXAMPLE | {"algorithm": "auto"},
    nl.instance_parts: EXAMPLE | {"algorithm": "auto"},
    nl.invert: {"parts": PARTS, "h": A},
    nl.layer_norm: EXAMPLE | {"axes": -1, "algorithm": "auto"},
    nl.layer_parts: EXAMPLE | {"axes": -1, "algorithm": "auto"},
    nl.merge: {"p": M, "q": M},
    nl.merge_axes: {"m": M, "axes": 0},
    nl.merge_running: {"states": STACKED},
    nl.moments: {"x": A, "axes": 0, "weights": jnp.ones(2), "algorithm": "auto"},
    nl.plain_weights: {
        "variables": {"Dense_0": {"kernel": W}},
        "rule": {"Dense_0": nl.weight_norm},
        "unit_axis": -1,
        "dtype": None,
        "apply": None,
        "folded_apply": None,
    },
    nl.pool_running: {"states": STATE, "axis_name": "d"},
    nl.precise: {
        "step": lambda state, batch: nl.batch_norm(batch, None, state, train=True)[1],
        "states": STATE,
        "batches": [A],
        "estimator": None,
    },
    nl.ring: {"count": 4, "reach": 1},
    nl.rms_norm: EXAMPLE | {"axes": -1},
    nl.rms_parts: EXAMPLE | {"axes": -1},
    nl.row: {"name": "batch"},
    nl.select_domain: {"states": nl.init_domains(3), "domain": 1},
    nl.settle: {"states": PENDING, "estimator": None},
    nl.shapes: {"x": X, "w": W, "linear": nl.Dense(), "weights": None},
    nl.share_running: {"states": STATE, "devices": 2},
    nl.thaw: {"states": {"a": nl.freeze(STATE)}, "rule": "a"},
    nl.weight_norm: {"v": W, "g": jnp.ones(4)},
    nl.weight_norm_init: {"site": SITE, "eps": 0.0, "axis_name": None},
    nl.weight_parts: {"params": nl.init_affine(4), "site": SITE},
    nl.weight_standardization: {"v": W, "g": jnp.ones(4)},
    nl.weight_standardization_parts: {"params": nl.init_affine(4), "site": SITE},
    nl.whiten: {"x": SQUARE, "w": nl.whitening(SQUARE)},
    nl.whitening: {"x": SQUARE, "method": "zca", "eps": 0.1},
    nl.Sync: {
        "axes": "d",
        "groups": 2,
        "members": None,
        "shards": 1,
        "virtual_batch": None,
        "staged": False,
        "gradient": "both",
        "every": 0,
        "mesh": None,
    },
    nl.Dense: {"channel_axis": -1},
    nl.Conv: {
        "strides": 1,
        "padding": "SAME",
        "dilation": 1,
        "groups": 1,
        "channel_axis": -1,
    },
    instruments.along_step: {
        "loss": lambda w: (w**2).sum(),
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
        "loss": lambda w: (w**2).sum(),
        "params": jnp.ones(8),
        "key": jax.random.key(0),
        "steps": 2,
        "tol": 1e-3,
    },
    instruments.percentiles: {"a": A, "q": (0.5,), "axes": 0},
    instruments.saturation: {"h": A, "low": 0.0, "high": 1.0, "margin": 0.1, "axes": 0},
}
for _name in nl.names():
    _f = nl.row(_name).factory
    _own = {"groups": 2, "eps": 1e-5, "axes": "channels", "algorithm": "auto", "bad_batch": "skip"}
    _own |= {"rescale": True, "reshift": True, "data_init": False, "axis_name": None, "g": None}
    _own |= {"decay": 0.9, "ddof": 0, "population": "debiased"}
    CALLS[functools.partial(nl.get, _name)] = {k: _own[k] for k in inspect.signature(_f).parameters}
    for _half in ("init", "parts", "apply"):
        _right = {"site": SITE}
        if _half != "init":
            _params = None if _name == "none" else nl.init_affine(4)
            _state = nl.init_running(4) if _name == "batch" else ()
            _right |= {"params": _params, "state": _state, "train": True}
        _site = SITE
        if _name == "instance":
            _right["site"] = SITE._replace(a=A[..., :4])
        CALLS[getattr(nl.get(_name, **({"groups": 2} if _name == "group" else {})), _half)] = _right

PROBES = {
    "None": None,
    "string": "zzz",
    "empty string": "",
    "True": True,
    "np.True_": np.True_,
    "float": 1.5,
    "1.0": 1.0,
    "NaN": float("nan"),
    "Inf": float("inf"),
    "-1": -1,
    "0": 0,
    "7": 7,
    "1e-39": 1e-39,
    "huge": 10**400,
    "list": [1.0, 2.0],
    "list of None": [None],
    "tuple": (1, "x"),
    "()": (),
    "dict": {"a": "b"},
    "{}": {},
    "class": nl.Running,
    "Sync": nl.Sync,
    "object": object(),
    "complex": 1j,
    "lambda": lambda: 0,
    "rank 6": np.ones((1, 2, 1, 2, 1, 2), np.float32),
    "rank 0": np.float32(1.0),
    "strings": np.array(["x"]),
    "objects": np.array([None]),
    "complex array": np.ones(3, np.complex64),
    "bytes": b"x",
    "Affine of lists": nl.Affine([1.0] * 6, [1.0] * 6),
    "Affine class": nl.Affine,
    "Parts of lists": nl.Parts([1.0], [1.0], [1.0], [1.0]),
    "Running of lists": nl.Running([1.0], [1.0], 1.0, 1.0, 1, 1),
    "Site of lists": nl.Site([1.0], [1.0], [1.0]),
    "Dense": nl.Dense,
    "key": jax.random.key(0),
    "ShapeDtypeStruct": jax.ShapeDtypeStruct((2, 3), jnp.float32),
    "numpy dtype": np.float32,
}


def label(f):
    if isinstance(f, functools.partial):
        return f"get {f.args[0]}"
    return getattr(f, "__qualname__", str(f))


def outcome(call):
    try:
        with jax.ensure_compile_time_eval() if False else __import__("contextlib").nullcontext():
            call()
    except ValueError as e:
        return "ok" if "; expected" in str(e) or "unknown" in str(e) or "missing" in str(e) else "foreign: " + str(e)[:100]
    except FloatingPointError:
        return "ok"
    except Exception as e:
        return f"raw {type(e).__name__}: " + str(e)[:100].replace("\n", " ")
    return "accepted"


def bound(f, given):
    """The call, within an axis where the function needs one."""
    if given.get("axis_name") == "d" or "Sync" in str(type(given.get("axis_name"))):
        return lambda: jax.vmap(lambda _: f(**given), axis_name="d", out_axes=None, axis_size=2)(None)
    return lambda: f(**given)


def axed(f, given, own):
    needs = own.get("axis_name") is not None and f is not nl.equivalence
    if not needs:
        return lambda: f(**given)
    return lambda: jax.vmap(lambda _: (f(**given), 0)[1], axis_name="d")(jnp.zeros(2))


if __name__ == "__main__":
    import collections, sys
    tally = collections.Counter()
    for f, own in CALLS.items():
        r = outcome(axed(f, own, own))
        if r != "accepted":
            print("BAD VALID CALL", label(f), r)
        for name in own:
            for probe, value in PROBES.items():
                r = outcome(axed(f, own | {name: value}, own))
                tally[r.split(" ")[0]] += 1
                if r != "ok":
                    print(f"{label(f)} | {name} | {probe} | {r}")
            def traced(v, name=name, f=f, own=own):
                return (axed(f, own | {name: v}, own)(), 0)[1]
            r = outcome(lambda: jax.make_jaxpr(traced)(1))
            tally[r.split(" ")[0]] += 1
            if r != "ok":
                print(f"{label(f)} | {name} | traced | {r}")
    print(tally)
