"""Workspaces of kernels, against what an H100 allocated (tests/data/h100-2026-11-27/events), and span by span."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mstplan.step.cuda import CUBLASLT_WORKSPACE
from mstplan.step.workspaces import FEW_LOOKUPS, Size, SortedLookups, Span, SumOverTokens, Workspace, span_at

EVENTS = Path(__file__).parents[1] / "data" / "h100-2026-11-27" / "events"
BLOCK = 512

Row = tuple[str, int]


def measured() -> Iterator[tuple[str, dict[str, Any], list[Row]]]:
    """(name, case, [action, bytes]) of steps of mstplan's own."""
    for path in sorted(EVENTS.glob("*.json.gz")):
        document = json.loads(gzip.decompress(path.read_bytes()))
        case = document.get("case", {})
        if "recipe" in case and "config" in case:
            yield path.name, case, rows_of(document["events"])


def rows_of(events: list[Any]) -> list[Row]:
    """Events as they are kept: [bytes, frames] of an allocation, the number of the allocation that is released."""
    sizes: list[int] = []
    rows: list[Row] = []
    for event in events:
        if isinstance(event, list):
            sizes.append(event[0])
            rows.append(("alloc", event[0]))
        else:
            rows.append(("free_requested", sizes[event] if event >= 0 else -event))
    return rows


def tokens_of(case: dict[str, Any]) -> int:
    batch: int = case["recipe"].get("batch", 1)
    return batch * int(case["seq_len"])


def blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def test_sorted_lookups_were_allocated_so() -> None:
    """Every size in order, but for the sorts' own buffers, which come and go between; short steps sort nothing."""
    sorting = 0
    for name, case, rows in measured():
        config = {**case["config"], **case["config"].get("text_config", {})}
        width = config.get("hidden_size") or config["n_embd"]
        kernel, tokens = SortedLookups(config["vocab_size"], width), tokens_of(case)
        allocated = [number * each for number, each in kernel.tensors(tokens)]
        sums = [n for n, row in enumerate(rows) if allocated and row == ("alloc", allocated[-1])]
        if tokens <= FEW_LOOKUPS:
            assert not allocated
            continue
        if case["recipe"].get("train"):  # the embedding is none of it
            assert not sums
            continue
        sorting += 1
        before = [size for action, size in rows[sums[-1] - 22 : sums[-1] + 1] if action == "alloc"]
        for size in allocated:
            assert size in before, (name, size)
            before.remove(size)
    assert sorting >= 8


def test_sums_over_tokens_were_allocated_so() -> None:
    """Where a buffer, and semaphores after it, are given back at once, what came just before is the sum."""
    seen = set()
    for name, case, rows in measured():
        tokens = tokens_of(case)
        for out, parts, semaphores, *gone in zip(rows, rows[1:], rows[2:], rows[3:], rows[4:], strict=False):
            was_sum = [row[0] for row in (out, parts, semaphores)] == ["alloc"] * 3 and gone == [
                ("free_requested", semaphores[1]),
                ("free_requested", parts[1]),
            ]
            if not was_sum or parts[1] < 2**20 or out[1] > 2**17:  # of vectors: attention has buffers as well
                continue
            sums = [SumOverTokens(out[1] // each, rows) for each in (2, 4) for rows in (1, *range(2, 130, 2))]
            fitting = [s for s in sums if (s.bytes(tokens), s.semaphores) == (parts[1], semaphores[1])]
            if fitting and fitting[0].rows == 1:
                seen.add((name, out[1]))
            elif not fitting:
                assert "family" in name, (name, out, parts, semaphores)  # state space models sum other shapes
    assert len(seen) >= 15


@pytest.mark.parametrize(
    ("kernel", "tokens", "size"),
    [
        (SumOverTokens(4096), 8192, 138412032),
        (SumOverTokens(4096), 1024, 33554432),
        (SumOverTokens(4096), 1020, 0),
        (SumOverTokens(2304), 8192, 139198464),
        (SumOverTokens(128, 32), 8192, 138412032),
        (SumOverTokens(4096), 1 << 20, 2147483648),
    ],
)
def test_bytes_of_a_sum(kernel: SumOverTokens, tokens: int, size: int) -> None:
    assert kernel.bytes(tokens) == size


@pytest.mark.parametrize(("tokens", "width", "size"), [(8192, 4096, 148037120), (65536, 2048, 593752576)])
def test_bytes_of_sorted_lookups(tokens: int, width: int, size: int) -> None:
    """As measured, in blocks of 512 bytes."""
    assert sum(blocks(number * each) for number, each in SortedLookups(128256, width).tensors(tokens)) == size


def in_span(sizes: tuple[Size, ...], tokens: int) -> int:
    return sum(size.bytes * {"": 1, "t": tokens, "p": tokens // 10}[size.unit] for size in sizes)


@pytest.mark.parametrize("tokens", [1, 1020, 1021, 3072, 3073, 4160, 4224, 8192, 32000, 32001, 67584, 67585, 2**20 + 7])
@pytest.mark.parametrize(
    "kernel",
    [
        SortedLookups(32000, 4096),
        SortedLookups(1000, 64),
        SumOverTokens(4096),
        SumOverTokens(896),
        SumOverTokens(128, 8),
    ],
)
def test_a_span_gives_what_the_length_does(kernel: Workspace, tokens: int) -> None:
    counted = in_span(kernel.sizes(span_at(kernel.starts(), tokens)), tokens)
    if isinstance(kernel, SortedLookups):
        assert counted == sum(number * each for number, each in kernel.tensors(tokens))
    elif isinstance(kernel, SumOverTokens):
        assert 0 <= kernel.bytes(tokens) - counted <= 512 * kernel.columns  # one part more, where rows do not fill it


@pytest.mark.parametrize("kernel", [SortedLookups(32000, 4096), SumOverTokens(4096), SumOverTokens(128, 8)])
def test_it_grows_with_the_tokens(kernel: Workspace) -> None:
    """From span to span, too: the search for the longest sequence relies on it."""
    lengths = sorted({*range(1, 200000, 997), *kernel.starts(), *(n - 1 for n in kernel.starts())})
    sizes = [in_span(kernel.sizes(span_at(kernel.starts(), n)), n) for n in lengths]
    assert sizes == sorted(sizes)


def test_spans_cover_all_lengths() -> None:
    assert span_at((5, 3), 0) == Span(0, 2) and span_at((5, 3), 3) == Span(3, 4) and span_at((5, 3), 5).first == 5
    assert span_at((), 7).first == 0


def test_cublaslt_holds_a_mebibyte() -> None:
    """environment.json: what the first product with a bias added to its result's 32,768 bytes."""
    seen = json.loads((EVENTS.parent / "environment.json").read_text(encoding="utf-8"))["cublas"]
    assert seen["lin_fwd"] - seen["x"] == CUBLASLT_WORKSPACE
