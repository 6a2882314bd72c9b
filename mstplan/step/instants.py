"""The named moments of a step at which memory can peak, and the stretches of a step's tape that they belong to."""

from __future__ import annotations

from enum import Enum

from ..words import Word


class Instant(Word):
    """A moment of a step, in the order of a step."""

    END_OF_FORWARD = "end of forward"
    LOSS = "loss"
    LOSS_BACKWARD = "backward of the loss"
    LAST_LAYER = "backward of the last layer"
    MIDDLE_LAYER = "backward of a layer between"
    FIRST_LAYER = "backward of the first layer"
    EMBEDDING = "backward of the embedding"
    OPTIMIZER = "optimizer step"

    @property
    def phase(self) -> str:
        """forward | backward | optimizer: what training loops tell apart."""
        if self in (Instant.END_OF_FORWARD, Instant.LOSS):
            return "forward"
        return "optimizer" if self is Instant.OPTIMIZER else "backward"


class Stage(Enum):
    """A stretch of the forward pass: the instants that its forward and its backward belong to."""

    EMBEDDING = (Instant.END_OF_FORWARD, Instant.EMBEDDING)
    FIRST_LAYER = (Instant.END_OF_FORWARD, Instant.FIRST_LAYER)
    MIDDLE_LAYER = (Instant.END_OF_FORWARD, Instant.MIDDLE_LAYER)
    LAST_LAYER = (Instant.END_OF_FORWARD, Instant.LAST_LAYER)
    LOSS = (Instant.LOSS, Instant.LOSS_BACKWARD)

    def __init__(self, forward: Instant, backward: Instant):
        self.forward, self.backward = forward, backward

    @property
    def is_layer(self) -> bool:
        return self in (Stage.FIRST_LAYER, Stage.MIDDLE_LAYER, Stage.LAST_LAYER)

    @classmethod
    def of_layer(cls, number: int, layers: int) -> Stage:
        """The stage of a layer of so many; a single one is the first."""
        if number == 0:
            return cls.FIRST_LAYER
        return cls.LAST_LAYER if number == layers - 1 else cls.MIDDLE_LAYER


class Pass(Word):
    """Pass of a step."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
