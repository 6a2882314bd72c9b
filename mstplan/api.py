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
    """Solve for the longest sequence (tokens) that fits with `recipe` on `card`, and in CPU RAM where that is known.

    strategy: what the answer calls the recipe; where a strategy is named, that. Raises an InputError.
    """
    name = strategy or (recipes.strategy_name(recipe) if isinstance(recipe, str) else "custom")
    return solve.max_seq(_as_model(model), _as_recipe(recipe), _as_card(card), name)


def plan_at(
    model: AnyModel, recipe: AnyRecipe, card: AnyCard, seq_len: Length, chunks: tuple[int, int] | None = None
) -> Plan:
    """Plan a step at a length: its peak (bytes) and where that is, chunks, CPU RAM (bytes), seconds at best.

    seq_len: tokens, or text such as "64k"; chunks: (MLP, loss), else as in the recipe or as recommended. Raises an InputError.
    """
    asked_chunks = Chunks(*chunks) if chunks is not None else None
    return solve.plan_at(_as_model(model), _as_recipe(recipe), _as_card(card), _as_length(seq_len), asked_chunks)


def parameter_count(model: AnyModel) -> tuple[int, int]:
    """Count all parameters, and those that one token uses. Raises an InputError."""
    return parameters.parameter_count(_as_model(model))


def shapes(model: AnyModel, batch: int, seq_len: Length, dtype: str = "bfloat16") -> tuple[Shape, ...]:
    """List the large tensors of a step of `batch` sequences: symbolic shapes, sizes, bytes. Raises an InputError."""
    return table_of.shapes(_as_model(model), batch, _as_length(seq_len), dtype)


def trace(
    model: str | os.PathLike[str] | Mapping[str, Any], recipe: AnyRecipe, card: AnyCard, seq_len: Length
) -> Trace:
    """Run a step on fake tensors and give every allocation of it; `peak` and `peaks` are those of instants. Needs torch.

    model: a name, a path, an id, or the fields of a config.json. Chunks that a recipe leaves open are those recommended for
    `card`. Raises an InputError.
    """
    from .tracing import tracer

    config = dict(model) if isinstance(model, Mapping) else dict(catalog.load_config(model))
    planned_card, tokens = _as_card(card), _as_length(seq_len)
    planned_model = read_config(config, "model") if isinstance(model, Mapping) else _as_model(model)
    plan = solve.plan_at(planned_model, _as_recipe(recipe), planned_card, tokens)
    fixed_recipe = plan.chunks.put_into(plan.recipe)
    workspace, platform = planned_card.gpu.workspaces_bytes, planned_card.platform
    return tracer.trace(config, fixed_recipe, fixed_recipe.padded(tokens), workspace=workspace, platform=platform)


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
    from .measuring.measurement import card_of
    from .measuring.processes import Processes

    if device not in ("cuda", "cpu"):
        raise MeasurementError(f"device is {quoted(device)}, must be 'cuda' or 'cpu'.")
    planned_recipe, tokens = _as_recipe(recipe), _as_length(seq_len)
    name = recipe if isinstance(recipe, str) else "custom"
    with Processes() as processes:
        environment = sweep.ask_environment(device, processes)
        card = card_of(environment)
        (case,) = sweep.plan_cases(
            os.fspath(model), [tokens], {name: planned_recipe}, card, layers, device, None, steps
        )
        return sweep.measure_case(case, environment, processes=processes)


# ---- names, or objects ------------------------------------------------------------------------------------------------


def _as_model(model: object) -> Model:
    if isinstance(model, Model):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ModelError(f"model is {_type_words(model)}.\nGive a name such as 'llama3.1-8b', a path, or a Model.")
    return catalog.load_model(model)


def _as_recipe(recipe: object) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        names = ", ".join(STRATEGIES)
        raise RecipeError(f"recipe is {_type_words(recipe)}.\nGive a strategy's name ({names}) or a Recipe.")
    return recipes.strategy(recipe)


def _as_card(card: object) -> Card:
    if isinstance(card, Card):
        return card
    if not isinstance(card, str):
        raise HardwareError(
            f"card is {_type_words(card)}.\nGive a name such as 'h100', an amount such as '80GB', or a Card."
        )
    is_amount = card[:1].isdigit() and card[-1:] in ("B", "b")
    return hardware.card(memory=parse_memory(card)) if is_amount else hardware.card(card)


def _as_length(length: Length) -> int:
    return parse_length(length) if isinstance(length, str) else length


def _type_words(value: object) -> str:
    return f"of type {type(value).__name__}"
