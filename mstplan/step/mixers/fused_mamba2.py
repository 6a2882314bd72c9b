"""Mamba-2 as mamba-ssm runs it in training: from the product before it to the one after it in one function, which keeps what the first product
gave and what was scanned, and makes the rest again.

from source: mamba-ssm 2.3.2.post1, ops/triton/ssd_combined.py, MambaSplitConv1dScanCombinedFn, _mamba_chunk_scan_combined_fwd and
_mamba_chunk_scan_combined_bwd, and what these call in ops/triton; the convolution is causal-conv1d's, the product F.linear.
Axes: those of `mamba2.py`, W channels of x, B and C.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from ...spec.model import Mamba2
from ..selection import WeightKind
from ..tape import Buffer, ForGradients, Tensor, Weight
from ..workspaces import MULTIPROCESSORS, Size, Span, Workspace

if TYPE_CHECKING:
    from ..layers import Writer

_WIDE = "float32"
STATE_BLOCK, CHUNK_BLOCK = 64, 32
"""The fewest numbers of a state (ssd_state_passing.py, BLOCK_SIZE_min) and tokens of a chunk (ssd_chunk_scan.py, BLOCK_SIZE_M_min) for which a
sum of their own is made; how many a card really takes does not change what is made."""


@dataclass(frozen=True)
class Parts(Workspace):
    """What the gradients of B, C and their products take beside the largest moment of a backward that makes each of them in one part: in how
    many parts they come, the fewer the more chunks there are, depends on a card's multiprocessors.

    from source: ssd_chunk_state.py, _chunk_state_bwd_db; ssd_chunk_scan.py, _chunk_scan_bwd_dC and _chunk_scan_bwd_dcb (nsplits).
    heads: that share B and C; groups: of such heads; chunk: tokens; axis: that counts chunks; moments: for each gradient bytes of a chunk at its moment, and of
    one part; most: of the largest moment.
    """

    heads: int
    groups: int
    chunk: int
    axis: str
    moments: tuple[tuple[int, int], ...]
    most: int

    def parts(self, chunks: int) -> int:
        together = min(-(-chunks * self.heads * self.groups // MULTIPROCESSORS), self.heads)
        return -(-self.heads // max(together, 1))

    def bytes_of_chunk(self, parts: int) -> int:
        """Beyond the largest moment."""
        return max(0, *(taken + (parts - 1) * part - self.most for taken, part in self.moments))

    @cached_property
    def _chunks(self) -> tuple[int, ...]:
        """Numbers of chunks, the first and those from which there are fewer parts."""
        found = [1]
        for together in range(2, self.heads + 1):
            chunks = (together - 1) * MULTIPROCESSORS // (self.heads * self.groups) + 1
            if self.parts(chunks) < self.parts(found[-1]):
                found.append(chunks)
        return tuple(found)

    def starts(self) -> tuple[int, ...]:
        return tuple((chunks - 1) * self.chunk + 1 for chunks in self._chunks[1:])

    def sizes(self, span: Span) -> tuple[Size, ...]:
        size = self.bytes_of_chunk(self.parts(-(-max(span.first, 1) // self.chunk)))
        name = "parts of the gradients of B, C and C B'"
        return (Size(name, f"b {self.axis}", _WIDE, size, f"b{self.axis}"),) if size else ()


class FusedMamba2:
    """Writer of one layer's scan. module: the layer's part that the weights are of; chunks: the axis that counts them."""

    def __init__(self, w: Writer, sizes: Mamba2, module: str, chunks: str):
        self.w, self.tape, self.sizes, self.module, self.chunks = w, w.tape, sizes, module, chunks
        self.dtype, self.normed = w.numerics.weights, sizes.norm != "none"
        w.tape.dims["W"] = sizes.heads * sizes.head_dim + 2 * sizes.groups * sizes.state

    def new(self, name: str, shape: str, dtype: str = "") -> Tensor:
        return self.tape.new(name, f"{self.w.t} {shape}", dtype or self.dtype)

    def of_chunks(self, name: str, shape: str, dtype: str = _WIDE) -> Tensor:
        return self.tape.new(name, f"b {self.chunks} {shape}", dtype)

    def of_tokens(self, name: str) -> Tensor:
        """A number of each token and head, by chunks."""
        return self.of_chunks(name, f"{self.sizes.chunk} M")

    def states(self, name: str, dtype: str) -> Tensor:
        return self.of_chunks(name, "M P N", dtype)

    def products(self, name: str) -> Tensor:
        return self.of_chunks(name, f"g {self.sizes.chunk} {self.sizes.chunk}")

    # ---- forward ------------------------------------------------------------------------------------------------------

    def lay_out(self, projected: Tensor, decay: Tensor) -> Tensor:
        """Of projected (t, 2 M P + 2 g N + M) and decay (M) the layer's results (t, d)."""
        w, tape, s = self.w, self.tape, self.sizes
        given, passed = (tape.view(projected, projected.name, projected.shape) for _ in range(2))
        active, scanned = self.new("x, B and C, convolved", "W"), self.new("scanned values", "M P")
        total, dt = map(self.of_tokens, ("sums of decays", "dt"))
        states, last = self.states("states", self.dtype), self._last_state()
        gated = self.new("scanned values, gated", "M P")
        norm = (self.new("1/rms of groups", "g", _WIDE),) if self.normed else ()
        kept = (projected, scanned, *norm)
        again = self._made_again()
        self._begin(projected, (given, passed), kept, again)
        convolution = ((active.basis, 2 * w.width(active) * s.kernel),)
        tape.op("convolution", [given], active, total, dt, flops=convolution)
        inside = (active, total, dt, states, last)
        tape.op("states", inside[:3], states, last, temps=(self.states("states of chunks", _WIDE),))
        products = self.products("C B'")
        of_chunk = 2 * s.chunk * (s.groups * s.chunk * s.state + s.heads * s.head_dim * (s.chunk + 2 * s.state))
        flops = ((products.basis, of_chunk),)
        tape.op("scan", [given, *inside], scanned, *(() if self.normed else (gated,)), temps=(products,), flops=flops)
        y = w.new("attention output", "d")
        made = (y, gated, *norm) if self.normed else (y,)
        product = ((y.basis, 2 * s.heads * s.head_dim * w.model.hidden),)
        tape.op("out_proj", [scanned, *inside, *(() if self.normed else (gated,))], *made, flops=product)
        largest, parts = self._at_its_largest()
        out = tape.view(y, y.name, y.shape)
        return tape.op(
            "scan and out_proj",
            [given, passed, decay, y],
            out,
            keeps=kept,
            grads=((given, tape.grad(projected)), (passed, None), (decay, tape.grad(decay))),
            for_gradients=ForGradients(all=True),
            back_temps=(*again, *largest),
            buffers=(Buffer(parts, "bs", backward=True, forward=False),),
        )

    def _begin(
        self, projected: Tensor, views: tuple[Tensor, ...], kept: tuple[Tensor, ...], again: tuple[Tensor, ...]
    ) -> None:
        """The operation whose backward is the end of all: gradients of weights come when the scan's is over. The incoming gradient stays until
        then, with what is kept and what was made again; autograd has that of `out_proj` made, trained or not."""
        weights = self._weights()
        whole = next(weight for weight in weights if len(weight.shape) == 2)
        shape = " ".join(map(str, whole.shape))
        unwanted = () if whole.trained else (self.tape.new("gradient of out_proj", shape, self.dtype),)
        self.tape.op(
            "what mamba-ssm is given",
            [projected],
            *views,
            keeps=kept,
            grads=((projected, None),),
            weights=weights,
            back_temps=(*again, *unwanted),
        )

    def _weights(self) -> tuple[Weight, ...]:
        """But for A_log, whose exponential is given."""
        w, s, kinds = self.w, self.sizes, (WeightKind.ATTENTION,)
        inner, channels = s.heads * s.head_dim, self.tape.dims["W"]
        named: list[tuple[bool, str, tuple[int, ...]]] = [
            (True, "conv1d.weight", (channels, 1, s.kernel)),
            (s.conv_bias, "conv1d.bias", (channels,)),
            (True, "dt_bias", (s.heads,)),
            (True, "D", (s.heads,)),
            (self.normed, "norm.weight", (inner,)),
            (True, "out_proj.weight", (w.model.hidden, inner)),
            (s.out_bias, "out_proj.bias", (w.model.hidden,)),
        ]
        return tuple(
            w.weight(f"{self.module}.{name}", *shape, kinds=kinds, name="") for there, name, shape in named if there
        )

    def _last_state(self) -> Tensor:
        return self.tape.new("last state", "b M P N", _WIDE)

    # ---- backward -----------------------------------------------------------------------------------------------------

    def _made_again(self) -> tuple[Tensor, ...]:
        """What its backward makes before the scan's and holds until the end."""
        return (
            self.new("scanned values, gated, again", "M P"),
            self.new("x, B and C, convolved, again", "W"),
            self.new("gradient of x, B and C", "W"),
            self.new("gradient of scanned values, gated", "M P"),
            self.new("gradient of scanned values", "M P"),
        )

    def _at_its_largest(self) -> tuple[tuple[Tensor, ...], Parts]:
        """What the scan's backward holds at its largest moment beside that, each gradient in one part; and what more parts add to it."""
        s = self.sizes
        throughout = (
            *(() if self.normed else (self.new("scanned values, gated, of the scan", "M P"),)),
            self.new("dt, a copy", "M"),
            *map(self.of_tokens, ("sums of decays, again", "dt, again")),
            self._last_state(),
            self.products("C B', again"),
        )
        blocks = s.head_dim * s.state // STATE_BLOCK
        passing = (
            *(self.states(name, _WIDE) for name in ("states, again", "gradient of states")),
            *(self.states(name, self.dtype) for name in ("states, cast", "gradient of states, cast")),
            self.of_chunks("gradients of chunks' decays, by blocks", f"M {blocks}"),
            self.of_chunks("gradients of chunks' decays", "M"),
        )
        then = (*passing[2:4], passing[5], self.of_tokens("gradient of dt, by chunks"))
        of_b, of_c = (self.new(f"gradient of {name} in fp32", "g N", _WIDE) for name in ("B", "C"))
        of_products = self.products("gradient of C B'")
        decays = tuple(self.of_tokens(f"gradients of decays, {place}") for place in ("next", "before", "summed"))
        by_blocks = self.of_chunks("gradients of decays, by blocks", f"{s.chunk // CHUNK_BLOCK} {s.chunk} M")
        split = (
            (*then, decays[0], of_b, of_b),
            (*then, *decays[:2], of_b, of_c, of_c),
            (*then, *decays[:2], of_b, of_c, of_products, of_products),
        )
        last = (*then, *decays, of_b, of_c, of_products, by_blocks, self.of_tokens("gradient of decays"))
        largest = max((passing, *split, last), key=self._bytes)
        moments = zip(map(self._bytes, split), (self._bytes(each[-1:]) for each in split), strict=True)
        parts = Parts(s.heads // s.groups, s.groups, s.chunk, self.chunks, tuple(moments), self._bytes(largest))
        return (*throughout, *largest), parts

    def _bytes(self, tensors: Iterable[Tensor]) -> int:
        """Of a chunk."""
        return sum(each.bytes * (1 if self.chunks in each.shape.split() else self.sizes.chunk) for each in tensors)
