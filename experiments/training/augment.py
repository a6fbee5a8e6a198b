"""Images, changed at random before each step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax


def augment(kinds: Sequence[str], key: Array, images: Array) -> Array:
    """Images `[N, H, W, K]` changed at random, each by itself.

    Args:
      kinds: "flip" mirrors half of them left to right; "crop" moves each by up to an eighth of its
        height and width (4 of 32 pixels), and what comes in is 0. Both as in He et al. (2016).
      key: Draws.
      images: Of any type.

    >>> augment(("flip", "crop"), jax.random.key(0), jnp.ones((2, 8, 8, 1))).shape
    (2, 8, 8, 1)
    """
    count, height, width, _ = images.shape
    flips, moves = jax.random.split(key)
    if "flip" in kinds:
        mirrored = jax.random.bernoulli(flips, shape=(count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    if "crop" in kinds:
        most = jnp.array([max(1, height // 8), max(1, width // 8)])
        (up, left), nothing = (max(1, height // 8), max(1, width // 8)), (0, 0)
        padded = jnp.pad(images, (nothing, (up, up), (left, left), nothing))
        starts = jax.random.randint(moves, (count, 2), 0, 2 * most + 1)

        def cut(image: Array, start: Array) -> Array:
            return lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

        images = jax.vmap(cut)(padded, starts)
    return images
