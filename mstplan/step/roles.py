"""What the tensors of a step are for: by this they are found and compared, never by what they are called."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """Purpose of a tensor, where anything but people asks. An intermediate has that of the part of the model it is made in."""

    WEIGHT = "weight"
    TOWER = "weights of a tower that text does not go through"
    GATHERED = "weights gathered from all cards"
    WEIGHT_GRADIENT = "gradient of a weight"
    REDUCED = "gradients on the way to the cards that keep them"
    UPDATE = "temporary of the optimizer"
    WORKSPACE = "workspace of a library"
    CALIBRATION = "what a calibration says beyond the formula"
    BATCH = "token ids or labels"
    POSITIONS = "position ids, tables of the rotary embedding, or a mask"
    EMBEDDING = "intermediate of the embedding"
    LAYER_INPUT = "hidden states between layers"
    NORM = "intermediate of a norm, or of the sums that layers add to"
    ATTENTION = "intermediate of attention"
    MLP = "intermediate of the MLP or the experts"
    LOSS = "intermediate of the LM head and the loss"


class State(NamedTuple):
    """Purpose of an optimizer's state: which of them it is, by torch's keys."""

    torch_keys: tuple[str, ...] = ()


Purpose = Role | State
