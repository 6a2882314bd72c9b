"""A sweep's points, and what becomes of each: whatever its process does is an outcome."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mstplan import MeasurementError, RecipeError, card, strategy
from mstplan.measuring import measurement, sweep
from mstplan.measuring.measurement import FAILED, OK, OUT_OF_MEMORY, REFUSED, key_of
from mstplan.step.recipe import STRATEGIES
from mstplan.tracing.tracer import trace
from mstplan.units import GIB

from ..processes import ROOT, environment
from ..tracing.tiny import TINY, write_tiny
from .measured import CPU, case, measured

FP32 = {"precision": "fp32"}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch):
    """Lets a few lines of Python stand in for the process that measures."""

    def stand_in(program: str) -> None:
        monkeypatch.setattr(sweep, "WORKER_COMMAND", (sys.executable, "-c", program))

    return stand_in


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
        match=r"2 tokens take 74\.\d+ GiB.*there are 24\.00 GiB\.\nMeasure a slice of it: --layers \d+",
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
        ({"optimizer": "adamw-8bit"}, "no adamw-8bit"),
        ({"optimizer_on_host": True}, "keeps weights and optimizer"),
        ({"loss": "transformers<4.45"}, "before 4.45"),
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
    assert sweep.card_of({"card": "NVIDIA H100 80GB HBM3", "total_bytes": 84932978278}).label == "h100"
    assert sweep.card_of({"card": "cpu", "total_bytes": 16 * GIB}).total_bytes == 16 * GIB
    assert sweep.card_of({"card": "NVIDIA H200", "total_bytes": 150109945856}, 80 * GIB).total_bytes == 80 * GIB


# ---- outcomes -------------------------------------------------------------------------------------------------------


def test_a_step_is_measured_in_a_process_of_its_own():
    one = case("mst", 300, mlp_chunks=3, loss_chunks=4, steps=2, **FP32)
    found = sweep.measure_case(one, CPU)
    assert (found.outcome, found.error, len(found.ranks), found.case) == (OK, "", 1, one)
    told = {peak.instant: peak.bytes for peak in trace(TINY, one.recipe, 300, on="cpu").peaks}
    assert found.instants == {name: pytest.approx(size, rel=0.005) for name, size in told.items()}
    figures = found.ranks[0]
    assert figures.phases["optimizer"].allocated == figures.instants["optimizer step"].allocated
    assert len(figures.step_seconds) == 2 and min(figures.step_seconds) > 0 and 0 < figures.loss < 20
    assert figures.static == pytest.approx(
        3 * sum(w.bytes for w in trace(TINY, one.recipe, 8, on="cpu").weights), rel=0.001
    )
    assert found.environment["card"] == "cpu" and found.environment["torch"].startswith("2.")
    assert key_of(one, found.environment) in sweep.results_by_key([found])


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import os; os.kill(os.getpid(), 11)", "crashed: SIGSEGV"),
        ("import sys; print('no such luck', file=sys.stderr); sys.exit(7)", "ended with code 7. no such luck"),
        ("pass", "ended with code 0"),
    ],
    ids=["kill", "crash", "error", "nothing"],
)
def test_a_process_that_gives_no_answer(process, program, said):
    process(program)
    found = sweep.measure_case(case(), CPU)
    assert found.outcome == FAILED and said in found.error and found.environment == CPU
    assert key_of(case(), CPU) not in sweep.results_by_key([found])  # a rerun tries again


def test_a_process_that_takes_too_long(process):
    process("import time; time.sleep(600)")
    started = time.monotonic()
    found = sweep.measure_case(case(), CPU, timeout=0.5)
    assert found.outcome == FAILED and found.error == "took more than 0.5 s" and time.monotonic() - started < 30


def test_a_process_ends_with_the_one_that_began_it():
    child = subprocess.Popen(sweep.WORKER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write((json.dumps(case("standard", 200_000, steps=1000).as_data()) + "\n").encode())
    child.stdin.close()
    assert child.wait(60) == 3 and child.stdout.read() == b""
    child.stdout.close()


def test_what_cannot_be_run_is_said_and_tried_again():
    unknown = case(config={**TINY, "model_type": "llama", "hidden_act": "no such function"})
    found = sweep.measure_case(unknown, CPU)
    assert found.outcome == REFUSED and "no such function" in found.error
    assert key_of(unknown, found.environment) not in sweep.results_by_key(
        [found]
    )  # what is missing may be installed by then


def test_out_of_memory_is_an_answer():
    found = measured(case(), {}, OUT_OF_MEMORY)
    assert key_of(case(), CPU) in sweep.results_by_key([found]) and key_of(
        case(seq_len=513), CPU
    ) not in sweep.results_by_key([found])


def test_no_such_device():
    with pytest.raises(MeasurementError, match="CUDA"):
        sweep.ask_environment("cuda")


def test_the_allocator_of_a_card_is_as_predicted_unless_the_user_set_it_up(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert sweep.process_environment("cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in sweep.process_environment("cpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert sweep.process_environment("cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


# ---- a sweep that is ended --------------------------------------------------------------------------------------------


def start(folder: Path) -> subprocess.Popen[str]:
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
