"""The words of `--sync`: over which devices the statistics are measured.

    local               each device its own
    all                 all devices together
    inner               those along the last axis of a mesh of several
    together=axis0      those along the axes named of such a mesh: axis0, axis1, …
    groups=4            blocks of four devices
    groups=0,2|1,3      the groups named
    ring=1              each device with its neighbours up to 1 away
    virtual=64          groups of 64 examples, whatever the number of devices
    ghost=4             parts of a device's batch, four of them, each its own

One of these, then with `+` what else there is to say: `staged`, `every=2`, `gradient=forward`
(backward, none, both), `second=always` (never, when_needed). `ghost` may stand beside one of the
others, which then group its parts: `ghost=4+groups=2`. The running statistics are those of all
devices, but for `local`, and `ghost` by itself, where every device keeps its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import normlab as nl
from normlab.errors import nearest

from ..rundir import RunError

TOPOLOGIES = ("local", "all", "inner", "together", "groups", "ring", "virtual")
WORDS = (*TOPOLOGIES, "ghost", "staged", "every", "gradient", "second")
CHOICES = {"gradient": get_args(nl.devices.Gradient), "second": get_args(nl.devices.Second)}
_ALONE = ("local", "all", "inner", "staged")


def parse(
    text: str, axes: str | tuple[str, ...] = "data", devices: int = 8, *, mapped: bool = True
) -> nl.Sync | str | tuple[str, ...] | None:
    """Returns what the words say, for a norm's `axis_name`.

    Args:
      text: Words, joined with `+`.
      axes: The axes along which the devices lie, a tuple of several; `()` in plain jit without a
        mesh to name, where the batch is cut into `devices` shards.
      devices: How many devices there are.
      mapped: Whether the axes are mapped (`pmap`, `shard_map`, `vmap`) and a norm that names none
        sees its device alone. Otherwise they are those of a mesh, in plain jit.

    Raises:
      RunError: For a word that is not known, or words that do not go together.
    """
    given = _words(text)
    where = [word for word in TOPOLOGIES if word in given]
    if len(where) > 1:
        raise _error(text, f"{' and '.join(where)} exclude each other; name one of them")
    parts = _number(text, given, "ghost") if "ghost" in given else 1
    alone = not where or where == ["local"] if parts > 1 else where == ["local"]
    options: dict[str, Any] = {"axes": axes, "shards": parts}
    if not axes and "virtual" not in given:
        options["shards"] *= devices
    if alone and mapped and axes:
        options["axes"] = ()
    if "inner" in given or "together" in given:
        options["together"] = _together(text, given, axes)
    elif "groups" in given:
        options["groups"] = _groups(text, given["groups"])
    elif "ring" in given:
        options["members"] = nl.devices.ring(devices * parts, _number(text, given, "ring"))
    elif "virtual" in given:
        options["virtual_batch"] = _number(text, given, "virtual")
    elif alone and (parts > 1 or options["axes"] or not axes):
        options["groups"] = 1
    for word, known in CHOICES.items():
        if word in given and given[word] not in known:
            raise _error(text, f"{word}={given[word]}: {nearest(given[word], known)}")
        if word in given:
            options[word] = given[word]
    if "staged" in given:
        options["staged"] = True
    if "every" in given:
        options["every"] = _number(text, given, "every")
    rest = {k: v for k, v in options.items() if k != "axes"}
    if rest == {"shards": 1}:
        return options["axes"] or None
    try:
        return nl.Sync(**options)
    except ValueError as error:
        raise _error(text, str(error)) from None


def alike(sync: nl.devices.AxisName | None, axes: Sequence[str]) -> bool:
    """Whether the running statistics of a norm are those of all devices along the axes.

    >>> alike("data", ["data"]), alike(None, ["data"]), alike("axis1", ["axis0", "axis1"])
    (True, False, False)
    """
    spec = sync if isinstance(sync, nl.Sync) else nl.Sync(sync or ())
    return set(spec.names) == set(axes) and not spec.every


def delayed(sync: nl.devices.AxisName | None) -> nl.Sync | None:
    """The `Sync` by which devices exchange their statistics after each step, if they do."""
    return sync if isinstance(sync, nl.Sync) and sync.every else None


def _words(text: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in text.split("+"):
        word, equals, value = part.strip().partition("=")
        if word not in WORDS:
            raise _error(text, f"unknown word {word!r}: {nearest(word, WORDS)}")
        if word in given:
            raise _error(text, f"{word} stands there twice")
        if bool(equals) == (word in _ALONE) or bool(value) != bool(equals):
            wanted = word if word in _ALONE else f"{word}=VALUE"
            raise _error(text, f"{part.strip()!r} is to be written as {wanted}")
        given[word] = value
    return given


def _number(text: str, given: dict[str, str], word: str) -> int:
    if not given[word].isdecimal() or int(given[word]) < 1:
        raise _error(text, f"{word}={given[word]}: a number from 1 on was expected")
    return int(given[word])


def _together(text: str, given: dict[str, str], axes: str | tuple[str, ...]) -> Any:
    """The axes that are normalized together."""
    if isinstance(axes, str) or len(axes) < 2:
        word = "inner" if "inner" in given else "together"
        why = f"{word} needs a mesh of several axes; give one, as --mesh 4 2 for eight devices"
        raise _error(text, why)
    if "inner" in given:
        return axes[-1]
    names = tuple(given["together"].split(","))
    for i, name in enumerate(names):
        if name not in axes:
            raise _error(text, f"the mesh has no axis {name!r}: {nearest(name, axes)}")
        if name in names[:i]:
            raise _error(text, f"{name} stands there twice")
    return names[0] if len(names) == 1 else names


def _groups(text: str, value: str) -> int | tuple[tuple[int, ...], ...]:
    if value.isdecimal() and int(value) > 0:
        return int(value)
    try:
        groups = tuple(tuple(int(i) for i in group.split(",")) for group in value.split("|"))
    except ValueError:
        groups = ()
    if not groups or ("|" not in value and "," not in value):
        raise _error(
            text, f"groups={value}: a size (groups=4) or a partition (groups=0,2|1,3) was expected"
        )
    return groups


def _error(text: str, why: str) -> RunError:
    return RunError(f"--sync {text}: {why}.")
