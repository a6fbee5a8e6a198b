"""Folding: norms written into the linear layers before them, one layer or a whole model."""
