"""The PyTorch contestant of `bench sync`: SyncBatchNorm over gloo, a process for each device.

`torch.nn.SyncBatchNorm` refuses CPU tensors, and none of the five kernels that it is made of has a
CPU form (torch 2.15). Where it refuses, its algorithm is timed in its place, made of what PyTorch
has on a CPU: the moments and the sums of the backward pass by batch norm's own kernels, one gather
of [mean, var, n] from every process forward, one all_reduce of the two sums backward.
"""

from __future__ import annotations

import datetime

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.distributed as dist  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]

from .sync_jax import drawn
from .turns import Repeated, available_cores, first_line
from .worker import BOTH, DIRECTIONS, EPS, FORWARD

MODULE, STAND_IN = "torch", "torch, algorithm"


class Synced(torch.autograd.Function):
    """`(x, g, b, running mean, running variance) -> y`, with the statistics of all processes."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        g: Tensor,
        b: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
    ) -> Tensor:
        """What `SyncBatchNorm` does: gather [mean, var, n], merge, update, apply."""
        mean, var = torch.batch_norm_update_stats(x, None, None, 0.0)
        count = mean.new_full((1,), x.numel() // x.shape[1])
        packed = torch.cat([mean, var, count])
        table = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(table, packed)
        means, variances, counts = torch.stack(table).split(x.shape[1], 1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        running_mean.copy_(mean)
        running_var.copy_(var)
        ctx.save_for_backward(x, g, mean, var, counts.sum())
        return F.batch_norm(x, mean, var, g, b, False, 0.0, EPS)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: torch.autograd.function.FunctionCtx, dy: Tensor
    ) -> tuple[Tensor | None, ...]:
        """By x it is g/σ · (dy − mean(dy) − x̂·mean(dy·x̂)), with the means over all processes."""
        x, g, mean, var, count = ctx.saved_tensors  # pyright: ignore[reportAttributeAccessIssue]
        _, dg, db = torch.ops.aten.native_batch_norm_backward(
            dy, x, g, mean, var, None, None, False, EPS, [False, True, True]
        )
        sums = torch.cat([db, dg])
        dist.all_reduce(sums)
        by_shift, by_scale = (sums / count).split(len(g))
        r = torch.rsqrt(var + EPS)
        by_dy, by_x = g * r, -g * r * r * by_scale
        constant = -by_dy * by_shift - by_x * mean
        wide = (-1, *[1] * (x.ndim - 2))
        dx = torch.addcmul(constant.view(wide), x, by_x.view(wide))
        return dx.addcmul_(dy, by_dy.view(wide)), dg, db, None, None


class Part:
    """What one process does: its share of the work, on the cores that it may run on.

    Args:
      processes: How many processes there are.
      process: Which of them this is.
      address: HOST:PORT at which they meet.
    """

    def __init__(self, processes: int, process: int, address: str) -> None:
        torch.set_num_threads(len(available_cores()))
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{address}",
            rank=process,
            world_size=processes,
            timeout=datetime.timedelta(seconds=60),
        )
        self._refused = _refusal()
        self._turns: dict[tuple[str, str], Repeated] = {}

    def refused(self) -> tuple[str, str]:
        """PyTorch's version, and why its module is not timed; "" where it is."""
        return torch.__version__, self._refused

    def prepare(self, shape: tuple[int, ...]) -> list[tuple[str, str]]:
        """Makes the norm of a shape, channels last; returns its name and both directions."""
        spread = (dist.get_world_size(), *shape)
        x, dy, g, b = map(torch.from_numpy, drawn((spread, spread, shape[-1:], shape[-1:])))
        x, dy = x[dist.get_rank()], dy[dist.get_rank()]
        if x.ndim > 2:
            x, dy = x.movedim(-1, 1), dy.movedim(-1, 1)  # the same bytes, its channels_last
        self.leaves, self.dy = [v.requires_grad_() for v in (x, g, b)], dy
        refused, module = bool(self._refused), nn.SyncBatchNorm(len(g), eps=EPS, momentum=1.0)
        module.weight, module.bias = nn.Parameter(g), nn.Parameter(b)
        if not refused:
            self.leaves[1:] = [module.weight, module.bias]
        self.var = module.running_var

        def norm() -> Tensor:
            x, g, b = self.leaves
            return Synced.apply(x, g, b, module.running_mean, self.var) if refused else module(x)

        def forward() -> Tensor:
            with torch.no_grad():
                return norm()

        def both() -> Tensor:
            for leaf in self.leaves:
                leaf.grad = None
            y = norm()
            y.backward(self.dy)
            return y

        self._calls = {FORWARD: forward, BOTH: both}
        name = STAND_IN if refused else MODULE
        self._turns = {(name, d): Repeated(self._calls[d], 0.0) for d in DIRECTIONS}
        return list(self._turns)

    def turn(self, key: tuple[str, str], repetitions: int) -> float:
        """Milliseconds per call."""
        self._turns[key].repetitions = repetitions
        return self._turns[key]()

    def outputs(self, shape: tuple[int, ...]) -> dict[str, list[np.ndarray]]:
        """What this process has of the shape prepared: as the JAX side's."""
        del shape
        y = self._calls[BOTH]().detach()
        dx, dg, db = (leaf.grad for leaf in self.leaves)
        y, dx = (v.movedim(1, -1) for v in (y, dx))
        ((name, _), *_) = self._turns
        return {name: [v.numpy().copy() for v in (y, self.var, dx, dg, db)]}

    def leave(self) -> None:
        """Parts from the other processes."""
        dist.destroy_process_group()


def _refusal() -> str:
    """What `SyncBatchNorm` says to a CPU tensor; "" if it takes it."""
    try:
        nn.SyncBatchNorm(1)(torch.zeros(2, 1))
    except (ValueError, NotImplementedError) as error:
        return first_line(error)
    return ""
