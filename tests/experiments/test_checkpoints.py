"""Checkpoints: every kind of norm state, other devices, other models, and a kill in the middle."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import normlab as nl
from normlab.experiments.rundir import RunError
from normlab.experiments.training.checkpoints import Checkpoints
from normlab.experiments.training.trainer import TrainState
from tests.helpers import array, draw, gap, mesh

C = 3
KINDS = {
    name: functools.partial(nl.population.init_population, name, C)
    for name in ("debiased", "ema", "cumulative", "renorm", "domains", "frozen", "batch")
} | {
    "delayed": functools.partial(nl.population.init_delayed, C),
    "pending": lambda: nl.population.begin(nl.init_running(C)),
}


class Devices:
    """A layout of so many devices, and states on it."""

    def __init__(self, devices: int) -> None:
        grid = mesh(d=devices)
        self.devices = devices
        self.copied, self.split = NamedSharding(grid, P()), NamedSharding(grid, P("d"))

    def spread(self, copied, split):
        stack = functools.partial(jnp.broadcast_to)
        split = jax.tree.map(lambda v: stack(v, (self.devices, *v.shape)), split)
        return jax.device_put(copied, self.copied), jax.device_put(split, self.split)

    def state(self, kinds, **init) -> TrainState:
        """Untrained: parameters, the optimizer's state, and the norms' of every device."""
        params = {"kernel": jnp.zeros((4, C))}
        norms = {name: KINDS[name](**init) for name in kinds}
        (params, opt_state), norms = self.spread((params, optax.adam(0.1).init(params)), norms)
        return TrainState(params, norms, opt_state)

    def trained(self, kinds, **init) -> TrainState:
        """The same after a batch of its own on each device."""
        state = self.state(kinds, **init)
        a = array(draw(0, self.devices, 6, C) + 2 * draw(1, self.devices, 1, C))

        @jax.jit
        @functools.partial(jax.vmap, axis_name="d")
        def step(norms, a):
            after = dict(norms)
            for name, norm in norms.items():
                sync = nl.Sync("d", every=1) if name == "delayed" else None
                after[name] = nl.batch_norm(a, None, norm, train=True, axis_name=sync)[1]
            return after

        norms = jax.device_put(step(state.norm_state, a), self.split)
        return state._replace(params={"kernel": state.params["kernel"] + 1}, norm_state=norms)


def saved(path: Path, state: TrainState, step: int = 7) -> Checkpoints:
    checkpoints = Checkpoints(path, 2)
    checkpoints.save(step, state)
    checkpoints.manager.wait_until_finished()
    return Checkpoints(path, 2)


def test_every_kind_of_norm_state_comes_back_as_it_was(tmp_path):
    eight = Devices(8)
    state = eight.trained(KINDS)
    step, back = saved(tmp_path, state).restore(eight, eight.state(KINDS))
    assert step == 7
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for new, old in zip(*map(jax.tree.leaves, (back, state)), strict=True):
        assert np.array_equal(new, old)
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


@pytest.mark.parametrize("devices", [1, 4])
def test_on_another_number_of_devices_all_that_was_seen_is_merged(tmp_path, devices):
    """Also of the devices that are no more: the population of every kind is the same."""
    state = Devices(8).trained(KINDS)
    few = Devices(devices)
    _, back = saved(tmp_path, state).restore(few, few.state(KINDS))
    merged = nl.population.merge_running(state.norm_state)
    shares = nl.population.share_running(merged, devices)
    assert gap(back.params, state.params) == 0
    for name, norm in back.norm_state.items():
        assert jax.tree.structure(norm) == jax.tree.structure(merged[name])
        for new, old in zip(*map(jax.tree.leaves, (norm, shares[name])), strict=True):
            assert new.shape == (devices, *old.shape)
            assert gap(new, np.broadcast_to(old, new.shape)) < 1e-6
    a = draw(0, 8, 6, C) + 2 * draw(1, 8, 1, C)
    whole = a.reshape(-1, C)
    mean, var = merged["cumulative"].read()
    assert gap((mean, var), (whole.mean(0), whole.var(0))) < 5e-6
    assert merged["cumulative"].updates == 8
    again = nl.population.merge_running(back.norm_state["cumulative"])
    assert gap((again.read(), again.count), ((mean, var), merged["cumulative"].count)) < 5e-6


def test_synced_states_are_copied_and_not_counted_twice(tmp_path):
    """Each device has seen everything: what is merged is what each had."""
    eight, four = Devices(8), Devices(4)
    state = eight.trained(["cumulative"])
    alike = jax.tree.map(lambda v: jnp.broadcast_to(v[:1], v.shape), state.norm_state)
    state = state._replace(norm_state=jax.device_put(alike, eight.split))
    _, back = saved(tmp_path, state).restore(four, four.state(["cumulative"]))
    for new, old in zip(*map(jax.tree.leaves, (back.norm_state, alike)), strict=True):
        assert np.array_equal(new, old[:4])


def refused(path: Path, state: TrainState, new: TrainState) -> str:
    with pytest.raises(RunError) as error:
        saved(path, state).restore(Devices(2), new)
    return str(error.value)


def test_another_convention_is_refused(tmp_path):
    two = Devices(2)
    said = refused(tmp_path, two.trained(["ema"]), two.state(["ema"], decay=0.99, ddof=1))
    assert "norm_state.ema is Running(decay=0.9, ddof=0) in it" in said
    assert "Running(decay=0.99, ddof=1) here" in said


def test_another_kind_is_refused(tmp_path):
    two = Devices(2)
    old, new = two.trained(["ema"]), two.state(["cumulative"])
    new = new._replace(norm_state={"ema": new.norm_state["cumulative"]})
    said = refused(tmp_path, old, new)
    assert "is Running(decay=0.9, ddof=0) in it and Cumulative(ddof=0, estim" in said


def test_missing_and_extra_leaves_are_named_with_the_nearest(tmp_path):
    two = Devices(2)
    old, new = two.trained(["ema"]), two.state(["ema"])
    renamed = new._replace(params={"kernels": new.params["kernel"]})
    said = refused(tmp_path / "missing", old, renamed)
    assert "params.kernels is not there in it and (4, 3) here (nearest: params.kernel" in said
    less = new._replace(params={})
    assert "params.kernel is (4, 3) in it and not there here" in refused(
        tmp_path / "extra", old, less
    )
    wider = new._replace(params={"kernel": jnp.zeros((5, C))})
    assert "params.kernel is (4, 3) in it and (5, 3) here" in refused(tmp_path / "w", old, wider)


SAVER = """
import sys, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
import normlab as nl
from normlab.experiments.training.checkpoints import Checkpoints
from normlab.experiments.training.trainer import TrainState

checkpoints = Checkpoints(Path(sys.argv[1]), 2)
for step in range(1, 1000):
    big = np.full((4_000_000,), step, np.float32)
    norm = nl.init_running(3)._replace(updates=jnp.full((1,), step))
    checkpoints.save(step, TrainState({"big": jnp.asarray(big)}, {"norm": norm}, ()))
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [3])
def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path, kills):
    """SIGKILL while files are being written: the last whole checkpoint is there, and is whole."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    last = 0
    for kill in range(kills):
        path = tmp_path / str(kill)
        with subprocess.Popen(
            [sys.executable, "-c", SAVER, str(path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout
            seen = [int(process.stdout.readline()) for _ in range(2 + kill)]
            deadline = time.monotonic() + 60
            while not list((path / "checkpoints").glob("*tmp*")):
                assert time.monotonic() < deadline, "no save was under way"
            time.sleep(0.02 * kill)
            process.send_signal(signal.SIGKILL)
        unfinished = list((path / "checkpoints").glob("*tmp*"))
        checkpoints = Checkpoints(path, 2)
        step = checkpoints.manager.latest_step()
        assert step is not None
        assert step >= seen[-1] - 1  # a save returns when the one before it is whole
        state = checkpoints.manager.restore(step)
        assert np.array_equal(state["params"]["big"], np.full((4_000_000,), step, np.float32))
        assert state["norm_state"]["norm"]["updates"] == step
        assert not list((path / "checkpoints").glob("*tmp*"))  # what was half is taken away
        last += len(unfinished)
    assert last >= 1, "no kill hit a save"
