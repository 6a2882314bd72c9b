"""Results files pass through other tools and other hands: whatever became of some lines, the others count, and what is said is fit to be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.cli import output
from mstplan.measuring import measurement, processes, sweep
from mstplan.measuring.measurement import FAILED, OUT_OF_MEMORY, REFUSED
from mstplan.show.formats.as_json import written
from mstplan.spec.catalog import load_config

from ..measuring.measured import CARD, CPU, case, measured
from ..tracing.tiny import TINY, write_tiny
from .conftest import Run, Said

INSTANTS = {"loss": 2**30, "optimizer step": 2**29}
RAW = [
    "null",
    "true",
    "-1",
    "0",
    "1",
    "1.5",
    "1000",
    "1e999",
    "NaN",
    "-Infinity",
    "9" * 30,
    "1" + "0" * 4000,
    "1" + "0" * 5000,
    "[]",
    "{}",
    '["a", {}]',
    '{"": null}',
    "[" * 300 + "]" * 300,
    "[" * 5000 + "]" * 5000,
    "{half",
]
TEXTS = [
    "",
    " ",
    "x",
    "\x1b[31mred",
    "a\nb\r\n\x07",
    "[/bold]",
    "$\\frac{",
    "\ud800",
    "\u202e",
    "\0",
    "é模",
    "x" * 300,
    "\x1b" * 80,
    "e" * 100_000,
    "../../x",
    "cpu",
    "auto",
]
DAMAGES = [*RAW, *map(json.dumps, TEXTS)]


def shipped(number: int) -> dict[str, Any]:
    line = measurement.shipped_results()[0].read_text().splitlines()[number]
    found: dict[str, Any] = json.loads(line)
    return found


def on_card(outcome: str = "ok", error: str = "", **more: Any) -> dict[str, Any]:
    one = case(
        "mst",
        model="smollm2-135m",
        config=load_config("smollm2-135m"),
        device="cuda",
        mlp_chunks=2,
        loss_chunks=2,
        **more,
    )
    m = measured(
        one,
        INSTANTS,
        outcome,
        {**CARD, "sdpa": "flash_attention", "cudnn": 90100, "cuda": "12.8"},
        reserved=2**31,
        context=7,
        workspace=2**23,
    )
    return json.loads(json.dumps({**m.as_data(), "error": error}))  # type: ignore[no-any-return]


LINES = [
    shipped(0),
    on_card(),
    on_card(OUT_OF_MEMORY, "no memory", limit=2**30),
    on_card(REFUSED, "no kernel"),
    on_card(FAILED, "killed\nand more"),
]
GOOD = [shipped(1), on_card(seq_len=768)]


def places(data: object, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in inner:
        yield (*so_far, key)
        yield from places(value, (*so_far, key))


def damaged(line: dict[str, Any], place: tuple[Any, ...]) -> Iterator[str]:
    """The line with that value missing, and with each of DAMAGES in its place."""
    copy = json.loads(json.dumps(line))
    part = copy
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = "@@"
    text = json.dumps(copy)
    for damage in DAMAGES:
        yield text.replace('"@@"', damage)
    del part[place[-1]]
    yield json.dumps(copy)


SHARED = (("case", "config"), ("case", "recipe"), ("environment",))
"""What all lines have alike: the damage of two of them is enough, of one for a model's config."""
ALL = [
    (line, place)
    for line in LINES
    for place in places(line)
    if not any(place[: len(alike)] == alike for alike in SHARED)
]
ALL += [
    (line, place)
    for line in LINES[:2]
    for alike in SHARED[1:]
    for place in places(line)
    if place[: len(alike)] == alike
]
ALL += [(LINES[0], place) for place in places(LINES[0]) if place[:2] == SHARED[0]]
PART = 12
"""Places whose damages share a file: fewer commands."""


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """calibrate keeps a card's constants there, and these make no sense."""
    monkeypatch.setenv("MSTPLAN_HOME", str(tmp_path / "home"))


def strictly(text: str) -> Any:
    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def fit_to_be_read(said: Said) -> None:
    assert said.code in (0, 1, 2) and len(said.err.splitlines()) <= 2
    for line in [*said.out.splitlines(), *said.err.splitlines()]:
        assert line.isprintable() and len(line) <= 350, line[:400]


@pytest.mark.parametrize("start", range(0, len(ALL), PART))
def test_any_value_of_any_line_damaged(run: Run, start: int, tmp_path: Path) -> None:
    lines = [line for place in ALL[start : start + PART] for line in damaged(*place)]
    (tmp_path / "r.jsonl").write_text("\n".join([*lines, *map(json.dumps, GOOD)]) + "\n")
    asked = ("validate", "r.jsonl", "--rung", "formula,calibrated")
    for more in ((), ("--markdown",)):
        said = run(*asked, *more)
        fit_to_be_read(said)
        assert said.code < 2
    told = strictly(run(*asked, "--json").out)
    rows = {(row["model"], row["strategy"], row["seq_len"], row["measured_bytes"]) for row in told["rows"]}
    for good in GOOD:
        where, peaks = good["case"], [peak[0] for peak in good["ranks"][0]["instants"].values()]
        assert (where["model"], where["strategy"], where["seq_len"], max(peaks)) in rows
    said = run("calibrate", "--from", "measurements", "-m", "smollm2-135m", "-o", "here", "r.jsonl")
    fit_to_be_read(said)


@settings(max_examples=80)
@given(draw=st.data())
def test_a_damaged_line_alone(run: Run, tmp_path: Path, draw: st.DataObject) -> None:
    line, place = draw.draw(st.sampled_from([one for one in ALL if one[1][:2] != ("case", "config")]))
    (tmp_path / "r.jsonl").write_text(draw.draw(st.sampled_from(list(damaged(line, place)))) + "\n")
    fit_to_be_read(run("validate", "r.jsonl", "--rung", "formula,calibrated"))


def test_what_the_trace_cannot_follow_is_left_out(run: Run, tmp_path: Path) -> None:
    strange = {**TINY, "rms_norm_eps": "\x1b[31mno number"}
    both = [measured(case(config=config, seq_len=64), {"loss": 2**30}) for config in (strange, TINY)]
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(m.as_data()) for m in both) + "\n")
    said = run("validate", "r.jsonl", "--rung", "trace")
    fit_to_be_read(said)
    assert "1 measured steps" in said.out and "left out: tiny, checkpoint, 64 tokens: " in said.out


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_no_number_is_null(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float
) -> None:
    """Of a child that says so, of an older results file, and in answers."""
    write_tiny(tmp_path)
    child = f"import json, sys; print(json.dumps({{'environment': {CPU!r}, 'outcome': 'ok', 'error': '', 'figures': json.load(open('figures'))}}))"
    one = measured(case(seq_len=64), {"loss": 2**30})
    data = one.as_data()
    data["ranks"][0]["loss"] = loss
    (tmp_path / "figures").write_text(json.dumps(data["ranks"][0]))
    monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, "-c", child))
    monkeypatch.setattr(processes, "CAN_FORK", False)
    monkeypatch.setattr(sweep, "ask_environment", lambda *_: dict(CPU))
    said = run(
        "measure",
        "-m",
        "tiny.json",
        "--seq-len",
        "64",
        "-s",
        "checkpoint",
        "--device",
        "cpu",
        "-o",
        "new.jsonl",
        "--json",
    )
    assert said.code == 0 and strictly(said.out)["results"][0]["ranks"][0]["loss"] is None
    assert strictly((tmp_path / "new.jsonl").read_text())["ranks"][0]["loss"] is None
    (tmp_path / "old.jsonl").write_text(json.dumps(data) + "\n")
    assert measurement.read_results(tmp_path / "old.jsonl").measurements[0].ranks[0].loss is None


def test_json_has_no_number_that_is_none() -> None:
    told = written({"a": [1.5, float("nan"), ("x", {"b": float("-inf")})], "c": {"d": None, "e": 1e300}})
    assert strictly(told) == {"a": [1.5, None, ["x", {"b": None}]], "c": {"d": None, "e": 1e300}}


@pytest.mark.parametrize("text", TEXTS)
def test_complaints_are_printable_and_of_some_length(capsys: pytest.CaptureFixture[str], text: str) -> None:
    output.complain(f"{text.replace(chr(10), '')} is wrong.\nThe way out: {text.replace(chr(10), '')}.")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.isprintable() and len(line) <= 520 for line in said)


def test_names_of_files_are_shown_escaped(run: Run, tmp_path: Path) -> None:
    name = "a\x1b[31mb\u202e"
    said = run("plot", "-m", "gpt2", "--gpu", "h100", "-o", f"{name}.csv", "--points", "2")
    assert said.code == 0 and said.out == "wrote a\\x1b[31mb\\u202e.csv\n" and (tmp_path / f"{name}.csv").exists()
    (tmp_path / f"{name}.jsonl").write_text("{half\n" + json.dumps(GOOD[0]) + "\n")
    said = run("validate", "--results", f"{name}.jsonl", "--rung", "formula")
    fit_to_be_read(said)
    assert "left out: a\\x1b[31mb\\u202e.jsonl: line 1 is damaged" in said.out
    for command in (
        ("max-seq", "--gpu", "h100"),
        ("calibrate", "--from", "measurements", "--results", f"{name}.jsonl"),
    ):
        fit_to_be_read(run(*command, "-m", f"{'o' * 300}/{'n' * 300}"))
        fit_to_be_read(run(*command, "-m", f"{name}/{name}"))


@pytest.mark.parametrize("bad", [b"\xff\xfe{}", b"\x80", b'{"case": "\xc3"}', b"\x00\x01", b"\xef\xbb\xbf{}"])
def test_bytes_that_are_no_text_stop_nothing_else(run: Run, tmp_path: Path, bad: bytes) -> None:
    good = measurement.shipped_results()[0].read_bytes().splitlines()[:2]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([good[0], bad, good[1]]) + b"\n")
    told = run("validate", "m.jsonl", "--rung", "formula", "--json").json
    assert len(told["rows"]) == 2 and any("line 2 is damaged" in line for line in told["left_out"])
