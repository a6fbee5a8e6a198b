"""The tables of docs/numerics.md: errors of variances, and where ε breaks invariances."""
