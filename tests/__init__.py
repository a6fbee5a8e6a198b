"""The test-suite: laws over the registry, float64 oracles, devices, numerics, bad input."""
