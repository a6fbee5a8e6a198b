"""The norms of the library: one row of the registry for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from normlab.example import group_parts, instance_parts, layer_parts, rms_parts
from normlab.factories import (
    batch,
    centred_cosine,
    centred_weight,
    cosine,
    none,
    weight,
    weight_standardization,
)
from normlab.family.domains import auxiliary_batch, recurrent_batch, transferable_batch
from normlab.family.evo import evo_b0, evo_s0_parts, evo_s1_parts, evo_s2_parts, evolved_params
from normlab.family.iterations import batch_rms, cross_iteration
from normlab.family.lengths import scale_params, scale_parts
from normlab.family.local import (
    bare_params,
    divisive_parts,
    local_context_parts,
    local_parts,
    local_response_parts,
)
from normlab.family.mixtures import (
    batch_channel,
    batch_instance,
    extended_batch,
    ibn,
    mean_only_batch,
    switchable,
    weight_mean_only_batch,
)
from normlab.family.pointwise import derf, dyisru, dyt, pointwise
from normlab.family.response import frn, grn_params, grn_parts, seed_params, seed_parts
from normlab.family.segments import (
    graph_params,
    graph_parts,
    pair_params,
    pair_parts,
    segment_parts,
)
from normlab.family.spectral import spectral
from normlab.family.spread import lp_batch
from normlab.family.whitening import group_whitening_parts, switchable_whitening, whitening
from normlab.making import initial_features, stateless
from normlab.registry import INVARIANCES, Row, register


def _add(
    factory: Callable[..., Any],
    needs: str,
    looks_at: str,
    mu: str,
    sigma: str,
    marks: str,
    paper: str,
    **more: Any,
) -> None:
    """Registers a norm of the library.

    `marks` has an `I` for each of `INVARIANCES` that holds, behind a dense layer; where others hold
    behind one with positions, those follow behind a space.
    """
    name = getattr(factory, "__name__").removesuffix("_parts")  # noqa: B009
    held = [
        frozenset(change for change, mark in zip(INVARIANCES, each, strict=True) if mark == "I")
        for each in marks.split()
    ]
    if held[1:]:
        more["with_positions"] = held[1]
    about = (looks_at, mu, sigma, held[0], paper)
    register(Row(name, factory, frozenset(needs.split()), *about, **more))


_OF_A = ("mean a", "√(var a + ε)")
_BATCH = "a: all examples and positions (and devices), per channel"
_LAYER = "a: the channels of a position, or all of an example"
_GROUP = "a: the positions of an example and a group of channels"
_INSTANCE = "a: the positions of an example, per channel"
_UNIT = "w: the weights of a unit"
_SUMS = "w, and the sum of x: the weights of a unit"
_BOTH = "w and x: the weights of a unit and the inputs they meet"
_QIAO = "Qiao et al. 2019, Brock et al. 2021"

_add(none, "", "nothing", "0", "1", "------II", "–")
_add(batch, "a batch", _BATCH, *_OF_A, "I-III-I-", "Ioffe & Szegedy 2015")
_add(
    stateless(layer_parts, initial_features),
    "a",
    _LAYER,
    *_OF_A,
    "II-I-III",
    "Ba, Kiros & Hinton 2016",
)
_add(
    stateless(rms_parts, initial_features),
    "a",
    "a: as layer",
    "0",
    "√(mean a² + ε)",
    "I--I-III",
    "Zhang & Sennrich 2019",
)
_add(group_parts, "a", _GROUP, *_OF_A, "II-I-III I--I-III", "Wu & He 2018")
_add(instance_parts, "a", _INSTANCE, *_OF_A, "I-IIIIII", "Ulyanov, Vedaldi & Lempitsky 2016")
_add(weight, "w", _UNIT, "0", "‖w‖", "I-I---II", "Salimans & Kingma 2016")
_add(weight_standardization, "w x", _SUMS, "w̄·Σx", "‖w − w̄‖", "I-I---II", _QIAO)
_add(cosine, "w x", _BOTH, "0", "‖w‖·‖x‖", "I-II-III", "Luo et al. 2017")
_add(
    centred_cosine,
    "w x",
    "w and x: as cosine",
    "K·w̄·x̄",
    "‖w − w̄‖·‖x − x̄‖",
    "I-II-III",
    "Luo et al. 2017",
)

# Lengths.
_LENGTH = "a: the channels of a position"
_add(
    stateless(scale_parts, scale_params),
    "a",
    _LENGTH,
    "0",
    "max(‖a‖, ε)",
    "I--I-III",
    "Nguyen & Salazar 2019",
)

# The value itself; with the activation; measured gains.
_ITSELF = "a: the value itself"
_GROUPS = "a: as group, and the value itself"
_LIU = "Liu et al. 2020"

_add(pointwise, "a", _ITSELF, "0", "u/φ(u), u = αa + s", "------II", "–")
_add(dyt, "a", _ITSELF, "0", "αa/tanh(αa)", "------II", "Zhu et al. 2025")
_add(derf, "a", _ITSELF, "0", "u/erf(u), u = αa + s", "------II", "Chen et al. 2025")
_add(dyisru, "a", _ITSELF, "0", "√(1 + (αa)²)", "------II", "Stollenwerk 2025")
_add(
    evo_b0,
    "a batch",
    "a: as batch and instance, and the value itself",
    "0",
    "max(√(var_B + ε), va + √(var_I + ε))",
    "I-II--I-",
    _LIU,
    fused=True,
)
_S = {"paper": _LIU, "fused": True}
_add(
    stateless(evo_s0_parts, evolved_params),
    "a",
    _GROUPS,
    "0",
    "√(var a + ε)",
    "------II",
    **_S,
)
_add(evo_s1_parts, "a", _GROUPS, "0", "√(var a + ε)", "------II", **_S)
_add(evo_s2_parts, "a", _GROUPS, "0", "√(mean a² + ε)", "------II", **_S)
_add(
    frn,
    "a",
    _INSTANCE,
    "0",
    "√(mean a² + ε)",
    "I-II-III",
    "Singh & Krishnan 2019",
    fused=True,
)
_add(
    stateless(grn_parts, grn_params),
    "a",
    "a: the lengths of an example's channels",
    "0",
    "1",
    "------II",
    "Woo et al. 2023",
)
_add(
    stateless(seed_parts, seed_params),
    "a",
    "a: as layer",
    "0",
    "√(mean a² + ε)",
    "------II",
    "Cai et al. 2026",
)

# Mixtures and compositions.
_B_I_L = "a: as instance, layer and batch"
_SALIMANS = "Salimans & Kingma 2016"
_add(
    switchable,
    "a batch",
    _B_I_L,
    "Σ w·mean a",
    "√(Σ w·var a + ε)",
    "I--I--I-",
    "Luo et al. 2019",
)
_add(
    batch_instance,
    "a batch",
    "a: as batch and instance",
    "Σ w·mean a",
    "of Σ w·h",
    "I-III-I-",
    "Nam & Kim 2018",
)
_add(ibn, "a batch", "a: as instance or batch, by channel", *_OF_A, "I-III-I-", "Pan et al. 2018")
_add(
    batch_channel,
    "a batch",
    "a: as batch, then as group",
    "mean a",
    "√(var a + ε)·√(var h + ε)",
    "I-III-I-",
    "Qiao et al. 2019",
)
_add(mean_only_batch, "a batch", _BATCH, "mean a", "1", "----I-I-", _SALIMANS)
_add(
    weight_mean_only_batch,
    "a w batch",
    "a: as batch; w: the weights of a unit",
    "mean a",
    "‖w‖",
    "I-I-I-I-",
    _SALIMANS,
)
_add(
    extended_batch,
    "a batch",
    "a: as batch; σ of all channels",
    "mean a",
    "√(var of all channels + ε)",
    "I--II-I-",
    "Luo et al. 2020",
)
_add(batch_rms, "a batch", _BATCH, "0", "√(mean a² + ε)", "I-II--I-", "Shen et al. 2020")
_add(
    cross_iteration,
    "a w x batch",
    "a: as batch, in the last batches too; w and x: what moved since",
    *_OF_A,
    "I-III-I-",
    "Yao et al. 2021",
)

_add(
    lp_batch,
    "a batch",
    _BATCH,
    "mean a",
    "√(s² + ε), s of |a − μ|",
    "I-III-I-",
    "Hoffer et al. 2018",
)
_DOMAIN = "a: as batch, within the domain"
_add(auxiliary_batch, "a batch", _DOMAIN, *_OF_A, "I-III-I-", "Xie et al. 2020")
_add(transferable_batch, "a batch", _DOMAIN, *_OF_A, "I-II--I-", "Wang et al. 2019")
_STEP = "a: as batch, at the time step"
_add(recurrent_batch, "a batch", _STEP, *_OF_A, "I-III-I-", "Cooijmans et al. 2016")

# Windows and segments.
_NEAR = "a: the window about the value"
_add(local_parts, "a", _NEAR, *_OF_A, "I-IIII-I", "–")
_add(
    stateless(local_response_parts, bare_params),
    "a",
    "a: the channels beside the value's",
    "0",
    "(k + α·mean a²)^power",
    "------II",
    "Krizhevsky, Sutskever & Hinton 2012",
)
_SEGMENT = "a: the segment of the value, per channel"
_add(segment_parts, "a", _SEGMENT, *_OF_A, "I-IIIIII", "–")
_add(
    stateless(graph_parts, graph_params),
    "a",
    _SEGMENT,
    "α·mean a",
    "√(mean (a − μ)² + ε)",
    "I-II-III",
    "Cai et al. 2021",
)
_add(
    stateless(pair_parts, pair_params),
    "a",
    "a: the segment of the value",
    "mean a",
    "√(mean ‖a − μ‖² + ε)",
    "I--IIIII",
    "Zhao & Akoglu 2020",
)
_add(divisive_parts, "a", _NEAR, "mean a", "√(k + mean v²)", "-I----II -------I", "Ren et al. 2017")
_add(local_context_parts, "a", _NEAR, *_OF_A, "II-I-I-I I--I-I-I", "Ortiz et al. 2020")

# Maps of the weights.
_KERNEL = "w: the whole kernel, or the layer's map"
_add(spectral, "w", _KERNEL, "0", "σ̂ of w", "I-----II", "Miyato et al. 2018")
_add(centred_weight, "w x", _SUMS, "w̄·Σx", "1", "------II", "Yan et al. 2020")

# Whitening.
_add(
    whitening,
    "a batch",
    "a: all examples and positions (and devices), groups of channels together",
    "mean a",
    "Σ^½, Σ = cov a + εI",
    "I-III-I-",
    "Huang et al. 2018, 2019, Siarohin et al. 2019",
)
_add(
    stateless(group_whitening_parts),
    "a",
    "a: of an example, its groups of channels together",
    "mean a",
    "Σ^½, Σ = cov a + εI",
    "II-I-III I--I-III",
    "Huang et al. 2021",
)
_add(
    switchable_whitening,
    "a batch",
    "a: mixed, of the batch, of the positions of an example",
    "Σ w·μ",
    "(Σ w·cov a + εI)^½",
    "I--II-I-",
    "Pan et al. 2019",
)
