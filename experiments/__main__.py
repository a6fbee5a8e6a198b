"""The command `normlab`, which is also `python -m normlab.experiments`."""

import os
import signal
import sys


def main() -> int:
    """Runs the command; returns the exit status."""
    if not {"", os.getcwd()} & {*sys.path}:  # an installed command begins without it
        sys.path.append(os.getcwd())  # where modules of one's own are; they hide no other
    quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if quiet:  # a Ctrl-C in the midst of an import leaves through any library
        signal.signal(signal.SIGINT, _leave)
    try:
        from .console import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("normlab"):
            raise
        print(f"normlab needs {error.name}: pip install 'normlab[experiments]'", file=sys.stderr)
        return 2
    try:
        return main(begin=_begin if quiet else lambda: None)
    except BrokenPipeError:  # of `| head`: what it printed is no longer wanted
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _leave(*_: object) -> None:
    os.write(2, b"interrupted before there was anything to keep.\n")
    os._exit(130)


def _begin() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    sys.exit(main())
