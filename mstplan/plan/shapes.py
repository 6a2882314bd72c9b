"""The tensors of one layer and the LM head: symbolic shape and bytes at a batch and a length, as the method's
introduction lists them (arXiv 2407.15892, section 1)."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import RecipeError, UnitError
from ..spec.model import Model
from ..step.tape import ITEMSIZE


class Shape(NamedTuple):
    name: str
    symbols: str  # "(b, s, d)"
    sizes: tuple[int, ...]
    dtype: str
    bytes: int
    quoted: str = ""  # the figure in the method's introduction, where this is its case


QUOTED_FIGURES = {
    "X": "about 1 GB",
    "Q": "about 1 GB",
    "K": "about 1 GB",
    "V": "about 1 GB",
    "MLP gate and up": "7.5 GB",
    "logits": "33 GB",
    "attention matrix, 16 heads": "550 GB",
}
"""For Llama 3.1 8B at b = 1, S = 131,072, in decimal GB; K and V there without grouped queries."""


def shapes(model: Model, batch: int, seq_len: int, dtype: str = "bfloat16") -> tuple[Shape, ...]:
    """The tensor table at `batch` sequences of `seq_len` tokens. Bytes are exact. Raises RecipeError, UnitError."""
    if dtype not in ITEMSIZE:
        raise RecipeError(f"unknown dtype {dtype!r}.\nKnown: {', '.join(ITEMSIZE)}.")
    if not all(isinstance(n, int) and n >= 1 for n in (batch, seq_len)):
        raise UnitError(f"batch and seq_len must be whole numbers from 1, not {batch!r} and {seq_len!r}.")
    attention, size = model.attention, ITEMSIZE[dtype]
    introduction = (model.hidden, model.vocab, batch, seq_len, dtype) == (4096, 128256, 1, 131072, "bfloat16")

    def make_shape(name: str, symbols: str, *sizes: int) -> Shape:
        count = 1
        for n in sizes:
            count *= n
        return Shape(name, symbols, sizes, dtype, count * size, QUOTED_FIGURES.get(name, "") if introduction else "")

    b, s = batch, seq_len
    rows = [make_shape("X", "(b, s, d)", b, s, model.hidden)]
    attends = [
        make_shape("Q", "(b, s, H, e)", b, s, attention.heads, attention.head_dim),
        make_shape("K", "(b, s, G, e)", b, s, attention.kv_heads, attention.head_dim),
        make_shape("V", "(b, s, G, e)", b, s, attention.kv_heads, attention.v_head_dim),
    ]
    rows += attends if model.attends else []
    if attention.kv_heads != attention.heads:
        rows.append(make_shape("K, without grouped queries", "(b, s, H, e)", b, s, attention.heads, attention.head_dim))
        rows.append(
            make_shape("V, without grouped queries", "(b, s, H, e)", b, s, attention.heads, attention.v_head_dim)
        )
    if model.mlp is not None:
        both = 2 if model.mlp.gated else 1
        rows.append(
            make_shape("MLP gate and up" if both == 2 else "MLP up", f"({both}, b, s, I)", both, b, s, model.mlp.width)
        )
    if model.experts is not None:
        experts = model.experts
        rows.append(make_shape("expert gate and up", "(2, b, s, A, F)", 2, b, s, experts.per_token, experts.width))
    rows.append(make_shape("logits", "(b, s, V)", b, s, model.vocab))
    if not model.attends:
        return tuple(rows)
    rows.append(make_shape(f"attention matrix, {attention.heads} heads", "(b, H, s, s)", b, attention.heads, s, s))
    if attention.heads != 16:
        rows.append(make_shape("attention matrix, 16 heads", "(b, 16, s, s)", b, 16, s, s))
    return tuple(rows)
