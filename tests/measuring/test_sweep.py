"""A sweep's points, and what becomes of each: whatever its process does is an outcome."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mstplan import MeasurementError, RecipeError, card, strategy
from mstplan.measuring import measurement, sweep
from mstplan.measuring.measurement import OK, OUT_OF_MEMORY, card_of, key_of
from mstplan.step.recipe import STRATEGIES
from mstplan.units import GIB

from ..processes import environment
from ..tracing.tiny import write_tiny
from .measured import CPU, case, measured

FP32 = {"precision": "fp32"}


# ---- points ---------------------------------------------------------------------------------------------------------


def test_points_are_every_recipe_at_every_length():
    recipes = {name: STRATEGIES[name] for name in ("checkpoint", "mst")}
    found = sweep.plan_cases("llama3.1-8b", [4096, 1024], recipes, card("h100"), layers=2)
    assert [(c.strategy, c.seq_len) for c in found] == [
        ("checkpoint", 1024),
        ("mst", 1024),
        ("checkpoint", 4096),
        ("mst", 4096),
    ]
    assert all(c.described.layers == 2 and c.layers == 2 and c.model == "llama3.1-8b" for c in found)
    assert all(isinstance(c.recipe.loss_chunks, int) for c in found)
    assert (
        sweep.plan_cases("qwen3-4b", [64], {"mst": strategy("mst", mlp_chunks=4, loss_chunks=8)}, card("h100"))[
            0
        ].recipe.loss_chunks
        == 8
    )


def test_a_model_too_large_is_refused_with_the_number_and_the_slice_that_fits():
    with pytest.raises(
        MeasurementError,
        match=r"2 tokens take 59\.\d+ GiB.*there are 24\.00 GiB\.\nMeasure a slice of it: --layers \d+",
    ) as refused:
        sweep.plan_cases("llama3.1-8b", [1024], {"mst": STRATEGIES["mst"]}, card(memory=24 * GIB))
    fitting = int(str(refused.value).split("--layers ")[1].split()[0])
    assert sweep.plan_cases("llama3.1-8b", [1024], {"mst": STRATEGIES["mst"]}, card(memory=24 * GIB), layers=fitting)
    with pytest.raises(MeasurementError):
        sweep.plan_cases("llama3.1-8b", [1024], {"mst": STRATEGIES["mst"]}, card(memory=24 * GIB), layers=fitting + 2)
    with pytest.raises(MeasurementError, match=r"smaller model\."):
        sweep.plan_cases("llama3.1-405b", [1024], {"mst": STRATEGIES["mst"]}, card(memory=4 * GIB))
    with pytest.raises(MeasurementError, match="--gpu-mem"):
        sweep.plan_cases("llama3.1-405b", [1024], {"mst": STRATEGIES["mst"]}, card(memory=4 * GIB), limit=4 * GIB)


@pytest.mark.parametrize(
    ("model", "precision", "packages", "expected"),
    [
        ("gpt-oss-20b", "bf16", (), "eager"),
        ("gpt-oss-20b", "bf16", ("flash_attn",), "eager"),  # it knows no sinks
        ("gpt-oss-20b", "bf16", ("kernels",), "sdpa"),
        ("gemma2-2b", "bf16", (), "eager"),
        ("gemma2-2b", "bf16", ("flash_attn",), "sdpa"),
        ("llama3.1-8b", "bf16", (), "sdpa"),
    ],
)
def test_attention_that_no_package_brings_is_measured_eager(model, precision, packages, expected, monkeypatch):
    monkeypatch.setattr(sweep, "find_spec", lambda name: name if name in packages else None)
    recipes = {"checkpoint": strategy("checkpoint", precision=precision)}
    (case,) = sweep.plan_cases(model, [512], recipes, card("h200"), layers=2)
    assert case.recipe.attention == expected
    (case,) = sweep.plan_cases(model, [512], recipes, card("h200"), layers=2, device="cpu")
    assert case.recipe.attention == "sdpa"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"optimizer_on_host": True}, "keeps weights and optimizer"),
        ({"loss": "transformers<4.45"}, "before 4.45"),
        ({"loss": "transformers<4.49"}, "before 4.49"),
        ({"loss": "chunked", "mlp_chunks": 2}, "--no-recompute"),
        ({"loss": "chunked", "loss_chunks": 65}, "64 tokens cannot be run in 65 chunks"),
    ],
)
def test_a_recipe_that_no_step_follows_is_refused_before_anything_runs(changes, why):
    recipe = strategy("standard").changed(**changes)
    with pytest.raises(RecipeError, match=why) as refused:
        sweep.plan_cases("smollm2-135m", [64], {"custom": recipe}, card("h100"))
    assert len(str(refused.value).splitlines()) == 2


def test_the_card_of_an_environment():
    assert card_of({"card": "NVIDIA H100 80GB HBM3", "total_bytes": 84932978278}).label == "h100"
    assert card_of({"card": "cpu", "total_bytes": 16 * GIB}).total_bytes == 16 * GIB
    assert card_of({"card": "NVIDIA H200", "total_bytes": 150109945856}, 80 * GIB).total_bytes == 80 * GIB


# ---- what a rerun takes for done ---------------------------------------------------------------------------------------


def test_out_of_memory_is_an_answer():
    found = measured(case(), {}, OUT_OF_MEMORY)
    assert key_of(case(), CPU) in sweep.results_by_key([found]) and key_of(
        case(seq_len=513), CPU
    ) not in sweep.results_by_key([found])


# ---- a sweep that is ended --------------------------------------------------------------------------------------------


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "mstplan",
        "measure",
        "-m",
        str(write_tiny(folder)),
        "--seq-len",
        "64,65,66",
        "-s",
        "checkpoint",
        "--device",
        "cpu",
        "--steps",
        "1",
        "-o",
        str(folder / "results.jsonl"),
        *more,
    ]

    def hear() -> None:  # also where the tests themselves run with interrupts ignored, as in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear,  # noqa: PLW1509  no other thread is here
    )


def wait_for(path: Path, lines: int) -> None:
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"not {lines} results in a minute")


@pytest.mark.slow
def test_a_kill_and_an_interrupt_lose_the_current_point_and_a_rerun_goes_on(tmp_path):
    results = tmp_path / "results.jsonl"
    for n, end in enumerate([signal.SIGKILL, signal.SIGINT], 1):
        sweeping = start(tmp_path)
        wait_for(results, n)
        sweeping.send_signal(end)
        heard, _ = sweeping.communicate(timeout=60)
        assert sweeping.returncode == (-9 if end == signal.SIGKILL else 130)
        assert [m.case.seq_len for m in measurement.read_results(results).measurements] == [64, 65][:n]
    assert f"interrupted; results are kept in {results}" in heard
    sweeping = start(tmp_path)
    said, _ = sweeping.communicate(timeout=120)
    assert sweeping.returncode == 0, said
    found = measurement.read_results(results)
    assert [m.case.seq_len for m in found.measurements] == [64, 65, 66] and not found.skipped
    assert all(m.outcome == OK for m in found.measurements) and "2 of 3 had been measured before" in said


@pytest.mark.slow
def test_an_interrupt_of_several_at_a_time_keeps_those_that_are_done(tmp_path):
    results = tmp_path / "results.jsonl"
    sweeping = start(tmp_path, "--workers", "2")
    wait_for(results, 1)
    sweeping.send_signal(signal.SIGINT)
    said, _ = sweeping.communicate(timeout=60)
    made = measurement.read_results(results)
    assert made.measurements and not made.skipped and all(m.outcome == OK for m in made.measurements)
    assert sweeping.returncode == 130 and "interrupted; results are kept" in said, said
    sweeping = start(tmp_path, "--workers", "2")
    said, _ = sweeping.communicate(timeout=120)
    assert sweeping.returncode == 0, said
    assert sorted(m.case.seq_len for m in measurement.read_results(results).measurements) == [64, 65, 66]
