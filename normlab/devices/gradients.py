"""The loss of all devices, and its gradient: right in `pmap`, `shard_map` and `vmap` alike.

What `lax.pmean` does to a gradient depends on the transform: where types say what varies over the
devices (`shard_map` with `check_vma`), JAX sums the gradients of replicated parameters by itself;
elsewhere every device differentiates the sum of all devices' losses. Two functions hide that:

    def loss(params, x, y):
        return nl.devices.global_mean(losses(params, x, y), "data")

    grads = nl.devices.global_gradient(jax.grad(loss)(params, x, y), "data")
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from normlab._arguments import array, checked
from normlab._checks import promote
from normlab._weights import align_weights
from normlab._xla import derivative_of
from normlab.devices.mapped import check_bound, is_bound, is_typed, varying_axes
from normlab.devices.topology import AxisName, as_sync
from normlab.errors import invalid

Tree = TypeVar("Tree")


@checked("global mean", weights=array())
def global_mean(
    values: ArrayLike, axis_name: AxisName | None, *, weights: ArrayLike | None = None
) -> Array:
    """Σ w·v / Σ w over all values of all devices: the mean that one device would have taken.

    A mean of the devices' means weighs an example of a short, masked shard more than one of a full
    shard; this does not. Its derivative, on each device, is that by what the device owns (its
    inputs and its copy of the parameters): no factor of the number of devices, in any transform.

    Args:
      values: `[N, ...]`, this device's losses; or one number, which counts as one value.
      axis_name: One mapped axis or several; a `Sync` stands for its axes. In plain `jit` they are
        those of the mesh, and the values are of all devices; so they are with `None`.
      weights: Importance, aligned with the leading axes of `values`. Not differentiated.

    Returns:
      One number, the same on all devices; 0 where nothing weighs anything.

    Raises:
      ValueError: If an axis is not bound, or the weights do not fit.

    >>> losses = jnp.array([[1.0, 3.0], [5.0, 7.0]])  # of two devices
    >>> jax.vmap(lambda loss: global_mean(loss, "data"), axis_name="data")(losses).tolist()
    [4.0, 4.0]
    """
    names = _summed("global mean", axis_name)
    values = promote(values)
    w = align_weights("global mean", weights, values)
    if w is None:
        w = jnp.ones((), values.dtype)
    w = lax.stop_gradient(jnp.broadcast_to(w, values.shape))
    total = jnp.where(w > 0, w * jnp.where(w > 0, values, 0), 0).sum()
    count = lax.psum(lax.stop_gradient(w.sum()), names)
    share = total / jnp.where(count > 0, count, 1)
    if is_typed(names):
        return lax.psum(share, names)
    # The transpose of an untyped psum is a psum: it would add up what all devices own.
    return lax.psum(lax.stop_gradient(share), names) + derivative_of(share)


@checked("global gradient")
def global_gradient(grads: Tree, axis_name: AxisName | None) -> Tree:
    """The gradient of a `global_mean` by replicated parameters, from each device's.

    The sum over the devices of what each differentiated by its own copy. Where types say so,
    JAX has added them up already, as in plain `jit`, and the gradient is returned as it is.

    Args:
      grads: What `jax.grad` of a `global_mean` returned on this device.
      axis_name: That of the `global_mean`.

    Raises:
      ValueError: If an axis is not bound, or some but not all axes were added up.

    >>> def gradient(w, x):
    ...     grads = jax.grad(lambda w: global_mean(w * x, "data"))(w)
    ...     return global_gradient(grads, "data")
    ...
    >>> x = jnp.array([[1.0, 3.0], [5.0, 7.0]])  # of two devices
    >>> jax.vmap(gradient, (None, 0), axis_name="data")(2.0, x).tolist()
    [4.0, 4.0]
    """
    names = _summed("global gradient", axis_name)
    if not names:
        return grads
    if not is_typed(names):
        return jax.tree.map(lambda g: lax.psum(g, names), grads)

    def whole(g: Array) -> Array:
        own = set(names) & varying_axes(g)
        if own and own != set(names):
            raise invalid(
                "global gradient",
                f"a gradient that varies over {sorted(own)} and not over the rest of {names}",
                "one that varies over all of them or none",
                "name all axes in one call, or the varying ones alone",
            )
        return lax.psum(g, names) if own else g

    return jax.tree.map(whole, grads)


def _summed(where: str, axis_name: AxisName | None) -> tuple[str, ...]:
    """The axes to sum over: none in plain jit, where every array is of all devices."""
    sync, here = as_sync(axis_name), jax.sharding.get_abstract_mesh()
    mesh = sync.mesh or here
    if not is_bound(sync.names) and {*sync.names} <= {*mesh.axis_names} - {*here.manual_axes}:
        return ()
    check_bound(where, sync.names)
    return sync.names
