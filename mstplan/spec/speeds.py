"""How fast GPUs really are, where that was measured: matrix products, attention, memory and the link to CPU RAM.

`profiles/speeds/` has a file for each GPU model, with the measured points and where they come from. A GPU whose file says
that it is `like` another one has the same shares of its own nominal rates. The files are the package's own data, which a
test checks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from math import log2
from typing import Any, NamedTuple

from ..profiles import ROOT
from .hardware import Gpu, find_gpu

_FORWARD_SHARE = 2 / 7
"""Of the products of attention: two in forward, five in backward (FlashAttention-2, arXiv 2307.08691, section 3.1)."""


class Curve(NamedTuple):
    """Rate by amount of work, as measured. Points (log2 of the work, work per second), by work; on a line between two of them,
    beyond the first and the last as there."""

    points: tuple[tuple[float, float], ...]

    @classmethod
    def from_measurements(cls, measured: Iterable[tuple[float, float]], scale: float = 1.0) -> Curve:
        """From pairs (work, seconds), of which those within an octave are taken together; scale: of all rates."""
        octaves: dict[int, list[tuple[float, float]]] = {}
        for work, seconds in measured:
            octaves.setdefault(round(log2(work)), []).append((work, seconds))
        points = []
        for _, rows in sorted(octaves.items()):
            work, seconds = (sum(column) for column in zip(*rows, strict=True))
            points.append((log2(work / len(rows)), scale * work / seconds))
        return cls(tuple(points))

    def seconds(self, work: float) -> float:
        """Seconds for an amount of work; none for none."""
        return work / self._rate(log2(work)) if work else 0.0

    def _rate(self, size: float) -> float:
        (first, rate), *others = self.points
        for second, next_rate in others:
            if size < second:
                return rate + (next_rate - rate) * max(0.0, (size - first) / (second - first))
            first, rate = second, next_rate
        return rate


class AttentionCurves(NamedTuple):
    """Operations of an attention kernel per second, for one head size."""

    forward: Curve
    backward: Curve


class Checked(NamedTuple):
    """Steps of a model, or of its first layers, that were measured on a GPU and none of whose times is further from the expected one."""

    model: str
    steps: int
    within: float


class Speeds(NamedTuple):
    """Measured rates of a GPU model. In operations, bytes and seconds."""

    products: Curve  # matrix products in bf16, by operations of one
    attention: Mapping[str, Mapping[int, AttentionCurves]]  # causal, by kernel and head size
    memory: float  # bytes/s of what is bound by memory
    host: float  # bytes/s between pinned CPU RAM and GPU, in one direction
    launch: float  # seconds from one operation to the next where none has work to do
    gpu: str  # that was measured
    torch: str  # its release
    checked: Checked

    def attention_of(self, kernel: str, head_size: int) -> tuple[int, AttentionCurves] | None:
        """(head size, curves) of the smallest measured size that holds a head: kernels pad smaller ones. None: of no such size."""
        sizes = self.attention.get(kernel, {})
        measured_size = min((size for size in sizes if size >= head_size), default=None)
        return (measured_size, sizes[measured_size]) if measured_size is not None else None


@lru_cache(maxsize=8)
def speeds_of(gpu: Gpu) -> Speeds | None:
    """Measured rates of a GPU; None: nobody has measured it."""
    path = ROOT / "speeds" / f"{gpu.name}.json"
    if not path.is_file():
        return None
    own = json.loads(path.read_text(encoding="utf-8"))
    document = own if "like" not in own else json.loads((ROOT / "speeds" / f"{own['like']}.json").read_text("utf-8"))
    return _speeds(document, gpu, Checked(**own["checked"]))


def _speeds(document: Mapping[str, Any], gpu: Gpu, checked: Checked) -> Speeds:
    """Rates of the GPU that was measured, or of one like it."""
    measured_gpu = find_gpu(document["gpu"])
    arithmetic = gpu.bf16_flops / measured_gpu.bf16_flops
    products = document["products"]["points"]
    attention: dict[str, dict[int, AttentionCurves]] = {}
    for section in document["attention"]:
        scale = gpu.bf16_flops / find_gpu(section["gpu"]).bf16_flops
        attention[section["kernel"]] = _attention(section["points"], scale)
    bandwidth = gpu.memory_bandwidth / measured_gpu.memory_bandwidth
    return Speeds(
        Curve.from_measurements(_products(products), arithmetic),
        attention,
        bandwidth * _rate(document["memory"]["points"]),
        gpu.host_link / measured_gpu.host_link * _rate(document["host"]["points"]),
        min(min(seconds) for _, _, _, *seconds in products),
        measured_gpu.name,
        document["versions"]["torch"].partition("+")[0],
        checked,
    )


def _products(points: Iterable[Sequence[float]]) -> Iterable[tuple[float, float]]:
    """(operations, seconds) of products (rows x inner) (inner x outer), and of those of their backward."""
    return ((2 * rows * inner * outer, one) for rows, inner, outer, *seconds in points for one in seconds)


def _attention(points: Iterable[Sequence[Any]], scale: float) -> dict[int, AttentionCurves]:
    """Curves by head size. Where only both passes together were measured, each has its share of the operations."""
    passes: dict[int, tuple[list[tuple[float, float]], list[tuple[float, float]]]] = {}
    for batch, heads, _, tokens, head_size, forward, both in points:
        work = batch * heads * tokens * tokens * head_size * 2  # two products, half of the scores
        ahead = forward if forward is not None else both * _FORWARD_SHARE
        forwards, backwards = passes.setdefault(head_size, ([], []))
        forwards.append((work, ahead))
        backwards.append((work * (1 / _FORWARD_SHARE - 1), both - ahead))
    return {
        size: AttentionCurves(*(Curve.from_measurements(rows, scale) for rows in pair)) for size, pair in passes.items()
    }


def _rate(points: Iterable[tuple[str, int, float]]) -> float:
    """Bytes per second of all points together."""
    rows = list(points)
    return sum(size for _, size, _ in rows) / sum(seconds for _, _, seconds in rows)
