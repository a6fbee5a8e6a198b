"""The networks of the experiments, in Flax, with the norm as an argument.

Every network takes the same arguments beside its own sizes (`Network`): the norm, its placement
before or after the activation, and which layers carry it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.typing import ArrayLike

import normlab as nl
from normlab._checks import imported
from normlab.errors import invalid, nearest

from .feedforward import ConvNet, Mlp, Nin, Vgg
from .layers import (
    ACTIVATIONS,
    DEPTH,
    PARTS,
    STATE,
    Activations,
    MatmulConv,
    Network,
    Normed,
    Placement,
    Where,
    conv,
)
from .lm import Lm
from .recurrent import Gru, Lstm
from .resnet import ResNet
from .transformer import Transformer, unstack
from .vit import Vit

MODELS: dict[str, Callable[..., Network]] = {
    "mlp": Mlp,
    "conv": ConvNet,
    "vgg": Vgg,
    "nin": Nin,
    "resnet20": functools.partial(ResNet, n=3),
    "resnet32": functools.partial(ResNet, n=5),
    "resnet56": functools.partial(ResNet, n=9),
    "resnet110": functools.partial(ResNet, n=18),
    "resnet50": functools.partial(
        ResNet, n=(3, 4, 6, 3), widths=(64, 128, 256, 512), bottleneck=True
    ),
    "lstm": Lstm,
    "gru": Gru,
    "vit": Vit,
    "lm": Lm,
}
"""Every model by name: what makes it from `norm`, `classes` and its options."""


def require(name: str, **options: Any) -> Callable[..., Network]:
    """Returns what makes the model called `name`.

    Args:
      name: One of `MODELS`, or `"mypackage.module:Net"`, which is imported: a subclass of
        `Network`, or a `functools.partial` of one.
      **options: What it is told beside the norm and the classes.

    Raises:
      ValueError: For an unknown name or option, with the nearest known one, or for what is no
        model.
    """
    if ":" in name:
        make = imported("models", "model", name)
        _class_of(name, make)
    elif name in MODELS:
        make = MODELS[name]
    else:
        raise ValueError(f"unknown model {name!r}: {nearest(name, MODELS)}")
    known = set(inspect.signature(make).parameters) - {"parent", "name"}
    for option in options:
        if option not in known:
            raise ValueError(f"{name}: unknown option {option!r}: {nearest(option, sorted(known))}")
    return make


def _class_of(name: str, make: Any) -> type[Network]:
    found = make
    while isinstance(found, functools.partial):
        found = found.func
    if isinstance(found, type) and issubclass(found, nn.Module) and hasattr(found, "carriers"):
        return cast(type[Network], found)  # `python -m experiments` has a Network of its own
    expected = "a subclass of normlab.experiments.models.Network, or a functools.partial of one"
    raise invalid("models", f"{name!r}, which is {found!r}", expected, "derive it from Network")


def reads_text(name: str) -> bool:
    """Whether the model called `name` reads tokens, and not images; ValueError for an unknown one.

    >>> reads_text("lm"), reads_text("vit")
    (True, False)
    """
    return _class_of(name, require(name)).text


def is_flat(name: str) -> bool:
    """Whether the layers of the model called `name` have no positions; see `Network.flat`.

    >>> is_flat("mlp"), is_flat("conv")
    (True, False)
    """
    return _class_of(name, require(name)).flat


def build(name: str, norm: nl.Norm, classes: int, **options: Any) -> Network:
    """Returns the model called `name` with a norm.

    Args:
      name: What `require` takes.
      norm: The norm.
      classes: The size of the output.
      **options: `activation`, `placement` and `where`, which every model takes, and the model's
        own; its docstring lists them.

    Raises:
      ValueError: For an unknown name or option, with the nearest known one.

    >>> sorted(build("resnet20", nl.get("layer"), 10, where="stem|.*conv1").carriers())[-2:]
    ['stage2_block2_conv1', 'stem']
    """
    return require(name, **options)(norm=norm, classes=classes, **options)


def draw_kernels(
    name: str, classes: int, seeds: Iterable[int], example: ArrayLike, **options: Any
) -> Any:
    """Draws the kernels and the output layer of a model, for all norms to start from.

    Args:
      name: The model.
      classes: The size of the output.
      seeds: One draw for each.
      example: A preprocessed batch, for its shape.
      **options: As in `build`.

    Returns:
      A tree of parameters `[seeds, ...]`, to be completed by `complete`.
    """
    model = build(name, nl.get("none", use_bias=False), classes, **options)
    draw = jax.jit(lambda seed: model.init(jax.random.key(seed), example, train=False)["params"])
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(draw, seeds))


def complete(model: Network, kernels: Any, example: ArrayLike) -> Any:
    """Returns the model's variables: these kernels, and the norms' initial params and states.

    The kernels are projected where a model projects them after every step.
    """
    rngs = {"params": jax.random.key(0)}  # asked for by Flax; the norms draw nothing
    _, variables = model.apply(
        {"params": model.project(_without_norms(kernels))},
        example,
        train=False,
        rngs=rngs,
        mutable=["params", STATE],
    )
    return variables


def _without_norms(params: Any) -> Any:
    if not isinstance(params, dict):
        return params
    kept = {name: _without_norms(value) for name, value in params.items() if name != "norm"}
    return {name: value for name, value in kept.items() if not isinstance(value, dict) or value}


def split(variables: Any) -> tuple[Any, Any]:
    """Splits a model's variables into what the optimizer changes and the norms' states."""
    return variables["params"], variables.get(STATE, {})


def parts_by_layer(variables: Any) -> dict[str, nl.Parts]:
    """The parts that the last call sowed, by layer, in the order of the layers.

    A layer is named by its path, whether blocks are scanned or not; the parts of all time steps of
    a recurrent one are stacked.
    """
    return _sown(variables.get(PARTS, {}))


def activations_by_layer(variables: Any) -> dict[str, Activations]:
    """What flowed through each layer in the last call, by its path, in the order of the layers."""
    return _sown(variables[ACTIVATIONS])


def _sown(collection: Any) -> dict[str, Any]:
    sown: Any = flatten_dict(unstack(collection), is_leaf=lambda _, v: isinstance(v, tuple))
    names = {path: [word for word in path if word not in ("norm", "layer")] for path in sown}
    return {"/".join(names[path]): values[0] for path, values in sown.items()}
