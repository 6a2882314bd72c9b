"""What a launcher tells each rank by its environment: torchrun, and accelerate and deepspeed, which say the same; or SLURM's srun. No torch."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from ..errors import MeasurementError, quoted

RENDEZVOUS_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What ranks need to find each other. Job schedulers set some of it for purposes of their own."""
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
"""What srun sets for the tasks of a step, and for nothing else in a job (srun's manual, OUTPUT ENVIRONMENT VARIABLES)."""
LAUNCHERS = "torchrun, accelerate launch, deepspeed or srun"
_WAY_OUT = "Start the ranks with {launcher}, which sets it, or unset it."
_FIRST_PORT, _PORTS = 12_000, 20_000  # below those that Linux hands out by itself


class Launch(NamedTuple):
    """This process among others."""

    rank: int
    ranks: int
    local_rank: int  # on this machine
    host: str  # where they meet
    port: int

    def tell_torch(self) -> None:
        """Set what torch reads, as torchrun would."""
        for name, value in zip(
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"),
            (self.rank, self.ranks, self.local_rank, self.host, self.port),
            strict=True,
        ):
            os.environ[name] = str(value)


def read_launch() -> Launch | None:
    """Launch of this process as one of several ranks; None where it is by itself. Raises MeasurementError for what makes no sense."""
    missing = [name for name in RENDEZVOUS_VARIABLES if not _given(name)]
    if missing and "TORCHELASTIC_RUN_ID" not in os.environ:
        return _read_slurm()
    if missing:
        raise MeasurementError(
            f"torchrun started this process (TORCHELASTIC_RUN_ID), but {missing[0]} is not set in the environment.\n"
            + _WAY_OUT.format(launcher="torchrun")
        )
    ranks = _read_number("WORLD_SIZE", 1, 1 << 16)
    rank = _read_number("RANK", 0, ranks - 1)
    local_rank = _read_number("LOCAL_RANK", 0, ranks - 1) if "LOCAL_RANK" in os.environ else rank
    launch = Launch(rank, ranks, local_rank, os.environ["MASTER_ADDR"].strip(), _read_number("MASTER_PORT", 1, 65535))
    return launch if ranks > 1 else None


def _read_slurm() -> Launch | None:
    """Launch as one of several tasks of srun. They meet on the first machine of the step, at a port that its numbers give, unless MASTER_ADDR or
    MASTER_PORT say otherwise."""
    if not all(map(_given, SLURM_VARIABLES)):
        return None
    ranks = _read_number("SLURM_STEP_NUM_TASKS", 1, 1 << 16, "srun")
    if ranks == 1:
        return None
    rank = _read_number("SLURM_PROCID", 0, ranks - 1, "srun")
    local_rank = _read_number("SLURM_LOCALID", 0, ranks - 1, "srun")
    job = _read_number("SLURM_JOB_ID", 0, 999_999_999, "srun")
    step = _read_number("SLURM_STEP_ID", 0, 999_999_999, "srun") if _given("SLURM_STEP_ID") else 0
    host = os.environ["MASTER_ADDR"].strip() if _given("MASTER_ADDR") else first_host(os.environ["SLURM_STEP_NODELIST"])
    own_port = _FIRST_PORT + (job + 101 * step) % _PORTS  # two steps of a job do not meet
    port = _read_number("MASTER_PORT", 1, 65535, "srun") if _given("MASTER_PORT") else own_port
    return Launch(rank, ranks, local_rank, host, port)


def first_host(nodes: str) -> str:
    """The first of SLURM's list of machines: 'gpu-[003-007,9],login1' -> 'gpu-003'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^,\-\]]*)[^\]]*\]", r"\1", first.group() if first else "")


def _given(name: str) -> bool:
    return bool(os.environ.get(name, "").strip())


def _read_number(name: str, low: int, high: int, launcher: str = "torchrun") -> int:
    text = os.environ[name].strip()
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not low <= value <= high:
        raise MeasurementError(
            f"{name} is {quoted(os.environ[name])} in the environment, must be a whole number from {low} to {high}.\n"
            + _WAY_OUT.format(launcher=launcher)
        )
    return value
