"""Population statistics: the state of batch norm, a pytree that says itself what it keeps.

    Running      an exponential average of the batches        Frozen    nothing changes it
    Cumulative   all batches pooled into one                  Renorm    batch renormalization
    Pending      a transaction: one update of many batches    Domains   each domain has its own

Any of them can be the state of batch norm. The state `()` keeps nothing: then inference normalizes
with the statistics of its own batch too.
"""
