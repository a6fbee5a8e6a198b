"""The tests of `experiments/`; those of the library, beside this folder, do without it."""
