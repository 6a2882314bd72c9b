"""A function of tensors that span tokens, run over pieces of them in both passes, each piece again by itself in backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .grad_sums import Sums, add_gradients, as_gradients, can_sum_products, summing_products
from .mlp import seeded
from .runtime import Runtime, is_pinned_from, saving_here
from .weight_stand_ins import current_autocast, own_weights, swap_weights
from .zero import gather, gathered

Tensors = tuple[torch.Tensor, ...]


class Pieces(NamedTuple):
    """A function of tensors that span tokens, to be run over pieces of them. run: of the pieces and their place, gives tensors.
    dims, out_dim: of each input and of all outputs, the dimension that spans tokens. modules: of `layer`, whose own weights it uses."""

    run: Callable[[Tensors, slice], Tensors]
    dims: tuple[int, ...]
    out_dim: int
    layer: nn.Module
    modules: tuple[nn.Module, ...]
    rows: int  # tokens of each sequence to a piece
    runtime: Runtime
    seed: int | None  # of random numbers, if it draws any
    from_host: int = 0  # of the inputs, how many of the last ones are on the host; so are their gradients
    to_host: bool = False  # the outputs go there

    def __call__(self, *inputs: torch.Tensor, skip: bool = False) -> Tensors:
        """Its outputs, differentiable; skip: one output of the first input's shape only, for nobody will read it."""
        with gathered(self.modules):
            out: Tensors = _Pieces.apply(self, skip, *inputs, *own_weights(self.modules))
        return out

    def places(self, tokens: int) -> Iterator[tuple[int, slice]]:
        return self.runtime.chunk_slices(tokens, self.rows)

    def on_host(self) -> tuple[bool, ...]:
        """Of each input, whether it is there."""
        here = len(self.dims) - self.from_host
        return (False,) * here + (True,) * self.from_host

    def cut(self, inputs: Sequence[torch.Tensor], place: slice) -> Iterator[torch.Tensor]:
        """A piece of each input, on the device."""
        for x, dim, on_host in zip(inputs, self.dims, self.on_host(), strict=True):
            part = _view(x, dim, place)
            yield self.runtime.to_device(part, inputs[0].device) if on_host else part.contiguous()

    def put(self, part: torch.Tensor, room: torch.Tensor, on_host: bool) -> None:
        """Copy a piece to where it belongs, on the device or on the host."""
        if on_host:
            self.runtime.send(part, room)
        else:
            room.copy_(part)

    def cut_gradient(self, whole: torch.Tensor, place: slice, device: torch.device) -> torch.Tensor:
        """A piece of an output's gradient, on the device."""
        part = _view(whole, self.out_dim, place)
        if self.to_host:
            return self.runtime.to_device(part, device)
        return part.contiguous() if self.out_dim == 1 else part


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pieces: Pieces, skip: bool, *tensors: torch.Tensor) -> Tensors:  # type: ignore[override]
        inputs = tensors[: len(pieces.dims)]
        device = inputs[0].device
        ctx.pieces, ctx.autocast = pieces, current_autocast(device.type)
        ctx.sums_products = can_sum_products(inputs[0], pieces.runtime)
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        tokens = inputs[0].shape[pieces.dims[0]]
        if skip:
            return (inputs[0].new_empty(()).expand(inputs[0].shape),)
        outputs: list[torch.Tensor] = []
        for n, place in pieces.places(tokens):
            parts = tuple(pieces.cut(inputs, place))
            with seeded(device, pieces.seed, n):
                made = pieces.run(parts, place)
            del parts
            outputs = outputs or [_room(part, pieces, tokens) for part in made]
            for whole, part in zip(outputs, made, strict=True):
                pieces.put(part, _view(whole, pieces.out_dim, place), pieces.to_host)
            del made, part  # before the next piece's intermediates are made
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        pieces: Pieces = ctx.pieces
        inputs, weights = ctx.saved_tensors, own_weights(pieces.modules)
        gather(pieces.modules)
        wanted = ctx.needs_input_grad[2 : 2 + len(inputs)]
        gradients = [
            None
            if not wants
            else pieces.runtime.empty_on_host(x, is_pinned_from(inputs[0]))
            if on_host
            else torch.empty_like(x)
            for x, wants, on_host in zip(inputs, wanted, pieces.on_host(), strict=True)
        ]
        tokens = inputs[0].shape[pieces.dims[0]]
        several = tokens > pieces.rows
        sums: Sums = [None] * len(weights)
        for n, place in pieces.places(tokens):
            parts = tuple(
                part.detach().requires_grad_(wants)
                for part, wants in zip(pieces.cut(inputs, place), wanted, strict=True)
            )
            with (
                swap_weights((pieces.layer,), weights) as leaves,
                summing_products(several and ctx.sums_products, leaves, sums, pieces.runtime),
                seeded(inputs[0].device, pieces.seed, n),
                torch.enable_grad(),
                torch.autocast(**ctx.autocast),
                saving_here(),
            ):
                made = pieces.run(parts, place)
            of_parts = [part for part, wants in zip(parts, wanted, strict=True) if wants]
            found = _gradients(made, of_parts, leaves, incoming, pieces, place)
            del made, parts, of_parts
            for whole, dim, on_host in zip(gradients, pieces.dims, pieces.on_host(), strict=True):
                if whole is not None:
                    part = found.pop(0)
                    room = _view(whole, dim, place)
                    pieces.put(part, room, on_host) if part is not None else room.zero_()
                    del part
            add_gradients(sums, found, several)
            del found
        return (None, None, *gradients, *as_gradients(sums, weights))


def _gradients(
    made: Tensors,
    parts: list[torch.Tensor],
    leaves: list[torch.Tensor],
    incoming: Sequence[torch.Tensor | None],
    pieces: Pieces,
    place: slice,
) -> list[torch.Tensor | None]:
    """Gradients of a piece's inputs and of the weights; those of nothing that asks for any are None."""
    pairs = [
        (part, pieces.cut_gradient(whole, place, part.device))
        for part, whole in zip(made, incoming, strict=True)
        if whole is not None and part.requires_grad
    ]
    if not pairs:
        return [None] * (len(parts) + len(leaves))
    outputs, grads = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, [*parts, *leaves], grads, allow_unused=True))


def _view(x: torch.Tensor, dim: int, place: slice) -> torch.Tensor:
    return x[(slice(None),) * dim + (place,)]


def cut_tokens(x: torch.Tensor, dim: int, place: slice) -> torch.Tensor:
    """Some tokens, without gaps, as models' code takes for granted; of one sequence a view, of more a copy."""
    return _view(x, dim, place).contiguous()


def _room(part: torch.Tensor, pieces: Pieces, tokens: int) -> torch.Tensor:
    """Room for all pieces, laid out as this one is but for its gaps."""
    strides = part.stride()
    order = sorted(range(part.dim()), key=lambda d: (-strides[d], d))  # from the outermost
    sizes = [tokens if d == pieces.out_dim else part.shape[d] for d in order]
    on_host = pieces.to_host
    room = pieces.runtime.empty_on_host(part, is_pinned_from(part), sizes) if on_host else part.new_empty(sizes)
    if order == sorted(order):  # FSDP2 warns of layers that give views
        return room
    return room.permute([order.index(d) for d in range(part.dim())])
