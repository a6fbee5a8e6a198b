"""What training the small language model costs, beside PyTorch, and what its norms take of it.

    normlab bench lm         # peers need torch: pip install 'normlab[peers]'
    normlab bench compile    # scanned over its blocks, and written out

All contestants train the same pre-norm model with RMS norm and AdamW, from the same weights on the
same tokens, each in a process of its own with all cores; they take turns. normlab's steps are one
scan. PyTorch runs an eager loop, with the kernels it has for the norm, the attention and AdamW, and
the same loop with the model compiled. The losses of the first turn are compared: the times are
worth nothing where the work differs. The tokens are random, which costs what text costs.

The floor is what no arrangement of the rest can undercut here: the matrix products of a step,
forward and backward, and the optimizer, in a scan of their own, with two sums per block that join
them. The products of the attention are those of all pairs of tokens; PyTorch's kernel leaves some
of those out that the mask hides.

The norms' share of a step is 1 − (step without norms / step with them), of the two next to each
other in a round. What XLA fuses the norms with is read from the compiled program of one step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import normlab as nl

from .. import models
from ..programs.ledger import SCOPE, Named
from ..programs.passes import Move, moves
from ..rundir import VARIABLES, RunError
from .config import BenchCompile, BenchLm
from .training import GAP, Part, Turn
from .turns import (
    INSTALL,
    REUSE,
    Process,
    ProcessError,
    available_cores,
    medians,
    per_step,
    take_turns,
)

EPS = 1e-5
ADAMW: dict[str, Any] = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

NORMS = {"normlab": "rms", "normlab, no norms": "none"}
TORCH = {"torch, eager": False, "torch, compiled": True}
"""The contestants of both sides; the third is the floor."""

NO_CACHES = {
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or idle processes stay behind
}
"""Environment of a process that compiles everything itself."""

State = tuple[Any, optax.OptState]
"""What training changes: parameters and the optimizer's state."""


def run(config: BenchLm, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Takes turns.

    Args:
      config: What to time.
      say: Receives short messages about what is going on.

    Returns:
      By contestant, `ms_per_step` and its `range_ms`, `tokens_per_second`, `start_seconds` to
      build, compile and take the first turn; `left_out`, the reasons by contestant; the largest
      relative gap `loss_gap` of the losses; `norm_share`, its median and range; `fused`, from
      `fusions`.

    Raises:
      RunError: If a process of normlab dies, a loss is not finite or the losses disagree.
    """
    variables = {**NO_CACHES, **(REUSE if config.reuse_memory else {})}
    contestants: dict[str, tuple[Any, ...]] = {
        **{name: (build_normlab, config, norm) for name, norm in NORMS.items()},
        **{name: (build_torch, config, compiled) for name, compiled in TORCH.items()},
        "floor": (build_floor, config),
    }
    start_seconds: dict[str, float] = {}
    losses: dict[str, np.ndarray] = {}
    turns: dict[str, Callable[[], float]] = {}
    left_out: dict[str, str] = {}
    taken: dict[str, list[float]] = {}
    say("reading the program")
    with Process("programs", functools.partial, fusions, config, variables=variables) as process:
        fused = process.ask("__call__")
    with contextlib.ExitStack() as stack:
        for name, arguments in contestants.items():
            if name in TORCH and config.scheme != "pre":
                left_out[name] = f"its model is pre-norm, not {config.scheme}"
                continue
            say(f"starting {name}")
            process = Process(name, Part, *arguments, variables=variables)
            stack.enter_context(process)
            begin = time.perf_counter()
            try:
                losses[name] = process.ask("turn")
            except ProcessError as error:
                if name not in TORCH:
                    raise
                left_out[name] = str(error)
                continue
            start_seconds[name] = time.perf_counter() - begin
            turns[name] = per_step(functools.partial(process.ask, "turn"), config.steps)
        gap = loss_gap({name: losses[name] for name in losses if name in ("normlab", *TORCH)})
        for taken in take_turns(turns, config.rounds):
            say(f"{len(taken['normlab'])} of {config.rounds} rounds")
    result = medians(taken)
    tokens = config.batch_size * config.context
    here = {name: os.environ.get(name) for name in VARIABLES} | variables
    return result | {
        "tokens_per_second": {
            name: 1e3 * tokens / ms for name, ms in result["ms_per_step"].items()
        },
        "start_seconds": start_seconds,
        "left_out": left_out,
        "loss_gap": gap,
        "norm_share": share(*(taken[name] for name in NORMS)),
        "fused": fused,
        "cores": len(available_cores()),
        "variables": {name: here[name] for name in VARIABLES if here[name] is not None},
    }


def loss_gap(losses: dict[str, np.ndarray]) -> float:
    """How far the losses of a turn are apart from normlab's, relatively.

    Raises:
      RunError: If they are not the losses of the same work.
    """
    ours = losses["normlab"]
    if not np.isfinite(ours).all():
        raise RunError("the loss is not finite: the times would mean nothing. Lower --lr.")
    gap = max(float(np.max(np.abs(ours - v) / np.abs(ours))) for v in losses.values())
    if not gap < GAP:
        raise RunError(
            f"the losses of normlab and torch are {gap:.1e} apart, relatively, where {GAP} is "
            "allowed: they do not do the same work. Lower --lr or --steps."
        )
    return gap


def share(whole: list[float], rest: list[float]) -> tuple[float, float, float]:
    """Of turns side by side: 1 − rest/whole, its median, the least and the most.

    >>> share([2.0, 4.0, 4.0], [1.0, 3.0, 4.0])
    (0.25, 0.0, 0.5)
    """
    shares = [1 - b / a for a, b in zip(whole, rest, strict=True)]
    return statistics.median(shares), min(shares), max(shares)


# --- What all start from -----------------------------------------------------------------------


def weights(config: BenchLm) -> dict[str, np.ndarray]:
    """The initial kernels of all blocks, `[depth, inputs, outputs]` by name, and the embedding."""
    rng = np.random.default_rng(0)
    width, hidden = config.width, 8 * round(config.width / 3)
    ends = {name: (width, width) for name in ("q", "k", "v", "out")}
    ends |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    drawn = {
        name: rng.normal(0, inputs**-0.5, (config.depth, inputs, outputs)).astype(np.float32)
        for name, (inputs, outputs) in ends.items()
    }
    embed = rng.normal(0, width**-0.5, (config.vocabulary, width)).astype(np.float32)
    return drawn | {"embed": embed}


def batches(config: BenchLm) -> np.ndarray:
    """The windows of a turn, `[steps, N, T + 1]`."""
    shape = (config.steps, config.batch_size, config.context + 1)
    return np.random.default_rng(1).integers(0, config.vocabulary, shape, dtype=np.int32)


# --- normlab -----------------------------------------------------------------------------------


def build_model(config: BenchLm, norm: str) -> Any:
    """The model, whose norms the compiler calls `SCOPE`."""
    made = nl.get(norm) if norm == "none" else nl.get(norm, use_bias=False, eps=EPS)
    return models.build(
        "lm",
        Named(made.init, made.parts),
        config.vocabulary,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        scheme=config.scheme,
        scan=config.scan,
        remat=config.remat,
    )


def start(config: BenchLm, model: Any) -> State:
    """The initial parameters, and the optimizer's state."""
    drawn = weights(config)
    stacked = {"embed": {"embedding": drawn.pop("embed")}}
    kernels = {"blocks": {name: {"kernel": w} for name, w in drawn.items()}}
    blocks = models.unstack(kernels)
    blocks = model.stack(blocks) if config.scan else blocks
    tokens = np.zeros((1, config.context), np.int32)
    params, _ = models.split(models.complete(model, stacked | blocks, tokens))
    return params, optimizer(config).init(params)


def optimizer(config: BenchLm) -> optax.GradientTransformation:
    """AdamW, of all parameters."""
    return optax.adamw(config.lr, **ADAMW)


def training_step(config: BenchLm, model: Any) -> Callable[[State, Array], tuple[State, Array]]:
    """A step: `(state, windows [N, T + 1]) -> (state, loss)`."""

    def loss(params: Any, windows: Array) -> Array:
        variables = {"params": params}
        logits, _ = model.apply(variables, windows[:, :-1], train=True, mutable=[models.STATE])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
        return losses.mean()

    return descend(config, loss)


def descend(
    config: BenchLm, loss: Callable[[Any, Array], Array]
) -> Callable[[State, Array], tuple[State, Array]]:
    """The step of the optimizer down a loss of `(params, batch)`."""

    def step(state: State, batch: Array) -> tuple[State, Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer(config).update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    return step


def build_normlab(config: BenchLm, norm: str) -> Turn:
    """Compiles the training of the model with a norm; returns a turn."""
    model = build_model(config, norm)
    state = jax.jit(lambda: start(config, model))()
    return _scanned(training_step(config, model), state, batches(config))


def build_floor(config: BenchLm) -> Turn:
    """The matrix products of a step, joined by two sums per block, and the optimizer."""
    drawn = {name: jnp.asarray(w) for name, w in weights(config).items()}
    drawn["q"] *= 1e-3  # so that what flows keeps its size through all blocks,
    drawn["up"] *= 1e-3
    config = dataclasses.replace(config, lr=1e-12)  # and the kernels theirs through all steps
    embed = drawn.pop("embed")
    heads = (config.batch_size, config.context, config.heads, -1)

    def block(x: Array, w: dict[str, Array]) -> Array:
        q, k, v = ((x @ w[name]).reshape(heads) for name in ("q", "k", "v"))
        pairs = jnp.einsum("nthd,nshd->nhts", q, k)
        v = v + jnp.einsum("nhts,nshd->nthd", pairs, v)
        x = v.reshape(x.shape) @ w["out"]
        return (x @ w["gate"] + x @ w["up"]) @ w["down"]

    def loss(kernels: tuple[dict[str, Array], Array], x: Array) -> Array:
        blocks, embed = kernels
        for i in range(config.depth):
            x = block(x, {name: w[i] for name, w in blocks.items()})
        return jnp.square(x @ embed.T).mean()

    shape = (config.steps, config.batch_size * config.context, config.width)
    inputs = np.random.default_rng(1).standard_normal(shape, np.float32)
    state = (drawn, embed), optimizer(config).init((drawn, embed))
    return _scanned(descend(config, loss), state, inputs)


def _scanned(
    step: Callable[[State, Array], tuple[State, Array]], state: State, batches: np.ndarray
) -> Turn:
    """A turn, compiled, that goes on where the last one ended."""
    # As the trainer does: two steps in a row save a copy of what is carried.
    train = jax.jit(
        lambda state, batches: lax.scan(step, state, batches, unroll=2), donate_argnums=0
    )
    train = train.lower(state, batches).compile()
    lane, on_device = [state], jnp.asarray(batches)

    def turn() -> np.ndarray:
        lane[0], losses = train(lane[0], on_device)
        return np.asarray(losses)

    return turn


# --- PyTorch -----------------------------------------------------------------------------------


def build_torch(config: BenchLm, compiled: bool) -> Turn:
    """The same of a PyTorch loop; `compiled` by inductor, which needs a C++ compiler."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RunError(f"torch is not installed: {INSTALL}") from None
    from . import peer_lm

    torch.set_num_threads(len(available_cores()))
    warnings.simplefilter("ignore")  # the compiler's, about caches that are turned off
    base = build_model(config, NORMS["normlab"]).rope
    model: Any = peer_lm.Lm(weights(config), config.context, config.heads, EPS, base)
    betas = (ADAMW["b1"], ADAMW["b2"])
    more = {"eps": ADAMW["eps"], "weight_decay": ADAMW["weight_decay"], "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas, **more)
    loss_of = torch.compile(model, dynamic=False) if compiled else model
    windows = torch.from_numpy(batches(config).astype(np.int64))
    inputs, targets = windows[..., :-1].contiguous(), windows[..., 1:].contiguous()

    def turn() -> np.ndarray:
        losses = []
        for x, y in zip(inputs, targets, strict=True):
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).numpy()

    return turn


# --- What XLA fuses ----------------------------------------------------------------------------


class Fused(NamedTuple):
    """The instructions of a step that hold the same operations of norms, and of others.

    Attributes:
      direction: "forward", "backward", or both: where the backward pass computes something anew.
      operations: Those of norms.
      others: The layers that the other operations are of; the operations where there is none.
      times: How many instructions there are.
      nbytes: What they move, all together.
    """

    direction: str
    operations: tuple[str, ...]
    others: tuple[str, ...]
    times: int
    nbytes: int


class Fusions(NamedTuple):
    """What became of the norms.

    Attributes:
      rows: The instructions that hold them; first those that move the most.
      instructions: How many there are in a step, with norms or without.
      nbytes: What all of a step moves.
      nbytes_without: What a step of the model without norms moves.
    """

    rows: list[Fused]
    instructions: int
    nbytes: int
    nbytes_without: int


def fusions(config: BenchLm) -> Fusions:
    """Reads from the compiled program of one step what became of the norms."""
    whole, rest = (moves(_compiled_step(config, norm)) for norm in NORMS.values())
    nbytes, without = (sum(move.nbytes for move in found) for found in (whole, rest))
    return Fusions(fused(whole), sum(move.times for move in whole), nbytes, without)


def _compiled_step(config: BenchLm, norm: str) -> Any:
    model = build_model(config, norm)
    state = jax.eval_shape(lambda: start(config, model))
    step = jax.jit(training_step(config, model), donate_argnums=0)
    return step.lower(state, batches(config)[0]).compile()


def fused(found: list[Move]) -> list[Fused]:
    """The norms among the instructions of a program."""
    kinds: dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[Move]] = {}
    for move in found:
        of_norms = [name for name in move.names if re.search(rf"/{SCOPE}\b", name)]
        others = {_layer(name) for name in move.names if "/" in name and name not in of_norms}
        if of_norms:
            passes = {"transpose(" in name for name in of_norms}
            words = [
                word for word, back in (("forward", False), ("backward", True)) if back in passes
            ]
            operations = {name.split("/")[-1] for name in of_norms}
            key = " and ".join(words), tuple(sorted(operations)), tuple(sorted(others))
            kinds.setdefault(key, []).append(move)
    rows = [
        Fused(*key, sum(move.times for move in each), sum(move.nbytes for move in each))
        for key, each in kinds.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)


def _layer(name: str) -> str:
    """The innermost layer in the name of an operation, or the operation itself.

    >>> _layer("jit(f)/jvp(Lm)/block0/mlp/block0.dense/up/dot_general"), _layer("jit(f)/mul")
    ('up', 'mul')
    """
    *path, operation = name.split("/")
    layers = [word for word in path if re.fullmatch(r"[a-z]\w*", word)]
    return layers[-1] if layers else operation


# --- Compiling ---------------------------------------------------------------------------------

FORMS: dict[str, dict[str, bool]] = {
    "unrolled": {},
    "scan": {"scan": True},
    "scan, remat": {"scan": True, "remat": True},
}
"""How the blocks are written."""

PHASES = ("trace", "lower", "compile")


def compiling(
    config: BenchCompile, say: Callable[[str], None] = lambda _: None
) -> Iterator[dict[str, Any]]:
    """Compiles one training step, again and again, each time in a fresh process.

    Yields:
      For each depth and form, its median `seconds` by phase and of all; the `range` of all; and
      `temp_bytes`, what the program needs beside its arguments and results.
    """
    turns = {
        (depth, form): functools.partial(_fresh, config, depth, form)
        for depth in config.depths
        for form in FORMS
        if form != "unrolled" or depth <= config.deepest
    }
    order, found = list(turns), {key: [] for key in turns}
    for i in range(config.rounds):
        first = i % len(order)
        for key in order[first:] + order[:first]:
            say(f"{key[0]} blocks, {key[1]}: {i + 1} of {config.rounds}")
            found[key].append(turns[key]())
    for (depth, form), each in found.items():
        whole = [sum(seconds[p] for p in PHASES) for seconds in each]
        by_phase = {p: statistics.median(seconds[p] for seconds in each) for p in PHASES}
        yield {
            "depth": depth,
            "form": form,
            "seconds": by_phase | {"all": statistics.median(whole)},
            "range": (min(whole), max(whole)),
            "temp_bytes": each[0]["temp_bytes"],
        }


def _fresh(config: BenchCompile, depth: int, form: str) -> Any:
    work = functools.partial, timed, config, depth, form
    with Process("compile", *work, variables=NO_CACHES) as process:
        return process.ask("__call__")


def timed(config: BenchCompile, depth: int, form: str) -> dict[str, float]:
    """The seconds of each phase of compiling a step, and the program's temporary memory."""
    sizes = BenchLm(depth=depth, scheme=config.scheme, **FORMS[form])
    model = build_model(sizes, NORMS["normlab"])
    state = jax.eval_shape(lambda: start(sizes, model))
    windows = jax.ShapeDtypeStruct((sizes.batch_size, sizes.context + 1), jnp.int32)
    jax.block_until_ready(jnp.zeros(1))  # the backend is there
    step: Any = jax.jit(training_step(sizes, model), donate_argnums=0)
    marks = [time.perf_counter()]
    traced = step.trace(state, windows)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    compiled = lowered.compile()
    marks.append(time.perf_counter())
    memory = {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes}
    return dict(zip(PHASES, np.diff(marks).tolist(), strict=True)) | memory
