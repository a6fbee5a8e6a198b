"""Does cosine normalization train better than batch, layer and weight normalization?

Claim: The cosine of weights and inputs in the place of their product bounds the pre-activation by
1; its centred form is Pearson's correlation; and nets with it end more accurate than with batch,
layer or weight normalization, where these stand before the activation. Behind a sigmoid, where
batch and layer norm do better, these are the more accurate.

Source: Luo et al. 2017, https://arxiv.org/abs/1702.05870, of which we know the abstract: cosine
normalization, in dense and in conv nets, is better than the three, on MNIST, CIFAR-10 and others.
It names no number, neither of the forms, and no place of the norms; behind the sigmoid is ours.

Protocol: Exact part: the pre-activations of MNIST images, without gain and bias, for inputs and
weights of any length; the centred ones beside SciPy's Pearson r, in float64. Training: 3×100
sigmoids on MNIST, 1,000 steps of SGD, and a conv net of ReLUs with 4, 8 and 16 channels on
CIFAR-10 (5,000 test images), 300 steps with momentum, batches of 60. Each norm has the best of its
rates, and the best of the others is the one that is best there, on held-out images. Cosine norms
have a gain, which starts at √K (K inputs) for a variance like that of the other norms; they and
weight norm look at the weights, and have no place behind the activation.

Found: With the centred form some nets stay at chance on CIFAR-10, one of those on which the rate is
chosen at every rate, so that its mean over the seeds is one of two kinds; the share that learns is
beside it. Why was not looked into; a patch that is nearly constant has a contrast near zero, by
which the form divides.

Command: normlab run cosine
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from matplotlib.figure import Figure

import normlab as nl

from ..engine import (
    Condition,
    Config,
    Record,
    Records,
    Schedule,
    Source,
    Verdict,
    dataset,
    decide,
    decide_share,
    draw,
    exact,
    tuned,
)
from .batch_size_conv import tested

BOUND = 1e-12
"""How far the largest |pre-activation| is above 1, at most: float64's rounding."""

PEARSON = 1e-10
"""The difference from SciPy's Pearson r, at most."""

BETTER = {"mnist": 0.1}
"""Points of test accuracy that it is better than the best of the others, on other data `ELSEWHERE`.
Ours: about a tenth of what separates the others there."""

ELSEWHERE = 0.5

LEARNS = 15.0
"""Percent of test images told right above which a net has learned; chance is 10."""

FORMS = ("cosine", "centred_cosine")

RIVALS = {"before": ("batch", "layer", "weight"), "after": ("batch", "layer")}
"""What stands before the activation, and what can stand after it."""

SOURCE = Source("luo2017", read="abstract")


@dataclasses.dataclass(frozen=True)
class Cosine(Config):
    """The config.

    Attributes:
      rates: Learning rates, of which each norm has its best.
      cifar10_rates: Those of the conv net.
      cifar10_steps: Its steps.
      cifar10_model: The conv net.
      cifar10_widths: Its channels.
      cifar10_images: Its test images.
    """

    rates: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
    steps: int = 1000
    schedule: Schedule = "cosine"
    evaluations: int = 1
    cifar10_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    cifar10_steps: int = 300
    cifar10_model: str = "conv"
    cifar10_widths: tuple[int, ...] = (4, 8, 16)
    cifar10_images: int = 5000

    @property
    def datasets(self) -> tuple[str, ...]:
        """Both."""
        return self.dataset, "cifar10"


QUICK = Cosine()
SECONDS = 550
FULL = Cosine(
    steps=50_000,
    evaluations=50,
    cifar10_steps=50_000,
    cifar10_model="vgg",
    cifar10_widths=(128, 256, 512),
    cifar10_images=10_000,
)


def run(config: Cosine) -> Iterator[Condition]:
    """The exact part, then each norm on both data sets, on one in either place."""
    yield Condition({"norm": "cosine", "data": "mnist", "part": "exact"}, exact(values, config))
    conv = dataclasses.replace(
        config,
        dataset="cifar10",
        model=config.cifar10_model,
        steps=config.cifar10_steps,
        optimizer="momentum",
        evaluations=1,
    )
    before = [("before", name) for name in (*RIVALS["before"], *FORMS)]
    after = [("after", name) for name in RIVALS["after"]]
    fewer = functools.partial(tested, images=config.cifar10_images)
    for here, rates, rows, options in (
        (config, config.rates, before + after, {}),
        (conv, config.cifar10_rates, before, {"prepare": fewer, "widths": config.cifar10_widths}),
    ):
        for place, name in rows:
            norm = nl.get(name, **({"axes": "all"} if name == "layer" else {}))
            labels = {"norm": name, "data": here.dataset, "placement": place, "part": "training"}
            yield Condition(labels, tuned(here, norm, rates, placement=place, **options))


def values(config: Cosine) -> Iterator[Record]:
    """The largest |pre-activation|, and the distance from Pearson's r, of each draw."""
    data = dataset(config.dataset, config.data_dir)
    plain, centred = (
        nl.get(name, use_gain=False, use_bias=False) for name in ("cosine", "centred_cosine")
    )
    for seed in config.each_seed:
        rng = np.random.default_rng(seed)
        images = data.train_inputs[rng.choice(len(data.train_inputs), 64, replace=False)]
        x = images.reshape(64, -1) * 10.0 ** rng.uniform(-8, 8, (64, 1))
        w = rng.standard_normal((x.shape[1], 50)) * 10.0 ** rng.uniform(-8, 8, 50)
        w[:, :10] = x[:10].T  # at the bound: units that look just like their input
        with jax.enable_x64(True):
            site = nl.Site(jnp.asarray(x) @ jnp.asarray(w), jnp.asarray(x), jnp.asarray(w))
            outputs = [
                np.asarray(norm.apply(*norm.init(site), site, train=True)[0])
                for norm in (plain, centred)
            ]
        r = np.asarray(scipy.stats.pearsonr(x[:, :, None], w[None], axis=1)[0])
        yield {
            "kind": "exact",
            "seed": seed,
            "largest": float(max(np.abs(h).max() for h in outputs)),
            "off_pearson": float(np.abs(outputs[1] - r).max()),
        }


def best(records: Records, place: str) -> str:
    """The rival in a place with the best accuracy on the held-out images, at its best rate."""
    trials = records.where(kind="tuning", placement=place)
    found = {
        r["norm"]: max((v for v in r["accuracies"] if v is not None), default=0.0) for r in trials
    }
    return max(RIVALS[place], key=found.__getitem__)


def verdict(records: Records) -> Iterator[Verdict]:
    """The bound, Pearson's r, and each form against the best of the others in either place."""
    same = {"exact": True, "source": SOURCE}
    claim = "cosine norm: |pre-activation| without gain and bias is at most 1 (what it is above)"
    yield decide("cosine.bound", claim, records.by_seed("largest") - 1, at_most=BOUND, **same)
    claim = "centred cosine norm is Pearson's r (largest difference from SciPy's)"
    off = records.by_seed("off_pearson")
    yield decide("centred-cosine.pearson", claim, off, at_most=PEARSON, geometric=True, **same)
    training = records.where(part="training")
    for data, place in training.values("data", "placement"):
        here = training.where(data=data)
        rival = here.accuracy(norm=best(here, place), placement=place)
        size = BETTER.get(data, ELSEWHERE)
        others = " and ".join(RIVALS[place]).replace(" and ", ", ", len(RIVALS[place]) - 2)
        for norm in FORMS:
            gain = here.accuracy(norm=norm) - rival
            form = f"{data}: {norm.replace('_', ' ')} norm ends"
            id = f"{data}.{norm.replace('_', '-')}.{place}"
            if place == "before":
                claim = f"{form} more accurate than the best of {others} norm"
                how = {"at_least": 0, "size": size, "source": SOURCE}
            else:
                claim = (
                    f"{form} less accurate than the better of {others} norm after the activation"
                )
                how = {"at_most": 0, "size": -size}
            yield decide(id, claim, gain, unit="points", **how)
    conv = training.where(data="cifar10")
    for norm in FORMS if conv else ():
        learns = conv.accuracy(norm=norm)[:, 0] > LEARNS
        claim = f"cifar10: most nets with {norm.replace('_', ' ')} norm learn (share of the seeds)"
        yield decide_share(f"cifar10.{norm.replace('_', '-')}.learns", claim, learns, at_least=0.5)


def figure(records: Records) -> Figure:
    """The error of each norm at its best rate, on both data sets, in either place."""
    picture, panels = draw.panels(records.where(part="training"), "data")
    for axes, data, here in panels:
        errors = {
            norm + (" after" if place == "after" else ""): 100
            - here.accuracy(norm=norm, placement=place)
            for norm, place in here.values("norm", "placement")
        }
        draw.columns(axes, errors)
        axes.set(ylabel="test error (%)", title=f"{data}: seeds, mean, 95% interval")
    return picture
