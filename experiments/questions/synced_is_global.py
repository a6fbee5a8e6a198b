"""Is synced batch norm the batch norm of the whole batch?

Claim: Synced batch norm on D devices equals batch norm on one device with the whole batch, forward
and backward, to 1e-6 in float32 and 1e-14 in float64; and so does the training. Averaging the
devices' variances, as if the variance between their means were nothing, fails the same test.

Source: Peng et al. 2018, https://arxiv.org/abs/1711.07240; how Chan, Golub & LeVeque 1983 merge
variances, https://doi.org/10.1080/00031305.1983.10483115

Protocol: real images through a random kernel; `instruments.equivalence` runs the norm on one device
and on D and compares output, running statistics and gradients. Then an MLP (three layers of 100
sigmoids) is trained on one device and on D with the same batches and the losses are compared.

Command: normlab run synced_is_global
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

import normlab as nl
from normlab import instruments
from normlab.site import Params, State

from ..engine import Condition, Record, Records, Verdict, decide, draw, exact, number
from ..engine.devices import FIRST_STEPS, Config, Lab, relative
from ..training.trainer import AXIS, FORMS, Form

LAYER = {"float32": 1e-6, "float64": 1e-14}
"""The largest error of a layer, relative to the largest value, forward and backward."""

TRAINING = {"float32": 1e-3, "float64": 1e-10}
"""The largest relative difference of the loss over the steps: rounding grows on the way."""

QUICK = Config(dataset="mnist", per_device=8, steps=50)
SECONDS = 140
FULL = dataclasses.replace(QUICK, model="conv", steps=1000)

CHANNELS = 100
"""Of the layer."""

PASSES = {"forward": ("h", "state.mean", "state.var"), "backward": ("dx", "dg", "db")}
NORMS = ("synced", "variances averaged")


def norm(name: str, axis_name: nl.devices.AxisName | None) -> nl.Norm:
    """Batch norm, synced by the library, or by averaging means and variances."""
    inner = nl.get("batch", axis_name=axis_name if name == "synced" else None)
    if name == "synced" or axis_name is None:
        return inner
    axis = nl.Sync(axis_name).names if isinstance(axis_name, str | tuple) else ()

    def parts(
        params: Params, state: State, site: nl.Site, *, train: bool
    ) -> tuple[nl.Parts, State]:
        if not train:
            return inner.parts(params, state, site, train=False)
        own = nl.moments(site.a, range(site.a.ndim - 1))
        mean, var = lax.pmean(own.mean, axis), lax.pmean(own.var(), axis)
        count = own.count * lax.axis_size(axis)
        state = state.update(nl.Moments(count, mean, count * var))
        return nl.Parts(mean, jnp.sqrt(var + 1e-5), params.g, params.b), state

    return nl.Norm(inner.init, parts)


def run(config: Config) -> Iterator[Condition]:
    """One layer in both types and forms, and the training."""
    for measure in (layer, training):
        for dtype in LAYER:
            labels = {"measured": measure.__name__, "dtype": dtype}
            yield Condition(labels, exact(in_precision, measure, config, dtype))


def in_precision(
    measure: Callable[[Config, str], Iterator[Record]], config: Config, dtype: str
) -> Iterator[Record]:
    """Measures with float64 switched on if it is asked for."""
    with jax.enable_x64(dtype == "float64"):
        yield from measure(config, dtype)


def layer(config: Config, dtype: str) -> Iterator[Record]:
    """The errors of one layer on real data, by seed, norm and form."""
    lab = Lab(config, dtype)
    images = np.asarray(lab.data.preprocess(lab.data.inputs[lab.indices[0]]), np.float64)
    # The norm alone is to be compared: what goes into it is computed once. The seeds are channels
    # side by side, which batch norm does not mix.
    x = images.reshape(*images.shape[:2], -1)
    w = np.random.default_rng(0).normal(size=(config.seeds, x.shape[-1], CHANNELS))
    a = np.concatenate(list(x @ w / np.sqrt(x.shape[-1])), axis=-1)
    for name, form in itertools.product(NORMS, FORMS):
        found = instruments.equivalence(
            lambda axis_name, name=name: norm(name, axis_name),
            AXIS,
            config.devices,
            form=form,
            x=jnp.asarray(a, dtype),
            w=jnp.eye(a.shape[1], dtype=dtype),
        )
        for (i, seed), (which, names) in itertools.product(
            enumerate(config.each_seed), PASSES.items()
        ):
            own = slice(CHANNELS * i, CHANNELS * (i + 1))
            many, one = ([of[n][..., own] for n in names] for of in (found.many, found.one))
            yield {
                "kind": "layer",
                "condition": name,
                "dtype": dtype,
                "form": form,
                "seed": seed,
                "pass": which,
                "error": number(relative(many, one)),
            }


def training(config: Config, dtype: str) -> Iterator[Record]:
    """The losses of D devices beside those of one."""
    one = Lab(config, dtype, devices=1)
    trainer = one.trainer(norm("synced", None), "pmap")
    _, expected = trainer.train(one.start(trainer), one.indices)
    lab = Lab(config, dtype)
    for name in NORMS:
        losses = {}
        both = name == "synced" and len(lab.data.axes) == 1
        forms: tuple[Form, ...] = FORMS if both else (config.form,)
        for form in forms:
            trainer = lab.trainer(norm(name, config.axes), form)
            _, losses[form] = trainer.train(lab.start(trainer), lab.indices)
        base = {"condition": name, "dtype": dtype}
        if len(losses) == len(FORMS):
            gap = relative(*(of[:FIRST_STEPS] for of in losses.values()))
            yield {"kind": "forms", **base, "steps": FIRST_STEPS, "loss_gap": gap}
        gaps = np.abs(losses[config.form] - expected) / np.abs(expected)
        for step in range(config.steps):
            for i, seed in enumerate(config.each_seed):
                yield {
                    "kind": "training",
                    **base,
                    "seed": seed,
                    "step": step + 1,
                    "gap": number(gaps[step, i]),
                    "worst": number(gaps[: step + 1, i].max()),
                }


def verdict(records: Records) -> Iterator[Verdict]:
    """Synced passes in each type, layer and training; averaged variances do not."""
    layers, training = (records.where(kind=kind) for kind in ("layer", "training"))
    how = {"unit": "relative", "geometric": True, "exact": True}
    steps = max(training.values("step"))
    for dtype in LAYER:
        wanted: dict[str, Any] = {"condition": "synced", "dtype": dtype}
        claim = f"{dtype}, forward and backward: synced is one device with the whole batch"
        errors = layers.by_seed("error", of=max, **wanted)  # the worse form and pass count
        yield decide(f"layer.{dtype}", claim, errors, at_most=LAYER[dtype], **how)
        claim = f"{dtype}, losses of {steps} steps: synced is one device with the whole batch"
        worst = training.by_seed("worst", **wanted)
        yield decide(f"training.{dtype}", claim, worst, at_most=TRAINING[dtype], **how)
    claim = "averaged variances are not, by the smallest error of any type and pass"
    errors = layers.by_seed("error", of=min, condition="variances averaged")
    yield decide("averaged", claim, errors, at_least=max(LAYER.values()), **how)


def figure(records: Records) -> Figure:
    """The errors of a layer, and the difference of the losses over the steps."""
    picture, (left, right) = draw.canvas(2, width=5, height=4.2)
    columns = list(itertools.product(LAYER, PASSES))
    tiny = np.finfo(np.float64).eps / 2
    for label, style in draw.styles(map(", ".join, itertools.product(NORMS, LAYER))).items():
        name, dtype = label.rsplit(", ", 1)
        mine = records.where(condition=name, dtype=dtype)
        layer, training = mine.where(kind="layer"), mine.where(kind="training")
        places = [columns.index((dtype, r["pass"])) for r in layer]
        left.plot(places, [max(r["error"], tiny) for r in layer], **{**style, "ls": ""})
        steps, gaps = draw.along(training, "step", "gap")
        worst = np.maximum(np.max(gaps, axis=1), tiny)
        right.plot(steps, worst, label=label, **{**style, "marker": ""})
    for at, (dtype, _) in enumerate(columns):
        left.plot([at - 0.4, at + 0.4], [LAYER[dtype]] * 2, color="grey", lw=1, ls=":")
    left.set_xticks(range(len(columns)), map("\n".join, columns))
    left.set(yscale="log", ylabel="largest error, relative", title="one layer")
    right.set(yscale="log", xlabel="optimizer step", ylabel="difference of the loss, relative")
    right.set_title("training, the worst seed")
    title = "D devices against one with the whole batch; dotted: threshold"
    return draw.finish(picture, title, key=right, fontsize=10)
