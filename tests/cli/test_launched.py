"""The environment variables that torchrun and srun set, whoever set them to whatever: an answer, or two lines and exit code 2."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from mstplan import MeasurementError
from mstplan.measuring.launch import RENDEZVOUS_VARIABLES, SLURM_VARIABLES, Launch, first_host, read_launch
from mstplan.measuring.measurement import OUT_OF_MEMORY, Measurement

from ..measuring.measured import measure_by
from ..tracing.tiny import write_tiny
from .conftest import Run, Said

COMPLETE = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
OTHERS = (
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_NAME",
    "ROLE_WORLD_SIZE",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_USE_AGENT_STORE",
    "TORCHELASTIC_ERROR_FILE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
)
EMPTY = ("", " ", "\t\n")
NO_NUMBERS = (
    "abc",
    "-1",
    "1.5",
    "1e3",
    "0x2",
    "2 2",
    "None",
    "\uff17",
    "²",
    "9" * 30,
    "9" * 5000,
    "\x1b[31m2",
    "\udcff",
    "70000",
)
BAD = [(name, value) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT") for value in NO_NUMBERS]
BAD += [
    ("RANK", "2"),
    ("RANK", "7"),
    ("LOCAL_RANK", "2"),
    ("WORLD_SIZE", "0"),
    ("MASTER_PORT", "0"),
    *(("LOCAL_RANK", value) for value in EMPTY),
]

Put = Callable[[dict[str, str]], None]


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Put:
    """Sets these of the variables, and none of the others."""

    def put_(variables: dict[str, str]) -> None:
        for name in (*COMPLETE, *OTHERS, *SLURM_VARIABLES, "SLURM_STEP_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put_


@pytest.fixture
def measure(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Said]:
    measure_by(monkeypatch, lambda case, known: Measurement(case, dict(known), OUT_OF_MEMORY))
    write_tiny(tmp_path)
    return lambda *more: run(
        "measure", "-m", "tiny.json", "--seq-len", "16", "-s", "checkpoint", "--device", "cpu", *more
    )


def test_a_variable_that_stands_alone_means_nothing(put: Put) -> None:
    for name in (*COMPLETE, *OTHERS):
        for value in ("0", "2", *EMPTY, *NO_NUMBERS):
            put({name: value})
            if name == "TORCHELASTIC_RUN_ID":
                with pytest.raises(MeasurementError, match=r"RANK is not set in the environment\.\n"):
                    read_launch()
            else:
                assert read_launch() is None


def test_what_a_launch_lacks(put: Put) -> None:
    """Where torchrun is not said to be at work, job schedulers may have set the rest."""
    for name in RENDEZVOUS_VARIABLES:
        for value in (None, *EMPTY):
            launch = {**COMPLETE, name: value}
            put({key: text for key, text in launch.items() if text is not None})
            with pytest.raises(MeasurementError, match=f"{name} is not set in the environment"):
                read_launch()
            put({key: text for key, text in launch.items() if text is not None and key != "TORCHELASTIC_RUN_ID"})
            assert read_launch() is None


@pytest.mark.parametrize("by_torchrun", [True, False])
def test_a_launch_that_makes_no_sense(put: Put, by_torchrun: bool) -> None:
    for name, value in BAD:
        put(
            {
                key: text
                for key, text in {**COMPLETE, name: value}.items()
                if by_torchrun or key != "TORCHELASTIC_RUN_ID"
            }
        )
        with pytest.raises(MeasurementError, match=f"^{name} is '.*' in the environment, must be") as refused:
            read_launch()
        lines = str(refused.value).splitlines()
        assert len(lines) == 2 and all(line.isprintable() and len(line) < 300 for line in lines)


def test_a_launch(put: Put) -> None:
    put({**COMPLETE, "RANK": "1", "LOCAL_RANK": "1"})
    assert read_launch() == Launch(1, 2, 1, "127.0.0.1", 29500)
    put({**COMPLETE, "RANK": "0", "WORLD_SIZE": "1"})  # one rank is none among others
    assert read_launch() is None
    put({name: COMPLETE[name] for name in RENDEZVOUS_VARIABLES} | {"RANK": "1"})  # by hand
    assert read_launch() == Launch(1, 2, 1, "127.0.0.1", 29500)


SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu-[003-004]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "1",
}


def test_a_launch_by_srun(put: Put) -> None:
    put(SLURM)
    assert read_launch() == Launch(1, 2, 0, "gpu-003", 12000 + (1234567 + 101) % 20000)
    put({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "29500"})
    assert read_launch() == Launch(1, 2, 0, "head", 29500)
    put({**SLURM, **COMPLETE})  # torchrun in a step of srun's
    assert read_launch() == Launch(0, 2, 0, "127.0.0.1", 29500)
    put({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})
    assert read_launch() is None


def test_a_batch_script_by_itself_is_no_rank(put: Put) -> None:
    """sbatch's script has the first task's numbers, but is no task of a step."""
    for name in SLURM_VARIABLES:
        put({key: value for key, value in SLURM.items() if key != name})
        assert read_launch() is None


@pytest.mark.parametrize("name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID"])
@pytest.mark.parametrize("value", [text for text in NO_NUMBERS if text != "70000"])
def test_what_srun_would_not_set(put: Put, name: str, value: str) -> None:
    put({**SLURM, name: value})
    with pytest.raises(MeasurementError, match=f"^{name} is '.*' in the environment, must be") as refused:
        read_launch()
    assert "srun, which sets it" in str(refused.value) and len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node7", "node7"),
        ("gpu-[003-007,9],login1", "gpu-003"),
        ("gpu-[12]", "gpu-12"),
        ("a1,b[2-3]", "a1"),
        ("rack[1-2]n[04,06]", "rack1n04"),
        ("n[1-2].cluster", "n1.cluster"),
        ("", ""),
    ],
)
def test_the_first_machine(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_command(put: Put, measure: Callable[..., Said]) -> None:
    put({"WORLD_SIZE": "abc", "LOCAL_RANK": "abc", "RANK": ""})
    assert measure().code == 0
    assert "torchrun --nproc-per-node 2" in measure("--sharding", "fsdp", "--gpus", "2").err
    put({**COMPLETE, "WORLD_SIZE": "abc"})
    said = measure()
    assert said.code == 2 and "WORLD_SIZE is 'abc'" in said.err and len(said.err.splitlines()) == 2
    put(COMPLETE)
    assert "2 ranks were started" in measure().err


def test_rank_0_refuses_a_foreign_file_before_anything_runs(
    put: Put, measure: Callable[..., Said], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("my own notes")
    put(COMPLETE)
    assert "'notes.txt' holds no results" in measure("--sharding", "fsdp", "-o", "notes.txt").err


def test_ranks_that_cannot_meet(put: Put, measure: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(host: str, _port: int) -> NoReturn:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for host in ("nowhere", "a" * 300, "\x1b[31m"):
        put({**COMPLETE, "RANK": "1", "MASTER_ADDR": host})
        said = measure("--sharding", "fsdp")
        assert (
            said.code == 2 and "do not meet at" in said.err and "Name or service not known" in said.err and not said.out
        )
        assert len(said.err.splitlines()) == 2 and said.err.replace("\n", "").isprintable()
