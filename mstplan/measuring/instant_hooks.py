"""Which of the step model's instants a real step is at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from ..step.instants import Instant, Pass
from ..step.recipe import Recipe
from ..step.steps import segment_length
from ..tracing.recording import Place
from ..tracing.trace import instant_of
from ..train import locate
from ..train.step import TrainingStep

Mark = Callable[[Instant], None]


class Trained(NamedTuple):
    """A model that another loop than mstplan's trains, with an optimizer of its own that steps after backward."""

    model: PreTrainedModel
    recipe: Recipe
    optimizer: str = "the loop's"


@contextmanager
def marking(step: TrainingStep | Trained, mark: Mark) -> Iterator[Callable[[Pass], None]]:
    """Yield `begin(pass)`, to be called as each pass starts. Hooks then call `mark(instant)`: on entering a layer in forward, and
    when the gradient of a layer's input arrives in backward."""
    layers = locate.find_parts(step.model).layers
    segment = segment_length(step.recipe, len(layers)) or 1
    units = -(-len(layers) // segment)
    current = Pass.FORWARD

    def mark_unit(unit: int) -> None:
        mark(instant_of(Place(current, unit), units))

    def begin(started: Pass) -> None:
        nonlocal current
        current = started
        if current != Pass.OPTIMIZER or step.optimizer is not None:
            mark_unit(-1 if current == Pass.FORWARD else units)

    def enter(unit: int) -> Callable[[nn.Module, Any], None]:
        def hook(_layer: nn.Module, inputs: Any) -> None:
            if current == Pass.FORWARD:
                mark_unit(unit)
                if inputs[0].requires_grad:
                    inputs[0].register_hook(lambda _gradient: mark_unit(unit - 1))

        return hook

    def leave(_layer: nn.Module, _inputs: Any, output: Any) -> None:
        if current == Pass.FORWARD:
            mark_unit(units)
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _gradient: mark_unit(units - 1))

    handles: list[Any] = [
        layers[n].register_forward_pre_hook(enter(n // segment)) for n in range(0, len(layers), segment)
    ]
    handles.append(layers[-1].register_forward_hook(leave))
    try:
        yield begin
    finally:
        for handle in handles:
            handle.remove()
