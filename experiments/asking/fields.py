"""The fields of a question's config: given after `--`, swept over a grid, or changed in Python."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import shlex
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import tyro

from normlab.errors import nearest

from .. import models
from ..engine.question import Config
from ..grids import split
from ..rundir import RunError
from ..terminal import PROGRAM
from . import reads

LARGEST = 100_000
"""Points of a grid: a directory each."""

ASIDE = ("data_dir",)
"""What is no part of the question: runs that differ in it alone are one run."""


class Point(NamedTuple):
    """A point of a grid.

    Attributes:
      values: The swept fields.
      config: The config with them.
    """

    values: dict[str, Any]
    config: Config

    @property
    def name(self) -> str:
        """The swept fields in words: `lr 0.1, seeds 3`."""
        return ", ".join(f"{field} {words(value)}" for field, value in self.values.items())


def parsed(name: str, config: Config, options: Sequence[str]) -> Config:
    """The config with options of the terminal, `--lr 0.1 --norms none batch`.

    Raises:
      RunError: For an option that the question does not read.
      SystemExit: For one that there is not, or a value that is refused; the reason is printed.
    """
    unread = reads.unread(name)
    for option in options:
        field = option.partition("=")[0].removeprefix("--").replace("-", "_")
        if option.startswith("--") and field in unread:
            raise _unread(name, config, field, option)
    kind = type(config)
    hints = typing.get_type_hints(kind, include_extras=True)
    hidden = {
        "__annotations__": {field: Annotated[hints[field], tyro.conf.Suppress] for field in unread},
        **{field: getattr(config, field) for field in unread},
    }
    offered = dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), hidden))
    found = tyro.cli(
        offered,
        default=offered(**_values(config)),
        args=list(options),
        prog=f"{PROGRAM} run {name} --",
        config=(tyro.conf.OmitArgPrefixes,),
    )
    return kind(**_values(found))


def _values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _unread(name: str, config: Config, field: str, said: str) -> RunError:
    """The error about a field that a question does not read."""
    instead = config.INSTEAD.get(field)
    if instead:
        return RunError(
            f"{said}: {name} sets {field} itself for each of its conditions, by {instead}. Give "
            "that in its place."
        )
    offered = [known for known in _values(config) if known not in reads.unread(name)]
    return RunError(
        f"{said}: {name} does not read {field}, so that nothing would change. Leave it out. It "
        f"reads {', '.join(offered)}."
    )


def replaced(name: str, config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other values.

    Args:
      name: The question, for the error.
      config: Its config.
      values: Fields and what they shall be.

    Raises:
      RunError: For a field that the question does not have, with the nearest, or does not read, or
        a value that its config refuses.
    """
    _require_fields(name, config, values)
    return dataclasses.replace(config, **values)


def grid(name: str, config: Config, sweep: Iterable[str]) -> list[Point]:
    """The points of a grid over fields of a config, of which the last varies fastest.

    >>> from experiments.engine import Config
    >>> [point.name for point in grid("figure1", Config(), ["lr=0.01,0.1", "seeds=3"])]
    ['lr 0.01, seeds 3', 'lr 0.1, seeds 3']

    Args:
      name: The question, for the errors.
      config: What the points have in common.
      sweep: Fields with their values, `lr=0.01,0.1`, read as the option `--lr` would be; several
        words of one value as in a shell, `norms=none batch,none layer`.

    Raises:
      RunError: If a field is not there, or given twice; if values are missing, or given twice; if a
        config refuses them together; if there are more points than `LARGEST`.
      SystemExit: For a value that is none of its field's type; what was expected is printed.
    """
    values: dict[str, list[Any]] = {}
    for word in sweep:
        field, texts = split(word)
        if field in values:
            raise RunError(f"--sweep: {field} is given twice. Give all its values at once.")
        _require_fields(name, config, (field,), "--sweep: ")
        if field in ASIDE:
            raise RunError(
                f"--sweep: the answer does not depend on {field}. Give it once, as "
                f"--{field.replace('_', '-')}."
            )
        values[field] = [_value(name, config, field, text) for text in texts]
        often = collections.Counter(map(words, values[field])).most_common(1)
        if often[0][1] > 1:
            raise RunError(f"--sweep: {field} is {often[0][0]} twice. Give each value once.")
    count = math.prod(map(len, values.values()))
    if not values or count > LARGEST:
        given = f"{count:,} points" if values else "no field"
        raise RunError(
            f"--sweep: got {given}; it must be FIELD=VALUE,VALUE,… for each field that varies, of "
            f"at most {LARGEST:,} points together."
        )
    rows = itertools.product(*values.values())
    return [_point(name, config, dict(zip(values, row, strict=True))) for row in rows]


def words(value: Any) -> str:
    """A value as the terminal takes it: `0.1`, `none batch`.

    >>> words((("sgd", 0.1), ("adam", 0.001)))
    'sgd 0.1 adam 0.001'
    """
    return shlex.join(_words(value)) if isinstance(value, tuple) else str(value)


def _words(value: Any) -> list[str]:
    if not isinstance(value, tuple):
        return [str(value)]
    return [word for part in value for word in _words(part)]


def _value(name: str, config: Config, field: str, text: Sequence[str]) -> Any:
    """A value as the option of the field's name reads it, whatever the other fields are."""
    if list(text) == [""] and isinstance(getattr(config, field), tuple):
        text = ()  # the empty word of a shell is an empty list
    hints = typing.get_type_hints(type(config), include_extras=True)
    alone: Any = dataclasses.make_dataclass(field, [(field, hints[field])], frozen=True)
    found = tyro.cli(
        alone,
        default=alone(getattr(config, field)),
        args=[f"--{field.replace('_', '-')}", *text],
        prog=f"{PROGRAM} run {name} --",
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
    )
    return getattr(found, field)


def _point(name: str, config: Config, values: dict[str, Any]) -> Point:
    try:
        point = Point(values, dataclasses.replace(config, **values))
        models.require(point.config.model)
        return point
    except ValueError as error:
        at = Point(values, config).name
        raise RunError(f"--sweep: {name} cannot be asked at {at}. {error}") from None


def _require_fields(name: str, config: Config, given: Iterable[str], where: str = "") -> None:
    known = [field.name for field in dataclasses.fields(config)]
    for field in given:
        if field not in known:
            raise RunError(f"{where}{name} has no field {field!r}: {nearest(field, known)}.")
        if field in reads.unread(name):
            raise _unread(name, config, field, f"{where}{field}")
