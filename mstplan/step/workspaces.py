"""What CUDA's kernels take for themselves while they make the gradient of a weight, by number of tokens.

Over all lengths such a workspace is no sum of shares of batch and length: it begins somewhere, grows, stands still, grows again. Between
two numbers of tokens, in a `Span`, it is one. A step is laid out for spans (`tape.Rules`), and the solver goes from one to the next.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ..units import LONGEST

FEW_LOOKUPS = 3072
"""from source: up to so many indices embedding_dense_backward_cuda sorts nothing (aten native/cuda/Embedding.cu). measured."""
IDS_PER_PARTIAL_SUM = 10
"""from source: NROWS_PER_THREAD (aten native/cuda/EmbeddingBackwardKernel.cu)."""
MULTIPROCESSORS, THREADS = 132, 2048
"""Of an H100 and an H200, and threads of each. Sums take less on GPUs with fewer: 113 MB in place of 138 on an A100, which has 108."""
BLOCK_THREADS, WARP = 512, 32
LEAST_VALUES, MOST_VALUES = 16, 256
"""from source: numbers that a thread adds up (aten native/cuda/Reduce.cuh: MAX_NUM_THREADS, min_ and max_values_per_thread)."""


class Span(NamedTuple):
    """Numbers of tokens, both included, between which every workspace grows in one way."""

    first: int
    last: int


class Spans(NamedTuple):
    """Spans of the tokens of a batch, of those in a piece of the MLP and of the loss, and of those that a card norms; and the number of sequences, which is
    one: by what `tape.BASIS` calls them."""

    bs: Span
    bc: Span
    bk: Span
    bq: Span
    b: Span


class Size(NamedTuple):
    """Bytes of a tensor: of all of it ("" as `unit`), for each token ("t"), for each ten of them ("p"), or for each of what else `tape.BASIS` has.

    shape: as of `tape.Tensor`, with "t" for the tokens.
    """

    name: str
    shape: str
    dtype: str
    bytes: int
    unit: str = ""


class Workspace:
    """What a kernel takes beside the gradient that it makes."""

    def starts(self) -> tuple[int, ...]:
        """Numbers of tokens from which it grows in another way."""
        raise NotImplementedError

    def sizes(self, span: Span) -> tuple[Size, ...]:
        """Tensors that are alive at its largest, in a span in which it grows in one way."""
        raise NotImplementedError


@dataclass(frozen=True)
class SortedLookups(Workspace):
    """Of an embedding's gradient: token ids are sorted, and the rows of equal ids added up by tens, in fp32.

    from source: aten native/cuda/Embedding.cu, embedding_dense_backward_cuda, and EmbeddingBackwardKernel.cu,
    embedding_backward_cuda_kernel. measured: 148,037,120 bytes of 8,192 tokens x 4,096. rows, width: of the table.
    """

    rows: int
    width: int

    def starts(self) -> tuple[int, ...]:
        return FEW_LOOKUPS + 1, max(FEW_LOOKUPS, self.rows) + 1

    def sizes(self, span: Span) -> tuple[Size, ...]:
        """Different ids are as many as tokens at most, or as rows."""
        if span.first <= FEW_LOOKUPS:
            return ()
        ids, count, unit = ("t", 1, "t") if span.first <= self.rows else (str(self.rows), self.rows, "")
        sums = "partial sums of rows"
        return (
            *(Size(f"token ids, {what}", "t", "int64", 8, "t") for what in ("sorted", "as they were", "at changes")),
            *(Size(f"partial sums {what} id", ids, "int64", 8 * count, unit) for what in ("of an", "before an")),
            Size("numbers of ids and partial sums", "2", "int64", 16),
            Size("first ids of partial sums", ids, "int64", 8 * count, unit),
            Size("first ids of partial sums, ten to one", "p", "int64", 8, "p"),
            Size(sums, f"{ids} {self.width}", "float32", 4 * self.width * count, unit),
            Size(f"{sums}, ten to one", f"p {self.width}", "float32", 4 * self.width, "p"),
        )

    def tensors(self, tokens: int) -> tuple[tuple[int, int], ...]:
        """The same as they are made at a length: (numbers, bytes of each)."""
        if tokens <= FEW_LOOKUPS:
            return ()
        ids = min(tokens, self.rows)
        parts = tokens // IDS_PER_PARTIAL_SUM + ids
        return (
            (tokens, 8),
            (tokens, 8),
            (tokens, 8),
            (ids, 8),
            (ids, 8),
            (1, 8),
            (1, 8),
            (parts, 8),
            (parts * self.width, 4),
        )


@dataclass(frozen=True)
class SumOverTokens(Workspace):
    """Of a sum over rows, where blocks of threads add up parts of the rows, and through memory what they came to.

    from source: aten native/cuda/Reduce.cuh, setReduceConfig and global_memory_size, for numbers of 4 bytes or fewer. measured:
    138,412,032 bytes of 8,192 tokens x 4,096. columns: numbers in a row; rows: added up for each token.
    """

    columns: int
    rows: int = 1

    @cached_property
    def _numbers_at_once(self) -> int:
        """Numbers that a thread reads at once."""
        return next(n for n in (4, 2, 1) if self.columns % n == 0)

    @cached_property
    def _block(self) -> tuple[int, int]:
        """Threads of a block side by side, and above each other. Of sums of fewer rows than it has, there are no parts."""
        threads = BLOCK_THREADS // self._numbers_at_once
        across = min(_power_of_two(self.columns // self._numbers_at_once), threads)
        height = threads // min(across, WARP)
        return min(across, threads // height), height

    @cached_property
    def _blocks(self) -> int:
        return -(-(self.columns // self._numbers_at_once) // self._block[0])

    @cached_property
    def _most_parts(self) -> int:
        """Parts with which the GPU's threads are all at work; 0 where they are without any."""
        width, height = self._block
        at_work = MULTIPROCESSORS * (THREADS // (width * height))
        return -(-at_work // self._blocks) if self._blocks <= at_work else 0

    @cached_property
    def _bytes_of_part(self) -> int:
        return 4 * self.columns * self._block[0] * self._numbers_at_once

    def parts(self, tokens: int) -> int:
        """Parts that so many tokens are added up in; 0 where that is done in one go."""
        values = -(-tokens * self.rows // self._block[1])
        if values < MOST_VALUES or not self._most_parts:
            return 0
        return max(min(self._most_parts, -(-values // LEAST_VALUES)), -(-values // MOST_VALUES))

    def bytes(self, tokens: int) -> int:
        return self.parts(tokens) * self._bytes_of_part

    @property
    def semaphores(self) -> int:
        """Bytes of one for each block, beside that."""
        return 4 * self._blocks

    def starts(self) -> tuple[int, ...]:
        height, most = self._block[1], self._most_parts
        values = (MOST_VALUES, max(MOST_VALUES, (most - 1) * LEAST_VALUES + 1), most * MOST_VALUES + 1)
        return tuple(-(-((n - 1) * height + 1) // self.rows) for n in values) if most else ()

    def sizes(self, span: Span) -> tuple[Size, ...]:
        """Parts of whole numbers of rows: lengths between have one more at most than is counted."""
        parts, height, name = self.parts(span.first), self._block[1], "parts of a sum over tokens"
        if not parts:
            return ()
        if span.first == span.last or (parts == self._most_parts and self.parts(span.last) == parts):
            return (Size(name, f"{parts} {self.columns}", "float32", parts * self._bytes_of_part),)
        rows = height * (MOST_VALUES if parts > self._most_parts else LEAST_VALUES)
        return (Size(name, f"t {self.columns}", "float32", -(-self._bytes_of_part * self.rows // rows), "t"),)


def _power_of_two(n: int) -> int:
    """The largest up to n."""
    return 1 << (n.bit_length() - 1)


def span_at(starts: Iterable[int], tokens: int) -> Span:
    """The span that a number of tokens lies in."""
    ordered = sorted(starts)
    return Span(
        max((n for n in ordered if n <= tokens), default=0),
        min((n for n in ordered if n > tokens), default=LONGEST * LONGEST) - 1,
    )
