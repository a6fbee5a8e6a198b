"""transformers: the norms of a language model by path, from its state dict and its config.json.

A checkpoint is a flat state dict. Which of its keys are norms, and what they mean, is said by a row
of `normlab.convert.families`; nothing here knows a model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from normlab._arguments import (
    Kind,
    anything,
    checked,
    either,
    integer,
    mapping,
    real,
    sequence,
    text,
)
from normlab._arguments import read as argument
from normlab._checks import promote, promote_dtype
from normlab._trees import register
from normlab.convert.families import FAMILIES, Branch, Family, Order, Place
from normlab.convert.leaves import flatten, listed, near, numbers, read
from normlab.convert.library import refuse
from normlab.convert.value import Converted, Exported, check
from normlab.equation import Affine
from normlab.errors import invalid, nearest
from normlab.example import layer_norm, rms_norm
from normlab.gains import Offset


class Placed(NamedTuple):
    """A norm of a language model, and where it stands.

    Attributes:
      norm: The norm: params, ε, and the `options` of `nl.get`.
      block: The number of its block; `None` for a norm of the net. Not a leaf, nor are the others.
      branch: `"attention"`, `"mlp"`, `"both"`, or `None`.
      place: On the line, inside the branch or of the net, as in `Place`.
      heads: Of q and k, whether heads share a gain or all are one sample; or `None`.
      order: When it casts, an `Order`.
      eps_name: The field of config.json that ε is from, if it is from one.

    >>> norm = Converted("rms", Affine(jnp.ones(2), None), eps=1e-6)
    >>> print(Placed(norm, 3, "attention", "inner"))
    block 3, attention, inner
    """

    norm: Converted
    block: int | None
    branch: Branch | None
    place: str
    heads: str | None = None
    order: Order = "last"
    eps_name: str | None = None

    def __str__(self) -> str:
        block = None if self.block is None else f"block {self.block}"
        return ", ".join(word for word in (block, self.branch, self.place) if word)

    def apply(self, a: Array) -> Array:
        """Returns h in the order of casts of the library, `[..., C]` of `a` `[..., C]`.

        In float32 it is what `nl.get(norm.kind, **norm.options)` makes of the same values; that
        casts last, whatever the order.

        Args:
          a: In any floating type; h is in the same, or where the gain is multiplied in its own type
            and that is another, in the one that holds both, as in torch.
        """
        kind, params, eps = self.norm.kind, self.norm.params, self.norm.eps
        how: Any = rms_norm if kind == "rms" else layer_norm
        if self.order == "before gain":
            h = how(a, eps=eps)
            return h if params.g is None else _product(params.g, h)
        if self.order == "gain too" and isinstance(params, Offset) and params.d is not None:
            params = Affine(_rounded(1 + params.d), params.b)
        return how(a, params, eps=eps)


register(Placed, "block", "branch", "place", "heads", "order", "eps_name")


def _rounded(h: Array) -> Array:
    """The values of `h`, of its own type, in float32 at least; not by casts, which XLA may drop."""
    kept = jnp.finfo(h.dtype)
    wide = promote(h)
    return lax.reduce_precision(wide, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)


def _product(g: Array, h: Array) -> Array:
    """g·h of what `h` is once it is cast; where the types differ, in the one that holds both."""
    wide = np.promote_types(promote_dtype(g), promote_dtype(h))
    made = g.astype(wide) * _rounded(h).astype(wide)
    return made.astype(h.dtype) if g.dtype == h.dtype else made


NORMLIKE = re.compile(r"norm|(?:^|[._/])ln(?:_|\d|[._/]|$)", re.IGNORECASE)
"""What names of norms have in them; a vector called weight, scale or gamma is like one too."""


def _family(value: Any) -> Any:
    if not isinstance(value, str | Family) or not value:
        raise TypeError
    return value


_DEPTH = integer("a number of blocks", "pass the config of this model", 1)
_PATTERN = text("a pattern of keys", "pass a string")
_FAMILY = Kind(
    "a model_type, or a Family", 'pass for example "llama"', _family, (1, True, [], object(), b"x")
)
_PATTERNS = either(
    "patterns of keys", "pass a list of regular expressions", sequence(_PATTERN), _PATTERN
)


@checked(
    "from transformers",
    variables=anything,
    config=anything,
    family=_FAMILY,
    eps=real,
    leave=_PATTERNS,
)
def from_transformers(
    variables: Any,
    config: Any = None,
    *,
    family: str | Family | None = None,
    path: str | None = None,
    eps: float | None = None,
    leave: Sequence[str] = (),
) -> dict[str, Placed]:
    """Returns the norms of a language model by path, with where each stands.

    Every key that looks like a norm is either read or refused; weights of other layers are not
    touched. Norms without leaves, as those of OLMo 1, are there too.

    Args:
      variables: The model, or its state dict: arrays of NumPy, JAX or torch by name, all shards
        of a checkpoint in one.
      config: Its config.json as a mapping, or the config object; a model has its own.
      family: The row of `FAMILIES`, or one of your own, where config does not name it.
      path: Where the language model lies, as `"model.language_model"`: keys outside of it are
        none of its norms. Without it, it is found.
      eps: ε, where config does not say it.
      leave: Regular expressions for keys that look like norms and stay as they are.

    Raises:
      ValueError: If a norm is missing or is no array, a key looks like a norm that the row does
        not know, there are several models, or ε or the family is not known.

    >>> import numpy as np
    >>> leaves = {f"model.layers.0.{n}.weight": np.ones(4, "float32")
    ...           for n in ("input_layernorm", "post_attention_layernorm")}
    >>> leaves |= {"model.norm.weight": np.ones(4, "float32"), "lm_head.weight": np.ones((9, 4))}
    >>> norms = from_transformers(leaves, {"model_type": "llama", "rms_norm_eps": 1e-5})
    >>> print(*norms.values(), sep="; ")
    block 0, attention, inner; block 0, mlp, inner; last
    """
    where = "from transformers"
    if hasattr(variables, "state_dict"):
        config = getattr(variables, "config", None) if config is None else config
        variables = variables.state_dict()
    leaves = flatten(where, variables)
    row, settings = _row(where, config, family)
    root, depth = _blocks(where, leaves, row, path)
    norms: dict[str, Placed] = {}
    missing: list[str] = []
    used: set[str] = set()
    depth = argument(where, row.depth, settings.get(row.depth, depth), _DEPTH)
    for name, block, place in _there(row, root, depth, leaves):
        form = place.form or row.form
        keys = {ours: f"{name}.{leaf}" for ours, leaf in form.leaves.items()}
        used.update(keys.values())
        if absent := [key for key in keys.values() if key not in leaves]:
            missing += absent
            continue
        found = {ours: read(where, key, leaves[key]) for ours, key in keys.items()}
        field, value = _eps(where, row, place, settings, eps)
        made: Any = (Offset if form.gain == "offset" else Affine)(found.get("g"), found.get("b"))
        norm = check(f"{where}, {name}", Converted(form.kind, made, eps=value))
        how = (block, place.branch, place.place, place.heads, form.order)
        norms[name] = Placed(norm, *how, field)
    within = root if path is not None else ""
    used |= _left(where, leave, leaves)
    unknown = [
        key
        for key, leaf in leaves.items()
        if key.startswith(within) and key not in used and _is_normlike(key, leaf)
    ]
    if missing or unknown:
        parts = [f"no leaf {listed(missing)} (near: {near(missing, leaves)})"] if missing else []
        parts += [f"what looks like further norms, {listed(unknown)}"] if unknown else []
        raise invalid(
            where,
            " and ".join(parts),
            f"just the norms of {row.models[0]}",
            "pass all shards in one; name another family; say that all other keys are none of the "
            f"language model's by path={root.removesuffix('.')!r}, or by leave= which stay as they "
            "are",
        )
    return norms


def _there(
    row: Family, root: str, depth: int, leaves: Mapping[str, Any]
) -> Iterator[tuple[str, int | None, Place]]:
    """The path of every norm that is to be there, by block, the number of its block, its place."""
    for block in (*range(depth), None):
        for pattern, place in row.places.items():
            if ("*" in pattern) != (block is not None):
                continue
            at = {n: f"{root}{n}".replace("*", str(block)) for n in (pattern, place.beside) if n}
            form = place.form or row.form
            own = any(f"{at[pattern]}.{leaf}" in leaves for leaf in form.leaves.values())
            beside = place.beside is None or f"{at[place.beside]}.weight" in leaves
            if (own or not place.optional) and beside:
                yield at[pattern], block, place


def _instances(value: Any) -> Any:
    if not isinstance(value, Placed):
        raise TypeError
    return value


_NORMS = mapping(
    Kind("a Placed", "pass what from_transformers returned", _instances, (None, 1, "x")),
    "norms by path",
    "pass what from_transformers returned",
)


@checked("to transformers", norms=_NORMS, variables=anything)
def to_transformers(
    norms: Mapping[str, Placed], variables: Any = None, *, allow: Sequence[str] = ()
) -> Exported:
    """Returns `(state_dict, arguments)`, the inverse of `from_transformers`.

    The arguments are the fields of config.json that hold ε.

    Args:
      norms: The norms by path.
      variables: The state dict, or the model, whose norms they are: what is returned is a copy with
        these norms in it, each leaf an array of the same library and type; other leaves are the
        same objects, in the same order. Without it there are the norms alone, in NumPy.
      allow: The conventions that may be lost: `"dtype"`, a rounding to the type of `variables`.

    Raises:
      ValueError: If `variables` has no such norm, or one of another shape or type, or two norms
        have a different ε where config.json has one.

    >>> norm = Converted("rms", Offset(jnp.zeros(2), None), eps=1e-6)
    >>> placed = Placed(norm, None, None, "last", eps_name="rms_norm_eps")
    >>> to_transformers({"model.norm": placed}).arguments
    {'rms_norm_eps': 1e-06}
    """
    where = "to transformers"
    made, arguments = {}, {}
    for path, placed in norms.items():
        norm = check(where, placed.norm)
        for name, value in zip(("weight", "bias"), norm.params, strict=True):
            if value is not None:
                made[f"{path}.{name}"] = value
        if placed.eps_name is not None:
            known = arguments.setdefault(placed.eps_name, norm.eps)
            if known != norm.eps:
                given = f"eps={known} and, of {path!r}, {norm.eps}"
                change = "give all norms of a model the same"
                raise invalid(where, given, f"one {placed.eps_name}", change)
    if variables is None:
        return Exported(numbers(made), arguments)
    variables = variables.state_dict() if hasattr(variables, "state_dict") else variables
    leaves = flatten(where, variables)
    if absent := [key for key in made if key not in leaves]:
        given = f"norms with the leaves {listed(absent)} (near: {near(absent, leaves)})"
        raise invalid(where, given, "leaves of variables", "pass the model that they are of")
    lost = {}
    for key, value in made.items():
        shape, dtype = tuple(leaves[key].shape), str(leaves[key].dtype).removeprefix("torch.")
        if shape != value.shape:
            change = "pass norms of this model"
            raise invalid(where, f"{key} of shape {value.shape}", f"{shape}", change)
        if dtype != str(value.dtype):
            lost["dtype"] = f"{key} is {value.dtype}, its place in variables {dtype}: cast it"
    refuse(where, lost, allow)
    return Exported(leaves | {k: _like(leaves[k], v) for k, v in made.items()}, arguments)


def _row(where: str, config: Any, family: str | Family | None) -> tuple[Family, dict[str, Any]]:
    """The family, and the settings of the language model."""
    settings = config.to_dict() if hasattr(config, "to_dict") else config
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        change = "pass json.load of config.json, or model.config"
        raise invalid(where, f"a config of type {type(config).__name__}", "a mapping", change)
    settings = dict(settings.get("text_config") or settings)  # of a model of several kinds of data
    name = settings.get("model_type") if family is None else family
    if name is None:
        change = f"pass config=..., or family=..., one of {', '.join(FAMILIES)}"
        raise invalid(where, "no family", "the model_type of config.json", change)
    row = name if isinstance(name, Family) else FAMILIES.get(str(name))
    if row is None:
        change = f"use a known one, {nearest(str(name), FAMILIES)}; or pass family=Family(...)"
        raise invalid(where, f"the family {name!r}", "one whose conventions are known", change)
    wrong = {n: settings[n] for n, v in row.fixed.items() if settings.get(n, v) != v}
    if wrong:
        expected = f"{dict(row.fixed)}, of which this family is known"
        raise invalid(where, f"{wrong} in config", expected, "pass family=Family(...) for it")
    return row, settings


def _blocks(
    where: str, leaves: Mapping[str, Any], row: Family, path: str | None
) -> tuple[str, int]:
    """The prefix of the language model, and how many blocks it has by its keys."""
    stems = {pattern.partition("*")[0] for pattern in row.places if "*" in pattern}
    before = r"(.*?\.)?" if path is None else f"({re.escape(path + '.' if path else '')})"
    block = re.compile(f"{before}(?:{'|'.join(map(re.escape, stems))})" + r"(\d+)\.(.*)")
    ends = [pattern.partition("*.")[2] for pattern in row.places if "*" in pattern]
    found = [match for key in leaves if (match := block.fullmatch(key))]
    own = [match for match in found if match[3].rpartition(".")[0] in ends]
    roots = {match[1] or "" for match in own or found}
    if len(roots) != 1:
        some = f"norms under {listed(sorted(roots))}" if roots else "no blocks"
        given = f"{some}, in keys such as {listed(list(leaves)[:3])}"
        expected = f"one language model, with keys like {next(iter(row.places))}"
        change = "say by path= where it lies, and by family= which it is"
        raise invalid(where, given, expected, change)
    (root,) = roots
    return root, 1 + max(int(match[2]) for match in found if (match[1] or "") == root)


def _eps(
    where: str, row: Family, place: Place, settings: Mapping[str, Any], eps: float | None
) -> tuple[str | None, float]:
    """The field that ε is from, and ε."""
    name = row.eps if place.eps is None else place.eps
    if not isinstance(name, str):
        return None, name
    value = settings.get(name) if eps is None else eps
    if value is None:
        change = f"pass eps=..., or a config with {name}"
        raise invalid(where, f"no {name}", "the ε of the model", change)
    return name, value


def _left(where: str, leave: Sequence[str], leaves: Mapping[str, Any]) -> set[str]:
    """The keys that patterns say to leave."""
    found: set[str] = set()
    for pattern in [leave] if isinstance(leave, str) else leave:
        expected = "a regular expression for the whole of some key"
        try:
            fits = {key for key in leaves if re.fullmatch(pattern, key)}
        except re.error as error:
            raise invalid(where, f"leave={pattern!r}: {error}", expected, "correct it") from error
        if not fits:
            change = f"correct it (near: {near([pattern], leaves)})"
            raise invalid(where, f"leave={pattern!r}, which fits no key", expected, change)
        found |= fits
    return found


def _is_normlike(key: str, leaf: Any) -> bool:
    vector = len(getattr(leaf, "shape", ())) == 1
    return bool(NORMLIKE.search(key)) or (
        vector and key.rpartition(".")[2] in ("weight", "scale", "gamma")
    )


def _like(leaf: Any, value: Array) -> Any:
    """A value as an array of the library and the type of a leaf."""
    if isinstance(leaf, Array):
        return value.astype(leaf.dtype)
    if not hasattr(leaf, "new_tensor"):
        return np.array(value, leaf.dtype)
    array = np.array(value)
    return leaf.new_tensor(array.astype(np.float32) if array.dtype == jnp.bfloat16 else array)
