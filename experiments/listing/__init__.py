"""The command `list`: what norms, models, schemes, data sets and questions there are."""
