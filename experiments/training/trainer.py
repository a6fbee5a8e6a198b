"""One trainer for every norm and model: data-parallel over `pmap` or `shard_map`, seeds together.

Inside each device the steps are scanned and the seeds are vmapped, so a call trains all seeds for
many steps without returning to Python. Parameters, the norms' states and the optimizer's state
are explicit pytrees of shape `[devices, seeds, ...]`.

The gradient is the mean over the devices of the gradients of their local losses; with statistics
merged inside the loss that is the gradient of the global loss (a test compares it with one device
and the whole batch).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

import normlab as nl
from normlab.devices.mapped import vary

from .. import models
from ..data import Dataset
from ..rundir import RunError
from .augment import augment
from .tasks import Evaluation, Task

AXIS = "data"
"""The name of the mapped axis: devices that each hold a part of the batch. A mesh of several axes
has others, which are those of `axes_of`."""

QUANTILES = (0.15, 0.5, 0.85)
"""The percentiles of figure 1 in Ioffe & Szegedy (2015), used for the four parts."""


Form = Literal["pmap", "shard_map"]
"""How the step runs on the devices: `pmap`, or `shard_map` (with its `check_vma`) under `jit`."""

FORMS: tuple[Form, ...] = get_args(Form)


class TrainState(NamedTuple):
    """What training changes; every leaf is `[devices, seeds, ...]`."""

    params: Any
    norm_state: Any
    opt_state: optax.OptState


class Trainer:
    """Trains one model on one data set; `compile` before the first step keeps the times clean.

    Args:
      model: A model of `models`.
      optimizer: Any optax optimizer.
      data: The data set, as `DeviceData`.
      kernels: The initial kernels of each seed, from `models.draw_kernels`; the seeds are trained
        side by side.
      synced: Whether the devices share one running state (the norm merges its statistics) or
        keep their own, to be pooled for each evaluation.
      form: How the step runs on the devices; the numbers are the same.
      delayed: The `Sync(every=...)` of the norm, if it has one: the devices exchange their
        statistics after each step.
      microbatches: Into how many parts, one after the other, a device cuts its share of a batch.
      augment: How images are changed at random before each step.
      parts: Whether an evaluation looks at the norms' parts.
    """

    def __init__(
        self,
        model: models.Network,
        optimizer: optax.GradientTransformation,
        data: DeviceData,
        kernels: Any,
        *,
        synced: bool,
        form: Form = "pmap",
        delayed: nl.Sync | None = None,
        microbatches: int = 1,
        augment: Sequence[str] = (),
        parts: bool = True,
    ) -> None:
        self.model, self.optimizer, self.data = model, optimizer, data
        self.task = data.task
        self.kernels, self.synced, self.delayed = kernels, synced, delayed
        self.microbatches, self.augment, self.parts = microbatches, tuple(augment), parts
        # The big arrays come as they lie, one copy per device; everything else is mapped.
        self._train = on_devices(
            form, data.mesh, self._train_device, in_axes=(0, None, None, 0), donate=0
        )
        self._init = jax.jit(jax.vmap(self.init_one))
        self._compiled: dict[int, Any] = {}
        self._evaluate = on_devices(
            form, data.mesh, self._evaluate_device, in_axes=(0, 0, 0, 0, None)
        )

    @property
    def seeds(self) -> int:
        """The number of seeds."""
        return len(jax.tree.leaves(self.kernels)[0])

    def init(self, kernels: Any = None) -> TrainState:
        """The initial state; a data-dependent init of the norm sees the probe batch.

        With other `kernels` of as many seeds, that of these.
        """
        state = self._init(self.kernels if kernels is None else kernels)
        return jax.device_put(
            jax.tree.map(lambda v: np.broadcast_to(v, (self.data.devices, *v.shape)), state),
            self.data.mapped,
        )

    def init_one(self, kernels: Any) -> TrainState:
        """The initial state of one seed, without the axes of devices and seeds."""
        variables = models.complete(self.model, kernels, self.data.probe)
        params, norm_state = models.split(variables)
        return TrainState(params, norm_state, self.optimizer.init(params))

    def compile(self, state: TrainState, steps: Iterable[int], batch_size: int) -> None:
        """Compiles `train` for calls of each number of `steps`, and `evaluate`."""
        data = self.data
        for n in steps:
            shape = (data.devices, n, self.seeds, batch_size // data.devices)
            indices = jax.ShapeDtypeStruct(shape, jnp.int32)
            lowered = self._train.lower(state, data.inputs, data.labels, indices)
            self._compiled[n] = lowered.compile()
        self._evaluate = self._evaluate.lower(state, *data.test, data.probe).compile()

    def testing(self, inputs: np.ndarray, labels: np.ndarray) -> Trainer:
        """The same trainer, its programs and all, with another test set, no larger than its own."""
        other = copy.copy(self)
        other.data = self.data.testing(inputs, labels)
        return other

    def train(self, state: TrainState, indices: np.ndarray) -> tuple[TrainState, np.ndarray]:
        """Runs one optimizer step per row of `indices`.

        Args:
          state: Where training stands. Its buffers are reused: do not use it afterwards.
          indices: `[steps, seeds, batch]`, the examples of each minibatch.

        Returns:
          `(state, losses)`, with the global loss of each step, `[steps, seeds]`.
        """
        steps, seeds, batch = indices.shape
        devices = self.data.devices
        per_device = indices.reshape(steps, seeds, devices, batch // devices)
        per_device = np.ascontiguousarray(per_device.transpose(2, 0, 1, 3))
        train = self._compiled.get(steps, self._train)
        state, losses = train(state, self.data.inputs, self.data.labels, per_device)
        return state, np.asarray(losses[0])

    def evaluate(self, state: TrainState) -> Evaluation:
        """Measures what is held out, with running statistics, pooled if the devices differ."""

        def measure(held: tuple[Array, ...]) -> Any:
            sums, each, parts = self._evaluate(state, *held, self.data.probe)
            return *jax.tree.map(lambda v: np.asarray(v[0]), (sums, parts)), each

        sums, parts, each = measure(self.data.test)
        validation = self.data.validation and measure(self.data.validation)[0]
        parts = {name: parts[name] for name in self.order(parts)}
        return self.task.evaluation(sums, parts, validation, self.data.in_order(each))

    def order(self, layers: Iterable[str]) -> list[str]:
        """Names of layers in the order of the model: a compiled program has them sorted."""
        known = {name: i for i, name in enumerate(self.model.layers)}
        return sorted(layers, key=lambda name: known.get(name, len(known)))

    def loss(
        self, params: Any, norm_state: Any, inputs: Array, labels: Array, chosen: Array
    ) -> tuple[Array, Any]:
        """The mean cross-entropy of a device's share of the batch, and the norms' next state.

        `chosen` are the examples' places in the data set.
        """
        drawn = key_of(chosen)
        rngs = {"dropout": drawn}
        if self.augment:
            inputs = augment(self.augment, jax.random.fold_in(drawn, 1), inputs)
        losses, after = self.task.losses(self.model, params, norm_state, inputs, labels, rngs=rngs)
        return losses.mean(), after

    def _step(
        self, state: TrainState, inputs: Array, labels: Array, chosen: Array
    ) -> tuple[TrainState, Array]:
        params, norm_state, opt_state = state
        batch = (inputs, labels, chosen)
        loss, norm_state, grads = accumulate(
            self.loss, params, norm_state, batch, self.microbatches, self.data.axes
        )
        whole = loss
        if self.data.devices > 1:
            flat, unravel = ravel_pytree((loss, grads))
            whole, grads = unravel(
                lax.pmean(flat, self.data.axes)
            )  # packed: one collective for everything
        norm_state = committed(norm_state, jnp.isfinite(whole))
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        params = self.model.project(optax.apply_updates(params, updates))
        return TrainState(params, norm_state, opt_state), loss

    def _train_device(
        self, state: TrainState, inputs: Array, labels: Array, indices: Array
    ) -> tuple[TrainState, Array]:
        seeds = range(self.seeds)

        def step(state: TrainState, chosen: Array) -> tuple[TrainState, Array]:
            state, losses = side_by_side(self._step)(state, inputs[chosen], labels[chosen], chosen)
            if self.delayed:  # one collective for all layers of all seeds
                each = [jax.tree.map(lambda v, i=i: v[i], state.norm_state) for i in seeds]
                each = nl.population.exchange(each, self.delayed)
                state = state._replace(norm_state=jax.tree.map(lambda *v: jnp.stack(v), *each))
            return vary(state, self.data.axes), losses

        state, losses = lax.scan(step, state, indices)
        return state, lax.pmean(losses, self.data.axes)

    def _evaluate_device(
        self, state: TrainState, inputs: Array, labels: Array, weights: Array, probe: Array
    ) -> tuple[Array, Array, Any]:
        """`inputs [batches, b, ...]` and so on: this device's share of what is held out."""

        def one(state: TrainState) -> tuple[Array, Array, Any]:
            norm_state = state.norm_state
            if not self.synced:
                norm_state = nl.population.pool_running(norm_state, self.data.axes)
            variables = {"params": state.params, models.STATE: norm_state}

            shards = (inputs, labels, weights)
            measure = functools.partial(self.task.sums, self.model, variables)
            sums, each = lax.map(lambda shard: measure(*shard), shards)
            parts = {}
            if self.parts:
                _, sown = self.model.apply(variables, probe, train=False, mutable=[models.PARTS])
                parts = jax.tree.map(quantiles, models.parts_by_layer(sown))
            return lax.psum(sums.sum(axis=0), self.data.axes), each, parts

        return side_by_side(one)(state)


class DeviceData:
    """A data set, laid out once on the devices for every norm to read.

    Args:
      data: The data set.
      devices: How many hold it.
      dtype: The type of what a model sees of images.
      mesh: The sizes of the axes along which they lie, if more than one.
      room: How many examples the test set has room for, where they are more than its own.

    Attributes:
      mesh, axes: The devices as a mesh, and the names of its axes.
      task: What is asked of a model.
      inputs, labels: The training set, a copy on each device.
      test: Inputs, labels and weights of the test set, `[devices, batches, b, ...]`; the last
        batch is padded with examples of weight zero.
      validation: The same of the validation set, of the same shapes; `()` where there is none.
      probe, probe_labels: A batch of training examples, preprocessed, on which the parts are looked
        at, and its labels.
      preprocess: What is done to inputs first.
    """

    def __init__(
        self,
        data: Dataset,
        devices: int,
        dtype: DTypeLike = jnp.float32,
        mesh: Sequence[int] = (),
        *,
        room: int = 0,
    ) -> None:
        self.devices = devices
        self.mesh = mesh_of(jax.devices()[:devices], mesh)
        self.axes = self.mesh.axis_names
        self.copied = NamedSharding(self.mesh, P())
        self.mapped = NamedSharding(self.mesh, P(self.axes))
        self.examples = len(data.train_inputs)
        self.task = Task.of(data, dtype)
        self.preprocess = self.task.preprocess
        self.inputs = jax.device_put(data.train_inputs, self.copied)
        self.labels = jax.device_put(data.train_labels, self.copied)
        self.probe = np.asarray(self.preprocess(data.train_inputs[: self.task.probe]))
        self.probe_labels = data.train_labels[: self.task.probe]
        held = [(data.test_inputs, data.test_labels)]
        if data.text is not None:
            held.append((data.text.validation_inputs, data.text.validation_labels))
        self.room = max(room, *(len(labels) for _, labels in held))
        self.tests = len(data.test_labels)
        self.test, self.validation = (*(self._split(*each) for each in held), ())[:2]

    def testing(self, inputs: np.ndarray, labels: np.ndarray) -> DeviceData:
        """The same with another test set, of the same shapes."""
        other = copy.copy(self)
        other.tests, other.test = len(labels), self._split(inputs, labels)
        return other

    def in_order(self, each: Array) -> np.ndarray:
        """`[seeds, examples]` of the test set, of `each` `[devices, seeds, batches, b]`."""
        by_seed = np.asarray(each).swapaxes(0, 1)
        return by_seed.reshape(len(by_seed), -1)[:, : self.tests]

    def _split(self, inputs: np.ndarray, labels: np.ndarray) -> tuple[Array, ...]:
        """Batches on each device, as many as `room` examples take."""
        batch = min(self.task.batch, -(-self.room // self.devices))
        batches = -(-self.room // (self.devices * batch))

        def split(v: np.ndarray) -> Array:
            padded = np.zeros((self.devices * batches * batch, *v.shape[1:]), v.dtype)
            padded[: len(v)] = v
            shape = (self.devices, batches, batch, *v.shape[1:])
            return jax.device_put(padded.reshape(shape), self.mapped)

        return tuple(map(split, (inputs, labels, np.ones(len(labels), np.float32))))


def on_devices(
    form: Form,
    mesh: Mesh,
    f: Callable[..., Any],
    *,
    in_axes: tuple[int | None, ...],
    donate: int | tuple[int, ...] = (),
) -> Any:
    """Maps `f` over the devices of a mesh, in one of two forms that take and return the same.

    Args:
      form: A `Form`.
      mesh: The devices; of `pmap`, along one axis.
      f: Takes and returns what one device holds.
      in_axes: For each argument 0, if it is `[devices, ...]`, or `None`, if all devices see all.
      donate: The arguments whose buffers are reused.

    Raises:
      RunError: For `pmap` over a mesh of several axes.
    """
    require_form(form, mesh.devices.shape)
    if form == "pmap":
        devices = mesh.devices.ravel().tolist()
        [axis] = mesh.axis_names
        return jax.pmap(f, axis, in_axes=in_axes, devices=devices, donate_argnums=donate)

    def body(*args: Any) -> Any:
        own = [
            v if axis is None else jax.tree.map(lambda v: v[0], v)
            for v, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda v: v[None], f(*own))

    split = P(mesh.axis_names)
    specs = tuple(P() if axis is None else split for axis in in_axes)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=split)
    return jax.jit(mapped, donate_argnums=donate)


def key_of(chosen: Array) -> Array:
    """The key of a device's share of a step, of the places of its examples in the data set.

    They decide what dropout leaves out and how images are changed, the same for every norm, and no
    state is needed to repeat a step.
    """
    return jax.random.fold_in(jax.random.key(chosen[0]), chosen[-1])


def minibatches(seed: int, examples: int, batch_size: int, steps: int) -> np.ndarray:
    """Indices of `steps` minibatches, `[steps, batch]`, from epochs shuffled by `seed`."""
    rng = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = -(-steps // per_epoch)
    rows = [
        rng.permutation(examples)[: per_epoch * batch_size].reshape(per_epoch, batch_size)
        for _ in range(epochs)
    ]
    return np.concatenate(rows)[:steps].astype(np.int32)


def stretches(steps: int, count: int) -> list[tuple[int, int]]:
    """Cuts `steps` into `count` stretches `(start, stop)` that differ by one step at most."""
    marks = [round(i * steps / count) for i in range(count + 1)]
    return list(itertools.pairwise(marks))


def lengths(steps: int, count: int) -> set[int]:
    """How many steps the stretches have."""
    return {stop - start for start, stop in stretches(steps, count)}


def turns(drawn: Sequence[np.ndarray], count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Each seed's minibatches `[steps, batch]` in stretches, `(stop, [steps, seeds, batch])`."""
    for start, stop in stretches(len(drawn[0]), count):
        yield stop, np.stack([each[start:stop] for each in drawn], axis=1)


def axes_of(sizes: Sequence[int]) -> str | tuple[str, ...]:
    """The names of the axes of a mesh of these sizes.

    >>> axes_of((4, 2)), axes_of((8,))
    (('axis0', 'axis1'), 'data')
    """
    return tuple(f"axis{i}" for i in range(len(sizes))) if len(sizes) > 1 else AXIS


def abstract(tree: Any, where: Sharding, *lead: int) -> Any:
    """The arrays of a tree as shapes and types to compile for, with leading axes `lead`."""
    return jax.tree.map(
        lambda v: jax.ShapeDtypeStruct((*lead, *v.shape), v.dtype, sharding=where), tree
    )


def mesh_of(devices: Sequence[Any], sizes: Sequence[int] = ()) -> Mesh:
    """The devices along one axis, or along several of these sizes: neighbours along the last."""
    if len(sizes) < 2:
        return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))
    auto = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes), tuple(axes_of(sizes)), auto, devices=devices)


def require_form(form: str, sizes: Sequence[int], option: str = "form") -> None:
    """Raises RunError for `pmap` over a mesh of several axes: it has one."""
    if form == "pmap" and len(sizes) > 1:
        raise RunError(
            f"--mesh {' '.join(map(str, sizes))}: pmap has one axis. Use --{option} shard_map."
        )


def set_devices(count: int) -> None:
    """Makes `count` devices on a CPU; raises RunError where there are fewer."""
    with contextlib.suppress(RuntimeError):  # raised when the devices are there already
        jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() < count:
        raise RunError(
            f"--devices {count}, but there are {jax.device_count()} "
            f"({jax.default_backend()}). Ask for at most that many."
        )


def accumulate(
    loss: Callable[..., tuple[Array, Any]],
    params: Any,
    norm_state: Any,
    batch: tuple[Array, ...],
    microbatches: int,
    axes: tuple[str, ...],
) -> tuple[Array, Any, Any]:
    """The mean loss and its gradient over the microbatches of one step.

    Args:
      loss: `(params, norm_state, *batch) -> (value, norm_state)`.
      params: The parameters.
      norm_state: The norms' states.
      batch: Arrays `[examples, ...]`.
      microbatches: Their number, which divides the examples.
      axes: The mapped axes, along which the devices lie.

    Returns:
      The loss, the states in a transaction that saw all microbatches, to be committed, and the
      gradient by `params`.
    """
    run = jax.value_and_grad(loss, has_aux=True)
    state = begun(norm_state)
    if microbatches == 1:
        (value, state), grads = run(params, state, *batch)
        return value, state, grads
    params = vary(params, axes)  # so that the gradient is the device's own
    parts = jax.tree.map(lambda v: v.reshape(microbatches, -1, *v.shape[1:]), batch)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        sums, state = total
        (value, state), grads = run(params, state, *part)
        return vary((jax.tree.map(jnp.add, sums, (value, grads)), state), axes), None

    zeros = jax.tree.map(jnp.zeros_like, (jax.eval_shape(loss, params, state, *batch)[0], params))
    (sums, state), _ = lax.scan(add, vary((zeros, state), axes), parts)
    value, grads = jax.tree.map(lambda v: v / microbatches, sums)
    return value, state, grads


def begun(states: Any) -> Any:
    """A transaction of the statistics, where there are some: spectral norm's state is another."""
    return nl.population.begin(states) if _any(nl.Population, states) else states


def committed(states: Any, ok: Array) -> Any:
    """Ends what `begun` began."""
    return nl.population.commit(states, ok) if _any(nl.population.Pending, states) else states


def _any(cls: type, tree: Any) -> bool:
    is_one = lambda leaf: isinstance(leaf, cls)  # noqa: E731
    return any(map(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


def side_by_side(f: Callable[..., Any]) -> Callable[..., Any]:
    """`vmap` over the leading axis; a single seed is not batched, which is faster for one."""

    def mapped(*args: Any) -> Any:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(f)(*args)
        return jax.tree.map(lambda v: v[None], f(*jax.tree.map(lambda v: v[0], args)))

    return mapped


def quantiles(v: Array, most: int = 4096) -> Array:
    """`QUANTILES` of an array, of at most `most` evenly chosen values."""
    v = v.ravel()
    return jnp.quantile(v[:: max(1, v.size // most)], jnp.array(QUANTILES))
