"""The PyTorch contestants of `bench ops`: torch.nn.functional, eager and compiled, Liger and Quack.

x is kept as [N, ..., C]. Where PyTorch wants channels second it gets a permuted view of the same
bytes, which is its channels-last memory format.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]

from .worker import BOTH, DECAY, EPS, FORWARD, GROUPS, Built, Case, Contestant, Family


class TorchFamily(Family):
    """PyTorch on `device`, with its default number of threads."""

    def __init__(self, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("this torch has no CUDA")
        self.device = torch.device(device)

    def environment(self) -> dict[str, Any]:
        """Version, threads, device."""
        cuda = self.device.type == "cuda"
        return {
            "packages": {"torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "devices": [f"cuda: {torch.cuda.get_device_name()}" if cuda else "cpu"],
        }

    def contestants(self, peer: str, case: Case) -> list[Contestant]:
        """One: the functional op, or that library's."""
        if peer in LIBRARIES:
            return [Contestant(peer, peer, LIBRARIES[peer](case), safe=True)]
        # The fused kernels of these take parameters in the type of x only.
        fused = case.op == "rms" or (self.device.type == "cuda" and case.op in ("layer", "group"))
        cast = fused and case.dtype != "float32"
        notes = []
        if case.op == "instance":
            notes.append("returns its output channels first")
        if cast:
            notes.append("the parameters are cast to the type of x, for its fused kernel")
        # The channels-last kernel of group norm on a CPU is E[x²] − E[x]².
        safe = case.op != "group"
        f, note = _function(case, cast, self.device), "; ".join(notes)
        if peer == "torch.compile":
            return [Contestant(peer, peer, torch.compile(f, dynamic=False), True, note=note)]
        return [Contestant(peer, "torch", f, safe, note=note)]

    def load(self, case: Case) -> None:
        x, dy, params = case.inputs()
        dtype = getattr(torch, case.dtype)
        self.x, self.dy = (torch.from_numpy(v).to(self.device, dtype) for v in (x, dy))
        self.params = tuple(torch.from_numpy(v).to(self.device) for v in params)
        for leaf in (self.x, *self.params):
            leaf.requires_grad_()

    def copy(self) -> Callable[[], torch.Tensor]:
        """A clone of x."""
        x = self.x.detach()
        return lambda: x.clone()

    def build(self, contestant: Contestant) -> Built:
        """The op without a graph, and the op with its backward pass."""
        x, dy, params, f = self.x, self.dy, self.params, contestant.f

        def forward() -> Any:
            with torch.no_grad():
                return f(x, *params)

        def both() -> Any:
            for leaf in (x, *params):
                leaf.grad = None
            y, aux = f(x, *params)
            y.backward(dy)
            return y.detach(), aux

        return Built({FORWARD: forward, BOTH: both}, None)

    def wait(self, out: Any) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def family(platform: str) -> TorchFamily:
    """The family as a worker serves it."""
    return TorchFamily(platform)


def _liger(case: Case) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Its Triton kernels, which take rows."""
    from liger_kernel.transformers import functional  # pyright: ignore[reportMissingImports]

    norms: dict[str, Callable[..., torch.Tensor]] = {
        "layer": lambda x, g, b: functional.liger_layer_norm(x, g, b, EPS),
        # In place it would write dx where dy is, which others read.
        "rms": lambda x, g: functional.liger_rms_norm(x, g, EPS, in_place=False),
    }
    if case.op not in norms:
        raise ValueError("it is measured on layer and RMS norm alone")
    return lambda x, *params: (norms[case.op](x, *params), ())


def _quack(case: Case) -> Callable[..., tuple[torch.Tensor, Any]]:
    """Its CuTe kernel of RMS norm; that of layer norm has no autograd."""
    import quack  # pyright: ignore[reportMissingImports]

    if case.op != "rms":
        raise ValueError("it has RMS norm alone, forward and backward")

    def f(x: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, Any]:
        return quack.rmsnorm(x.reshape(-1, x.shape[-1]), g, eps=EPS).reshape(x.shape), ()

    return f


LIBRARIES = {"liger": _liger, "quack": _quack}


def _function(
    case: Case, cast: bool, device: torch.device
) -> Callable[..., tuple[torch.Tensor, Any]]:
    channels = case.shape[-1]
    running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    norms: dict[str, Callable[..., torch.Tensor]] = {
        "batch": lambda x, g, b: F.batch_norm(
            x, *running, g, b, training=True, momentum=1 - DECAY, eps=EPS
        ),
        "layer": lambda x, g, b: F.layer_norm(x, (channels,), g, b, EPS),
        "rms": lambda x, g: F.rms_norm(x, (channels,), g, EPS),
        "group": lambda x, g, b: F.group_norm(x, GROUPS, g, b, EPS),
        "instance": lambda x, g, b: F.instance_norm(x, weight=g, bias=b, eps=EPS),
    }
    norm = norms[case.op]

    def f(x: torch.Tensor, *params: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if cast:
            params = tuple(p.to(x.dtype) for p in params)
        if case.op in ("layer", "rms"):
            return norm(x, *params), ()
        if case.kind == "conv":
            return norm(x.permute(0, 3, 1, 2), *params).permute(0, 2, 3, 1), running
        return norm(x.reshape(-1, channels), *params).reshape(x.shape), running

    return f
