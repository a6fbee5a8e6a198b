"""Folding: norms written into the linear layers before them, so that inference does not pay.

`fold` writes given parts into one layer, `fold_norm` any norm that folds, `fold_model` the batch
norms of a whole model, and `plain_weights` the norms of its weights. All but `fold` say what
rounding makes of it.
"""

from normlab.folding.comparison import FoldedLayer, FoldReport
from normlab.folding.kernel import fold
from normlab.folding.layer import Folded, fold_norm
from normlab.folding.model import fold_model
from normlab.folding.plain import plain_weights

__all__ = [
    "FoldReport",
    "Folded",
    "FoldedLayer",
    "fold",
    "fold_model",
    "fold_norm",
    "plain_weights",
]
