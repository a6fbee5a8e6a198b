"""The command `normlab`, which is also `python -m normlab.experiments`."""

import sys


def main() -> int:
    """Runs the command; returns the exit status."""
    try:
        from .console import main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("normlab"):
            raise
        print(f"normlab needs {error.name}: pip install 'normlab[experiments]'", file=sys.stderr)
        return 2
    return main()


if __name__ == "__main__":
    sys.exit(main())
