"""Texts: books and other writing as windows of tokens.

What is kept of a text is an array of bytes (UTF-8) for each split. A split consists of blocks of
text that do not follow each other, such as a part of each book; a zero ends each of them. Windows
are cut out of one block each.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

NAMES = ("tiny_shakespeare", "gutenberg", "lm1b", "markov")
SPLITS = ("train", "validation", "test")
SHARES = (0.9, 0.95)
"""Where a book is divided into the three: TFDS divides tiny_shakespeare there, too."""

Unit = Literal["bytes", "characters"]
"""What a token is."""


class Reading(NamedTuple):
    """How a text is read.

    Attributes:
      context: T; a window has T+1 tokens, of which the first T are inputs and the last T labels.
      unit: What a token is: a byte, of which there are 256, or a character of the text.
      measured: Windows of the validation and of the test set that are measured, spread evenly
        over each; 0 takes all.
    """

    context: int = 128
    unit: Unit = "bytes"
    measured: int = 512


class Text(NamedTuple):
    """What a data set of text has beside its windows of the training and of the test set.

    Attributes:
      validation_inputs, validation_labels: Windows to choose by, such as a learning rate.
      bytes_per_token: Of the labels of the test set: by it nats per token are bits per byte.
      vocabulary: The characters, in the order of their ids; of bytes an empty string.
      reading: How the text is read.
    """

    validation_inputs: np.ndarray
    validation_labels: np.ndarray
    bytes_per_token: float
    vocabulary: str
    reading: Reading


def packed(blocks: Iterable[str]) -> np.ndarray:
    """Blocks of text as bytes, each with a zero behind it.

    >>> packed(["ab", "é"]).tolist()
    [97, 98, 0, 195, 169, 0]
    """
    return np.frombuffer(b"".join(block.encode() + b"\0" for block in blocks), np.uint8)


def unpacked(array: np.ndarray) -> list[bytes]:
    """The blocks of `packed`."""
    return array.tobytes().split(b"\0")[:-1]


def divided(books: Iterable[str]) -> dict[str, np.ndarray]:
    """The first 90% of every book to train on, the next 5% to validate, the last 5% to test.

    Every book is in every split: a book held out would measure how much it differs from the
    others, which is more than two norms do.
    """
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for book in books:
        marks = [0, *(int(len(book) * share) for share in SHARES), len(book)]
        for name, start, stop in zip(SPLITS, marks[:-1], marks[1:], strict=True):
            splits[name].append(book[start:stop])
    return {name: packed(blocks) for name, blocks in splits.items()}


def book(content: bytes) -> str:
    r"""A book of Project Gutenberg: its text alone, in Unicode, with plain ends of lines.

    What stands before "*** START OF …" or "*END THE SMALL PRINT!…", and from "End of Project
    Gutenberg's …" or "*** END OF …" on, is not the book but the project's notes and licence.

    >>> book(b"Notes\r\n*** START OF THIS EBOOK ***\r\nCall me.\r\n*** END OF IT ***")
    'Call me.\n'
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    text = text.replace("\r\n", "\n")
    options = re.IGNORECASE | re.MULTILINE
    end = r"^\W*(End of (the |this )?Project Gutenberg|\*\*\* ?END OF ).*"
    text = re.split(end, text, maxsplit=1, flags=options)[0]
    start = r"^(?:\*\*\* ?START OF .*|\*END.{0,2}THE SMALL PRINT!.*)$"
    return re.split(start, text, flags=options)[-1].strip() + "\n"


def windows(
    arrays: Mapping[str, np.ndarray], reading: Reading
) -> tuple[dict[str, np.ndarray], int, Text]:
    """Cuts a text into windows.

    A window begins with the last token of the one before, so that every token of a block but its
    first is a label once. The tokens at the end of a block that fill no window are left out.

    Args:
      arrays: What is kept of the text.
      reading: How it is read.

    Returns:
      The four arrays of a `Dataset`, the size of the vocabulary, and what else there is.

    Raises:
      ValueError: If no block of a split fills a window.
    """
    vocabulary, blocks = "", {name: unpacked(arrays[name]) for name in SPLITS}
    tokens: dict[str, list[np.ndarray]] = {
        name: [np.frombuffer(b, np.uint8) for b in each] for name, each in blocks.items()
    }
    widths = np.ones(256, np.int64)
    if reading.unit == "characters":
        written = {name: [b.decode() for b in each] for name, each in blocks.items()}
        vocabulary = "".join(sorted({c for each in written.values() for b in each for c in b}))
        known = np.array([ord(c) for c in vocabulary])
        widths = np.array([len(c.encode()) for c in vocabulary])
        kind = np.uint8 if len(known) <= 256 else np.int32
        for name, each in written.items():
            points = [np.frombuffer(b.encode("utf-32-le"), np.uint32) for b in each]
            tokens[name] = [np.searchsorted(known, p).astype(kind) for p in points]
    size = reading.context + 1
    cut = {}
    for name in SPLITS:
        long = [block for block in tokens[name] if len(block) >= size]
        if not long:
            most = max(map(len, tokens[name]), default=0)
            raise ValueError(
                f"a window of {size} tokens is longer than every block of the {name} set; the "
                f"longest has {most}"
            )
        cut[name] = np.concatenate([sliding_window_view(b, size)[:: size - 1] for b in long])
        if name != "train" and 0 < reading.measured < len(cut[name]):
            places = np.arange(reading.measured) * len(cut[name]) // reading.measured
            cut[name] = cut[name][places]
    halves = {}
    for name, each in cut.items():
        halves |= {f"{name}_inputs": each[:, :-1], f"{name}_labels": each[:, 1:]}
    validation = halves.pop("validation_inputs"), halves.pop("validation_labels")
    per_token = float(widths[halves["test_labels"]].mean())
    text = Text(*validation, per_token, vocabulary, reading)
    return halves, len(vocabulary) or 256, text
