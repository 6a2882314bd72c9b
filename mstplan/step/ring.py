"""Context parallelism as torch's ring attention has it (accelerate's cp_size, transformers' Trainer): what a rank holds while keys and values
come round.

Every rank has a piece of the sequence's head and the one that mirrors it of its tail. The formula follows _templated_ring_attention and
_templated_ring_attention_backward (torch/distributed/tensor/experimental/_context_parallel/_attention.py, torch 2.13), for which s / N tokens
of queries, keys and values stay where they are:

- keys and values are copied into order, joined, and sent; with allgather, torch's own choice, those of all ranks are received at once, with
  alltoall those of one more rank at a time, the next while this one's are attended to;
- its own block is attended to whole; of a rank before it the first half of the keys, by all queries; of one behind it all keys, by the second
  half of the queries;
- what is made of a block is widened to fp32 and merged with what there is, by log-sum-exps; merging halves joins both into a new tensor, heads
  first, which is copied for the output projection;
- in backward gradients are summed in fp32, and those of keys and values go round joined, in fp32, after each block.

What is sent is held until what comes in its place is waited for: NCCL's work holds it. A rank in between has blocks of every kind and holds
most, but of two ranks one has either kind: both are laid out, and the larger counts at each instant.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RecipeError
from .kernels import SDPA, chosen
from .kernels.base import AttentionCall, RingTemps, heads_first, tokens_first
from .roles import Role
from .tape import BASIS, ITEMSIZE, ForGradients

if TYPE_CHECKING:
    from ..spec.model import LayerKind, Model
    from ..spec.platform import Platform
    from .layers import Writer
    from .recipe import Recipe
    from .tape import Tensor


class Ring(NamedTuple):
    """A ring of ranks, and the one that is laid out."""

    ranks: int
    gathers: bool  # keys and values of all ranks at once
    rank: int

    @property
    def has_half_keys(self) -> bool:
        """Whether blocks come to it of which it attends to the first half."""
        return self.rank > 0

    @property
    def has_half_queries(self) -> bool:
        """Whether blocks come to it that its second half of queries attends to."""
        return self.rank < self.ranks - 1


def ranks_that_differ(ranks: int) -> tuple[int, ...]:
    """Ranks of which one holds most at every instant."""
    return (0,) if ranks == 1 else (0, 1) if ranks == 2 else (1,)


def check(model: Model, recipe: Recipe, platform: Platform) -> None:
    """Check that a recipe's ranks can share a model's sequences in a ring. Raises RecipeError."""
    ranks, a = recipe.context_parallel, model.attention
    if ranks == 1:
        return
    for bad, what in (
        (
            any(kind.asks_mask for kind in model.layer_kinds),
            "sliding windows or chunks of attention, which accelerate refuses: a ring knows whole causal attention only.",
        ),
        (model.mixer is not None, "layers without attention, whose tokens go round no ring."),
        (
            a.latent is not None or a.v_head_dim != a.head_dim,
            "values of another size than keys, whose ring is not planned.",
        ),
        (
            a.sinks or a.softcap or not model.has_sdpa or model.eager_only or a.keys != "shared" or a.dropout > 0,
            "attention beside sdpa's own (sinks, soft-capping, dropout, heads in copies), which no ring has.",
        ),
        (
            a.gated_output or a.tempered or model.alibi or model.learned_positions > 0,
            "positions or gates in attention whose ring is not planned.",
        ),
    ):
        if bad:
            raise RecipeError(f"--context-parallel {ranks}: {model.name} has {what}\nLeave it out.")
    asked = AttentionCall.from_attention(a, recipe.compute_dtype, False, platform)
    kernel = chosen(recipe.attention, asked)
    if not kernel.in_rings:
        raise RecipeError(
            f"--context-parallel {ranks}: {model.name} runs {kernel.label} there ({asked.words}), whose ring is not planned.\nLeave it out."
        )


def attend(w: Writer, q: Tensor, k: Tensor, v: Tensor, kind: LayerKind) -> Tensor:
    """Attention of this rank's tokens, q (t, H, e), k and v (t, G, e), to those of all ranks -> (t, H, e)."""
    tape, a, ring = w.tape, w.model.attention, w.numerics.ring
    assert ring is not None
    with tape.assign_role(Role.ATTENTION):
        q, k, v = map(w.autocast, (q, k, v))
        kernel = chosen(SDPA, AttentionCall.from_attention(a, w.numerics.compute, False, w.numerics.platform))
        blocks = _Blocks(w, ring, k, q.dtype)
        start = len(tape.ops)
        merged = tape.new("attention merged, fp32", f"{w.t} H e", "float32")
        rows, sums = (tape.new(name, f"{w.t} H", "float32") for name in ("log-sum-exp", "log-sum-exp so far"))
        tape.op("attend to blocks in turn", [q, k, v], merged, temps=(sums, *blocks.largest_in_forward()))
        out = tape.new("attention mixed", "b H s e" if ring.has_half_queries else f"{w.t} H e", q.dtype)
        tape.op(
            "ring attention",
            [q, k, v, merged],
            out,
            rows,
            temps=blocks.received(),
            keeps=(q, k, v, out, rows),
            grads=tuple((x, tape.grad(x)) for x in (q, k, v)),
            for_gradients=ForGradients(all=True),
            back_temps=blocks.largest_in_backward(kernel.ring_temps),
            flops=w.attention_flops(),
        )
        tape.name_kernel(kernel.name, start, kernel.one_operation)
        tape.ops[start] = replace(
            tape.ops[start], selected=kernel.one_operation
        )  # torch's dispatcher sees one operation in both
        return tokens_first(w, out)


class _Blocks:
    """What a rank holds beside inputs and results at the moments of a ring of which one can be the largest."""

    def __init__(self, w: Writer, ring: Ring, k: Tensor, dtype: str):
        a = w.model.attention
        self.w, self.ring, self.dtype = w, ring, dtype
        self.pair = 2 * a.kv_heads * a.head_dim  # numbers of a token's keys and values
        in_order = heads_first(k), False
        self.copies = tuple(
            w.tape.new(f"{name}, in order", f"{w.t} G e", dtype)
            for name, is_so in zip("KV", in_order, strict=True)
            if a.kv_heads > 1 and not is_so
        )
        self.sent = self._keys("K and V, sent")

    def _of_queries(self, name: str, dtype: str = "float32") -> Tensor:
        return self.w.tape.new(name, f"{self.w.t} H e", dtype)

    def _keys(self, name: str, dtype: str = "", ranks: int = 1) -> Tensor:
        return self.w.tape.new(name, f"{self.w.t} {ranks * self.pair}", dtype or self.dtype)

    def _half(self, whole: Tensor, name: str) -> Tensor:
        """Half of the tokens of what a tensor is of."""
        numbers = self.w.width(whole)
        if numbers % 2:
            return self.w.tape.new(name, f"{self.w.t} {numbers * ITEMSIZE[whole.dtype] // 2}", "uint8")
        return self.w.tape.new(name, f"{self.w.t} {numbers // 2}", whole.dtype)

    def received(self, more: bool = False) -> tuple[Tensor, ...]:
        """Keys and values that have come. more: the next ones are on their way, while there are any."""
        if self.ring.gathers:
            return (self._keys("K and V of all ranks", ranks=self.ring.ranks),)
        there = self._keys("K and V, received")
        return (there, self._keys("K and V, on their way")) if more and self.ring.ranks > 2 else (there,)

    def largest_in_forward(self) -> tuple[Tensor, ...]:
        """Beside the output in fp32 and its log-sum-exp."""
        new, rows = self.w.tape.new, f"{self.w.t} H"
        block = self._of_queries("attention of a block", self.dtype)
        own = (*self.copies, self.sent, *self.received(more=True), block)
        wide, product = self._of_queries("attention of a block, fp32"), self._of_queries("difference of both, weighted")
        before = self._of_queries("attention merged so far, fp32")
        sent = (self.sent,) if not self.ring.gathers and self.ring.ranks > 2 else ()
        came = (*sent, *self.received(more=True))
        moments = [own]
        if self.ring.has_half_keys:
            statistics = new("log-sum-exp of a block", rows, "float32"), new("weights of both", rows, "float32")
            moments.append((*came, block, before, wide, product, *statistics))
        if self.ring.has_half_queries:
            halves = self._half(wide, wide.name), self._half(wide, "half of it, merged")
            row = self._half(new("log-sum-exp", rows, "float32"), "log-sum-exp of a block")
            moments.append((*came, self._half(block, block.name), before, *halves, row, row))
        return max(moments, key=_bytes)

    def largest_in_backward(self, workspace: RingTemps) -> tuple[Tensor, ...]:
        """Beside gradients of queries, keys and values."""
        sums = self._of_queries("dQ, summed in fp32"), self._keys("dK and dV, summed in fp32", "float32")
        goes_round = tuple(self._keys(f"dK and dV, {how}, fp32", "float32") for how in ("sent", "received"))
        mixed, queries, keys = self._of_queries("attention mixed", self.dtype), "queries", "keys"
        first = (
            *sums,
            *self.copies,
            self.sent,
            *self.received(),
            *workspace(self.w, mixed, "", self.ring.has_half_queries),
        )
        another = (self._keys("K and V, sent next"),) if self.ring.ranks > 2 else ()
        exchange = (*sums, *self.copies, self.sent, *another, *self.received(), *goes_round)
        moments = [first, exchange]
        held = (*sums, self.sent, *self.received(more=True), *goes_round)
        if self.ring.has_half_keys:
            made = self._of_queries("dQ of the block before", self.dtype), self._half(self.sent, "dK and dV of a block")
            moments.append((*held, *made, *workspace(self.w, mixed, keys, self.ring.has_half_queries)))
        if self.ring.has_half_queries:
            row = self._half(
                self.w.tape.new("log-sum-exp", f"{self.w.t} H", "float32"), "log-sum-exp of half the queries"
            )
            made = self._half(mixed, "dQ of a block"), self._keys("dK and dV of a block")
            moments.append((*held, *made, row, *workspace(self.w, mixed, queries, self.ring.has_half_queries)))
        return max(moments, key=_bytes)


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    """Bytes of a token; rows that are rounded up are taken for tokens."""
    return sum(tensor.bytes for tensor in tensors if BASIS[tensor.basis] in ("bs", "br"))
