"""What the arguments of public functions must be: one word means one thing.

`KINDS` says for each name what a value must be. `checked` holds the arguments of a function, or of
a dataclass, against it before the function sees them:

    @checked("group norm")
    def group_parts(a, params, *, groups, eps=1e-5): ...

Where a function means something else by a word it says so: `@checked("whitening", eps=...)`. `None`
is right where it is the default or the annotation has it. Names for what a module brings with it, a
`Literal` or a class, are declared there. The tests try on every function what `Kind.wrong` names.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeGuard, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from normlab._checks import is_zero, promote_dtype
from normlab.errors import invalid, nearest

F = TypeVar("F", bound=Callable[..., Any])


class Kind(NamedTuple):
    """What a value must be. The functions that make kinds take `expected` and `change` as here.

    Attributes:
      expected: In words, for the error.
      change: What to do about it.
      read: Returns the value as the function wants it (a NumPy integer as an int); raises
        TypeError, ValueError or OverflowError for a value of another kind.
      wrong: Some values of other kinds, for the tests.
      static: Whether it must be known when the function is traced.
      words: The only ones, if it is a word.
      numbers: Of which types it is if it is a number: those the error need not tell.
      saved: Whether a checkpoint may give it back as dicts or lists.
    """

    expected: str
    change: str
    read: Callable[[Any], Any]
    wrong: tuple[Any, ...] = ()
    static: bool = False
    words: tuple[str, ...] = ()
    numbers: tuple[type, ...] = ()
    saved: bool = False


RESTORE = (
    "give the dicts of a checkpoint their types back: "
    "nl.population.restore_states(states, restored), with states as they are made"
)
"""What to do about a dict or a list in the place of a state."""

KINDS: dict[str, Kind] = {}
"""What a value must be, by the name of the argument."""


def declare(**kinds: Kind) -> None:
    """Says what names mean, once for the whole library."""
    again = KINDS.keys() & kinds.keys()
    assert not again, f"declared twice: {again}"
    KINDS.update(kinds)


def checked(where: str, **special: Kind) -> Callable[[F], F]:
    """Holds the arguments of a function, or of a dataclass, against what their names mean.

    Args:
      where: The layer or function, for the errors.
      **special: Where it means something else by a name.

    Raises:
      ValueError: When called with a value of another kind.
      KeyError: At once, for an argument of which nobody has said what it means.
    """

    def decorate(f: F) -> F:
        if isinstance(f, type):
            f.__init__ = decorate(f.__init__)  # pyright: ignore[reportArgumentType]
            return f  # pyright: ignore[reportReturnType]
        parameters = inspect.signature(f).parameters.values()
        parameters = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        kinds = {
            p.name: special.get(p.name) or KINDS[p.name] for p in parameters if p.name != "self"
        }
        optional = {
            p.name for p in parameters if p.default is None or str(p.annotation).endswith("| None")
        }
        order = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
        added = {"eps", "a"} <= kinds.keys()
        assert special.keys() <= kinds.keys(), f"{where} has no such arguments: {special}"

        def check(name: str, value: Any) -> Any:
            kind = kinds.get(name)
            if kind is None or (value is None and name in optional):
                return value
            return read(where, name, value, kind)

        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            given = [*map(check, order, args), *args[len(order) :]]
            kwargs = {name: check(name, value) for name, value in kwargs.items()}
            if added and "eps" in kwargs:
                check_added(where, kwargs["eps"], given[0] if given else kwargs.get("a", 0.0))
            return f(*given, **kwargs)

        vars(call).update(where=where, kinds=kinds, optional=optional)  # for the tests
        return call  # pyright: ignore[reportReturnType]

    return decorate


def read(where: str, name: str, value: Any, kind: Kind | None = None) -> Any:
    """Returns an argument as a function wants it.

    Raises:
      ValueError: If it is of another kind than its name says.
    """
    kind = kind or KINDS[name]
    try:
        return kind.read(value)
    except (TypeError, ValueError, OverflowError):
        pass  # what NumPy or JAX say about it would be no help
    expected, change = kind.expected, kind.change
    if kind.saved and isinstance(value, Mapping | list):
        change = RESTORE
    if kind.words:
        change = f"use a known one: {nearest(str(value), kind.words)}"
    if kind.static and _is_traced(value):
        expected += ", known when the function is traced"
        change = f"leave it out of what is traced (under jit: static_argnames={name!r})"
    raise invalid(where, _given(name, value, kind), expected, change)


def check_added(where: str, eps: Any, a: Any) -> None:
    """Raises ValueError for an ε that is next to nothing in the type of the variance of `a`.

    A traced one is trusted.
    """
    least = float(np.finfo(np.float32).tiny)
    if not isinstance(eps, Tracer) and eps < least and promote_dtype(a) == jnp.float32:
        raise invalid(
            where,
            f"eps={eps!r} for statistics in float32",
            f"a positive number that float32 holds to its last digit, {least:.3g} or more",
            "pass for example eps=1e-5",
        )


def _given(name: str, value: Any, kind: Kind) -> str:
    kept = type(value).__name__
    if isinstance(value, type):
        return f"{name}=the class {value.__name__} itself"
    scalar = isinstance(value, bool | int | float | str) and (kind.static or kind.numbers)
    if value is None or scalar:
        typed = "" if type(value) in kind.numbers else f" of type {kept}"
        return f"{name}={_short(repr(value))}{typed}"
    said = _short(repr(value))
    if is_array(value):
        said = f"{value.dtype}{list(value.shape)}"
    traced = "traced " if isinstance(value, Tracer) else ""
    article = "" if name.endswith("s") or len(name) < 3 else "a "
    return f"{article}{traced}{name} of type {kept} ({said})"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _is_traced(value: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(value))


def is_array(value: Any) -> TypeGuard[Array]:
    """Whether it has a shape and a type, and values; of any library, or a box around an array."""
    abstract = isinstance(value, type | jax.ShapeDtypeStruct)
    return not abstract and hasattr(value, "shape") and hasattr(value, "dtype")


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def is_number(value: Any) -> bool:
    """Whether it is a number of Python, and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(condition: Any) -> None:
    if not condition:
        raise ValueError


def only(test: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """How a `Kind` reads a value that is taken as it is, if it passes a test."""

    def value_of(value: Any) -> Any:
        _require(test(value))
        return value

    return value_of


# Numbers.

LARGEST = 2**31
"""Below this is every integer that jax can hold without x64."""


def _scalar(value: Any) -> int | float:
    """A Python number, of one of Python's or NumPy's or of an array of rank 0; never of a bool."""
    if is_array(value):
        _require(value.ndim == 0 and _is_real(value.dtype))
        value = value.item()
    _require(is_number(value))
    return int(value) if isinstance(value, int) and abs(value) < LARGEST else float(value)


def number(
    expected: str,
    change: str,
    inside: Callable[[Any], bool] = math.isfinite,
    *,
    wrong: Iterable[Any] = (),
    static: bool = False,
) -> Kind:
    """A real number, traced or, if it is `static`, known when the function is traced.

    `inside` says which numbers, and `wrong` are some of the others; a traced one is trusted.
    """

    def value_of(value: Any) -> Any:
        if isinstance(value, Tracer) and not static:
            _require(value.ndim == 0 and _is_real(value.dtype))
            return value
        value = _scalar(value)
        _require(inside(value))
        return value

    others = ("1e-5", True, None, 1j, [1.0], np.ones(2), object())
    others = others if inside(math.nan) else (*others, math.nan)
    return Kind(expected, change, value_of, (*others, *wrong), static, numbers=(int, float))


def _index(value: Any) -> int:
    _require(not isinstance(value, bool) and getattr(value, "dtype", int) != np.bool_)
    return operator.index(value)


def integer(
    expected: str, change: str, least: float = -math.inf, *, among: Sequence[int] = ()
) -> Kind:
    """A whole number, known when the function is traced: the `least`, or the only ones `among`."""

    def value_of(value: Any) -> int:
        value = _index(value)
        _require(abs(value) < LARGEST and value >= least and (not among or value in among))
        return value

    others = (None, "1", True, 1.0, 1.5, [1], {"a": 1}, np.ones(2), object(), int)
    if among or least > -math.inf:
        others = (*others, (min(among) if among else int(least)) - 1)
    return Kind(expected, change, value_of, others, static=True, numbers=(int,))


def _flag(value: Any) -> bool:
    _require(isinstance(value, bool | np.bool_))
    return bool(value)


def flag(change: str = "pass a Python bool") -> Kind:
    """True or False, known when the function is traced."""
    others = (None, 1, 0.0, "True", "no", [True], jnp.ones, object())
    return Kind("True or False", change, _flag, others, static=True)


# Words.


def one_of(literal: Any, expected: str) -> Kind:
    """One of the words of a `Literal`."""
    words = get_args(literal)
    known = only(lambda value: isinstance(value, str) and value in words)
    others = (None, 1, True, "x", words[0].upper(), words[0] + " ", list(words), object(), b"")
    return Kind(expected, "", known, others, static=True, words=words)


def either(expected: str, change: str, *kinds: Kind) -> Kind:
    """A value of any of several kinds, as the first of them reads it."""

    def value_of(value: Any) -> Any:
        for kind in kinds:
            try:
                return kind.read(value)
            except (TypeError, ValueError, OverflowError):
                pass
        raise TypeError

    def fits(value: Any) -> bool:
        try:
            value_of(value)
        except TypeError:
            return False
        return True

    others = tuple(v for kind in kinds for v in kind.wrong if not fits(v))
    return Kind(expected, change, value_of, others, any(kind.static for kind in kinds))


# Arrays.


def _array(value: Any, rank: int = 0, most: float = math.inf, *, abstract: bool = False) -> Any:
    if is_number(value) and not rank:
        _require(isinstance(value, float) or abs(value) < LARGEST)
        return value
    shaped = abstract and isinstance(value, jax.ShapeDtypeStruct)
    _require(shaped or isinstance(value, Array) or is_array(value))
    _require(_is_real(value.dtype) or value.dtype == bool)
    _require(rank <= len(value.shape) <= most)
    return value


def array(
    expected: str = "",
    change: str = "",
    *,
    rank: int = 0,
    most: float = math.inf,
    abstract: bool = False,
) -> Kind:
    """A real array of jax or NumPy, or a number, with `rank` axes at least, and at `most` so many.

    If it is `abstract` a `jax.ShapeDtypeStruct` will do.
    """
    axes = f" of {rank} or more axes" if rank > 1 else ""
    expected = expected or f"an array, a real one{axes}"
    change = change or "pass a jax or NumPy array: of a list jnp.asarray(...)"
    others = (None, "x", True, 1j, [1.0], {"a": 1.0}, object(), len, Array, np.ones(2, complex))
    if rank:
        others = (*others, 1.0, np.ones((3,) * (rank - 1)))
    if most < math.inf:
        others = (*others, np.ones((3,) * int(most + 1)))
    return Kind(expected, change, lambda v: _array(v, rank, most, abstract=abstract), others)


def _leaves(value: Any) -> Any:
    """A NamedTuple of arrays, as jax has them; its numbers too, but a μ that is 0."""
    leaves, structure = jax.tree.flatten(value)
    _require(not isinstance(value, tuple) or not any(type(field) is list for field in value))
    if all(isinstance(leaf, Array) or is_zero(leaf) for leaf in leaves):
        return value
    _require(all(is_array(v) or is_number(v) for v in leaves))
    return jax.tree.unflatten(structure, map(jnp.asarray, leaves))


def tree(expected: str, change: str, *dtypes: Any) -> Kind:
    """A pytree of arrays and numbers, of these types; or of any, keys of random numbers too."""
    allowed = dtypes or (jnp.number, jnp.bool_, jax.dtypes.prng_key)

    def value_of(value: Any) -> Any:
        for leaf in jax.tree.leaves(value):
            leaf = leaf if is_array(leaf) or isinstance(leaf, bool | complex) else _array(leaf)
            _require(any(jnp.issubdtype(jnp.result_type(leaf), t) for t in allowed))
        return value

    return Kind(expected, change, value_of, ("x", object(), len, [print], {"a": "b"}, dict))


# Objects.


def instance(cls: Any, change: str, *, arrays: bool = True) -> Kind:
    """An instance of a class or a runtime protocol, or of several; a pytree of `arrays` or not."""
    classes = cls if isinstance(cls, tuple) else (cls,)

    def value_of(value: Any) -> Any:
        _require(isinstance(value, cls) and not isinstance(value, type))
        return _leaves(value) if arrays else value

    names = " or ".join(c.__name__ for c in classes)
    expected = f"{'an' if names[0] in 'AEIO' else 'a'} {names}"
    others = (None, "x", 1, True, [1.0], {}, object(), *classes)
    return Kind(expected, change, value_of, others)


def site_kind(cls: Any, *, abstract: bool) -> Kind:
    """A `Site` of arrays, or of their shapes."""
    any_rank, some_rank = (array(rank=rank, abstract=abstract) for rank in (0, 1))

    def value_of(site: Any) -> Any:
        _require(isinstance(site, cls))
        KINDS["linear"].read(site.linear)
        some_rank.read(site.a)
        for v, kind in ((site.x, any_rank), (site.w, some_rank), (site.weights, any_rank)):
            if v is not None:
                kind.read(v)
        return site

    some: Any = np.ones((2, 2))
    others = (None, "x", 1, True, [1.0], {}, cls, cls(some[0, 0]))
    others = (*others, cls(some)._replace(linear=cls), cls(some)._replace(a=[1.0]))
    change = "make it of the layer: Site(a=linear(x, w), x=x, w=w, linear=linear)"
    return Kind(f"a Site of {'shapes' if abstract else 'arrays'}", change, value_of, others)


def a_function(
    expected: str = "a function", change: str = "pass a function", *, of: int | None = None
) -> Kind:
    """Something that can be called, `of` so many positional arguments, but no class."""

    def value_of(value: Any) -> Any:
        _require(callable(value) and not isinstance(value, type))
        try:
            signature = inspect.signature(value)
        except ValueError:  # a builtin's is not always known
            return value
        if of is not None:
            signature.bind(*range(of))
        return value

    return Kind(expected, change, value_of, (None, "x", 1, True, [1.0], {}, object(), int))


def mapping(item: Kind, expected: str, change: str) -> Kind:
    """A mapping to values of one kind."""

    def value_of(given: Any) -> Any:
        _require(isinstance(given, Mapping))
        for value in given.values():
            item.read(value)
        return given

    return Kind(expected, change, value_of, (None, "x", 1, True, ["a"], object(), dict))


def sequence(item: Kind, expected: str = "", change: str = "", *, length: int = 0) -> Kind:
    """A tuple or a list (or a range, or an array of NumPy) of values of one kind, as a tuple."""

    def value_of(value: Any) -> tuple[Any, ...]:
        _require(isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes))
        _require(not length or len(value) == length)
        return tuple(map(item.read, value))

    others = (None, "x", 1.5, True, {}, object(), tuple, [object()], [None])
    return Kind(expected, change, value_of, others, item.static)


def text(expected: str, change: str) -> Kind:
    """A string that says something."""
    others = (None, 1, True, ["x"], {}, object(), str, b"x", "")
    return Kind(expected, change, only(lambda v: isinstance(v, str) and v), others, static=True)


anything = Kind("anything", "", lambda value: value)
"""What only the function itself can judge."""


def _dtype(value: Any) -> Any:
    _require(isinstance(value, str | type | np.dtype) or hasattr(value, "__name__"))
    _require(jnp.issubdtype(jnp.dtype(value), jnp.floating))
    return value


dtype = Kind(
    "a real floating type",
    "pass for example jnp.float32",
    _dtype,
    ("x", 1, True, [1.0], object(), jnp.int32, jnp.complex64, bool, object),
    static=True,
)


def _params(value: Any) -> Any:
    if value is None:
        return value
    _require(not isinstance(value, type) and hasattr(value, "g") and hasattr(value, "b"))
    for v in (value.g, value.b):
        _require(v is None or isinstance(v, Array) or _array(v) is not None)
    return value


def _key(value: Any) -> Any:
    _require(is_array(value))
    _require(jnp.issubdtype(value.dtype, jax.dtypes.prng_key) or value.dtype == np.uint32)
    return value


axis = integer("an axis by number", "pass an int, such as -1 for the last")
axes = either("axes by number", "pass an int or a tuple of ints", axis, sequence(axis))
count = integer("a whole number, at least 1", "count them", 1)
name = text("a name", "pass a string")
real = number("a finite number", "pass a float")
mode = either("a name or a function", "pass a string or a function", name, a_function(of=1))
SIZES = either(
    "a number of channels, at least 1, or one for each feature axis", "count them", count,
    sequence(count, "sizes", "count the channels"))  # fmt: skip
norm_axes = either("'channels', 'all' or axes by number", "pass one of these", axes,
                   one_of(Literal["channels", "all"], ""))  # fmt: skip
not_negative = number(
    "a number of at least 0: it is added to the variance under the root",
    "pass for example eps=1e-5",
    lambda v: 0 <= v < math.inf,
    wrong=(-1.0, math.inf),
)
STEP = integer("a number of steps, at least 1", "pass 1 for every position", 1)
STEPS = either(
    "a number of steps, at least 1, or one for each axis", STEP.change, STEP, sequence(STEP)
)
PADDING = either(
    "'SAME', 'VALID' or (low, high) for each axis",
    "use one",
    one_of(Literal["SAME", "VALID", "SAME_LOWER"], ""),
    sequence(sequence(integer("", ""), length=2)),
)
MODEL = a_function("a function of the variables", "pass lambda variables: model.apply(...)", of=1)
KERNEL = ("a kernel [..., K, C], a real one", "pass a jax or NumPy array, units last")

EPS = (
    "a positive number: it is added to the variance under the root",
    "pass for example eps=1e-5",
    lambda v: np.finfo(np.float64).tiny <= v < math.inf,
)
DECAY = (
    "a number in [0, 1), the weight of the old value",
    "pass for example decay=0.9 (a torch momentum of 0.1)",
    lambda v: 0 <= v < 1,
)
settled_eps, settled_decay = number(*EPS, static=True), number(*DECAY, static=True)

declare(
    # What is normalized, and by what.
    **dict.fromkeys(("a", "x", "h", "values"), array()),
    **dict.fromkeys(("v", "w", "kernel"), array(*KERNEL, rank=2)),
    **dict.fromkeys(("g", "bias"), array("one number for each channel, [C]", rank=1, most=1)),
    weights=array("an array of numbers of at least 0", "pass one weight per example, [N]", rank=1),
    params=Kind(
        "an Affine(g, b) of arrays, or None",
        "make them with init_affine(channels), or wrap yours: Affine(g=scale, b=bias)",
        _params,
        ("x", 1, True, [1.0], {"g": 1}, object()),
    ),
    train=flag("pass a Python bool (under jit: static_argnames='train')"),
    # Numbers.
    eps=number(*EPS, wrong=(0, -1.0, math.inf, 1e-310)),
    decay=number(*DECAY, wrong=(1.0, 1, -0.1, math.inf)),
    ddof=integer(
        "0, the biased variance, or 1, the unbiased one",
        "use 0 to keep the variance that normalized the batch, 1 for torch's",
        among=(0, 1),
    ),
    channels=integer("a number of channels, at least 1", "count the channels", 1),
    groups=integer("a number of groups", "pass an int that divides the channels"),
    devices=integer("a number of devices, at least 1", "count the devices", 1),
    # Axes.
    axes=axes,
    channel_axis=axis,
    feature_axes=sequence(axis, "axes by number", "pass a tuple, such as (-2, -1)"),
    unit_axis=axis,
    # Switches.
    **dict.fromkeys(("use_gain", "use_bias", "debias", "centred", "state_gradient"), flag()),
    # Words and functions.
    name=name,
    population=either("a name or a function", "pass a string or a function", name, a_function()),
    loss=a_function("a function of the parameters", "pass the loss of one batch", of=1),
    step=a_function(
        "a function (states, batch) -> states", "pass a forward pass in training mode", of=2
    ),
    apply=MODEL,
    folded_apply=a_function(
        "a function of the variables", "pass lambda variables: model.apply(...)"
    ),
    dtype=dtype,
    # Trees.
    grads=tree("a pytree of arrays", "pass what jax.grad returned", jnp.number),
    variables=mapping(anything, "nested dicts of arrays", "pass the variables of the model"),
    key=Kind("a key of random numbers", "pass jax.random.key(0)", _key, (None, "x", 1.5, [1])),
)
