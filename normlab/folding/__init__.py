"""Norms written into the layers before them, so that they cost nothing at inference."""

from normlab.equation import fold
from normlab.folding.layer import Folded, fold_norm
from normlab.folding.model import fold_model
from normlab.folding.plain import plain_weights
from normlab.folding.report import FoldedLayer, FoldReport

__all__ = [
    "FoldReport",
    "Folded",
    "FoldedLayer",
    "fold",
    "fold_model",
    "fold_norm",
    "plain_weights",
]
