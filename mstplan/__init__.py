"""How long a sequence can I train on this GPU, with which settings, and how sure is that?

    >>> import mstplan
    >>> answer = mstplan.max_seq("llama3.1-8b", "checkpoint", "h100")
    >>> answer.s_max, answer.plan.instant
    (19399, 'backward of the loss')

Sizes are ints in bytes, lengths ints in tokens. Whatever cannot be used raises a subclass of `mstplan.InputError`.
Nothing here imports torch but `trace`, `measure` and `minisequence(model)`, which trains what was planned.
"""

import sys

# `python -m mstplan` begins with the current folder on the path, and whatever random.py lies there. Nothing is imported before it is off,
# not even __future__; the package itself is found by then. While it is looked for, `-m` stands where its name will.
_as_module = getattr(sys, "argv", [])[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("mstplan", "-mmstplan")
if _as_module and not getattr(sys.flags, "safe_path", sys.flags.isolated):
    del sys.path[0]

from typing import TYPE_CHECKING  # noqa: E402

if TYPE_CHECKING:
    from .api import max_seq as max_seq
    from .api import measure as measure
    from .api import parameter_count as parameter_count
    from .api import plan_at as plan_at
    from .api import shapes as shapes
    from .api import trace as trace
    from .errors import HardwareError as HardwareError
    from .errors import InputError as InputError
    from .errors import MeasurementError as MeasurementError
    from .errors import MissingError as MissingError
    from .errors import ModelError as ModelError
    from .errors import MstplanError as MstplanError
    from .errors import OutputError as OutputError
    from .errors import RecipeError as RecipeError
    from .errors import UnitError as UnitError
    from .plan.solve import Answer as Answer
    from .plan.solve import Plan as Plan
    from .plan.ways import ways_to_fit as ways_to_fit
    from .spec.catalog import load_model as load_model
    from .spec.catalog import model_names as model_names
    from .spec.hardware import Card as Card
    from .spec.hardware import Gpu as Gpu
    from .spec.hardware import card as card
    from .spec.hardware import find_gpu as find_gpu
    from .spec.hardware import gpus as gpus
    from .spec.model import Model as Model
    from .step.instants import Instant as Instant
    from .step.recipe import STRATEGIES as STRATEGIES
    from .step.recipe import Recipe as Recipe
    from .step.recipe import strategy as strategy
    from .step.steps import Chunks as Chunks
    from .step.steps import Entry as Entry
    from .step.steps import InstantPeak as InstantPeak
    from .train import minisequence as minisequence
    from .units import parse_length as parse_length
    from .units import parse_memory as parse_memory

__version__ = "0.1.0"

PUBLIC = {
    "api": ("max_seq", "measure", "parameter_count", "plan_at", "shapes", "trace"),
    "errors": (
        *("HardwareError", "InputError", "MeasurementError", "MissingError", "ModelError"),
        *("MstplanError", "OutputError", "RecipeError", "UnitError"),
    ),
    "spec.catalog": ("load_model", "model_names"),
    "spec.hardware": ("Card", "Gpu", "card", "find_gpu", "gpus"),
    "spec.model": ("Model",),
    "step.recipe": ("STRATEGIES", "Recipe", "strategy"),
    "plan.solve": ("Answer", "Plan"),
    "step.instants": ("Instant",),
    "step.steps": ("Chunks", "Entry", "InstantPeak"),
    "plan.ways": ("ways_to_fit",),
    "train": ("minisequence",),
    "units": ("parse_length", "parse_memory"),
}
"""The public names, by the module that they live in. tests/test_exports.py holds it against what type checkers see."""
NEEDS_TORCH = "train"
__all__ = sorted(name for module, names in PUBLIC.items() if module != NEEDS_TORCH for name in names)  # noqa: PLE0605
"""All but `minisequence`, so that `from mstplan import *` works without torch."""


def __getattr__(name: str) -> object:
    """Names are imported when they are first used: `import mstplan` alone costs next to nothing."""
    from importlib import import_module

    for module, names in PUBLIC.items():
        if name in names:
            return getattr(import_module("." + module, __name__), name)
    raise AttributeError(f"module 'mstplan' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "minisequence"]
