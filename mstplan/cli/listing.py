"""The commands that list what is known: models, cards and recipes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from .commands import arguments, command, declared, flags_given, option
from .options import FormatOptions, RecipesOptions, known_gpus, length, recipes_of
from .output import emit

if TYPE_CHECKING:
    from ..show.listing import ModelRow
    from ..spec.hardware import Card
    from ..spec.model import Model


class ModelsOptions(RecipesOptions, FormatOptions):
    words = arguments(
        str, "TEXT", "Only models whose name, family or Hugging Face id contains this, and each of several."
    )
    fits = option(
        str,
        "--fits",
        "Only models that train on this GPU, as the options say.",
        panel="GPU",
        metavar="GPU",
        choices=known_gpus,
    )
    seq_len = option(str, "--seq-len", "Tokens per sequence for --fits. Default: 4k.", panel="GPU", metavar="TOKENS")


@command(
    "models",
    ModelsOptions,
    help="The models that ship with mstplan, what tells them apart, and which of them train on a GPU. Exit code with --fits: 0: some, 1: none.",
    examples=("mstplan models qwen3", "mstplan models qwen --fits rtx-4090 --lora 16"),
)
def models(options: ModelsOptions) -> None:
    from ..errors import ModelError, RecipeError, quoted
    from ..show import listing
    from ..spec.catalog import load_model, model_names
    from ..spec.hardware import card

    if options.fits is None and (unused := flags_given(options, [*declared(RecipesOptions), "seq_len"])):
        raise RecipeError(f"{', '.join(unused)}: nothing to do with what ships.\nAdd --fits GPU, or leave it out.")
    found = [model for model in map(load_model, model_names()) if _says(model, options.words)]
    if not found:
        words = " and ".join(map(quoted, options.words))
        raise ModelError(f"no model's name, family or id contains {words}.\nmstplan models lists them all.")
    if options.fits is None:
        emit(options, listing.models([listing.ModelRow(model) for model in found]))
        return
    planned_card, seq_len = card(options.fits), length(options.seq_len or "4k")
    rows, notes = _that_fit(options, found, planned_card, seq_len)
    emit(options, listing.models(rows, listing.Asked(planned_card, seq_len, len(found)), notes))
    if not rows:
        raise typer.Exit(1)


def _says(model: Model, words: tuple[str, ...]) -> bool:
    text = " ".join((model.name, model.model_type, model.hub_id or "")).lower()
    return all(word.lower() in text for word in words)


def _that_fit(
    options: ModelsOptions, found: list[Model], planned_card: Card, seq_len: int
) -> tuple[list[ModelRow], list[str]]:
    """Models with the first of the strategies with which a step fits; notes on those for which the recipe cannot be planned."""
    from ..errors import RecipeError
    from ..plan import solve
    from ..show.listing import ModelRow
    from ..step.recipe import strategy_label

    rows, refused = [], {}
    for model in found:
        try:
            for name, recipe in recipes_of(options, model=model).items():
                if solve.plan_at(model, recipe, planned_card, recipe.padded(seq_len)).fits:
                    rows.append(ModelRow(model, strategy_label(name)))
                    break
        except RecipeError as e:
            refused[model.name] = str(e)
    if len(refused) == len(found):
        raise RecipeError(next(iter(refused.values())))
    return rows, [f"left out: {name}: {said.splitlines()[0]}" for name, said in refused.items()]


class GpusOptions(FormatOptions):
    sources = option(bool, "--sources", "Also where each figure is from.", False)


@command(
    "gpus",
    GpusOptions,
    help="The GPUs that mstplan knows.",
    examples=("mstplan gpus --sources", "mstplan gpus --json"),
)
def gpus(options: GpusOptions) -> None:
    from ..show import listing
    from ..spec.hardware import gpus as all_gpus
    from ..spec.hardware import left_out_notes

    emit(options, listing.gpus(all_gpus(), options.sources, left_out_notes()))


@command(
    "recipes",
    FormatOptions,
    help="Recipes that --like starts from: trainers' defaults, and what is assumed with each.",
    examples=("mstplan recipes", "mstplan recipes --json"),
)
def recipes(options: FormatOptions) -> None:
    from ..show import listing
    from ..step.trainers import TRAINERS

    emit(options, listing.recipes(tuple(TRAINERS.values())))
