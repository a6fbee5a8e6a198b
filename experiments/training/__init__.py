"""Training a model: what is trained, on which devices, from which checkpoint."""
