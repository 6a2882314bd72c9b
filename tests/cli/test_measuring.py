"""`mstplan measure`, `calibrate --from measurements`, `validate`, `published` and the checks as a user meets them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mstplan import kept
from mstplan.measuring import measurement, processes, sweep
from mstplan.measuring.measurement import FAILED, OK, OUT_OF_MEMORY, REFUSED, Case, Measurement, utc_now
from mstplan.measuring.worker import measure_here
from mstplan.plan import calibration
from mstplan.step.recipe import STRATEGIES
from mstplan.tracing.trace import Trace

from ..measuring.measured import CARD, CPU, as_traced, measure_by, measured
from ..tracing.tiny import TINY, write_tiny
from .conftest import Run

ASKED = ("measure", "-m", "tiny.json", "--device", "cpu", "--precision", "fp32")


@pytest.fixture(autouse=True)
def model(run: Run, tmp_path: Path) -> Path:
    """tiny.json in the folder that commands run in."""
    return write_tiny(tmp_path)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Measures within this process, as test_running.py has shown that others do; gives what was measured."""
    made: list[Case] = []

    def run_here(case: Case, known: Mapping[str, Any]) -> Measurement:
        made.append(case)
        try:
            return Measurement(case, dict(known), OK, "", (measure_here(replace(case, steps=1)),), utc_now())
        except MemoryError as e:
            return Measurement(case, dict(known), OUT_OF_MEMORY, str(e), (), utc_now())

    measure_by(monkeypatch, run_here)
    return made


def write(path: Path, *measurements: Measurement) -> None:
    with measurement.appending(path) as append:
        for m in measurements:
            append(m)


# ---- measure ----------------------------------------------------------------------------------------------------------


def test_points_are_told_as_they_come_and_kept(run: Run, quick: list[Case], tmp_path: Path) -> None:
    said = run(*ASKED, "--seq-len", "64,128", "-s", "checkpoint,mst")
    assert said.code == 0
    for stream in (said.err, said.out):  # as they come, and in the report
        assert [line.split()[1:3] for line in stream.splitlines() if line.split()[:1] == ["tiny"]] == [
            ["checkpointing", "64"],
            ["mst", "64"],
            ["checkpointing", "128"],
            ["mst", "128"],
        ]
    assert said.out.startswith("measured: real steps on cpu") and "results: measurements.jsonl" in said.out
    assert said.err.startswith("measuring: real steps on cpu") and max(map(len, said.out.splitlines())) <= 80
    assert len(measurement.read_results(tmp_path / "measurements.jsonl").measurements) == 4
    again = run(*ASKED, "--seq-len", "64,256", "-s", "checkpoint")
    assert len(quick) == 5 and "1 of 2 had been measured before" in again.out
    assert run(*ASKED, "--seq-len", "64", "-s", "checkpoint", "--again").code == 0 and len(quick) == 6


def test_json(run: Run, quick: list[Case]) -> None:
    told = run(*ASKED, "--seq-len", "64", "-s", "checkpoint", "--json").json
    assert (told["schema_version"], told["command"], told["rung"], told["file"]) == (
        1,
        "measure",
        "measurement",
        "measurements.jsonl",
    )
    (row,) = told["results"]
    assert (
        row["outcome"] == "ok"
        and row["case"]["seq_len"] == 64
        and set(row["ranks"][0]["phases"]) == {"forward", "backward", "optimizer"}
    )


def test_one_recipe_and_all_strategies(run: Run, quick: list[Case]) -> None:
    assert run(*ASKED, "--seq-len", "64").code == 0
    assert [case.strategy for case in quick] == ["standard", "checkpoint", "chunked-loss", "mst", "mst-offload"]
    assert run(*ASKED, "--seq-len", "64", "--checkpoint", "2", "--optimizer", "sgd", "--layers", "4").code == 0
    assert (
        quick[-1].strategy,
        quick[-1].recipe.checkpoint,
        quick[-1].recipe.optimizer,
        quick[-1].described.layers,
    ) == ("custom", 2, "sgd", 4)


def test_a_suite(run: Run, quick: list[Case], tmp_path: Path) -> None:
    row = {"model": "tiny.json", "seq_len": [64, "0.25k"], "strategy": "mst", "recipe": {"precision": "fp32"}}
    (tmp_path / "suite.json").write_text(
        json.dumps({"cases": [row, {"model": "tiny.json", "seq_len": 32, "layers": 2}]})
    )
    assert run("measure", "--suite", "suite.json", "--device", "cpu").code == 0
    assert [(c.strategy, c.seq_len, c.layers) for c in quick][:2] == [("mst", 64, None), ("mst", 256, None)]
    assert len(quick) == 2 + len(STRATEGIES)


def test_a_point_that_fails_is_a_result_and_exit_code_1(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measure_by(monkeypatch, lambda case, known: Measurement(case, dict(known), FAILED, "killed (SIGKILL)\nand more"))
    said = run(*ASKED, "--seq-len", "64,128", "-s", "mst")
    assert said.code == 1 and said.out.count("failed: killed (SIGKILL)") == 2 and "and more" not in said.out
    assert len(measurement.read_results(tmp_path / "measurements.jsonl").measurements) == 2


def test_a_point_that_is_refused_is_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by(monkeypatch, lambda case, known: Measurement(case, dict(known), REFUSED, "no flash-attn here"))
    said = run(*ASKED, "--seq-len", "64", "-s", "mst")
    assert said.code == 1 and "refused: no flash-attn here" in said.out


@pytest.mark.parametrize(
    "command", [("measure", "--seq-len", "64", "-s", "mst"), ("check-throughput", "--seq-len", "64")]
)
def test_who_is_refused_as_the_second_writer_leaves_the_file(
    run: Run, quick: list[Case], tmp_path: Path, command: tuple[str, ...]
) -> None:
    with measurement.appending(tmp_path / "r.jsonl") as append:
        said = run(*command, "-m", "tiny.json", "--device", "cpu", "-o", "r.jsonl")
        assert said.code == 2 and "another mstplan is writing to 'r.jsonl'" in said.err and not quick
        append(measured(Case("tiny", "checkpoint", TINY, STRATEGIES["checkpoint"], 64, None, "cpu"), {"loss": 5}))
    assert len(measurement.read_results(tmp_path / "r.jsonl").measurements) == 1


def test_who_interrupts_hears_that_nothing_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> Measurement:
        raise KeyboardInterrupt

    measure_by(monkeypatch, interrupted)
    said = run(*ASKED, "--seq-len", "64", "-s", "mst")
    assert said.code == 130 and "interrupted; nothing was measured yet" in said.err and "goes on from there" in said.err
    write(tmp_path / "r.jsonl", measured(Case("tiny", "mst", TINY, STRATEGIES["mst"], 64, None, "cpu"), {"loss": 5}))
    said = run("check-throughput", "-m", "tiny.json", "--device", "cpu", "--seq-len", "64", "-o", "r.jsonl")
    assert said.code == 130 and "results are kept in r.jsonl" in said.err


def test_points_without_times_are_told_and_measured_again_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[int] = []

    def beside_others(case: Case, known: Mapping[str, Any]) -> Measurement:
        made.append(case.seq_len)
        m = measured(case, {"loss": 2**30}, environment=known)
        return m if case.seq_len == 64 else replace(m, ranks=(m.ranks[0].beside_others(),))

    measure_by(monkeypatch, beside_others)
    asked = (*ASKED, "--seq-len", "64,65", "-s", "mst")
    said = run(*asked, "--workers", "2")
    assert said.code == 0 and "1 not timed" in said.out
    for stream in (said.err, said.out):
        (row,) = [line.split() for line in stream.splitlines() if line.split()[:3] == ["tiny", "mst", "65"]]
        assert row[-2:] == ["-", "-"]
    told = run(*asked, "--workers", "2", "--json").json
    assert made == [64, 65] and (told["measured_before"], told["not_timed"]) == (2, 1)
    run(*asked)
    assert made == [64, 65, 65]


def test_who_begins_processes_anew_says_so(run: Run, quick: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "CAN_FORK", False)
    said = run(*ASKED, "--seq-len", "64", "-s", "checkpoint")
    assert said.code == 0 and "begun anew for each point, which takes seconds: there is no safe fork" in said.out


BAD = [
    ((*ASKED,), "--model and --seq-len"),
    ((*ASKED, "--seq-len", "64", "--workers", "0"), "--workers"),
    ((*ASKED, "--seq-len", "64", "--allocator", "default"), "--allocator: a cpu has no such allocator"),
    (
        ("measure", "-m", "tiny.json", "--seq-len", "64", "--allocator", "native"),
        "unknown --allocator 'native'.\nKnown: expandable, default.",
    ),
    (
        ("measure", "-m", "tiny.json", "--seq-len", "64", "--gpu-mem", "8GB", "--workers", "2"),
        "not with --workers",
    ),
    (
        ("measure", "--suite", "quick", "--allocator", "default"),
        "--allocator cannot be given beside it",
    ),
    ((*ASKED, "--seq-len", "64", "-o", ""), "is a folder"),
    ((*ASKED, "--seq-len", "64", "--loss", "transformers<4.45"), "before 4.45"),
    ((*ASKED, "--seq-len", "64", "-s", "mst", "--chunks", "99"), "64 tokens cannot be run in 99 chunks"),
    ((*ASKED, "--seq-len", "64", "--gpu-mem", "1KB"), "2 tokens take"),
    (("measure", "--suite", "nope", "--device", "cpu"), "there is no file 'nope'"),
    (
        ("check-smax", "-m", "tiny.json", "--device", "cpu", "--gpu-mem", "1KB"),
        "not even 2 tokens are predicted to fit in 1.00 KiB",
    ),
    (
        ("calibrate", "--from", "trace", "-m", "tiny.json", "--results", "ok.jsonl"),
        "--results: nothing to do with --from trace",
    ),
    (
        ("calibrate", "--from", "measurements", "-m", "tiny.json", "--no-cache"),
        "--no-cache: nothing to do with --from measurements",
    ),
    ((*ASKED, "--seq-len", "64,"), "cannot read ''"),
    ((*ASKED, "--seq-len", "64", "-s", "fast"), "unknown strategy 'fast'"),
    ((*ASKED, "--seq-len", "64", "--layers", "7"), "tiny has 6 layers"),
    ((*ASKED, "--seq-len", "64", "--layers", "0"), "--layers"),
    (
        ("measure", "-m", "tiny.json", "--seq-len", "64", "--device", "tpu"),
        "unknown --device 'tpu'. Did you mean cpu?\nKnown: cuda, cpu.",
    ),
    ((*ASKED, "--seq-len", "64", "-o", "no/folder.jsonl"), "cannot write"),
    (("measure", "--suite", "none.json", "--device", "cpu"), "none.json"),
    (("measure", "-m", "llama3.1-405b", "--seq-len", "64", "--device", "cpu"), "2 tokens take"),
    (("validate", "--results", "none.jsonl"), "none.jsonl"),
    (("validate", "--results", "empty.jsonl"), "no measurement"),
    (("published", "--json", "--markdown"), "exclude each other"),
    (("validate", "--json", "--markdown"), "exclude each other"),
    (("published", "--results", "ok.jsonl"), "It is one of mstplan calibrate, validate."),
    (("validate", "--results", "ok.jsonl", "--seq-len", "64"), "validate has no option --seq-len"),
    (("validate", "--results", "ok.jsonl", "-m", "gpt2"), "no measurement of gpt2"),
    (("validate", "--results", "failed.jsonl"), "no measurement"),
    (("validate", "--results", "ok.jsonl,"), "without a name"),
    ((*ASKED, "--seq-len", "64", "-o", "notes.txt"), "holds no results"),
    ((*ASKED, "--seq-len", "64", "--timeout", "inf"), "--timeout"),
    ((*ASKED, "--seq-len", "64", "--gpus", "2", "--sharding", "fsdp"), "torchrun --nproc-per-node 2"),
    (
        ("measure", "--suite", "quick", "--device", "cpu", "--precision", "fp32", "--layers", "2"),
        "--precision, --layers cannot be given",
    ),
    (("measure", "--suite", "no-case.json", "--device", "cpu"), "no point to measure"),
    (("calibrate", "--from", "measurements", "-m", "nope", "--results", "ok.jsonl"), "nope"),
    (("check-smax",), "'--model' / '-m'"),
    (
        ("check-smax", "-m", "tiny.json", "--device", "tpu"),
        "unknown --device 'tpu'. Did you mean cpu?\nKnown: cuda, cpu.",
    ),
    (
        ("check-smax", "-m", "tiny.json", "--device", "cpu", "--gpus", "2", "--sharding", "fsdp"),
        "torchrun --nproc-per-node 2",
    ),
    (
        ("check-throughput", "-m", "tiny.json", "--device", "cpu", "--seq-len", "64", "-s", "checkpoint"),
        "none of these recipes runs in chunks",
    ),
    (
        (
            "check-throughput",
            "-m",
            "tiny.json",
            "--device",
            "cpu",
            "--seq-len",
            "64",
            "--loss",
            "transformers<4.45",
        ),
        "before 4.45",
    ),
    (("check-throughput", "-m", "tiny.json", "--device", "cpu", "--seq-len", "abc"), "cannot read 'abc'"),
    (("measure", "--suite", "sharded.json", "--device", "cpu"), "torchrun --nproc-per-node 2"),
    (("measure", "--suite", "a" * 300, "--device", "cpu"), "there is no file"),
    (("published", "--batch", "4"), "published has no option --batch"),
    (("published", "--rung", "trace", "-s", "mst"), "published has no option --rung"),
    (
        ("validate", "--results", "ok.jsonl", "--device", "cpu", "--again"),
        "validate has no option --device",
    ),
    (
        ("check-smax", "-m", "tiny.json", "--mean", "2%"),
        "check-smax has no option --mean.\nIt is one of mstplan validate.",
    ),
    (("check-smax", "-m", "tiny.json", "--seq-len", "64"), "check-smax has no option --seq-len"),
    (
        ("check-throughput", "-m", "tiny.json", "--seq-len", "64", "--markdown"),
        "check-throughput has no option --markdown",
    ),
    (
        ("validate", "--results", "ok.jsonl", "--rung", "calibrated"),
        "calibrated has no answer for any of these 1 measurements",
    ),
    (("validate", "--results", "notes.txt"), "notes.txt: line 1 is damaged"),
    (("calibrate", "--from", "trace", "-m", "tiny.json", "-s", ""), "unknown strategy ''"),
    ((*ASKED, "--seq-len", "64", "-s", "mst", "--recipe", "mine.json"), "exclude each other"),
    (("check-throughput", "-m", "tiny.json"), "--seq-len"),
    (("validate", "--rung", "formula,traced"), "unknown --rung 'traced'. Did you mean trace, calibrated?"),
    (("measure", "-m", "tiny.json", "--seq-len", "64", "--device", "GPU"), "Write --device cuda."),
    (("calibrate", "--from", "measurement", "-m", "gpt2"), "unknown --from 'measurement'. Did you mean measurements?"),
    (("validate", "--mean", "lots"), "cannot read --mean 'lots'"),
    (("validate", "--rung", "guess"), "unknown --rung 'guess'.\nKnown: formula, calibrated, trace."),
    (("validate", "--results", "ok.jsonl", "--plot", "errors.txt"), "cannot tell from 'errors.txt'"),
    (("calibrate", "--from", "measurements", "-m", "tiny.json", "--results", "ok.jsonl"), "measured on a CPU"),
    (("calibrate", "--from", "measurements", "-m", "tiny.json", "--results", "newer.jsonl"), "schema 2"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_gets_one_or_two_lines(
    run: Run, arguments: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "ask_environment", lambda *_: dict(CPU))
    (tmp_path / "empty.jsonl").touch()
    write(
        tmp_path / "ok.jsonl",
        measured(Case("tiny", "checkpoint", TINY, STRATEGIES["checkpoint"], 64, None, "cpu"), {"loss": 5}),
    )
    write(
        tmp_path / "failed.jsonl",
        measured(Case("tiny", "checkpoint", TINY, STRATEGIES["checkpoint"], 64, None, "cpu"), {}, FAILED),
    )
    (tmp_path / "notes.txt").write_text("my own notes\nno results")
    (tmp_path / "no-case.json").write_text('{"cases": []}')
    (tmp_path / "newer.jsonl").write_text('{"schema_version": 2}\n')
    sharded = {"model": "tiny.json", "seq_len": 64, "strategy": "checkpoint", "recipe": {"gpus": 2, "sharding": "fsdp"}}
    (tmp_path / "sharded.json").write_text(json.dumps({"cases": [sharded]}))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    said = run(*arguments)
    assert said.code == 2 and says in said.err and not said.out and len(said.err.splitlines()) <= 2
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


MOVED = [
    (("--published", "--json"), "mstplan published --json"),
    (
        ("-m", "a b", "--smax", "--gpu-mem", "80GB", "-s", "mst,checkpoint"),
        "mstplan check-smax -m 'a b' --gpu-mem 80GB -s mst,checkpoint",
    ),
    (("--seq-len", "64k", "--throughput"), "mstplan check-throughput --seq-len 64k"),
    (("a.jsonl", "--published", "--smax"), "mstplan published a.jsonl"),
]


@pytest.mark.parametrize(("arguments", "now"), MOVED)
def test_what_was_an_option_of_validate_says_which_command_it_is(
    run: Run, arguments: tuple[str, ...], now: str, tmp_path: Path
) -> None:
    said = run("validate", *arguments)
    assert said.code == 2 and not said.out and [*tmp_path.iterdir()] == [tmp_path / "tiny.json"]
    first, *command = said.err.splitlines()
    assert "is a command of its own now" in first and command == [now]


def test_no_cuda_offers_the_cpu(run: Run) -> None:
    said = run("measure", "-m", "tiny.json", "--seq-len", "64")
    assert said.code == 2 and "no CUDA device" in said.err and "--device cpu" in said.err


@pytest.mark.parametrize("command", [(*ASKED, "--seq-len", "64"), ("check-smax", "-m", "tiny.json", "--device", "cpu")])
def test_no_torch_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    said = run(*command)
    assert said.code == 2 and "pip install 'mstplan[torch]'" in said.err and len(said.err.splitlines()) == 1


# ---- validate -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(run: Run, quick: list[Case]) -> Path:
    run(*ASKED, "--seq-len", "64,128", "-s", "checkpoint,mst", "-o", "r.jsonl")
    return Path("r.jsonl")


def test_errors_of_a_results_file(run: Run, results: Path, tmp_path: Path) -> None:
    said = run("validate", "--results", str(results), "--rung", "trace", "--plot", "errors.png")
    assert (
        said.code == 0
        and "4 measured steps on cpu" in said.out
        and "nothing here was measured on a CUDA device" in " ".join(said.out.split())
    )
    assert all(len(line) <= 80 for line in said.out.splitlines()) and (tmp_path / "errors.png").read_bytes().startswith(
        b"\x89PNG"
    )
    told = run("validate", "--results", str(results), "--rung", "trace,formula", "--json").json
    assert {row["rung"] for row in told["rows"]} == {"trace", "formula"} and not told["beyond_bounds"]
    assert all(abs(row["error"]) < 0.005 for row in told["rows"] if row["rung"] == "trace")
    page = run("validate", "--results", str(results), "--rung", "trace", "--markdown").out
    assert page.startswith("# Predictions held") and "\n| rung | steps | mean |" in page and "\n| trace | 4 | " in page
    table = run("validate", "--results", str(results), "--rung", "trace", "--format", "csv").out.splitlines()
    assert len(table) == 5 and table[0].endswith("predicted_bytes,measured_bytes,error")


def test_without_torch_the_formulas_are_compared(run: Run, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    told = run("validate", str(results), "--json").json
    assert {row["rung"] for row in told["rows"]} == {"formula"} and "pip install 'mstplan[torch]'" in told["not_asked"]
    said = run("validate", str(results))
    assert said.code == 0 and "without the trace: " in said.out and not said.err
    for asked in ("trace", "formula,trace"):
        said = run("validate", str(results), "--rung", asked)
        assert said.code == 2 and "pip install 'mstplan[torch]'" in said.err and not said.out


def test_worse_than_it_may_be_is_exit_code_1(run: Run, tmp_path: Path) -> None:
    from ..tracing.tiny import step_of

    case = Case("tiny", "checkpoint", TINY, STRATEGIES["checkpoint"], 128, None, "cuda")
    write(tmp_path / "off.jsonl", as_traced(case, step_of(case.recipe, 128), 1.2, workspace=0))
    said = run("validate", "--results", "off.jsonl", "--rung", "trace")
    assert said.code == 1 and "trace: worst error -16.67%, more than 3.00%" in said.out
    assert run("validate", "--results", "off.jsonl", "--rung", "trace", "--mean", "0.2", "--worst", "20%").code == 0


def test_a_damaged_line_is_said(run: Run, results: Path, tmp_path: Path) -> None:
    with (tmp_path / results).open("a") as file:
        file.write("{half\n")
    said = run("validate", "--results", str(results), "--rung", "trace")
    assert said.code == 0 and "line 5 is damaged and left out" in said.out and "4 measured steps" in said.out


def test_published_figures(run: Run) -> None:
    said = run("published")
    words = " ".join(said.out.split())
    assert (
        said.code == 0
        and "read as" in words
        and "Nothing is fitted to them" in words
        and "lengths: 17 rows, mean error" in words
    )
    told = run("published", "--json").json["published"]
    assert (
        len(told) > 20
        and {"published_tokens", "predicted_tokens", "tokens_difference", "recipe", "explained_by"} <= told[0].keys()
    )
    assert run("published", "--markdown").out.startswith("# Published measurements")


def test_s_max_is_tried_and_found(run: Run, quick: list[Case], tmp_path: Path) -> None:
    where = ("-m", "tiny.json", "--layers", "2", "--device", "cpu", "--gpu-mem", "60MiB", "-o", "s.jsonl")
    asked = ("check-smax", *where, "--precision", "fp32", "-s", "checkpoint")
    told = run(*asked, "--json").json
    (found,) = told["results"]
    assert (
        told["command"] == "check-smax"
        and found["holds"]
        and abs(found["error"]) <= 0.03
        and found["runs"] < found["fails"]
    )
    assert [point["outcome"] for point in found["points"]][:2] == ["ok", "out of memory"]
    made = len(quick)
    said = run(*asked)
    assert (
        said.code == 0 and len(quick) == made and "S_max of tiny in 60.00 MiB" in said.out
    )  # all of it had been measured


def test_what_chunks_cost_is_measured(run: Run, quick: list[Case]) -> None:
    said = run("check-throughput", "-m", "tiny.json", "--device", "cpu", "--seq-len", "256", "-o", "t.jsonl")
    assert said.code in (0, 1) and "<- recommended" in said.out and "of one chunk" in said.out
    assert re.search(r"^M 1, 1 +mst ", said.err, re.MULTILINE)  # each row tells its chunks while it comes
    assert {case.seq_len for case in quick} == {256} and (1, 1) in {
        (c.recipe.mlp_chunks, c.recipe.loss_chunks) for c in quick
    }


# ---- calibrate ------------------------------------------------------------------------------------------------------------


def test_calibrated_from_measurements(run: Run, quick: list[Case], tmp_path: Path) -> None:
    run(*ASKED, "--seq-len", "64,128,192,256", "-s", "checkpoint,mst", "-o", "r.jsonl")
    said = run("calibrate", "--from", "measurements", "-m", "tiny.json", "--results", "r.jsonl", "-o", "here")
    assert said.code == 0 and "checkpoint" in said.out and "wrote here/tiny.json" in said.out
    found, _ = calibration._read_own(calibration_model(), kept.find_file(tmp_path / "here" / "tiny.json")).calibrations
    assert found.residual < 0.005 and found.provenance["rung"] == "measurement" and found.provenance["card"] == "cpu"
    told = run(
        "calibrate", "--from", "measurements", "-m", "tiny.json", "--results", "r.jsonl", "-o", "here", "--json"
    ).json
    assert told["rung"] == "measurement" and told["calibrations"][0]["strategy"] == "checkpoint"


def calibration_model() -> Any:
    from mstplan.spec.config import read_config

    return read_config(TINY, "tiny")


def test_a_calibration_from_a_card_is_what_the_planner_uses(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))
    from ..tracing.tiny import step_of

    def on_card(tokens: int) -> Measurement:
        case = Case("tiny", "checkpoint", TINY, STRATEGIES["checkpoint"], tokens, None, "cuda")
        trace: Trace = step_of(case.recipe, tokens).with_workspace(2**25)
        return as_traced(
            case, trace, reserved=2**30, device=2**31, context=600 * 2**20, workspace=2**25, environment=CARD
        )

    write(tmp_path / "card.jsonl", *(on_card(tokens) for tokens in (512, 1024, 2048, 4096)))
    said = run("calibrate", "--from", "measurements", "-m", "tiny.json", "--results", "card.jsonl")
    assert said.code == 0 and "600 MiB of CUDA context, measured" in said.out
    asked = ("plan", "-m", "tiny.json", "--gpu", "h100", "--seq-len", "3000", "-s", "checkpoint")
    assert run(*asked, "--torch", "2.13", "--json").json["calibration"] is None  # which runs another attention kernel
    planned = run(*asked, "--torch", "2.10")
    assert planned.code == 0 and "measurements with torch 2.13.0" in planned.out
    told = run(*asked, "--torch", "2.10", "--json").json
    assert told["card"]["context_bytes"] == 600 * 2**20 and told["calibration"]["rung"] == "measurement"


def test_the_measuring_commands_start_without_torch(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the processes that measure import it."""
    import subprocess

    from mstplan.measuring import sweep as _sweep  # noqa: F401

    program = "import sys; from mstplan.show import checking, measuring, validating; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
