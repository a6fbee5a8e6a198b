"""A run again: the directory that it goes on in, and its config for another run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from normlab.errors import nearest

from ..rundir import LOCK, RunError, words


class Config(Protocol):
    """What is run."""

    @property
    def run_dir(self) -> Path | None:
        """Where."""
        ...

    def as_json(self) -> dict[str, Any]:
        """The options that the numbers depend on."""
        ...


def check_directory(config: Config) -> bool:
    """Whether the run directory holds this run, begun; RunError if it holds something else."""
    path = config.run_dir
    if path is None or not path.exists():
        return False
    try:
        there = json.loads((path / "config.json").read_text())
    except FileNotFoundError:
        if path.is_dir() and not any(file.name != LOCK for file in path.iterdir()):
            return False
        raise RunError(
            f"{path} exists already and is not the directory of a run. Choose another --run-dir."
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path / 'config.json'}: {error}.") from None
    here = json.loads(json.dumps(config.as_json()))
    differ = [
        f"--{name.replace('_', '-')} {words(there.get(name, '?'))} and not {words(value)}"
        for name, value in here.items()
        if there.get(name, "?") != value
    ]
    if differ or set(there) != set(here):
        raise RunError(
            f"the run directory {path} is that of another run: "
            f"{', '.join(differ) or 'of another command'}. Choose another --run-dir, or give the "
            "same options to go on with that run."
        )
    return True


def read_config(cls: Callable[..., Any], path: Path) -> Any:
    """The config that a run wrote into its `config.json`.

    Args:
      cls: The dataclass of the command.
      path: The file, or the directory of the run.

    Raises:
      RunError: If it cannot be read, or is that of another command.
    """
    path = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"--config {path}: cannot read it: {error}.") from None
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for name in found if isinstance(found, dict) else ["?"]:
        if name not in known:
            raise RunError(
                f"--config {path}: it is not the config of this command, which has no option "
                f"{name!r}: {nearest(name, known)}."
            )
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()})


def taken(arguments: Sequence[str], option: str) -> tuple[list[str], list[str] | None]:
    """The arguments without an option, and its words; `None` if it is not given.

    >>> taken(["--lr", "0.1", "--sweep", "seeds=1,2", "steps=5", "--tune"], "--sweep")
    (['--lr', '0.1', '--tune'], ['seeds=1,2', 'steps=5'])
    """
    rest: list[str] = []
    found: list[str] | None = None
    inside = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name == option:
            inside, found = not equals, [*(found or []), *([value] if equals else [])]
        elif inside and not word.startswith("--"):
            assert found is not None
            found.append(word)
        else:
            inside = False
            rest.append(word)
    return rest, found


def parsed(read: Callable[..., Any], cls: Callable[..., Any], arguments: Sequence[str]) -> Any:
    """The options; those that are not given are those of `--config FILE`, if there is one.

    Args:
      read: Reads arguments; takes a `default`.
      cls: The dataclass of the command.
      arguments: What was given.
    """
    rest, found = taken(arguments, "--config")
    if found is None:
        return read(rest)
    if len(found) != 1:
        raise RunError(f"--config: got {words(found)}; it must be one file.")
    return read(rest, default=read_config(cls, Path(found[0]).expanduser()))
