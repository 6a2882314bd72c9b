"""Which weights a recipe trains: patterns over the names that model.named_parameters() gives, and words for kinds of weights.

`layers.*.mlp.*` is matched as a shell does (fnmatch): it may begin at any dot of a name, and a module's name stands for all
that is below it. The planner asks for the weights that it lays out, the training step for those of the module itself.
"""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..errors import RecipeError, did_you_mean, quoted
from ..words import Word


class WeightKind(Word):
    """A word for weights of a kind, in place of a pattern."""

    EMBEDDINGS = "embeddings"
    HEAD = "head"
    NORMS = "norms"
    ATTENTION = "attention"
    MLP = "mlp"
    VISION = "vision"
    AUDIO = "audio"
    PROJECTOR = "projector"


TOWERS = frozenset({WeightKind.VISION, WeightKind.AUDIO, WeightKind.PROJECTOR})
"""Kinds of weights that text does not go through."""


Kinds = frozenset[WeightKind]


class Named(NamedTuple):
    """Names and kinds that a weight goes by. Tied embeddings have the names and kinds of both of their uses."""

    names: tuple[str, ...]
    kinds: Kinds


class Selection(NamedTuple):
    """Patterns or words. With `train` only what one of them matches is trained; what one of `freeze` matches is not."""

    train: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.train or self.freeze)

    def trains(self, weight: Named) -> bool:
        chosen = not self.train or any(_matches(pattern, weight) for pattern in self.train)
        return chosen and not any(_matches(pattern, weight) for pattern in self.freeze)

    def of_text(self) -> Selection:
        """What it says of a step on text alone, in which towers wait. Raises RecipeError where it trains nothing else."""
        train = tuple(pattern for pattern in self.train if pattern not in TOWERS)
        if self.train and not train:
            raise RecipeError(
                f"--train {','.join(self.train)}: no gradient comes to a tower in a step on text alone.\nAdd --images, or train more."
            )
        return Selection(train, tuple(pattern for pattern in self.freeze if pattern not in TOWERS))

    def check(self, weights: Collection[Named], model: str) -> None:
        """Check that every pattern matches a weight of the model and some weight is trained. Raises RecipeError."""
        for option, patterns in (("train", self.train), ("freeze", self.freeze)):
            for pattern in patterns:
                if not any(_matches(pattern, weight) for weight in weights):
                    raise RecipeError(_no_match(option, pattern, weights, model))
        if not any(map(self.trains, weights)):
            raise RecipeError(f"train and freeze leave no weight of {model} to train.\nTake a pattern from --freeze.")


def _matches(pattern: str, weight: Named) -> bool:
    if pattern in tuple(WeightKind):
        return pattern in weight.kinds
    globs = (pattern, f"*.{pattern}", f"{pattern}.*", f"*.{pattern}.*")
    return any(fnmatchcase(name, glob) for name in weight.names for glob in globs)


def _no_match(option: str, pattern: str, weights: Collection[Named], model: str) -> str:
    parts = {part for weight in weights for name in weight.names for part in name.split(".") if not part.isdigit()}
    near = did_you_mean(pattern, sorted({*map(str, WeightKind), *parts}))
    words = ", ".join(WeightKind)
    return (
        f"--{option} {quoted(pattern)} matches no weight of {model}.{near}\n"
        f"Write a word ({words}) or a pattern over its weights' names: 'layers.*.mlp.*'."
    )
