"""What torchrun, or a launcher like it, tells each rank by its environment. No torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from ..errors import MeasurementError, quoted

RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What ranks need to find each other. Job schedulers set some of it for purposes of their own."""
_WAY_OUT = "Start the ranks with torchrun, which sets it, or unset it."


class Launch(NamedTuple):
    """This process among others."""

    rank: int
    ranks: int
    local_rank: int  # on this machine
    host: str  # where they meet
    port: int


def read_launch() -> Launch | None:
    """Launch of this process as one of several ranks; None where it is by itself. Raises MeasurementError for what makes no sense."""
    missing = [name for name in RENDEZVOUS_VARIABLES if not os.environ.get(name, "").strip()]
    if missing and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    if missing:
        raise MeasurementError(
            f"torchrun started this process (TORCHELASTIC_RUN_ID), but {missing[0]} is not set in the environment.\n{_WAY_OUT}"
        )
    ranks = _read_number("WORLD_SIZE", 1, 1 << 16)
    rank = _read_number("RANK", 0, ranks - 1)
    local_rank = _read_number("LOCAL_RANK", 0, ranks - 1) if "LOCAL_RANK" in os.environ else rank
    launch = Launch(rank, ranks, local_rank, os.environ["MASTER_ADDR"].strip(), _read_number("MASTER_PORT", 1, 65535))
    return launch if ranks > 1 else None


def _read_number(name: str, low: int, high: int) -> int:
    text = os.environ[name].strip()
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not low <= value <= high:
        raise MeasurementError(
            f"{name} is {quoted(os.environ[name])} in the environment, must be a whole number from {low} to {high}.\n{_WAY_OUT}"
        )
    return value
