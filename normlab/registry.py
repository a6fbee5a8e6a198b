"""Every norm by name: one table for tests, documentation and experiments.

A new norm is a function that returns its parts and a row that says what it is:

    def half_parts(a, params=None, *, eps=1e-5, weights=None, channel_axis=-1): ...
    register(Row("half", stateless(half_parts)))

From then on `get("half", eps=1e-6)` is it, in the skins, the experiments and the laws too. The
rows of the library itself are in `normlab.rows`.
"""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jax.core import Tracer

from normlab._arguments import checked, flag, instance, is_array, text
from normlab._checks import check_options, imported
from normlab.errors import invalid, nearest
from normlab.making import factory_of
from normlab.maps import WeightMap
from normlab.sharded import OVER
from normlab.site import Made, Norm

INVARIANCES = (
    "weights rescaled",
    "weights recentred",
    "one unit rescaled",
    "data rescaled",
    "data recentred",
    "one case rescaled",
    "positions permuted",
    "other examples changed",
)
"""Changes that may leave h as it is, with ε = 0: six of weights and data (Ba et al. 2016, table 1);
the positions of every example in another order, in which h is too; and examples beside the one
that is looked at."""


class Row(NamedTuple):
    """What a norm is, in one line.

    Attributes:
      name: The name it goes by.
      factory: Makes the norm of its options, which are keyword arguments: see `stateless`.
      needs: What μ and σ are measured on: `"a"`, the pre-activation, `"w"`, the weights, `"x"`, the
        input, and `"batch"` where an example's μ and σ depend on the others.
      looks_at: The same in words.
      mu: The shift μ.
      sigma: The scale σ.
      invariances: Which of `INVARIANCES` leave h unchanged, behind a dense layer; of positions, and
        of a norm that needs them, behind one with positions.
      paper: Where it comes from.
      with_positions: Which do so behind a layer with several positions; `None` for the same.
      fused: Whether the activation is part of it, so that a model applies none after it.

    >>> from normlab import row
    >>> row("layer").mu, row("layer").paper
    ('mean a', 'Ba, Kiros & Hinton 2016')
    """

    name: str
    factory: Callable[..., Any]
    needs: frozenset[str] = frozenset({"a"})
    looks_at: str = "a"
    mu: str = "?"
    sigma: str = "?"
    invariances: frozenset[str] = frozenset()
    paper: str = "–"
    with_positions: frozenset[str] | None = None
    fused: bool = False

    @property
    def axis_of(self) -> Literal["batch", "example"] | None:
        """What lies along the axes of devices of its option `axis_name`; `None` without the option.

        `"batch"`, the examples, is what the data axis of a training step is for, as in batch norm;
        each `"example"`, its channels or its positions, what layer norm and its like mean.
        """
        if "axis_name" not in inspect.signature(self.factory).parameters:
            return None
        return "example" if getattr(self.factory, "kinds", {}).get("axis_name") is OVER else "batch"


_ROWS: dict[str, Row] = {}
_INVARIANT = ("invariances", "with_positions")
NAME = text("the name of a norm", "use one of names()")


ROW = instance(Row, "pass Row(name, factory, ...)", arrays=False)


@checked("register", row=ROW, replace=flag())
def register(row: Row, *, replace: bool = False) -> Row:
    """Adds a norm, which then goes by its name everywhere: `get`, the skins, experiments, laws.

    Args:
      row: What it is. Its `factory` may be a function that returns parts, as `stateless` takes it.
      replace: Whether it may take the place of a norm of the same name, as in a notebook.

    Returns:
      The row.

    Raises:
      ValueError: If another norm has the name, it has a ":" in it, or a field means nothing.

    >>> import jax.numpy as jnp
    >>> from normlab import Parts, Site, stateless
    >>> def centre_parts(a, params=None, *, channel_axis=-1):
    ...     mean = a.mean(channel_axis, keepdims=True)
    ...     return Parts(mean, jnp.ones(()), jnp.ones(()), jnp.zeros(()))
    >>> row = register(Row("centre", stateless(centre_parts), mu="mean a", sigma="1"))
    >>> get("centre").apply(None, (), Site(jnp.array([[1.0, 3.0]])), train=True)[0].tolist()
    [[-1.0, 1.0]]
    >>> unregister("centre")
    """
    taken = row.name in _ROWS and not replace
    if not isinstance(row.name, str) or not row.name or ":" in row.name or taken:
        given = f"the name {row.name!r}" + ", which another norm has" * taken
        raise invalid("register", given, "a name of its own, without ':'", "choose another")
    words = {"needs": {"a", "w", "x", "batch"}} | {key: {*INVARIANCES} for key in _INVARIANT}
    for field, known in words.items():
        given = getattr(row, field)
        if given is None and field == "with_positions":
            continue
        if not isinstance(given, frozenset | set) or not given <= known:
            expected = f"a set of some of {', '.join(sorted(known))}"
            raise invalid("register", f"{field}={given!r}", expected, "use these words")
    row = row._replace(factory=factory_of(row.factory))
    _ROWS[row.name] = row
    return row


@checked("unregister", name=NAME)
def unregister(name: str) -> None:
    """Takes a norm out of the table again, by its name; raises ValueError for an unknown one.

    >>> from normlab import example, making, names, register, unregister
    >>> own = Row("own", making.stateless(example.rms_parts))
    >>> _ = register(own)
    >>> unregister("own")
    >>> "own" in names()
    False
    """
    del _ROWS[row(name).name]


@checked("get", name=NAME)
def get(name: str, **options: Any) -> Norm:
    """Returns the norm called `name`; twice the same for the same options.

    Args:
      name: One of `names()`, or `"mypackage.module:factory"`, which is imported.
      **options: The options of its factory; `help(row(name).factory)` lists them.

    Raises:
      ValueError: For an unknown name or option, with the nearest known one.

    >>> import jax.numpy as jnp
    >>> from normlab import Site
    >>> norm, site = get("group", groups=2), Site(jnp.array([[1.0, 3.0, 10.0, 30.0]]))
    >>> norm.apply(*norm.init(site), site, train=True)[0].round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    >>> get("bach")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: registry: got the unknown norm 'bach': did you mean 'batch'? Known: none, batch, ...
    """
    factory, fused = (found := row(name)).factory, found.fused
    check_options(name, inspect.signature(factory).parameters, options)
    made = sorted((name, _hashable(value)) for name, value in options.items())
    try:
        return _get(Made(name, factory, tuple(made)), tuple(type(v) for _, v in made), fused)
    except TypeError:  # an option that cannot be hashed
        return factory(**options).known_as(None, fused=fused)


@functools.lru_cache(maxsize=1024)
def _get(made: Made, types: tuple[type, ...], fused: bool) -> Norm:
    del types  # True is no 1
    return made.factory(**dict(made.options)).known_as(made, fused=fused)


def _hashable(value: Any) -> Any:
    """A list as a tuple, a number of NumPy or jax as one of Python: what options mean alike."""
    if isinstance(value, list):
        return tuple(value)
    known = is_array(value) and value.ndim == 0 and not isinstance(value, Tracer)
    return value.item() if known else value


@checked("row", name=NAME)
def row(name: str) -> Row:
    """Returns the registry's row for `name`; raises ValueError for an unknown one.

    >>> from normlab import row
    >>> row("rms").sigma
    '√(mean a² + ε)'
    """
    if ":" in name:
        found = imported("registry", "norm", name)
        there = found if isinstance(found, Row) else Row(name, found)
        return there._replace(factory=factory_of(there.factory))
    if name not in _ROWS:
        given = f"the unknown norm {name!r}: {nearest(name, _ROWS)}"
        raise invalid("registry", given, "the name of a norm", "use a known one")
    return _ROWS[name]


def names() -> tuple[str, ...]:
    """The names of all norms, in the registry's order.

    >>> from normlab import names
    >>> names()[:4]
    ('none', 'batch', 'layer', 'rms')
    """
    return tuple(_ROWS)


def _pickled(norm: Norm) -> Any:
    """By its name and options; one of one's own by its functions."""
    if norm.made is None:
        given = {f.name: getattr(norm, f.name) for f in dataclasses.fields(norm) if f.init}
        return functools.partial(type(norm), **given), ()
    return functools.partial(get, norm.made.name, **dict(norm.made.options)), ()


for _class in (Norm, WeightMap):
    copyreg.pickle(_class, _pickled)
