"""Norms of other libraries as normlab's, and back, without loss.

Each `from_*` returns a `Converted`, each `to_*` takes one and returns `Exported(variables,
arguments)`; one is the inverse of the other. No library is imported: what is read are arrays,
names and attributes. A convention that the other side cannot hold is an error that names it, and
`allow=` loses it knowingly.

`from_transformers` reads all norms of a language model's checkpoint at once, each with its place.
"""

from normlab.convert.equinox import from_equinox, to_equinox
from normlab.convert.families import FAMILIES, Family, Form, Place
from normlab.convert.flax import from_linen, from_nnx, to_linen, to_nnx
from normlab.convert.haiku import from_haiku, to_haiku
from normlab.convert.keras import from_keras, to_keras
from normlab.convert.model import from_model, to_model
from normlab.convert.torch import from_torch, to_torch
from normlab.convert.transformers import Placed, from_transformers, to_transformers
from normlab.convert.value import Converted, Exported

__all__ = [
    "FAMILIES",
    "Converted",
    "Exported",
    "Family",
    "Form",
    "Place",
    "Placed",
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_model",
    "from_nnx",
    "from_torch",
    "from_transformers",
    "to_equinox",
    "to_haiku",
    "to_keras",
    "to_linen",
    "to_model",
    "to_nnx",
    "to_torch",
    "to_transformers",
]
