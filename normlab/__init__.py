"""normlab: normalization in one equation, h = f(g · (a − μ) / σ + b), with explicit state.

The norms and what they are made of stand here. Beside them: `normlab.family` (all other norms),
`normlab.combine` (norms made of norms), `normlab.measure` (moments as a monoid),
`normlab.population` (what batch norm keeps), `normlab.placement` (where norms stand in a net),
`normlab.devices` (what devices merge), `normlab.folding`, `normlab.instruments`, `normlab.convert`;
and `normlab.linen` and `normlab.nnx`, which are imported by name.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING

__version__ = _version("normlab")

if TYPE_CHECKING:
    from normlab._public import *  # noqa: F403
    from normlab._public import __all__ as __all__
else:  # or a checker would let every name pass

    def __getattr__(name):
        """Loads the library when a name of it is first asked for, so `normlab --help` is quick."""
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module 'normlab' has no attribute {name!r}")
        import normlab._public as public

        if name in ("__all__", *getattr(public, "__all__", ())):
            return globals().setdefault(name, getattr(public, name))
        if name in globals():  # a module, which has been loaded meanwhile
            return globals()[name]
        hint = f": import normlab.{name}" if name in ("linen", "nnx") else ""
        raise AttributeError(f"module 'normlab' has no attribute {name!r}{hint}")

    def __dir__():
        return sorted({*globals(), *__getattr__("__all__")})
