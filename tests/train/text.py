"""Batches of bytes of text.txt, a text written for this test (about a keeper of a lighthouse); it is part of this project."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

TEXT = Path(__file__).with_name("text.txt")


def byte_batches(steps: int, sequences: int, length: int) -> Iterator[torch.Tensor]:
    """The text over and over: ids (sequences, length) that are its bytes, one piece after the other."""
    data = torch.tensor(list(TEXT.read_bytes()))
    for n in range(steps):
        starts = [(n * sequences + i) * length % (len(data) - length) for i in range(sequences)]
        yield torch.stack([data[start : start + length] for start in starts])
