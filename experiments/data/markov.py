"""A language whose entropy is known: a letter depends by chance on the two before it.

No model can need fewer bits per letter than the entropy rate, but for the accident of which
letters were drawn: a law for whatever trains and measures language models.
"""

import bisect

import numpy as np

from .text import SPLITS, packed

LETTERS = "abcdefgh"
SIZES = {"train": 2**18, "validation": 2**15, "test": 2**15}
"""Letters of each split."""


def chances() -> np.ndarray:
    """The probability of a letter after two others, `[8, 8, 8]`: drawn by a seed."""
    weights = np.random.default_rng(0).integers(1, 9, (len(LETTERS),) * 3) ** 3
    return weights / weights.sum(axis=-1, keepdims=True)


def entropies() -> tuple[float, float, float]:
    """Bits per letter for one who knows none of the letters before, one, or two: all there is.

    >>> [round(bits, 3) for bits in entropies()]
    [2.98, 2.898, 2.242]
    """
    p = chances()
    two = np.full(p.shape[:2], 1 / p[0].size)  # the share of each pair of letters
    for _ in range(1000):
        two = np.einsum("ab,abc->bc", two, p)
    one = two.sum(axis=0)
    after_one = np.einsum("ab,abc->bc", two, p) / one[:, None]

    def bits(share: np.ndarray, q: np.ndarray) -> float:
        return float(-(share * (q * np.log2(q)).sum(axis=-1)).sum())

    return bits(np.ones(()), one), bits(one, after_one), bits(two, p)


def draw() -> dict[str, np.ndarray]:
    """The text: a block for each split, the same on every machine."""
    ends = chances().cumsum(axis=-1)[..., :-1].tolist()
    blocks = {}
    for seed, name in enumerate(SPLITS, 1):
        a = b = 0
        text = []
        for u in np.random.default_rng(seed).random(SIZES[name]).tolist():
            a, b = b, bisect.bisect(ends[a][b], u)
            text.append(LETTERS[b])
        blocks[name] = packed(["".join(text)])
    return blocks
