"""The Python interface: questions that take names as well as objects.

A model is a name, a path, a Hugging Face id or a `Model`; a recipe a strategy's name or a `Recipe`; a card a name, an amount
such as "80GB", or a `Card`. Whatever is none of these raises an InputError that names the argument.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import HardwareError, MeasurementError, ModelError, RecipeError, quoted
from .plan import shapes as table_of
from .plan import solve
from .plan.solve import Answer, Plan
from .spec import catalog, hardware
from .spec.config import read_config
from .spec.hardware import Card
from .spec.model import Model
from .step import parameters
from .step import recipe as recipes
from .step.recipe import STRATEGIES, Recipe
from .step.steps import Chunks
from .units import parse_length, parse_memory

if TYPE_CHECKING:
    from .measuring.measurement import Measurement
    from .plan.shapes import Shape
    from .tracing.trace import Trace

    AnyModel = Model | str | os.PathLike[str]
    AnyRecipe = Recipe | str
    AnyCard = Card | str
    Length = int | str


def max_seq(model: AnyModel, recipe: AnyRecipe, card: AnyCard, strategy: str | None = None) -> Answer:
    """Solve for the longest sequence (tokens) that fits with `recipe` on `card`, and in host memory where that is known.

    strategy: what the answer calls the recipe; where a strategy is named, that. Raises an InputError.
    """
    called = strategy or (recipes.strategy_name(recipe) if isinstance(recipe, str) else "custom")
    return solve.max_seq(_model(model), _recipe(recipe), _card(card), called)


def plan_at(
    model: AnyModel, recipe: AnyRecipe, card: AnyCard, seq_len: Length, chunks: tuple[int, int] | None = None
) -> Plan:
    """Plan a step at a length: its peak (bytes) and where that is, chunks, host memory (bytes), seconds at best.

    seq_len: tokens, or text such as "64k"; chunks: (MLP, loss), else as in the recipe or as recommended. Raises an InputError.
    """
    given = Chunks(*chunks) if chunks is not None else None
    return solve.plan_at(_model(model), _recipe(recipe), _card(card), _length(seq_len), given)


def parameter_count(model: AnyModel) -> tuple[int, int]:
    """Count all parameters, and those that one token uses. Raises an InputError."""
    return parameters.parameter_count(_model(model))


def shapes(model: AnyModel, batch: int, seq_len: Length, dtype: str = "bfloat16") -> tuple[Shape, ...]:
    """List the large tensors of a step of `batch` sequences: symbolic shapes, sizes, bytes. Raises an InputError."""
    return table_of.shapes(_model(model), batch, _length(seq_len), dtype)


def trace(
    model: str | os.PathLike[str] | Mapping[str, Any], recipe: AnyRecipe, card: AnyCard, seq_len: Length
) -> Trace:
    """Run a step on fake tensors and give every allocation of it; `peak` and `peaks` are those of instants. Needs torch.

    model: a name, a path, an id, or the fields of a config.json. Chunks that a recipe leaves open are those recommended for
    `card`. Raises an InputError.
    """
    from .tracing import tracer

    config = dict(model) if isinstance(model, Mapping) else dict(catalog.load_config(model))
    on, tokens = _card(card), _length(seq_len)
    described = read_config(config, "model") if isinstance(model, Mapping) else _model(model)
    plan = solve.plan_at(described, _recipe(recipe), on, tokens)
    fixed = plan.recipe.changed(mlp_chunks=plan.chunks.mlp, loss_chunks=plan.chunks.loss)
    return tracer.trace(config, fixed, fixed.padded(tokens), workspace=on.gpu.workspaces_bytes)


def measure(
    model: str | os.PathLike[str],
    recipe: AnyRecipe,
    seq_len: Length,
    device: str = "cuda",
    layers: int | None = None,
    steps: int = 3,
) -> Measurement:
    """Measure real steps in a process of its own: peaks (bytes) and seconds; `outcome` says whether they ran. Needs torch.

    layers: the model's first N only; steps: that are timed, after a first one. Raises an InputError, MeasurementError where
    there is no such device.
    """
    from .measuring import sweep

    if device not in ("cuda", "cpu"):
        raise MeasurementError(f"device is {quoted(device)}, must be 'cuda' or 'cpu'.")
    known, asked = sweep.environment(device), _recipe(recipe)
    name = recipe if isinstance(recipe, str) else "custom"
    spec = os.fspath(model)
    card = sweep.card_of(known)
    (case,) = sweep.cases(spec, [_length(seq_len)], {name: asked}, card, layers, device, None, steps)
    return sweep.run(case, known)


# ---- names, or objects ------------------------------------------------------------------------------------------------


def _model(given: object) -> Model:
    if isinstance(given, Model):
        return given
    if not isinstance(given, (str, os.PathLike)):
        raise ModelError(f"model is {_shown(given)}.\nGive a name such as 'llama3.1-8b', a path, or a Model.")
    return catalog.load_model(given)


def _recipe(given: object) -> Recipe:
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, str):
        names = ", ".join(STRATEGIES)
        raise RecipeError(f"recipe is {_shown(given)}.\nGive a strategy's name ({names}) or a Recipe.")
    return recipes.strategy(given)


def _card(given: object) -> Card:
    if isinstance(given, Card):
        return given
    if not isinstance(given, str):
        raise HardwareError(
            f"card is {_shown(given)}.\nGive a name such as 'h100', an amount such as '80GB', or a Card."
        )
    is_amount = given[:1].isdigit() and given[-1:] in ("B", "b")
    return hardware.card(memory=parse_memory(given)) if is_amount else hardware.card(given)


def _length(given: Length) -> int:
    return parse_length(given) if isinstance(given, str) else given


def _shown(given: object) -> str:
    return f"of type {type(given).__name__}"
