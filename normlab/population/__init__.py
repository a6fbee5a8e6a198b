"""What batch norm keeps: populations, by class and by name, and what is done with their states."""

from normlab.population._batches import BadBatch
from normlab.population.backward import Tap, take_back, tapped, taps
from normlab.population.by_name import (
    init_digits,
    init_domains,
    init_population,
    init_prior,
    init_rms,
    init_streaming,
)
from normlab.population.checkpoint import (
    change_ddof,
    check_conventions,
    conventions,
    restore_states,
)
from normlab.population.cumulative import Cumulative, Estimator, init_cumulative
from normlab.population.delayed import Delayed, exchange, init_delayed
from normlab.population.digits import Digits
from normlab.population.domains import Domains, select_domain, select_step
from normlab.population.frozen import Frozen, freeze, thaw
from normlab.population.mabn import Mabn, init_mabn
from normlab.population.pooling import (
    average_running,
    merge_running,
    pool_running,
    share_running,
)
from normlab.population.power import Power, init_power
from normlab.population.prior import Prior, adapt
from normlab.population.protocol import Population
from normlab.population.renorm import Renorm, init_renorm
from normlab.population.rms import Rms
from normlab.population.running import Running, init_running
from normlab.population.streaming import Streaming
from normlab.population.transaction import Pending, begin, commit, precise, settle
from normlab.population.window import Window, init_window

__all__ = [
    "BadBatch",
    "Cumulative",
    "Delayed",
    "Digits",
    "Domains",
    "Estimator",
    "Frozen",
    "Mabn",
    "Pending",
    "Population",
    "Power",
    "Prior",
    "Renorm",
    "Rms",
    "Running",
    "Streaming",
    "Tap",
    "Window",
    "adapt",
    "average_running",
    "begin",
    "change_ddof",
    "check_conventions",
    "commit",
    "conventions",
    "exchange",
    "freeze",
    "init_cumulative",
    "init_delayed",
    "init_digits",
    "init_domains",
    "init_mabn",
    "init_population",
    "init_power",
    "init_prior",
    "init_renorm",
    "init_rms",
    "init_running",
    "init_streaming",
    "init_window",
    "merge_running",
    "pool_running",
    "precise",
    "restore_states",
    "select_domain",
    "select_step",
    "settle",
    "share_running",
    "take_back",
    "tapped",
    "taps",
    "thaw",
]
