"""Flax, or an error that says how to install it."""

try:
    import flax  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "flax":
        raise
    raise ModuleNotFoundError(
        "normlab.linen and normlab.nnx need flax, which is not installed. To fix it, "
        "pip install 'normlab[flax]'.",
        name="flax",
    ) from None
