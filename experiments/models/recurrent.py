"""Recurrent networks, with a norm on what goes up and a norm on what goes on.

Both read a sequence [N, L, K], or an image [N, H, W, K] row by row or pixel by pixel, and classify
it by the last output of the last layer. Time is a scan: the program does not grow with L.

A norm with a state (batch norm) keeps one for each time step, up to `max_steps`: activations right
after the start of a sequence are distributed unlike later ones (Cooijmans et al. 2016). All steps
from the last on share one: within a transaction (`nl.population.begin`) what they measure is
pooled, outside of one each is an update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

import normlab as nl
from normlab.devices.mapped import vary, varying_axes
from normlab.errors import invalid

from .layers import NONE, PARTS, STATE, Activation, Network, Normed


class Cell(nn.Module):
    """One layer of a recurrent network, at one time step.

    Attributes:
      width: H, the size of the layer's state.
      norms: By the names of `SITES`, the norms that stand there.
      activation: What the candidate for the new state goes through.
      gain: What the norms' initial gain is multiplied by.
      steps: How many time steps have a state of their own.
    """

    width: int
    norms: dict[str, nl.Norm]
    activation: Callable[[Array], Array]
    gain: float
    steps: int

    SITES: ClassVar[tuple[str, ...]] = ()
    """Where a norm may stand."""

    DEFAULT: ClassVar[tuple[str, ...]] = ()
    """Where it stands if nothing else is said."""

    STATES: ClassVar[int] = 1
    """How many arrays [N, H] one step hands to the next; the last of them is its output."""

    def linear(self, name: str, x: Array, units: int, train: bool, step: Array) -> Array:
        """norm(w·x), with the norm that stands at `name`."""
        init = nn.initializers.orthogonal() if "recurrent" in name else Normed.kernel_init
        return Normed(
            nl.Dense(),
            self.norms.get(name, NONE),
            (x.shape[-1], units),
            kernel_init=init,
            gain=self.gain,
            steps=self.steps,
            name=name,
        )(x, train, step=step)


class LstmCell(Cell):
    """A step of `Lstm`."""

    SITES = ("vertical", "recurrent", "cell")
    DEFAULT = ("vertical", "recurrent")
    STATES = 2

    @nn.compact
    def __call__(
        self, step: Array, state: tuple[Array, Array], x: Array, train: bool
    ) -> tuple[Array, Array]:
        c, h = state
        a = self.linear("vertical", x, 4 * self.width, train, step)
        a += self.linear("recurrent", h, 4 * self.width, train, step)
        f, i, o, g = jnp.split(a, 4, axis=-1)
        c = nn.sigmoid(f + 1) * c + nn.sigmoid(i) * self.activation(g)
        d = c
        if "cell" in self.norms:
            norm = Activation(self.norms["cell"], self.gain, self.steps, name="cell")
            d = norm(c, train, step=step)
        return c, nn.sigmoid(o) * self.activation(d)


class GruCell(Cell):
    """A step of `Gru`."""

    SITES = ("vertical_gates", "recurrent_gates", "vertical", "recurrent")
    DEFAULT = SITES

    @nn.compact
    def __call__(self, step: Array, state: tuple[Array], x: Array, train: bool) -> tuple[Array]:
        (h,) = state
        gates = self.linear("vertical_gates", x, 2 * self.width, train, step)
        gates += self.linear("recurrent_gates", h, 2 * self.width, train, step)
        z, r = jnp.split(nn.sigmoid(gates), 2, axis=-1)
        up = self.linear("vertical", x, self.width, train, step)
        on = self.linear("recurrent", h, self.width, train, step)
        return ((1 - z) * h + z * self.activation(up + r * on),)


class Recurrent(Network):
    """What `Lstm` and `Gru` have in common.

    Attributes:
      widths: The size of each layer's state.
      max_steps: How many states the norm keeps, one for each time step; `None` for as many as
        there are steps in the sequences with which the model is initialized.
      gain: What the norms' initial gain is multiplied by. Cooijmans et al. start batch norm
        with 0.1, so that tanh is not saturated.
      read: How an image becomes a sequence.
    """

    flat = True
    widths: tuple[int, ...] = (100,)
    activation: Callable[[Array], Array] = nn.tanh
    max_steps: int | None = None
    gain: float = 1.0
    read: Literal["rows", "pixels"] = "rows"

    CELL: ClassVar[type[Cell]] = Cell

    @property
    def layers(self) -> tuple[str, ...]:
        """`layer0/vertical` and so on, everywhere a norm may stand."""
        return tuple(
            f"layer{i}/{site}" for i in range(len(self.widths)) for site in self.CELL.SITES
        )

    def carriers(self) -> frozenset[str]:
        """The names of the places where the norm stands."""
        if self.placement != "before":
            raise invalid(
                type(self).__name__,
                f"placement={self.placement!r}",
                "'before': a gate's sigmoid sees the sum of two normalized terms",
                "leave the placement; `where` chooses among the terms",
            )
        if self.norm.fused:
            raise invalid(
                type(self).__name__,
                f"{self.norm!r}, of which an activation is part",
                "a norm alone: a gate has its own activation, behind the sum of two terms",
                "use batch, group or RMS norm",
            )
        chosen = super().carriers()
        if self.where is None:
            return frozenset(name for name in chosen if name.split("/")[1] in self.CELL.DEFAULT)
        return chosen

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = sequence(x, self.read)
        carriers = self.carriers()
        for i, width in enumerate(self.widths):
            norms = {s: self.norm for s in self.CELL.SITES if f"layer{i}/{s}" in carriers}
            steps = self.max_steps or x.shape[1]
            cell = self.CELL(width, norms, self.activation, self.gain, steps, name=f"layer{i}")
            x = over_time(cell, x, train)
        return nn.Dense(self.classes)(x[:, -1])


class Lstm(Recurrent):
    """A long short-term memory with norms (Cooijmans et al. 2016; Ba, Kiros & Hinton 2016).

        f, i, o, g = vertical(x_t) + recurrent(h_t−1)
        c_t = σ(f + 1) c_t−1 + σ(i) tanh(g)
        h_t = σ(o) tanh(cell(c_t))

    `layer{i}/vertical` and `layer{i}/recurrent` are norm(w·x), all four gates together; the biases
    are the norms'. `layer{i}/cell` is a norm of c_t itself, for norms of activations. By default
    the first two carry the norm; with all three this is the batch-normalized LSTM of
    https://arxiv.org/abs/1603.09025 and, with layer norm, that of https://arxiv.org/abs/1607.06450.
    """

    CELL = LstmCell


class Gru(Recurrent):
    """A gated recurrent unit with norms, after Ba, Kiros & Hinton 2016 (supplement).

        z, r = σ(vertical_gates(x_t) + recurrent_gates(h_t−1))
        h_t = (1 − z) h_t−1 + z tanh(vertical(x_t) + r recurrent(h_t−1))

    Each of `layer{i}/vertical_gates`, `/recurrent_gates`, `/vertical` and `/recurrent` is norm(w·x)
    with the norm's bias, and carries the norm by default (https://arxiv.org/abs/1607.06450).
    """

    CELL = GruCell


def sequence(x: Array, read: str) -> Array:
    """A sequence [N, L, K] as it is, an image [N, H, W, K] by its rows or by its pixels."""
    if read not in ("rows", "pixels"):
        raise invalid("Recurrent", f"read={read!r}", "'rows' or 'pixels'", "use one of the two")
    if x.ndim == 3:
        return x
    if x.ndim != 4:
        raise invalid(
            "Recurrent",
            f"an input of shape {x.shape}",
            "a sequence [N, L, K] or an image [N, H, W, K]",
            "add an axis of time",
        )
    n, height, width, channels = x.shape
    if read == "pixels":
        return x.reshape(n, height * width, channels)
    return x.reshape(n, height, width * channels)


def over_time(cell: Cell, x: Array, train: bool) -> Array:
    """The outputs [N, L, H] of a cell that reads `x [N, L, K]`, from a state of zeros."""

    def body(cell: Cell, carry: Any, x: Array) -> tuple[Any, Array]:
        step, state = carry
        state = cell(step, state, x, train)
        return (step + 1, state), state[-1]

    step = jnp.zeros((), jnp.int32)
    zeros = tuple(jnp.zeros((x.shape[0], cell.width), x.dtype) for _ in range(cell.STATES))
    if cell.is_mutable_collection("params"):
        body(cell, (step, zeros), x[:, 0])  # the first step makes the parameters and the states
    # What is carried has one type throughout: it varies over the devices if anything read does.
    axes = tuple(set().union(*map(varying_axes, jax.tree.leaves((x, cell.variables)))))
    changing = cell.is_mutable_collection(STATE)
    scan = nn.scan(
        body,
        variable_broadcast=["params"] if changing else ["params", STATE],
        variable_carry=STATE if changing else False,
        variable_axes={PARTS: 0},
        split_rngs={"params": False},
        in_axes=1,
        out_axes=1,
        check_constancy_invariants=False,
    )
    scan = nn.map_variables(scan, STATE, lambda states: vary(states, axes), mutable=changing)
    return scan(cell, (step, vary(zeros, axes)), x)[1]
