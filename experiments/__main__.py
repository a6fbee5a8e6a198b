"""The command `normlab`, which is also `python -m normlab.experiments`."""

import os
import sys


def main() -> int:
    """Runs the command; returns the exit status."""
    if not {"", os.getcwd()} & {*sys.path}:  # an installed command begins without it
        sys.path.append(os.getcwd())  # where modules of one's own are; they hide no other
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
