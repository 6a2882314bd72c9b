"""An MLP, a chunk of tokens at a time, in both passes.

The forward pass keeps the input only. Backward runs the MLP again for one chunk, takes that chunk's gradients, and goes
on: intermediates exist for one chunk at a time. Weights' gradients are summed over the chunks in fp32 (`grad_sums.py`).

What follows an MLP token by token (a norm, dropout, in some families the residual) is recorded (see `lazy.py`) and run in
the same chunks. Then, inside a checkpointed layer, nothing reads the MLP's output but an addition: `output_is_read` finds
that out from autograd's graph, the layer's recomputation hands on an empty tensor instead of running the MLP a third
time, and two passes over the tokens remain, as many as plain checkpointing makes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from ..errors import ModelError
from .grad_sums import Sums, add_gradients, as_gradients, can_sum_products, summing_products
from .lazy import LazyTensor, Run
from .runtime import Runtime, saving_here
from .weight_stand_ins import current_autocast, swap_weights, trained_weights
from .zero import gather, gathered


class MlpIntermediate(LazyTensor):
    """What lies between the two matrices of an MLP that is no module of its own. Never made whole."""

    def use_unrecorded(self, what: str, use: Callable[[Any], Any]) -> Any:
        self.refuse(what)

    def refuse(self, what: str) -> NoReturn:
        kind = type(self.modules[0]).__name__
        raise ModelError(
            f"cannot run the MLP in chunks: the model's code uses {what} on the output of its first {kind}.\nSet mlp_chunks=1."
        )


class MlpOutput(LazyTensor):
    """What an MLP hands out. Made, chunk by chunk, as soon as something wants it that is not done token by token."""

    skip: Callable[[], bool]  # says when nobody will read the values
    nodes: list[Any]  # of autograd's graph, that made them
    dropped_counts: list[int]  # how many things the MLP hands out beside hidden states, once it is known

    @property
    def value(self) -> Any:
        """(..., d); a tuple where the MLP returns one, its first entry made, the others (router scores) `DroppedOutput`."""
        if "_value" not in self.__dict__:
            self._value = chunked_mlp(self)
            del self.source, self.run  # nobody else may need those
        return self._value

    def call_function(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if "_value" in self.__dict__:
            return func(*[self.value if a is self else a for a in args], **kwargs)
        return super().call_function(func, args, kwargs)

    def extended(self, run: Run, *modules: nn.Module, random: bool = False) -> LazyTensor:
        output = super().extended(run, *modules, random=random)
        output.skip, output.nodes, output.dropped_counts = self.skip, self.nodes, self.dropped_counts  # type: ignore[attr-defined]
        return output

    def record_step(self, run: Run, *modules: nn.Module, random: bool = False) -> Any:
        return run(self.value) if "_value" in self.__dict__ else super().record_step(run, *modules, random=random)

    def use_unrecorded(self, what: str, use: Callable[[Any], Any]) -> Any:
        return use(self.value)

    def refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"cannot run the MLP in chunks: the model's code calls {what} on a list with its output.\nSet mlp_chunks=1."
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.value)


class DroppedOutput(LazyTensor):
    """What an MLP hands out beside its output. It exists for one chunk at a time and is not kept."""

    def __init__(self, modules: tuple[nn.Module, ...]):
        self.name = type(modules[0]).__name__

    def use_unrecorded(self, what: str, use: Callable[[Any], Any]) -> Any:
        self.refuse(what)

    def call_function(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        self.refuse(getattr(func, "__name__", str(func)))

    def refuse(self, what: str) -> NoReturn:
        raise ModelError(
            f"cannot run {self.name} in chunks: the model's code uses {what} on something it returns beside hidden states.\nSet mlp_chunks=1."
        )


def materialize(out: Any) -> Any:
    """What a layer gives, with all of it there."""
    if isinstance(out, tuple) and any(isinstance(entry, MlpOutput) for entry in out):
        return tuple(materialize(entry) for entry in out)
    return out.value if isinstance(out, MlpOutput) else out


def chunked_mlp(lazy: MlpOutput) -> Any:
    """The tensor that `lazy` stands for: source (..., d) to (..., width), differentiable."""
    x, dropped_counts = lazy.source, lazy.dropped_counts
    seed = lazy.runtime.draw_seed() if lazy.random or draws_random(lazy.modules) else None
    weights = trained_weights(*lazy.modules)
    with gathered(lazy.modules):
        out: torch.Tensor = _ChunkedMlp.apply(
            x.flatten(0, -2),
            *(lazy.modules, lazy.run, lazy.rows, lazy.runtime, seed, lazy.skip(), dropped_counts),
            *weights,
        )
    if out.grad_fn is not None:
        lazy.nodes.append(out.grad_fn)
    out = out.view(*x.shape[:-1], out.shape[-1])
    return (out, *[DroppedOutput(lazy.modules)] * dropped_counts[0]) if dropped_counts[0] else out


def check_tokenwise(run: Run, x: torch.Tensor, modules: tuple[nn.Module, ...]) -> None:
    """Try `run` on a few tokens together and apart; raises ModelError when that differs: it looks from token to token."""
    if type(x) is not torch.Tensor or x.is_meta:  # no values, or traced
        return
    sample = x.detach().flatten(0, -2)[:4].unsqueeze(0)
    with stopped_training(*modules), torch.no_grad(), gathered(modules):
        together = _hidden_states(run(sample))
        apart = torch.cat([_hidden_states(run(sample[:, :1])), _hidden_states(run(sample[:, 1:]))])
    name = type(modules[0]).__name__
    if together.shape != apart.shape or together.shape[0] != sample.shape[1]:
        raise ModelError(f"cannot run {name} in chunks: it does not give one row for each token.\nSet mlp_chunks=1.")
    if (together - apart).norm() > 0.05 * together.norm():  # far above rounding, far below another token's share
        raise ModelError(
            f"cannot run {name} in chunks: what it gives for a token depends on the tokens beside it.\nSet mlp_chunks=1."
        )


@contextmanager
def stopped_training(*modules: nn.Module) -> Iterator[None]:
    """Within the context the modules draw no random numbers."""
    training = [m for module in modules for m in module.modules() if m.training and not _is_quantised(m)]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def _is_quantised(module: nn.Module) -> bool:
    """Linear layers of 4 bits draw no random numbers; and on some CPUs bitsandbytes packs their weights anew for good where they run once
    outside of training (its nn/modules.py, Linear4bit.forward)."""
    return any(not weight.is_floating_point() for weight in module.parameters(recurse=False))


def draws_random(modules: tuple[nn.Module, ...]) -> bool:
    """Could they draw random numbers now (dropout, jitter, noise)? What only looks so costs one needless draw."""
    return any(child.training and _draws_random(child) for module in modules for child in module.modules())


def _draws_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    shares = [
        v
        for k, v in vars(module).items()
        if any(w in k for w in ("drop", "jitter", "noise")) and isinstance(v, (int, float))
    ]
    return any(share > 0 for share in shares) if shares else _calls_random(type(module))


def _calls_random(kind: type[nn.Module]) -> bool:
    names = getattr(getattr(kind.forward, "__code__", None), "co_names", ())
    return any(word in name for name in names for word in ("bernoulli", "uniform_", "normal_", "multinomial", "rand"))


def output_is_read(node: Any, output: torch.Tensor) -> bool:
    """Does anything between a chunked MLP, `node` of autograd's graph, and `output` need the MLP's values for its backward?
    Additions and changes of shape do not, nor does scaling by what is not trained; whatever else stands between may."""
    pending, visited = [(output.grad_fn, False)], set()
    while pending:
        current, reading = pending.pop()
        if (
            current is None or (current, reading) in visited or current._sequence_nr() < node._sequence_nr()
        ):  # older ones cannot lie between
            continue
        visited.add((current, reading))
        if current is node:
            if reading:
                return True
            continue
        next_nodes = [n for n, _ in current.next_functions if n is not None]
        value_free = current.name() in _VALUE_FREE or (current.name() in _SCALING and len(next_nodes) == 1)
        pending += [(n, reading or not value_free) for n in next_nodes]
    return False


_VALUE_FREE = {
    "AddBackward0",
    "ViewBackward0",
    "UnsafeViewBackward0",
    "ReshapeAliasBackward0",
    "UnsqueezeBackward0",
    "SqueezeBackward1",
}
_SCALING = {"MulBackward0", "DivBackward0"}  # these keep a factor only when the other one is trained


class _ChunkedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        modules: tuple[nn.Module, ...],
        run: Run,
        rows: int,
        runtime: Runtime,
        seed: int | None,
        skip: bool,
        dropped_counts: list[int],
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.modules, ctx.run, ctx.rows, ctx.runtime, ctx.seed = modules, run, rows, runtime, seed
        ctx.save_for_backward(x)
        ctx.autocast, ctx.sums_products = current_autocast(x.device.type), can_sum_products(x, runtime)
        if skip:
            return torch.empty_like(x)
        out: torch.Tensor | None = None
        for n, place in runtime.chunk_slices(x.shape[0], rows):
            with seeded(x.device, seed, n):
                piece = run(x[place].unsqueeze(0))
            dropped_counts[0] = len(piece) - 1 if isinstance(piece, tuple) else 0
            piece = _hidden_states(piece)
            if out is None:
                out = piece.new_empty(x.shape[0], piece.shape[-1])
            out[place] = piece
            del piece  # before the next chunk's intermediates are made
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, incoming: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        weights = trained_weights(*ctx.modules)
        gather(ctx.modules)
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        several = x.shape[0] > ctx.rows
        sums: Sums = [None] * len(weights)
        for n, place in ctx.runtime.chunk_slices(x.shape[0], ctx.rows):
            piece = x[place].detach().requires_grad_(d_x is not None)
            with (
                swap_weights(ctx.modules, weights) as leaves,
                summing_products(several and ctx.sums_products, leaves, sums, ctx.runtime),
            ):
                out = _rerun_chunk(ctx, n, piece)
            inputs = [piece, *leaves] if d_x is not None else leaves
            gradients = list(torch.autograd.grad(out, inputs, incoming[place], allow_unused=True))
            del out
            if d_x is not None:
                d_x[place] = gradients.pop(0)
            add_gradients(sums, gradients, several)
            del gradients, piece  # before the next chunk's intermediates are made
        return (d_x, *[None] * 7, *as_gradients(sums, weights))


def _rerun_chunk(ctx: Any, n: int, piece: torch.Tensor) -> torch.Tensor:
    """Chunk n's forward once more, with the random numbers and the autocast of the first time."""
    with seeded(piece.device, ctx.seed, n), torch.enable_grad(), torch.autocast(**ctx.autocast), saving_here():
        return _hidden_states(ctx.run(piece.unsqueeze(0)))


def _hidden_states(out: Any) -> torch.Tensor:
    """The hidden states (n, d) in what an MLP returns for (1, n, d)."""
    hidden: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return hidden.flatten(0, -2)


@contextmanager
def seeded(device: torch.device, seed: int | None, chunk: int) -> Iterator[None]:
    """Random numbers of their own for a chunk, the same in both passes; None: nothing random happens."""
    if seed is None:
        yield
        return
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        torch.default_generator.manual_seed(seed + chunk)
        if not on_cpu:
            torch.get_device_module(device).default_generators[device.index].manual_seed(seed + chunk)
        yield
