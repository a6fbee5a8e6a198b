"""A config that tells which of its fields a question reads."""

import dataclasses
import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

DATACLASSES = dataclasses.__file__
ASIDE = "/experiments/asking/"
"""Where configs are kept and compared, which is not to read them."""


def recording(config: Any, read: set[str]) -> Any:
    """The config, of which `read` gets the names of the fields that are read.

    A field is not read where a config is checked, copied, compared or written down; nor is one of a
    copy that was given another value.
    """
    fields = {field.name for field in dataclasses.fields(config)}

    class Recording(type(config)):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            here = sys._getframe(1)
            copied = here.f_locals.get("obj", here.f_locals.get("self"))
            set_ = object.__setattr__
            set_(self, "_other", set())
            set_(self, "_carried", set())
            if _copies(here) and isinstance(copied, Recording):
                set_(self, "_other", copied._other | (fields - copied._carried))
                set_(copied, "_carried", set())
            super().__init__(*args, **kwargs)

        def __getattribute__(self, name: str) -> Any:
            value = object.__getattribute__(self, name)
            if name in fields:
                here = sys._getframe(1)
                if _copies(here):
                    self._carried.add(name)
                elif name not in self._other and _reads(here, self):
                    read.add(name)
            return value

    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return Recording(**values)


def _copies(frame: FrameType) -> bool:
    return frame.f_code.co_filename == DATACLASSES and "replace" in frame.f_code.co_name


def _reads(frame: FrameType | None, config: Any) -> bool:
    while frame is not None and frame.f_locals.get("self") is config:  # its own methods
        if frame.f_code.co_name == "__post_init__":
            return False
        frame = frame.f_back
    if frame is None or frame.f_code.co_filename in (DATACLASSES, "<string>", __file__):
        return False
    path = Path(frame.f_code.co_filename).as_posix()
    above = itertools.islice(_up(frame), 8)
    checks = any(each.f_code.co_name == "__post_init__" for each in above)
    return ASIDE not in path and not checks


def _up(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back
