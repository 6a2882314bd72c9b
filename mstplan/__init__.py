"""How long a sequence can I train on this GPU, with which settings, and how sure is that?

    >>> import mstplan
    >>> model, card = mstplan.load_model("llama3.1-8b"), mstplan.card("h100")
    >>> answer = mstplan.max_seq(model, mstplan.strategy("checkpoint"), card)
    >>> answer.s_max, answer.plan.instant
    (19709, 'backward of the loss')

Sizes are ints in bytes, lengths ints in tokens. Whatever cannot be used raises a subclass of `mstplan.InputError`.
Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import HardwareError as HardwareError, InputError as InputError, ModelError as ModelError, MstplanError as MstplanError, OutputError as OutputError, RecipeError as RecipeError, UnitError as UnitError
    from .plan.advice import ways_to_fit as ways_to_fit
    from .plan.catalog import load_model as load_model, model_names as model_names
    from .plan.hardware import Card as Card, Gpu as Gpu, card as card, find_gpu as find_gpu, gpus as gpus
    from .plan.model import Model as Model
    from .plan.parameters import parameter_count as parameter_count
    from .plan.recipe import STRATEGIES as STRATEGIES, Recipe as Recipe, strategy as strategy
    from .plan.shapes import shapes as shapes
    from .plan.solve import Answer as Answer, Chunks as Chunks, Plan as Plan, max_seq as max_seq, plan_at as plan_at
    from .plan.steps import Entry as Entry, Instant as Instant
    from .units import parse_length as parse_length, parse_memory as parse_memory

__version__ = "0.1.0"

_WHERE = {
    "errors": ("HardwareError", "InputError", "ModelError", "MstplanError", "OutputError", "RecipeError", "UnitError"),
    "plan.advice": ("ways_to_fit",),
    "plan.catalog": ("load_model", "model_names"),
    "plan.hardware": ("Card", "Gpu", "card", "find_gpu", "gpus"),
    "plan.model": ("Model",),
    "plan.parameters": ("parameter_count",),
    "plan.recipe": ("STRATEGIES", "Recipe", "strategy"),
    "plan.shapes": ("shapes",),
    "plan.solve": ("Answer", "Chunks", "Plan", "max_seq", "plan_at"),
    "plan.steps": ("Entry", "Instant"),
    "units": ("parse_length", "parse_memory"),
}
__all__ = [
    "STRATEGIES",
    "Answer",
    "Card",
    "Chunks",
    "Entry",
    "Gpu",
    "HardwareError",
    "InputError",
    "Instant",
    "Model",
    "ModelError",
    "MstplanError",
    "OutputError",
    "Plan",
    "Recipe",
    "RecipeError",
    "UnitError",
    "card",
    "find_gpu",
    "gpus",
    "load_model",
    "max_seq",
    "model_names",
    "parameter_count",
    "parse_length",
    "parse_memory",
    "plan_at",
    "shapes",
    "strategy",
    "ways_to_fit",
]


def __getattr__(name: str) -> object:
    """Names are imported when they are first used: `import mstplan` alone costs next to nothing."""
    from importlib import import_module

    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module("." + module, __name__), name)
    raise AttributeError(f"module 'mstplan' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
