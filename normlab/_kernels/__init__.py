"""Kernels in Pallas: norms in one pass over memory, where XLA takes more.

`normlab._implementation` chooses; nothing else imports this folder. A kernel is a plain function of
arrays (`rows`, `columns`); what derivatives, `vmap` and other platforms make of it is in
`primitive`, with the formula that stands in where there is no kernel.
"""
