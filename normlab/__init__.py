"""normlab: normalization in one equation, h = f(g · (a − μ) / σ + b), with explicit state."""

from normlab.batch import BatchState, batch_norm, batch_parts
from normlab.cosine import cosine_norm, cosine_parts
from normlab.devices.gradients import global_gradient, global_mean
from normlab.devices.merging import all_reduce
from normlab.devices.topology import AxisName, Gradient, Sync, ring
from normlab.equation import Parts, affine, fold, invert
from normlab.example import (
    group_norm,
    group_parts,
    instance_norm,
    instance_parts,
    layer_norm,
    layer_parts,
    rms_norm,
    rms_parts,
)
from normlab.folding.layer import Folded, fold_norm
from normlab.folding.model import fold_model
from normlab.folding.plain import plain_weights
from normlab.folding.report import FoldedLayer, FoldReport
from normlab.instruments.agreement import Equivalence, equivalence
from normlab.instruments.decorrelation import Whitening, whiten, whitening
from normlab.instruments.shards import Drift, drift
from normlab.linear import Conv, Dense, Linear
from normlab.measure import Algorithm, Moments, effective_sample_size, empty, merge, merge_axes, moments
from normlab.population.by_name import init_domains, init_population
from normlab.population.checkpoint import check_conventions, conventions, restore_states
from normlab.population.cumulative import Cumulative, Estimator, init_cumulative
from normlab.population.delayed import Delayed, exchange, init_delayed
from normlab.population.domains import Domains, select_domain
from normlab.population.frozen import Frozen, freeze, thaw
from normlab.population.pooling import average_running, merge_running, pool_running, share_running
from normlab.population.protocol import BadBatch, Population
from normlab.population.renorm import Renorm, init_renorm
from normlab.population.running import Running, change_ddof, init_running
from normlab.population.transaction import Pending, begin, commit, precise, settle
from normlab.registry import INVARIANCES, Row, get, names, row
from normlab.equation import Affine, init_affine
from normlab.site import Norm, Params, Site, State, shapes
from normlab.weight import (
    weight_norm,
    weight_norm_init,
    weight_parts,
    weight_standardization,
    weight_standardization_parts,
)

__version__ = "0.1.0"

__all__ = [
    "INVARIANCES",
    "Affine",
    "Algorithm",
    "AxisName",
    "BadBatch",
    "BatchState",
    "Conv",
    "Cumulative",
    "Delayed",
    "Dense",
    "Domains",
    "Drift",
    "Equivalence",
    "Estimator",
    "FoldReport",
    "Folded",
    "FoldedLayer",
    "Frozen",
    "Gradient",
    "Linear",
    "Moments",
    "Norm",
    "Params",
    "Parts",
    "Pending",
    "Population",
    "Renorm",
    "Row",
    "Running",
    "Site",
    "State",
    "Sync",
    "Whitening",
    "affine",
    "all_reduce",
    "average_running",
    "batch_norm",
    "batch_parts",
    "begin",
    "change_ddof",
    "check_conventions",
    "commit",
    "conventions",
    "cosine_norm",
    "cosine_parts",
    "drift",
    "effective_sample_size",
    "empty",
    "equivalence",
    "exchange",
    "fold",
    "fold_model",
    "fold_norm",
    "freeze",
    "get",
    "global_gradient",
    "global_mean",
    "group_norm",
    "group_parts",
    "init_affine",
    "init_cumulative",
    "init_delayed",
    "init_domains",
    "init_population",
    "init_renorm",
    "init_running",
    "instance_norm",
    "instance_parts",
    "invert",
    "layer_norm",
    "layer_parts",
    "merge",
    "merge_axes",
    "merge_running",
    "moments",
    "names",
    "plain_weights",
    "pool_running",
    "precise",
    "restore_states",
    "ring",
    "rms_norm",
    "rms_parts",
    "row",
    "select_domain",
    "settle",
    "shapes",
    "share_running",
    "thaw",
    "weight_norm",
    "weight_norm_init",
    "weight_parts",
    "weight_standardization",
    "weight_standardization_parts",
    "whiten",
    "whitening",
]
