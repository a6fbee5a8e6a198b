"""Norms as Pallas kernels for TPU and GPU."""
