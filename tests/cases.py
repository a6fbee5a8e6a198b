"""One table of layers, of which every law is tested on every row.

A case is a norm with its options, the linear map before it, and shapes; it knows the plain function
that computes the same, and the oracle. A new norm is tested by adding its cases here, and a test
fails as long as a name of the registry has none.
"""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normlab as nl
from tests import oracles
from tests.helpers import array, draw


class Case(NamedTuple):
    """A norm behind a layer.

    Attributes:
      label: The test's id.
      name: The registry's name.
      options: The factory's options.
      linear: The layer; its `channel_axis` says which layout `x` is in.
      x: The input's shape, channels last whatever the layout; see `values`.
      w: The kernel's shape.
      weights: Importance of examples or positions, or `None`.
    """

    label: str
    name: str
    options: dict[str, Any] = {}  # noqa: RUF012
    linear: Any = nl.Dense()
    x: tuple[int, ...] = (6, 5)
    w: tuple[int, ...] = (5, 4)
    weights: tuple | None = None

    @property
    def row(self) -> nl.Row:
        """The registry's row."""
        return nl.row(self.name)

    @property
    def norm(self) -> nl.Norm:
        """The norm itself."""
        return nl.get(self.name, **self.options)

    def values(self, dtype=jnp.float32, seed: int = 0):
        """Random `(x, w, params)`, the input in the layout of the layer."""
        x, w, g, b = self.numbers(seed)
        x, w = array(x, dtype), array(w, dtype)
        x = jnp.moveaxis(x, -1, self.linear.channel_axis)
        params, _ = self.init(x, w)
        return (
            x,
            w,
            nl.Affine(
                *(
                    None if p is None else array(v, dtype)
                    for p, v in zip(params, (g, b), strict=True)
                )
            ),
        )

    def numbers(self, seed: int = 0):
        """The same in NumPy, channels last: `(x, w, g, b)`."""
        channels = self.w[-1]
        return (
            draw(seed, *self.x, mean=0.3),
            draw(seed + 1, *self.w),
            draw(seed + 2, channels, mean=1.0, scale=0.3),
            draw(seed + 3, channels, scale=0.3),
        )

    def site(self, x, w) -> nl.Site:
        """The site, with values."""
        weights = None if self.weights is None else array(self.weights, jnp.float32)
        return nl.Site(self.linear(x, w), x, w, weights, self.linear)

    def init(self, x, w):
        """Parameters and state."""
        return self.norm.init(self.site(x, w))

    def apply(self, params, state, x, w, *, train: bool = True):
        """`norm.apply` on the layer."""
        return self.norm.apply(params, state, self.site(x, w), train=train)

    def plain(self, params, x, w):
        """h by the plain function, without the registry."""
        return PLAIN[self.name](self, params, self.site(x, w))

    def oracle(self, x, w, g, b):
        """h by the oracle, channels last, from `numbers`."""
        with_g, with_b = (self.options.get(k, True) for k in ("use_gain", "use_bias"))
        h = ORACLES[self.name](self, x, w)
        with_g = with_g and self.name != "none" and not self.options.get("bounded")
        h = h * g if with_g else h
        return h + b if with_b else h

    def channels_last(self, h):
        """`h` or `x` with its channels last."""
        return np.moveaxis(np.asarray(h), self.linear.channel_axis, -1)


def _call(function, case: Case, params, site, *args, **more):
    known = inspect.signature(function).parameters
    options = {k: v for k, v in case.options.items() if k in known} | more
    return function(
        site.a,
        params,
        *args,
        **options,
        weights=site.weights,
        channel_axis=case.linear.channel_axis,
    )


def _bias(params, site):
    return (
        0.0
        if params.b is None
        else jnp.expand_dims(
            params.b, [i for i in range(site.a.ndim) if i != site.linear.channel_axis % site.a.ndim]
        )
    )


def _weight(case, params, site):
    of = case.options.get("of", "unit")
    if case.options.get("bounded"):
        axes = None if of == "kernel" else range(site.w.ndim - 1)
        params = nl.Affine(jnp.sqrt(jnp.square(site.w).sum(axes)), params.b)
    return site.linear(site.x, nl.weight_norm(site.w, params, of=of)) + _bias(params, site)


def _weight_standardization(case, params, site):
    options = {k: v for k, v in case.options.items() if k in ("form", "eps")}
    w = nl.weight_standardization(site.w, params, **options)
    return site.linear(site.x, w) + _bias(params, site)


def _cosine(case, params, site):
    centred = case.name == "centred_cosine"
    return nl.cosine_norm(site.x, site.w, params, linear=site.linear, centred=centred)


PLAIN = {
    "none": lambda case, params, site: site.a + _bias(params, site),
    "batch": lambda case, params, site: _call(nl.batch_norm, case, params, site, train=True)[0],
    "layer": lambda case, params, site: _call(nl.layer_norm, case, params, site),
    "rms": lambda case, params, site: _call(nl.rms_norm, case, params, site),
    "group": lambda case, params, site: _call(nl.group_norm, case, params, site),
    "instance": lambda case, params, site: _call(nl.instance_norm, case, params, site),
    "weight": _weight,
    "weight_standardization": _weight_standardization,
    "cosine": _cosine,
    "centred_cosine": _cosine,
}


def _on_a(oracle, *names):
    def normalized(case: Case, x, w):
        options = {k: case.options[k] for k in (*names, "eps") if k in case.options}
        if options.get("axes") == "all":
            options["axes"] = None
        weights = None if case.weights is None else np.asarray(case.weights, np.float64)
        return oracle(oracles.preactivation(x, w, case.linear), **options, weights=weights)

    return normalized


def _on_x_and_w(oracle, *names, **options):
    def normalized(case: Case, x, w):
        own = {k: case.options[k] for k in names if k in case.options}
        x, w = oracles.patches(x, w, case.linear), oracles.units(w, case.linear)
        return oracle(x, w, **options, **own)

    return normalized


ORACLES = {
    "none": _on_x_and_w(oracles.product),
    "batch": _on_a(oracles.batch),
    "layer": _on_a(oracles.layer, "axes"),
    "rms": _on_a(oracles.rms, "axes"),
    "group": _on_a(oracles.group, "groups"),
    "instance": _on_a(oracles.instance),
    "weight": _on_x_and_w(oracles.weight, "of", "bounded"),
    "weight_standardization": _on_x_and_w(oracles.weight_standardization, "form", "eps"),
    "cosine": _on_x_and_w(oracles.cosine),
    "centred_cosine": _on_x_and_w(oracles.cosine, centred=True),
}

IMAGE = {"x": (2, 4, 5, 4), "w": (3, 2, 4, 6)}
FIRST = {"linear": nl.Conv(channel_axis=1), **IMAGE}
LAST = {"linear": nl.Conv(), **IMAGE}
VALID = {"linear": nl.Conv(padding="VALID"), **IMAGE}
TOKENS = {"x": (3, 4, 5), "w": (5, 6)}
ODD = {  # strides, dilation, uneven padding and groups, all at once
    "linear": nl.Conv(strides=(2, 1), padding=((1, 2), (0, 1)), dilation=(1, 2), groups=2),
    "x": (2, 5, 6, 4),
    "w": (3, 2, 2, 6),
}
LINE = {"linear": nl.Conv(), "x": (3, 7, 2), "w": (3, 2, 4)}
IMPORTANCE = (1.0, 2.0, 0.0, 1.0, 0.5, 1.0)
POSITIONS = ((1.0, 1.0, 0.0, 2.0), (1.0, 0.0, 0.0, 1.0), (0.5, 1.0, 1.0, 1.0))

CASES = (
    Case("none-dense", "none"),
    Case("none-conv-first", "none", {"use_bias": False}, **FIRST),
    Case("batch-dense", "batch"),
    Case("batch-tokens", "batch", {"eps": 0.1, "decay": 0.5, "ddof": 1}, **TOKENS),
    Case("batch-conv", "batch", **VALID),
    Case("batch-conv-first", "batch", {"use_bias": False, "population": "ema"}, **FIRST),
    Case("batch-weighted", "batch", {"use_gain": False}, weights=IMPORTANCE),
    Case("batch-weighted-tokens", "batch", **TOKENS, weights=POSITIONS),
    Case("batch-two-pass", "batch", {"algorithm": "two_pass", "bad_batch": "raise"}, **TOKENS),
    Case("batch-cumulative", "batch", {"population": "cumulative", "estimator": "within"}),
    Case("batch-learned", "batch", {"state_gradient": True}),
    Case("layer-dense", "layer"),
    Case("layer-tokens", "layer", {"eps": 0.1, "use_bias": False}, **TOKENS),
    Case("layer-conv", "layer", **LAST),
    Case("layer-conv-first", "layer", **FIRST),
    Case("layer-conv-all", "layer", {"axes": "all", "algorithm": "shifted"}, **LAST),
    Case("layer-conv-first-all", "layer", {"axes": "all", "use_gain": False}, **FIRST),
    Case("layer-weighted", "layer", {"axes": "all"}, **TOKENS, weights=POSITIONS),
    Case("rms-dense", "rms"),
    Case("rms-tokens", "rms", {"eps": 0.1, "use_bias": False}, **TOKENS),
    Case("rms-conv-first", "rms", **FIRST),
    Case("rms-conv-all", "rms", {"axes": "all", "use_gain": False}, **LAST),
    Case("rms-weighted", "rms", {"axes": "all"}, **TOKENS, weights=POSITIONS),
    Case("group-dense", "group", {"groups": 2}, w=(5, 8)),
    Case("group-conv", "group", {"groups": 3, "eps": 0.1, "use_bias": False}, **LAST),
    Case("group-one-pass", "group", {"groups": 2, "algorithm": "one_pass"}, **TOKENS),
    Case("group-conv-first", "group", {"groups": 2, "use_gain": False}, **FIRST),
    Case("group-weighted", "group", {"groups": 2}, **TOKENS, weights=POSITIONS),
    Case("instance-conv", "instance", **VALID),
    Case("instance-conv-first", "instance", {"eps": 0.1, "use_bias": False}, **FIRST),
    Case("instance-line", "instance", {"use_gain": False, "algorithm": "two_pass"}, **LINE),
    Case("instance-weighted", "instance", **TOKENS, weights=POSITIONS),
    Case("weight-dense", "weight"),
    Case("weight-kernel", "weight", {"of": "kernel"}, **TOKENS),
    Case("weight-bounded", "weight", {"bounded": True}, **TOKENS),
    Case("weight-kernel-bounded", "weight", {"of": "kernel", "bounded": True}, **TOKENS),
    Case("weight-data-init", "weight", {"data_init": True}, **TOKENS),
    Case("weight-conv", "weight", {"use_gain": False}, **LAST),
    Case("weight-conv-first", "weight", {"use_bias": False}, **FIRST),
    Case("weight-odd", "weight", **ODD),
    Case("weight-standardization-dense", "weight_standardization"),
    Case(
        "weight-standardization-conv-first", "weight_standardization", {"use_gain": False}, **FIRST
    ),
    Case("weight-standardization-qiao", "weight_standardization", {"form": "qiao"}, **LAST),
    Case("weight-standardization-timm", "weight_standardization", {"form": "timm"}, **VALID),
    Case(
        "weight-standardization-brock",
        "weight_standardization",
        {"form": "brock", "eps": 18.0},  # two of six units are longer
        **LAST,
    ),
    Case("weight-standardization-odd", "weight_standardization", {"use_bias": False}, **ODD),
    Case("cosine-dense", "cosine"),
    Case("cosine-tokens", "cosine", {"use_gain": False, "use_bias": False}, **TOKENS),
    Case("cosine-conv", "cosine", **LAST),
    Case("cosine-conv-first", "cosine", {"g": 2.0}, **FIRST),
    Case("cosine-odd", "cosine", {"use_gain": False}, **ODD),
    Case("centred-cosine-dense", "centred_cosine"),
    Case("centred-cosine-tokens", "centred_cosine", {"use_bias": False}, **TOKENS),
    Case("centred-cosine-conv", "centred_cosine", **LAST),
    Case("centred-cosine-conv-first", "centred_cosine", {"use_gain": False}, **FIRST),
    Case("centred-cosine-odd", "centred_cosine", **ODD),
    Case("centred-cosine-line", "centred_cosine", {"g": 1.5}, **LINE),
)


NAMES = tuple(dict.fromkeys(case.name for case in CASES))
"""The ten norms of the heart; the rest of the family is in `tests/family.py`."""

# One of each norm with each kind of layer.
KINDS = tuple(
    {(c.name, type(c.linear), c.linear.channel_axis, len(c.x)): c for c in CASES}.values()
)


def first_of(name: str) -> Case:
    """The first case of a norm."""
    found = next((case for case in CASES if case.name == name), None)
    if found is None:
        raise LookupError(f"{name!r} has no case: add one to CASES in {__file__}")
    return found


def everything(case: Case, wrap=lambda apply: apply):
    """`f(params, state, x, w) -> (h, state, gradients of Σ c·h by params, x and w)`, c random."""

    def objective(params, state, x, w):
        h, state = wrap(case.apply)(params, state, x, w)
        c = array(draw(9, *h.shape), h.dtype)
        return (c * h).sum(), (h, state)

    def f(params, state, x, w):
        grad = jax.grad(objective, (0, 2, 3), has_aux=True)
        grads, (h, state) = grad(params, state, x, w)
        return h, state, grads

    return f


@functools.cache
def _compiled(label: str, precision: str):
    return jax.jit(everything(next(case for case in CASES if case.label == label)))


def reference(case: Case, precision: str, params, state, x, w):
    """`everything(case)` compiled, once for all the tests that compare with it."""
    return _compiled(case.label, precision)(params, state, x, w)


def stack(*trees):
    """Stacks pytrees leaf by leaf, in NumPy."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
