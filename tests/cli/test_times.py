"""Expected times as answers have them: in every format, beside the least a step can take, and only where rates were measured."""

from __future__ import annotations

import csv
import io
import re

import pytest

from mstplan import api
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy

from .conftest import Run, Said

H100 = ("-m", "llama3.1-8b", "--gpu", "h100")


def rows_of(said: Said) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(said.out)))


@pytest.mark.parametrize("gpu", ["h100", "h200"])
@pytest.mark.parametrize("model", ["smollm2-135m", "gpt2", "llama3.1-8b", "qwen3-4b"])
def test_tables_fit_the_screen(run: Run, model: str, gpu: str) -> None:
    asked = ("-m", model, "--gpu", gpu)
    answers = [
        run("max-seq", *asked),
        run("plan", *asked, "--seq-len", "1k"),
        run("plan", *asked, "--seq-len", "1k,128k"),
    ]
    for said in answers:
        assert max(len(text.rstrip()) for text in said.out.splitlines()) <= 80
        assert "  step" in said.out and "step: expected from rates measured on h100" in " ".join(said.out.split())
    assert ["tok/s" in said.out for said in answers] == [True, True, False]


def test_every_format_of_max_seq_has_both_times(run: Run) -> None:
    told, rows = run("max-seq", *H100, "--json").json, rows_of(run("max-seq", *H100, "--format", "csv"))
    for result, row in zip(told["results"], rows, strict=True):
        assert 1.2 < result["expected_seconds"] / result["step_seconds"] < 2.5
        assert result["tokens_per_second"] == pytest.approx(result["s_max"] / result["expected_seconds"])
        for name in ("step_seconds", "expected_seconds", "tokens_per_second"):
            assert float(row[name]) == result[name]
    page = run("max-seq", *H100, "--format", "markdown").out
    assert all(f"| {heading} |" in page for heading in ("vs ckpt", "step \\>=", "step", "tok/s"))


def test_a_length_has_both_times(run: Run) -> None:
    told = run("plan", *H100, "--seq-len", "64k", "-s", "mst", "--json").json
    (row,) = told["strategies"]
    assert row["tokens_per_second"] == pytest.approx(65536 / row["expected_seconds"])
    text = " ".join(run("plan", *H100, "--seq-len", "64k", "-s", "mst").out.split())
    assert " s expected, at least " in text and f"{row['tokens_per_second']:,.0f} tokens/s" in text


def test_ways_to_fit_have_times(run: Run) -> None:
    """Of what is fetched from CPU RAM in each layer, where nothing was measured, the least."""
    asked = ("plan", *H100, "--seq-len", "500k", "-s", "mst-offload")
    ways = run(*asked, "--json").json["ways_to_fit"]
    on_host = ["-on-host" in way["options"] for way in ways]
    assert True in on_host and False in on_host
    assert [way["expected_seconds"] is None for way in ways] == on_host
    said = run(*asked).out
    assert re.search("longest  CPU GiB +step  you give up", said) and " >= " in said


@pytest.mark.parametrize("asked", [("--gpu", "a100-80gb"), ("--gpu-mem", "80GB")])
def test_elsewhere_the_bound_stands_alone(run: Run, asked: tuple[str, str]) -> None:
    said = run("max-seq", "-m", "llama3.1-8b", *asked)
    assert "vs ckpt CPU GiB step >=" in said.out and "tok/s" not in said.out and "expected" not in said.out
    told = run("max-seq", "-m", "llama3.1-8b", *asked, "--json").json
    assert all(row["expected_seconds"] is None and row["step_seconds"] > 0 for row in told["results"])
    rows = rows_of(run("max-seq", "-m", "llama3.1-8b", *asked, "--format", "csv"))
    assert {row["expected_seconds"] for row in rows} == {row["tokens_per_second"] for row in rows} == {""}


def test_a_note_says_what_was_not_measured(run: Run) -> None:
    said = run("max-seq", *H100, "--optimizer-on-host")
    assert "No expected step time: of the optimizer or weights in CPU RAM nothing was measured on h100" in " ".join(
        said.out.split()
    )
    assert "tok/s" not in said.out and "step >=" in said.out


def test_some_of_a_table_may_have_no_time(run: Run) -> None:
    """Mistral's window takes a mask from 4,096 tokens on."""
    said = run("plan", "-m", "mistral-7b-v0.1", "--gpu", "h200", "--seq-len", "2k,8k")
    assert ">= " in said.out and max(len(text.rstrip()) for text in said.out.splitlines()) <= 80
    notes = " ".join(said.out.split())
    assert "step: expected from rates" in notes and "attention under an explicit mask" in notes


def test_what_does_not_fit_takes_no_time(run: Run) -> None:
    told = run("max-seq", "-m", "llama3.1-70b", "--gpu", "h100", "--json").json
    assert {row["expected_seconds"] for row in told["results"]} == {None}
    adapters, on_host = told["ways_to_fit"]
    assert adapters["expected_seconds"] and on_host["expected_seconds"] is None
    assert any("of the optimizer or weights in CPU RAM nothing" in note for note in told["notes"])


def test_the_python_interface_has_them() -> None:
    answer = api.max_seq(load_model("llama3.1-8b"), strategy("mst"), card("h100"))
    assert answer.expected_seconds is not None and answer.tokens_per_second is not None
    assert answer.tokens_per_second * answer.expected_seconds == pytest.approx(answer.s_max)
