"""`mstplan trace`, `max-seq --rung trace` and `calibrate` as a user meets them, on a small model."""

from __future__ import annotations

import json
import pickle
import sys
from importlib import metadata
from pathlib import Path

import pytest

from mstplan.tracing import cache, tracer

from ..tracing.tiny import write_tiny
from .conftest import Run

STEP = ("trace", "--model", "tiny.json", "--gpu-mem", "8GB", "--seq-len", "4k", "--strategy")


@pytest.fixture(autouse=True)
def model(run: Run, tmp_path: Path) -> Path:
    """tiny.json in the folder that commands run in."""
    return write_tiny(tmp_path)


def test_trace_tells_peaks_and_tensors(run: Run) -> None:
    said = run(*STEP, "checkpoint")
    assert said.code == 0 and not said.err
    for part in (
        "simulated:",
        "fits: peak",
        "<- peak",
        "backward of the loss",
        "_log_softmax",
        "expandable_segments:True: runs",
        "traced with torch",
    ):
        assert part in said.out
    assert all(len(line) <= 80 for line in said.out.splitlines())


def test_attempts_of_the_rehearsal_are_not_heard(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Cohere's attention and MLP share a norm, which does not run before attention alone: torch logs tracebacks of such attempts."""
    said = run("trace", "--model", "aya-expanse-8b", "--seq-len", "1k", "--strategy", "mst-layer", "--chunks", "4")
    assert said.code == 0 and not said.err and not caplog.records


def test_trace_json_is_one_ledger(run: Run) -> None:
    told = run(*STEP, "mst", "--json").json
    assert (told["schema_version"], told["command"], told["rung"]) == (1, "trace", "trace")
    assert told["peak_bytes"] == max(i["bytes"] for i in told["instants"]) == sum(a["bytes"] for a in told["alive"])
    assert told["allocator"]["expandable_segments"]["allocated"] == told["peak_bytes"]
    assert {"torch", "transformers"} <= told["versions"].keys()


def test_without_a_card_there_is_no_verdict(run: Run, tmp_path: Path) -> None:
    """All but the verdict is what a card's trace has."""
    asked = ("trace", "--model", "tiny.json", "--seq-len", "4k", "--strategy", "mst")
    told, on_a_card = run(*asked, "--json").json, run(*asked, "--gpu", "h100", "--json").json
    for name in ("card", "fits", "budget_bytes", "allocator"):
        assert told[name] is None is not on_a_card[name]
    assert told["strategies"][0]["fits"] is None
    for name in ("peak_bytes", "instant", "instants", "alive", "mlp_chunks", "loss_chunks", "differences"):
        assert told[name] == on_a_card[name]
    said = run(*asked, "--plot", "step.svg")
    assert said.code == 0 and not said.err and "fits" not in said.out.replace("of whether it fits", "")
    assert "on any GPU\n" in said.out and "budget" not in said.out and "allocator with" not in said.out
    assert "budget" not in (tmp_path / "step.svg").read_text()
    assert run(*asked, "--format", "csv").out == run(*asked, "--gpu", "h100", "--format", "csv").out
    assert run(*asked[:-2], "--json").json["strategy"] == "standard"
    for alone in (("--reserve", "1GB"), ("--host-mem", "1GB")):
        assert "no GPU given" in run(*asked, *alone).err
    assert "no GPU given" in run("plan", *asked[1:]).err


def test_cards_that_train_together(run: Run) -> None:
    alone = run(*STEP, "checkpoint", "--json").json
    told = run(*STEP, "checkpoint", "--gpus", "8", "--sharding", "fsdp", "--json").json
    assert (told["recipe"]["gpus"], told["recipe"]["sharding"]) == (8, "fsdp") and told["peak_bytes"] < alone[
        "peak_bytes"
    ]
    assert all(i["formula_bytes"] == pytest.approx(i["bytes"], rel=0.03) for i in told["instants"])
    said = run("max-seq", "-m", "tiny.json", "--gpu-mem", "4GB", "--gpus", "8", "--sharding", "fsdp")
    assert said.code == 0 and "8" in said.out
    for arguments in (("--gpus", "8"), ("--sharding", "fsdp"), ("--gpus", "0", "--sharding", "fsdp")):
        refused = run(*STEP, "checkpoint", *arguments)
        assert refused.code == 2 and len(refused.err.splitlines()) <= 2


def test_exit_code_says_whether_it_fits(run: Run) -> None:
    said = run("trace", "-m", "tiny.json", "--gpu-mem", "2GB", "--seq-len", "256k", "-s", "checkpoint")
    assert said.code == 1 and "does not fit" in said.out and "out of memory" in said.out


def test_plot_and_snapshot_are_written(run: Run, tmp_path: Path) -> None:
    files = ("--plot", "step.png", "--snapshot", "step.pickle")
    said = run(*STEP, "checkpoint", *files)
    assert said.code == 0 and "wrote step.png" in said.out and "wrote step.pickle" in said.out
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")
    assert pickle.loads((tmp_path / "step.pickle").read_bytes())["device_traces"][0]
    again = run(*STEP, "checkpoint", *files)
    assert again.code == 2 and "--force" in again.err
    assert run(*STEP, "checkpoint", *files, "--force").code == 0


def test_a_snapshot_to_json_is_refused_before_anything_is_traced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracer, "trace", pytest.fail)
    assert run(*STEP, "mst", "--snapshot", "step.json", "--no-cache").code == 2


@pytest.mark.parametrize("name", ["step.pkl", "step", "step.dump"])
def test_a_snapshot_may_have_any_other_name(run: Run, tmp_path: Path, name: str) -> None:
    assert run(*STEP, "checkpoint", "--snapshot", name).code == 0
    assert pickle.loads((tmp_path / name).read_bytes())["device_traces"][0]
    said = " ".join(run("trace", "--help").out.replace("\u2502", " ").split())
    assert "a pickle for PyTorch's memory viewer" in said and "https://pytorch.org/memory_viz" in said


def test_max_seq_by_trace(run: Run) -> None:
    asked = ("max-seq", "-m", "tiny.json", "--gpu-mem", "2GB", "--rung", "trace", "--checkpoint", "layer")
    told = run(*asked, "--json").json
    (row,) = told["results"]
    assert told["rung"] == "trace" and row["s_max"] > 1000 and row["peak_bytes"] <= told["budget_bytes"]
    said = run(*asked)
    assert (
        f"{row['s_max']:,}" in said.out
        and "simulated:" in said.out
        and all(len(line) <= 80 for line in said.out.splitlines())
    )


def test_calibrate_and_then_plan(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))
    before = run("plan", "-m", "tiny.json", "--gpu", "h100", "--seq-len", "4k", "-s", "checkpoint", "--json").json
    said = run("calibrate", "--from", "trace", "-m", "tiny.json", "-s", "checkpoint")
    assert said.code == 0 and "tiny" in said.out and (tmp_path / "home" / "calibrations" / "tiny.json").exists()
    asked = ("plan", "-m", "tiny.json", "--gpu", "h100", "--seq-len", "4k", "-s", "checkpoint")
    assert "calibrated from traces" in run(*asked).out
    after = run(*asked, "--json").json
    assert abs(after["peak_bytes"] / before["peak_bytes"] - 1) < 0.005
    monkeypatch.undo()


BAD = [
    ((*STEP, "mst", "--plot", "a.png", "--snapshot", "a.png"), "both name 'a.png'"),
    ((*STEP, "mst", "--snapshot", "step.JSON", "--force"), "writes a pickle, no JSON: 'step.JSON'"),
    ((*STEP, "mst", "--snapshot", "step.json", "--plot", "step.png"), "End the name in .pickle"),
    ((*STEP, "mst", "--loss", "transformers<4.45"), "formula rung"),
    ((*STEP, "mst", "--plot", "step.csv"), "what to draw"),
    ((*STEP, "mst", "--plot", "nowhere/step.png"), "does not exist"),
    (("max-seq", "-m", "tiny.json", "--gpu-mem", "8GB", "--rung", "guess"), "Known: formula, trace"),
    (("calibrate", "--from", "dreams", "-m", "tiny.json"), "Known: trace"),
    (("calibrate", "--from", "trace", "-m", "tiny.json", "-s", "mts"), "unknown strategy"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD)
def test_bad_input_gets_one_or_two_lines(run: Run, arguments: tuple[str, ...], says: str, tmp_path: Path) -> None:
    said = run(*arguments)
    assert said.code == 2 and says in said.err and len(said.err.strip().splitlines()) <= 2 and not said.out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_no_code_for_a_model_is_refused(run: Run, tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "other", model_type="nobody_knows")
    said = run("trace", "-m", str(path), "--gpu-mem", "8GB", "--seq-len", "4k")
    assert said.code == 2 and "nobody_knows" in said.err and len(said.err.strip().splitlines()) <= 2


def test_no_torch_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(cache.metadata, "version", absent)
    said = run(*STEP, "mst")
    assert said.code == 2 and said.err.count("\n") == 1 and "pip install 'mstplan[torch]'" in said.err


def test_ctrl_c_leaves_nothing_half_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tracer, "trace", interrupted)
    said = run(*STEP, "mst", "--plot", "step.png", "--snapshot", "step.pickle")
    assert said.code == 130
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"tiny.json"}


def test_a_kept_trace_is_read_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    write_tiny(tmp_path)
    monkeypatch.chdir(tmp_path)
    code = "import sys; from mstplan import cli\ntry:\n cli.main()\nexcept SystemExit: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, *STEP, "checkpoint", "--json"]
    outs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    told = [json.JSONDecoder().raw_decode(out)[0] for out in outs]
    assert told[0] == told[1] and outs[1].rstrip().endswith("False")


def test_max_seq_by_trace_says_what_would_fit(run: Run) -> None:
    asked = ("max-seq", "-m", "smollm2-135m", "--gpu-mem", "1.5GB", "-s", "mst", "--rung", "trace")
    said, told = run(*asked), run(*asked, "--json").json
    assert said.code == 1 and "Ways to train smollm2-135m on 1.50 GiB GPU, by formula" in said.out
    assert told["ways_to_fit"] and all(way["options"] in said.out for way in told["ways_to_fit"])
