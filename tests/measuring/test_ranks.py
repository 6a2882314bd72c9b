"""`mstplan measure` under launchers: two real ranks, one record."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mstplan.measuring import measurement
from mstplan.measuring.measurement import OK, OUT_OF_MEMORY, REFUSED
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

from ..processes import ROOT, environment
from ..tracing.tiny import TINY, write_tiny

PYTHON = (sys.executable, "-m", "mstplan")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
    return port


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "mstplan",
        "measure",
        "--device",
        "cpu",
        "-m",
        str(write_tiny(folder)),
        "--steps",
        "1",
        "-o",
        str(folder / "results.jsonl"),
        *arguments,
    ]
    return subprocess.run(
        command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_two_ranks_make_one_record(tmp_path):
    done = torchrun(tmp_path, "--seq-len", "96", "-s", "checkpoint", "--sharding", "fsdp", "--precision", "fp32")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("checkpoint") == 1
    (found,) = measurement.read_results(tmp_path / "results.jsonl").measurements
    assert (found.outcome, len(found.ranks)) == (OK, 2)
    recipe = strategy("checkpoint", sharding="fsdp", gpus=2, precision="fp32")
    assert found.case.recipe == recipe
    told = trace(TINY, recipe, 96, on="cpu")
    # gloo holds copies of its own of what it gathers and scatters (test_sharding.py names them): at most two of the largest group,
    # that of embedding and head.
    largest = 2 * sum(w.bytes for w in told.weights if w.trained and ".layers." not in w.name)
    assert 0 <= found.peak.allocated - told.peak.bytes <= 2 * largest
    assert found.ranks[0].static == found.ranks[1].static == sum(alive.bytes for alive in told.resident)
    assert found.tokens_per_second == pytest.approx(2 * 96 / found.seconds)


@pytest.mark.slow
def test_the_ranks_of_srun_make_one_record(tmp_path):
    """Two tasks of a step, as SLURM's variables tell them, on this machine."""
    asked = ("--seq-len", "96", "-s", "checkpoint", "--sharding", "ddp", "--precision", "fp32", "--steps", "1")
    command = (*PYTHON, "measure", "--device", "cpu", "-m", str(write_tiny(tmp_path)), *asked, "-o", "results.jsonl")
    common = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_JOB_ID": str(os.getpid()),
        "MASTER_PORT": str(free_port()),
    }
    tasks = []
    for rank in ("0", "1"):
        more = {**common, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        tasks.append(
            subprocess.Popen(command, cwd=tmp_path, env=environment() | more, stdout=subprocess.PIPE, text=True)
        )
    said = [task.communicate(timeout=240)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert [text.count("checkpoint") for text in said] == [1, 0]  # rank 0 says it
    (found,) = measurement.read_results(tmp_path / "results.jsonl").measurements
    assert (found.outcome, len(found.ranks), found.case.recipe.gpus) == (OK, 2, 2)


@pytest.mark.slow
def test_a_rank_that_runs_out_of_memory_does_not_leave_the_others_waiting(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "tests.measuring.one_rank_fails",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = measurement.read_results(tmp_path / "results.jsonl").measurements
    assert (found.outcome, found.error) == (OUT_OF_MEMORY, "rank 1: too much")


@pytest.mark.slow
def test_what_two_ranks_cannot_do(tmp_path):
    many = torchrun(tmp_path, "--seq-len", "96,97", "-s", "checkpoint", "--sharding", "fsdp")
    assert many.returncode and "one with each command" in many.stderr
    refused = torchrun(tmp_path, "--seq-len", "96", "-s", "checkpoint", "--sharding", "fsdp", "--attention", "flash")
    (found,) = measurement.read_results(tmp_path / "results.jsonl").measurements
    assert found.outcome == REFUSED and "flash" in found.error, refused.stderr[-500:]
