"""Checkpoints over one layer or several, or some of the layers, their inputs on the device or on the host.

transformers hands every decoder layer's run to a function of one's choice (`_set_gradient_checkpointing`); `Checkpoints.run`
is that function. torch's own checkpoint does the work: it is opened at the first layer of a segment and closed after the
last, and its one saved input goes through `HostCopies` where offload is on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint
from transformers import PreTrainedModel

from ..errors import ModelError
from ..step.recipe import Recipe
from ..step.steps import checkpointed_layers, every_nth
from .mlp import materialize
from .offload import HostCopies
from .patching import patch_forward, plain_forward
from .runtime import Runtime

LayerRun = Callable[..., Any]
ContextPair = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


class Checkpoints:
    """Checkpoints of a model's layers as a recipe has them. One for a model; `abandon_segment` after a forward pass that failed."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[nn.Module], recipe: Recipe, runtime: Runtime):
        self.name, self.layers = type(model).__name__, layers
        self.segments = segments_of(recipe, checkpointed_layers(recipe, len(layers)), len(layers))
        self.host_copies = HostCopies(runtime) if recipe.offload_layer_inputs else None
        self.contexts: ContextPair = (
            runtime.keep_attention if recipe.checkpoint == "selective" else torch_checkpoint.noop_context_fn
        )
        self._segment = ExitStack()  # the one being run, its layers so far, and what the last of them gave
        self._runs: list[tuple[LayerRun, tuple[Any, ...]]] = []
        self._next_index = 0
        self.recomputing: int | None = None  # the number of the layer that is being run again
        self.discards_output = False  # and will nobody read its output?
        self.is_running = False  # is a layer being run, for the first time or again?
        self.reentrant = recipe.checkpoint == "reentrant"
        self._output: Any = None
        self.model, self.flags_before = (
            model,
            [(m, {k: m.__dict__[k] for k in _FLAGS if k in m.__dict__}) for m in model.modules()],
        )
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=checkpoint_alone)
        for index, layer in enumerate(layers):
            layer._gradient_checkpointing_func = partial(self.run_layer, index)  # type: ignore[assignment]
        for name in _SWITCHES:  # Trainer and others switch it on once more, as transformers does it
            setattr(model, name, MethodType(_keep_checkpointing_on, model))

    def undo(self) -> None:
        """Checkpointing as it was before."""
        for name in _SWITCHES:
            self.model.__dict__.pop(name, None)
        for module, flags in self.flags_before:
            for name in _FLAGS:
                module.__dict__.pop(name, None)
            module.__dict__.update(flags)

    @torch.compiler.disable  # a compiled layer and its recomputation would take different paths
    def run_layer(self, index: int, run: LayerRun, *args: Any) -> Any:
        """Layer `index`, which maps hidden states (b, s, d), its first argument, to (b, s, d) or a tuple that begins with them."""
        if not args or not torch.is_tensor(args[0]):
            raise ModelError(
                f"{self.name} gives its layers their hidden states by name, so they cannot be checkpointed here.\nSet checkpoint='none'."
            )
        if self.reentrant:
            return self._run_reentrant(index, run, *args)
        try:
            if index in self.segments:
                self._begin_segment(index, args[0])
            elif not any(start < index < stop for start, stop in self.segments.items()):
                return self._run(run, *args)  # between checkpoints
            elif self._next_index != index or args[0] is not self._output:
                raise ModelError(
                    f"{self.name} does not hand layer {index - 1}'s output to layer {index} as it is (FSDP wraps it, too), so checkpoints cannot span layers."
                    "\nSet checkpoint='layer'."
                )
            self._runs.append((run, args[1:]))
            out = self._run(run, *args)
            self._next_index, self._output = index + 1, _hidden_states(out)
            if self._next_index in self.segments.values():
                self._end_segment()
        except BaseException:
            self.abandon_segment()
            raise
        return out

    def _run_reentrant(self, index: int, run: LayerRun, *args: Any) -> Any:
        """As transformers did it before 5: torch's checkpoint of the layer is a function of autograd's with a backward of its own."""
        if torch.is_grad_enabled() and not args[0].requires_grad and self._trains(index):
            raise ModelError(
                f"reentrant checkpoints would give layer {index} of {self.name} no gradients: of its input none is wanted.\n"
                "Call model.enable_input_require_grads() first, or set checkpoint='layer'."
            )
        runs = 0

        def layer(*args: Any) -> Any:
            nonlocal runs
            self.recomputing, runs = index if runs else None, runs + 1
            try:
                return self._run(run, *args)
            finally:
                self.recomputing = None

        with self._input_on_host(index):
            return torch_checkpoint.checkpoint(layer, *args, use_reentrant=True)

    def _input_on_host(self, index: int) -> AbstractContextManager[None]:
        """Within the context what is saved, the input of the checkpoint that layer `index` begins, is kept on the host, if inputs are."""
        if self.host_copies is None or not torch.is_grad_enabled():
            return nullcontext()
        return self.host_copies.keep_on_host(index, len(self.segments))

    def _trains(self, index: int) -> bool:
        return any(weight.requires_grad for weight in self.layers[index].parameters())

    def _run(self, run: LayerRun, *args: Any) -> Any:
        self.is_running = True
        try:
            return materialize(run(*args))
        finally:
            self.is_running = False

    def _begin_segment(self, index: int, hidden: torch.Tensor) -> None:
        self.abandon_segment()
        runs: list[tuple[LayerRun, tuple[Any, ...]]] = []
        self._runs = runs

        def recompute(hidden: torch.Tensor) -> None:
            try:
                for n, (run, other_args) in enumerate(runs, 1):
                    self.recomputing, self.discards_output = index + n - 1, n == len(runs)
                    hidden = _hidden_states(self._run(run, hidden, *other_args))
            finally:
                self.recomputing, self.discards_output = None, False

        with ExitStack() as entered:  # left again if the host has no room for the input
            entered.enter_context(self._input_on_host(index))
            entered.enter_context(_checkpoint(recompute, hidden, self.contexts))
            self._segment = entered.pop_all()

    def _end_segment(self) -> None:
        self._output, self._runs = None, []
        self._segment.close()

    def abandon_segment(self) -> None:
        """Close a segment that an error left open."""
        if self._runs:
            self._end_segment()


def segments_of(recipe: Recipe, starts: Sequence[int], count: int) -> dict[int, int]:
    """Checkpoints over `count` layers: the first layer of each, one of `starts`, and the layer after its last."""
    return {n: n + 1 for n in starts} if every_nth(recipe) is not None else dict(pairwise([*starts, count]))


def checkpoint_children(layers: Sequence[nn.Module]) -> None:
    """Checkpoint each module of every layer by itself, as accelerate's FSDP2 did (utils/fsdp_utils.py, fsdp2_apply_ac, until its pull request
    4172 of August 2026)."""
    for layer in layers:
        for child in layer.children():
            patch_forward(child, _run_checkpointed)


def _run_checkpointed(self: Any, *args: Any, **kwargs: Any) -> Any:
    return torch_checkpoint.checkpoint(
        plain_forward(self), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )


_FLAGS = ("gradient_checkpointing", "_gradient_checkpointing_func")
_SWITCHES = ("gradient_checkpointing_enable", "activation_checkpointing_enable")


def checkpoint_alone(run: LayerRun, *args: Any) -> Any:
    """What is no decoder layer but can be checkpointed too: as transformers does it."""
    return torch_checkpoint.checkpoint(run, *args, use_reentrant=False)


def _keep_checkpointing_on(_model: nn.Module, *_args: Any, **_kwargs: Any) -> None:
    """Checkpointing is on already, as `minisequence` was told."""


def _checkpoint(
    recompute: Callable[[torch.Tensor], None], hidden: torch.Tensor, contexts: ContextPair
) -> AbstractContextManager[None]:
    """torch's checkpoint as a context: it keeps `hidden` and drops whatever is saved within, until `recompute` makes it anew.
    contexts: makes what the first run and the second run in.
    torch.utils.checkpoint.checkpoint takes one function, but the layers of a segment are called one by one by the model."""
    generator = torch_checkpoint._checkpoint_without_reentrant_generator
    early_stop = (True,) if "early_stop" in inspect.signature(generator).parameters else ()  # not in older torch
    return contextmanager(generator)(recompute, True, contexts, "default", False, *early_stop, hidden)


def _hidden_states(out: Any) -> torch.Tensor:
    return out[0] if isinstance(out, tuple) else out
