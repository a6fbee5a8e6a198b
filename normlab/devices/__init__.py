"""Statistics and gradients across devices."""
