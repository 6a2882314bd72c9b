"""A decoder layer over pieces of the sequence: all of it but attention itself, in both passes.

Queries, keys and values are made piece by piece; attention runs over all of them, whole or a group of heads at a time;
what follows it (output product, residual, norm, MLP) runs piece by piece again. Each piece is run again by itself in backward,
so that norms, projections, rotary embeddings and the MLP hold intermediates for one piece at a time.

transformers' layers are one function each. Up to attention, a piece is run until its call, which is then left by an exception.
From attention on, the layer's function is run once more, with norms and projections that only attention would read on a few tokens only,
and the call gives out the piece of what attention made. Where attention is not asked for by name (state spaces, linear attention,
attention in older code), the module that mixes tokens is run whole in its place. What of a layer runs where is found out by a
rehearsal on a few tokens (`rehearsal.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..errors import ModelError
from .host_attention import Graphs
from .mixing import FEW, AttentionCall, Call, Caught, Path, Reached, Spans, staged, stop
from .mlp import draws_random
from .patching import plain_forward
from .pieces import Pieces, Tensors
from .runtime import Runtime


class LayerParts:
    """How one layer runs in pieces, as a rehearsal found it."""

    def __init__(self, layer: nn.Module, spans: Spans):
        self.layer, self.spans = layer, spans
        self.mixer: nn.Module = layer  # the module that calls attention, or that mixes tokens itself
        self.calls_attention = True
        self.mixer_spans = Spans({})  # arguments of the module that calls attention
        # of a module that mixes tokens itself: arguments that the layer made, (b, s, ...), and outputs beside hidden states, all None; -1: no
        # tuple
        self.mixer_fresh: tuple[Path, ...] = ()
        self.mixer_outputs = -1
        self.skipped: tuple[nn.Module, ...] = ()  # norms that nothing but the mixer reads
        self.empties = True  # does the module that calls attention run on few tokens after it?
        self.outputs = -1  # of the layer, likewise
        # by the name of a module within the layer: does it run up to the call, and from there on?
        self.runs: dict[str, tuple[bool, bool]] = {}
        self.heads = self.kv_heads = 1  # of queries, of keys

    def modules(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        """Modules whose own weights are used up to the call, and from there on. What came into the layer since it was rehearsed (adapters) runs
        where the module runs that it is in."""
        before, after = [], []
        for name, module in self.layer.named_modules():
            known = name
            while known not in self.runs:
                known = known.rpartition(".")[0]
            if self.runs[known][0]:
                before.append(module)
            if self.runs[known][1]:
                after.append(module)
        return tuple(before), tuple(after)

    @property
    def touched(self) -> set[nn.Module]:
        """Modules whose forward is not their own any more."""
        return {self.layer, self.mixer, *self.skipped}

    def run(self, x: torch.Tensor, call: Call) -> Any:
        """The layer as it is, without a checkpoint of its own."""
        layer: Any = self.layer
        if not getattr(layer, "gradient_checkpointing", False):
            return plain_forward(layer)(x, *call[0], **call[1])
        layer.gradient_checkpointing = False
        try:
            return plain_forward(layer)(x, *call[0], **call[1])
        finally:
            layer.gradient_checkpointing = True

    def reach(self, x: torch.Tensor, call: Call) -> Caught:
        """What a piece x (b, c, d) hands to attention, or to what mixes tokens."""
        try:
            with staged(stop):
                self.run(x, call)
        except Reached as reached:
            return reached.call
        raise ModelError(f"{type(self.layer).__name__} runs no attention that transformers' interface knows.")

    def finish(self, x: torch.Tensor, mixed: Tensors, call: Call) -> torch.Tensor:
        """The layer's output for a piece x (b, c, d). mixed: what attention made of it, (b, c, heads, width), by groups of heads; or (b, c, d)."""

        def give(_call: Caught) -> Any:
            if not self.calls_attention:
                return _with_more(mixed[0], self.mixer_outputs)
            whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed, 2)
            return (_Attended(whole) if self.empties else whole), None

        with staged(give, rest=self.empties):
            out = self.run(x, call)
        return out[0] if isinstance(out, tuple) else out


class _Attended:
    """What attention made of a piece, (b, c, heads, width), for code that thinks it has few tokens."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.shape = (tensor.shape[0], FEW.stop, *tensor.shape[2:])

    def reshape(self, *_shape: Any) -> torch.Tensor:
        return self.tensor.flatten(2)

    view = reshape

    def contiguous(self) -> _Attended:
        return self


def layer_in_pieces(
    parts: LayerParts,
    rows: int,
    groups: int,
    on_host: Graphs | None,
    runtime: Runtime,
    skip: bool,
    x: torch.Tensor,
    call: Call,
) -> Any:
    """What the layer gives for hidden states x (b, s, d) and other arguments. rows: tokens of each sequence to a piece. groups: of heads,
    that attention runs over one after the other. on_host: if what goes into attention, and what comes out, waits in CPU RAM, its graphs.
    skip: nobody will read the output's values."""
    groups = groups if parts.calls_attention else 1
    on_host = on_host if parts.calls_attention else None
    found: list[Caught] = []
    modules_before, modules_after = parts.modules()
    random = draws_random((parts.layer,))
    seeds = [runtime.draw_seed() if random else None for _ in range(2)]
    guests = parts.spans.wanting_gradients(call) if torch.is_grad_enabled() else {}
    dims = (1, *(parts.spans.places[path] for path in guests))

    def cut(inputs: Tensors, place: slice) -> Call:
        return parts.spans.cut(call, place, dict(zip(guests, inputs, strict=True)))

    def before(inputs: Tensors, place: slice) -> Tensors:
        piece = cut(inputs[1:], place)
        caught = parts.reach(inputs[0], piece)
        if not found:
            found.append(caught.of_all(piece, call))
        return caught.made(groups)

    def after(inputs: Tensors, place: slice) -> Tensors:
        count = 1 + len(guests)
        return (parts.finish(inputs[0], inputs[count:], cut(inputs[1:count], place)),)

    out_dim = 2 if parts.calls_attention else 1
    made = Pieces(before, dims, out_dim, parts.layer, modules_before, rows, runtime, seeds[0], 0, on_host is not None)(
        x, *guests.values()
    )
    caught = found[0]
    if on_host is not None and isinstance(caught, AttentionCall):
        mixed = caught.run_from_host(made, groups, on_host, runtime, x.device)
    else:
        mixed = caught.run(made, groups)
    del made
    given = dims + (1,) * len(mixed)
    from_host = len(mixed) if on_host is not None else 0
    (out,) = Pieces(after, given, 1, parts.layer, modules_after, rows, runtime, seeds[1], from_host)(
        x, *guests.values(), *mixed, skip=skip
    )
    return _with_more(out, parts.outputs)


def _with_more(out: torch.Tensor, others: int) -> Any:
    return out if others < 0 else (out, *[None] * others)


def tokenwise_in_pieces(
    module: nn.Module, run: Callable[..., torch.Tensor], rows: int, runtime: Runtime, x: torch.Tensor
) -> torch.Tensor:
    """run(x) of hidden states x (b, s, d), a function of each token by itself: of a module that draws no random numbers."""
    pieces = Pieces(lambda parts, _: (run(parts[0]),), (1,), 1, module, tuple(module.modules()), rows, runtime, None)
    return pieces(x)[0]
