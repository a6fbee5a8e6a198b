"""The language model of `bench lm` in PyTorch: what `models.Lm` computes, by PyTorch's own layers.

The pre-norm Llama of `experiments/models/lm.py`: RMS norm, causal attention with RoPE on the two
halves of a head, SwiGLU, no biases, the head tied to the embedding. The norm, the attention and the
optimizer are the kernels PyTorch has for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn  # pyright: ignore[reportMissingImports]


class Block(nn.Module):
    """An attention and an MLP, each behind an RMS norm and added to the stream."""

    def __init__(self, width: int, hidden: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.RMSNorm(width, eps)
        self.before_mlp = nn.RMSNorm(width, eps)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, False) for _ in range(2))
        self.down = nn.Linear(hidden, width, False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of `x [N, T, C]`, with the cosines and sines `[T, D/2]` of the rotation."""
        h = self.before_attention(x)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(-2))
        h = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Lm(nn.Module):
    """The model.

    Args:
      weights: As `bench.lm.weights` has them.
      length: T, the tokens of a sequence.
      heads: The number of heads.
      eps: ε of the norms.
      base: Of the rotation's periods.
    """

    def __init__(
        self, weights: Mapping[str, np.ndarray], length: int, heads: int, eps: float, base: float
    ) -> None:
        super().__init__()
        depth, width, hidden = weights["up"].shape
        self.embed = nn.Embedding.from_pretrained(tensor(weights["embed"]), freeze=False)
        self.blocks = nn.ModuleList(Block(width, hidden, heads, eps) for _ in range(depth))
        self.last = nn.RMSNorm(width, eps)
        for name in weights.keys() - {"embed"}:
            for block, w in zip(self.blocks, weights[name], strict=True):
                getattr(block, name).weight.data = tensor(w.T)
        half = width // heads // 2
        angles = np.outer(np.arange(length), base ** (-np.arange(half) / half))
        self.register_buffer("cos", tensor(np.cos(angles)))
        self.register_buffer("sin", tensor(np.sin(angles)))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of the next tokens, both `[N, T]`."""
        x = self.embed(tokens) * self.embed.weight.shape[1] ** 0.5
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.last(x) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i+D/2}) of `x [N, H, T, D]`."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def tensor(v: np.ndarray) -> Tensor:
    """A copy in float32."""
    return torch.from_numpy(np.array(v, np.float32, order="C"))
