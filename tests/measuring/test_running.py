"""Points measured: whatever a process does is an outcome; several at a time, and what that disturbs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mstplan import MeasurementError
from mstplan.measuring import processes, running, sweep
from mstplan.measuring.measurement import FAILED, OK, OUT_OF_MEMORY, REFUSED, Case, Measurement, key_of
from mstplan.measuring.processes import Processes
from mstplan.tracing.tracer import trace

from ..processes import ROOT
from ..tracing.tiny import TINY
from .measured import CARD, CPU, case, measured

FP32 = {"precision": "fp32"}


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch):
    """Lets a few lines of Python stand in for the process that measures."""

    def stand_in(program: str) -> None:
        monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", program))
        monkeypatch.setattr(processes, "CAN_FORK", False)

    return stand_in


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
    child = subprocess.Popen(processes.WORKER_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
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


def test_no_such_device():
    with pytest.raises(MeasurementError, match="CUDA"):
        sweep.ask_environment("cuda")


def test_the_allocator_of_a_card_is_as_predicted_unless_the_user_set_it_up(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    assert processes.process_environment("cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in processes.process_environment("cpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    assert processes.process_environment("cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"


# ---- forked, or begun anew ------------------------------------------------------------------------------------------------


def test_a_forked_process_measures_what_one_begun_anew_does(monkeypatch):
    one = case("mst", 300, mlp_chunks=3, loss_chunks=4, steps=1, **FP32)
    with Processes() as forking:
        forked = sweep.measure_case(one, CPU, processes=forking)
        facts = sweep.ask_environment("cpu", forking)
        assert forking.why_anew == "" and len(forking._servers) == 1
    monkeypatch.setattr(processes, "CAN_FORK", False)
    with Processes() as beginning:
        anew = sweep.measure_case(one, CPU, processes=beginning)
        assert "no safe fork" in beginning.why_anew and not beginning._servers
    assert forked.outcome == anew.outcome == OK and forked.environment == anew.environment == facts
    assert (forked.instants, forked.ranks[0].static) == (anew.instants, anew.ranks[0].static)


def test_a_forked_process_that_is_killed_is_told_like_any_other():
    slow = case("standard", 200_000, steps=1000)
    with Processes() as forking:
        process = forking.begin((), processes.process_environment("cpu"))
        process.ask((json.dumps(slow.as_data()) + "\n").encode())
        os.kill(process.pid, signal.SIGKILL)
        process.read_all()
        assert process.end()[:2] == (b"", -signal.SIGKILL)
        late = sweep.measure_case(slow, CPU, timeout=0.5, processes=forking)
        assert (late.outcome, late.error) == (FAILED, "took more than 0.5 s") and not forking.why_anew


def test_a_forked_process_ends_with_the_one_that_asked_it():
    with Processes() as forking:
        process = forking.begin((), processes.process_environment("cpu"))
        process.ask((json.dumps(case("standard", 200_000, steps=1000).as_data()) + "\n").encode())
        os.close(process._pipes.input)
        process._pipes.input = os.open(os.devnull, os.O_RDONLY)
        process.read_all()
        assert process.end()[:2] == (b"", 3)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise SystemExit('no module torch')", "no module torch"),
        ("import os; os.kill(os.getpid(), 9)", "the process that forks others has ended"),
        (
            'import socket; socket.socket(fileno=0).send(b\'{"error": "CUDA was initialised by an import"}\')',
            "CUDA was initialised by an import",
        ),
    ],
    ids=["no torch", "kill", "CUDA"],
)
def test_where_none_can_be_forked_they_are_begun_anew(monkeypatch, program, why):
    answers = f"import sys\nif sys.argv[1:] == ['serve']:\n    {program}\nprint('{{}}')"
    monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", answers))
    with Processes() as both:
        process = both.begin((), dict(os.environ))
        process.read_all()
        assert process.end() == (b"{}\n", 0, "") and both.why_anew == why


def test_cuda_that_is_initialised_in_the_process_that_forks_is_refused(monkeypatch):
    program = processes.WORKER_COMMAND[2].replace(
        "main()\n", "import torch\ntorch.cuda.is_initialized = lambda: True\nmain()\n"
    )
    monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", program))
    with pytest.raises(processes.NoForkError, match=r"torch\.cuda\.is_initialized"):
        processes._ForkServer(processes.process_environment("cpu"))


def test_who_forks_may_die_between_two_points():
    with Processes() as forking:
        assert sweep.ask_environment("cpu", forking)["card"] == "cpu"
        (server,) = forking._servers.values()
        os.kill(server._process.pid, signal.SIGKILL)
        server._process.wait()
        assert sweep.ask_environment("cpu", forking)["card"] == "cpu"
        assert forking.why_anew == "the process that forks others has ended"


# ---- several at a time --------------------------------------------------------------------------------------------------------


ANSWER = """
import json, os, sys, time
length, folder = json.loads(sys.stdin.readline())["seq_len"], {folder!r}
begun = lambda: [int(line) for line in open(os.path.join(folder, "begun")).read().split()]
with open(os.path.join(folder, "begun"), "a") as file:
    file.write("%d\\n" % length)
deadline = time.monotonic() + 60
while length in {together!r} and set(begun()) < set({together!r}) and time.monotonic() < deadline:
    time.sleep(0.01)
replies = {replies!r}.get(length, [])
reply = replies[min(begun().count(length), len(replies)) - 1] if replies else {{}}
print(json.dumps({{"environment": {environment!r}, "outcome": "ok", "error": "", "figures": {figures!r}, **reply}}))
"""
"""Tells which points have begun; those that are to be together wait for each other. replies: of the first time, and of later ones."""


def figures_of(one: Case) -> dict[str, Any]:
    data = measured(one, {"loss": 2**20}, environment=CARD, device=2**22, context=2**21, workspace=2**20).as_data()
    figures: dict[str, Any] = json.loads(json.dumps(data["ranks"][0]))
    return figures


@pytest.fixture
def points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Measurement]]:
    """Measures points of so many tokens by a stand-in; in the order of the points."""
    monkeypatch.setattr(processes, "CAN_FORK", False)

    def measure(*lengths: int, workers: int, together: tuple[int, ...] = (), **more: Any) -> list[Measurement]:
        cases = [case(seq_len=length, device="cuda") for length in lengths]
        program = ANSWER.format(
            folder=str(tmp_path),
            environment=CARD,
            figures=figures_of(cases[0]),
            replies=more.pop("replies", {}),
            together=together,
        )
        monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", program))
        with Processes() as anew:
            results = list(running.measure_each(cases, {**CARD, **more}, anew, workers))
        assert sorted(result.number for result in results) == list(range(len(cases)))
        assert all(cases[number] == m.case for number, m in results)
        return [m for _, m in sorted(results, key=lambda result: result.number)]

    return measure


def begun(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "begun").read_text().split()]


def test_one_at_a_time_is_alone_and_timed(points, tmp_path):
    found = points(64, 65, workers=1)
    assert begun(tmp_path) == [64, 65]

    assert all(m.seconds == 0.5 and m.ranks[0].context and m.peak.device for m in found)


def test_what_others_on_the_device_change_is_not_kept(points, tmp_path):
    found = points(64, 65, workers=2, together=(64, 65))
    assert sorted(begun(tmp_path)) == [64, 65]
    for m in found:
        assert m.outcome == OK and m.seconds is m.tokens_per_second is None
        assert m.peak == (2**20, None, None) and m.ranks[0].context is None and m.ranks[0].workspace == 2**20
        assert Measurement.from_data(json.loads(json.dumps(m.as_data()))) == m


def test_points_run_together_only_as_far_as_memory_is_there(points, tmp_path):
    need = running.bytes_needed(case(seq_len=64, device="cuda"), CARD)
    assert [m.seconds for m in points(64, 65, 66, workers=3, total_bytes=int(1.5 * need))] == [0.5] * 3
    assert begun(tmp_path) == [64, 65, 66]


@pytest.mark.parametrize("reply", [{"outcome": OUT_OF_MEMORY, "figures": None}, {"retries": 1}])
def test_memory_that_lacked_beside_others_is_no_answer(points, tmp_path, reply):
    found = points(64, 65, workers=2, together=(64, 65), replies={65: [reply, {}]})
    assert sorted(begun(tmp_path)[:2]) == [64, 65] and begun(tmp_path)[2:] == [65]
    assert [(m.outcome, m.seconds) for m in found] == [(OK, None), (OK, 0.5)]


def test_memory_that_lacks_alone_is_an_answer(points, tmp_path):
    none = {"outcome": OUT_OF_MEMORY, "figures": None}
    found = points(64, 65, workers=2, together=(64, 65), replies={65: [none, none]})
    assert begun(tmp_path).count(65) == 2 and [m.outcome for m in found] == [OK, OUT_OF_MEMORY]


def test_who_stops_listening_ends_all_that_run(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "CAN_FORK", False)
    program = f"import os, time; open(os.path.join({str(tmp_path)!r}, str(os.getpid())), 'w').close(); time.sleep(600)"
    monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", program))

    def interrupt_once_both_run(runs, *_):
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "select", interrupt_once_both_run)
    with Processes() as anew, pytest.raises(KeyboardInterrupt):
        list(running.measure_each([case(seq_len=64), case(seq_len=65)], CPU, anew, workers=2))
    for path in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.name), 0)


# ---- the allocator --------------------------------------------------------------------------------------------------------------


def test_a_case_may_say_which_allocator(monkeypatch):
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "max_split_size_mb:64")
    settings = {
        allocator: running.environment_of(case(device="cuda", allocator=allocator), CARD)["allocator"]
        for allocator in (None, "expandable", "default")
    }
    assert settings == {None: "max_split_size_mb:64", "expandable": "expandable_segments:True", "default": ""}
    assert running.environment_of(case(allocator="default"), CPU) == CPU
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    assert running.environment_of(case(device="cuda"), CARD)["allocator"] == "expandable_segments:True"


def test_an_allocator_without_expandable_segments_needs_more():
    needs = [running.bytes_needed(case(device="cuda", allocator=name), CARD) for name in ("expandable", "default")]
    assert needs[0] < needs[1]


def test_the_allocator_is_told_apart_by_its_settings_not_by_who_set_it():
    said, unsaid = case(device="cuda", allocator="default"), case(device="cuda")
    before = {**CARD, "allocator": ""}
    assert key_of(said, before) == key_of(unsaid, before) != key_of(unsaid, {**CARD, "allocator": "x"})
    assert "allocator" not in unsaid.as_data() and Case.from_data(said.as_data()) == said
    with pytest.raises(ValueError, match="allocator"):
        Case.from_data({**said.as_data(), "allocator": "other"})
