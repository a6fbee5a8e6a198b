"""The experiments: `python -m experiments --help`. They run from a checkout."""
