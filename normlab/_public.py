"""The public names of normlab, which `normlab/__init__.py` loads when one is first asked for."""

import importlib
import typing

import normlab.rows  # noqa: F401
from normlab import combine, devices, family, measure, placement, population
from normlab.batch import batch_moments, batch_norm, batch_parts
from normlab.cosine import cosine_norm, cosine_parts
from normlab.devices.topology import Sync
from normlab.equation import Affine, Parts, affine, init_affine, invert, learned
from normlab.example import (
    group_moments,
    group_norm,
    group_parts,
    instance_moments,
    instance_norm,
    instance_parts,
    layer_moments,
    layer_norm,
    layer_parts,
    rms_moments,
    rms_norm,
    rms_parts,
)
from normlab.gains import Gain, Log, Offset, init_gain, modulate
from normlab.heads import Paired, init_heads, normalize_heads
from normlab.implementation import Implementation, add_norm
from normlab.linear import Conv, ConvTranspose, Dense, Linear
from normlab.making import stateless
from normlab.maps import Mapped, WeightMap, weight_map
from normlab.measure import Moments, moments
from normlab.population.protocol import Population
from normlab.population.running import Running, init_running
from normlab.registry import INVARIANCES, Row, get, names, register, row, unregister
from normlab.sharded import Sharded
from normlab.site import Norm, Site, shapes
from normlab.steps import decay_mask, project
from normlab.weight import (
    weight_norm,
    weight_norm_init,
    weight_parts,
    weight_standardization,
    weight_standardization_parts,
)

if typing.TYPE_CHECKING:
    from normlab import convert, folding, instruments

__all__ = [
    "INVARIANCES",
    "Affine",
    "Conv",
    "ConvTranspose",
    "Dense",
    "Gain",
    "Implementation",
    "Linear",
    "Log",
    "Mapped",
    "Moments",
    "Norm",
    "Offset",
    "Paired",
    "Parts",
    "Population",
    "Row",
    "Running",
    "Sharded",
    "Site",
    "Sync",
    "WeightMap",
    "add_norm",
    "affine",
    "batch_moments",
    "batch_norm",
    "batch_parts",
    "combine",
    "convert",
    "cosine_norm",
    "cosine_parts",
    "decay_mask",
    "devices",
    "family",
    "folding",
    "get",
    "group_moments",
    "group_norm",
    "group_parts",
    "init_affine",
    "init_gain",
    "init_heads",
    "init_running",
    "instance_moments",
    "instance_norm",
    "instance_parts",
    "instruments",
    "invert",
    "layer_moments",
    "layer_norm",
    "layer_parts",
    "learned",
    "measure",
    "modulate",
    "moments",
    "names",
    "normalize_heads",
    "placement",
    "population",
    "project",
    "register",
    "rms_moments",
    "rms_norm",
    "rms_parts",
    "row",
    "shapes",
    "stateless",
    "unregister",
    "weight_map",
    "weight_norm",
    "weight_norm_init",
    "weight_parts",
    "weight_standardization",
    "weight_standardization_parts",
]


if not typing.TYPE_CHECKING:  # or a checker would let every name pass

    def __getattr__(name: str) -> typing.Any:
        """Loads a family that no norm needs when it is first asked for: `nl.folding.fold_norm`."""
        if name in ("convert", "folding", "instruments"):
            return importlib.import_module(f"normlab.{name}")
        raise AttributeError(f"module 'normlab' has no attribute {name!r}")
