"""What batch norm keeps: populations, by class and by name, and what is done with their states."""

from normlab.population._batches import BadBatch
from normlab.population.by_name import init_domains, init_population
from normlab.population.checkpoint import (
    change_ddof,
    check_conventions,
    conventions,
    restore_states,
)
from normlab.population.cumulative import Cumulative, Estimator, init_cumulative
from normlab.population.delayed import Delayed, exchange, init_delayed
from normlab.population.domains import Domains, select_domain
from normlab.population.frozen import Frozen, freeze, thaw
from normlab.population.pooling import (
    average_running,
    merge_running,
    pool_running,
    share_running,
)
from normlab.population.protocol import Population
from normlab.population.renorm import Renorm, init_renorm
from normlab.population.running import Running, init_running
from normlab.population.transaction import Pending, begin, commit, precise, settle

__all__ = [
    "BadBatch",
    "Cumulative",
    "Delayed",
    "Domains",
    "Estimator",
    "Frozen",
    "Pending",
    "Population",
    "Renorm",
    "Running",
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
    "init_domains",
    "init_population",
    "init_renorm",
    "init_running",
    "merge_running",
    "pool_running",
    "precise",
    "restore_states",
    "select_domain",
    "settle",
    "share_running",
    "thaw",
]
