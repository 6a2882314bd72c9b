"""How weights lie in a GPU's memory: in a dtype of numbers, or quantised by bitsandbytes, with scales beside them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .tape import ITEMSIZE, Weight

BLOCK = 64
"""Values of a 4-bit weight that share a scale. from source: bitsandbytes nn/modules.py, Params4bit, blocksize."""
NESTED_BLOCK = 256
"""Scales that share a scale where they are quantised, too. from source: bitsandbytes functional.py, quantize_4bit, compress_statistics."""
CODE_OF_4_BITS, CODE_OF_SCALES = 16, 256
"""Numbers that 4 bits, and 8 bits of a scale, stand for: a table of fp32 with each weight."""


PACKED = "4-bit weights"


class Stored(NamedTuple):
    """A tensor that a weight is kept in. Bytes."""

    name: str  # for people
    dtype: str
    bytes: int


def storages_of(weight: Weight, dtype: str) -> tuple[Stored, ...]:
    """The tensors that a weight is kept in. dtype: of one that has none of its own."""
    if weight.quantised in ("nf4", "fp4"):
        return _four_bits(weight)
    if weight.quantised == "int8":  # from source: bitsandbytes nn/modules.py, Int8Params: CB, and SCB of each row
        rows = weight.shape[0]
        return Stored("8-bit weights", "int8", weight.numel), Stored("scales of 8-bit weights", "float32", 4 * rows)
    own = weight.dtype or dtype
    return (Stored("adapters" if weight.is_adapter else "weights", own, weight.numel * ITEMSIZE[own]),)


def _four_bits(weight: Weight) -> tuple[Stored, ...]:
    """Two values to a byte; the scales of blocks in fp32, or in 8 bits with scales and an offset of their own."""
    blocks = -(-weight.numel // BLOCK)
    packed = Stored(PACKED, weight.packed_in, packed_rows(weight) * ITEMSIZE[weight.packed_in])
    code = Stored("tables of 4-bit weights", "float32", 4 * CODE_OF_4_BITS)
    if not weight.double_quantised:
        return packed, Stored("scales of 4-bit weights", "float32", 4 * blocks), code
    nested = 4 * -(-blocks // NESTED_BLOCK) + 4 * CODE_OF_SCALES + 4  # scales, their table, the offset
    return (
        packed,
        Stored("8-bit scales of 4-bit weights", "uint8", blocks),
        Stored("scales of scales", "float32", nested),
        code,
    )


def packed_rows(weight: Weight) -> int:
    """Numbers, in a column, that the values of a 4-bit weight pass for on a card: all of them, or its shard, padded (bitsandbytes
    backends/default/ops.py, quantize_4bit)."""
    rows = -(-weight.numel // (2 * ITEMSIZE[weight.packed_in]))
    return -(-rows // weight.packed_over)


def scales_of(weights: Iterable[tuple[Weight, int]], dtype: str) -> tuple[Stored, ...]:
    """What quantised weights have beside their packed values, which no sharding knows of: attributes of modules, not parameters."""
    sums = in_sum([each for each in weights if each[0].quantised], dtype)
    return tuple(stored for stored in sums if stored.name != PACKED)


def bytes_of(weights: Iterable[tuple[Weight, int]], dtype: str) -> int:
    """Bytes of weights, given as (weight, how many)."""
    return sum(stored.bytes * count for weight, count in weights for stored in storages_of(weight, dtype))


def in_sum(weights: Iterable[tuple[Weight, int]], dtype: str) -> tuple[Stored, ...]:
    """What weights are kept in, alike tensors together."""
    sums: dict[tuple[str, str], int] = {}
    for weight, count in weights:
        for stored in storages_of(weight, dtype):
            key = stored.name, stored.dtype
            sums[key] = sums.get(key, 0) + stored.bytes * count
    return tuple(Stored(*key, size) for key, size in sums.items())
