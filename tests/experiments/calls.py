"""What workers of a cluster run in the tests; nothing of JAX, so that they start fast."""

import os
import signal
import time
from pathlib import Path


def squares(count):
    """Squares, and where they were made."""
    for i in range(count):
        yield i**2, os.getpid()


def variables(*names):
    """What a worker sees."""
    yield {name: os.environ.get(name) for name in names}
    yield len(getattr(os, "sched_getaffinity", lambda _: [0])(0))


def waits(folder, number):
    """Says that it has begun, and goes on when it is let."""
    Path(folder, f"begun-{number}-{os.getpid()}").touch()
    yield "begun"
    while not Path(folder, "go").exists():
        time.sleep(0.05)
    yield number


def dies(after):
    """A worker that is killed each time."""
    yield from range(after)
    time.sleep(1)  # what it yielded is on its way
    os.kill(os.getpid(), signal.SIGKILL)


def raises():
    """An error that nobody catches."""
    yield 1
    raise LookupError("nothing there")
