"""Kernels in Pallas: norms that read an array from memory once for each time that they must."""
