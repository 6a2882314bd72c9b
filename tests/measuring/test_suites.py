"""Suites: which points they name, and what is said of a file that is none."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import MeasurementError, card
from mstplan.measuring import suites
from mstplan.step.recipe import STRATEGIES

H100 = card("h100")


def write(folder: Path, *rows: object) -> Path:
    path = folder / "suite.json"
    path.write_text(json.dumps({"cases": rows}))
    return path


@pytest.mark.parametrize("name", suites.shipped_suites())
def test_suites_that_ship(name):
    found = suites.read_cases(name, H100)
    assert len(found) > 20 and len(
        {(c.model, c.strategy, c.seq_len, c.layers, repr(c.recipe), c.allocator, c.trainer) for c in found}
    ) == len(found)
    assert all(isinstance(c.recipe.loss_chunks, int) and c.seq_len <= 65536 for c in found)


def test_those_that_ship_are_known():
    assert suites.shipped_suites() == ["cards", "quick", "small"]


def test_points_of_a_suite(tmp_path):
    path = write(
        tmp_path,
        {
            "model": "qwen3-4b",
            "seq_len": ["1k", 300],
            "strategy": "mst",
            "layers": 2,
            "recipe": {"batch": 2, "loss_chunks": 4},
        },
        {"model": "gpt2", "seq_len": 64},
    )
    found = suites.read_cases(path, H100, "cpu", 2**34, 5)
    assert [(c.model, c.strategy, c.seq_len) for c in found[:2]] == [
        ("qwen3-4b", "mst", 300),
        ("qwen3-4b", "mst", 1024),
    ]
    assert [c.strategy for c in found[2:]] == list(STRATEGIES)
    one = found[0]
    assert (one.recipe.batch, one.recipe.loss_chunks, one.described.layers, one.device, one.limit, one.steps) == (
        2,
        4,
        2,
        "cpu",
        2**34,
        5,
    )


def test_the_allocator_and_the_trainer_of_a_row(tmp_path):
    one = {"model": "gpt2", "seq_len": 64, "strategy": "checkpoint"}
    path = write(tmp_path, one, {**one, "allocator": "default"}, {**one, "trainer": "transformers"})
    found = suites.read_cases(path, H100)
    assert [(c.allocator, c.trainer) for c in found] == [(None, None), ("default", None), (None, "transformers")]
    assert [(c.allocator, c.trainer) for c in suites.read_cases(path, H100, "cpu")] == [
        (None, None),
        (None, "transformers"),
    ]  # a CPU has no such allocator: the same step once


def test_a_suite_that_ships_leaves_out_what_is_too_large_and_says_so(tmp_path):
    said: list[str] = []
    found = suites.read_cases("cards", card("rtx-4090"), leave_out=said.append)
    assert {c.model for c in found if c.layers is None} == {
        "llama3.2-1b",
        "qwen3-0.6b",
        "gemma2-2b",
        "llama3.1-8b",
    }  # the last with LoRA
    assert "left out: llama3.1-8b, standard: 2 tokens take 59.85 GiB" in "\n".join(said)
    path = write(tmp_path, {"model": "gpt2", "seq_len": 8}, {"model": "llama3.1-405b", "seq_len": 8})
    with pytest.raises(MeasurementError, match=r"case 2: llama3\.1-405b"):
        suites.read_cases(path, H100, leave_out=said.append)


def test_a_file_goes_before_a_suite_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"model": "gpt2", "seq_len": 64, "strategy": "mst"}).rename("quick")
    assert [c.model for c in suites.read_cases("quick", H100)] == ["gpt2"]


GPT2 = {"model": "gpt2", "seq_len": 8}
BAD = [
    ("", "is not valid JSON"),
    ("{", "is not valid JSON"),
    ("[]", "must be an object"),
    ("7", "must be an object"),
    ("{}", "'cases' is missing"),
    ('{"cases": 1}', "cases must be"),
    ('{"cases": []}', "no point to measure"),
    ('{"cases": [], "name": 1}', "there is no 'name'"),
    ([7], "case 1: must be an object"),
    ([GPT2, {"model": "gpt2"}], "case 2: 'seq_len' is missing"),
    ([{"model": "gpt2", "seq_len": []}], "case 1: 'seq_len' is empty"),
    ([{"model": 7, "seq_len": 8}], "case 1: model must be"),
    ([{"model": "gpt2", "seq_len": True}], "case 1: seq_len must be"),
    ([{"model": "gpt2", "seq_len": "x"}], "case 1: cannot read 'x'"),
    ([{**GPT2, "strategy": "fast"}], "case 1: unknown strategy 'fast'"),
    ([{**GPT2, "layer": 1}], "case 1: there is no 'layer' in a suite. Did you mean layers"),
    ([{**GPT2, "layers": 99}], "case 1: --layers 99: gpt2 has 12 layers"),
    ([{**GPT2, "layers": 0}], "case 1: layers must be"),
    ([{**GPT2, "recipe": {"batch": "x"}}], "case 1: batch: must be"),
    ([{**GPT2, "recipe": {"name": 1, "self": 2}}], "case 1: a recipe has no field"),
    ([{**GPT2, "recipe": []}], "case 1: recipe must be"),
    ([{**GPT2, "allocator": "other"}], "case 1: allocator must be 'expandable' or 'default'"),
    ([{**GPT2, "trainer": "trl"}], "case 1: trainer must be 'transformers'"),
    ([{**GPT2, "trainer": "transformers", "strategy": "mst"}], "case 1: transformers' Trainer cannot follow"),
    ([GPT2, {"model": "gpt3", "seq_len": 8}], "case 2: unknown model 'gpt3'"),
    ([{"model": "llama3.1-405b", "seq_len": 8}], "case 1: llama3.1-405b, standard: 2 tokens take"),
    ([{**GPT2, "recipe": {"optimizer_on_host": True}}], "case 1: the step that is run keeps weights and optimizer"),
    ('{"cases": [{"model": "\\ud800", "seq_len": 8}]}', "is not valid JSON"),
    ("[" * 5000, "is not valid JSON"),
]


@pytest.mark.parametrize(("content", "says"), BAD)
def test_what_is_wrong_is_said_with_the_file_and_the_case(tmp_path, content, says):
    path = tmp_path / "suite.json"
    path.write_text(content if isinstance(content, str) else json.dumps({"cases": content}))
    with pytest.raises(MeasurementError) as refused:
        suites.read_cases(path, H100)
    lines = str(refused.value).splitlines()
    assert "suite.json" in lines[0] and says in lines[0] and len(lines) <= 2


def test_an_unknown_suite_names_those_that_ship():
    with pytest.raises(MeasurementError, match=r"(?s)no file 'nope'.*cards, quick, small"):
        suites.read_cases("nope", H100)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
)
FIELDS = st.dictionaries(
    st.sampled_from(["model", "seq_len", "strategy", "layers", "recipe", "x"]),
    JSON | st.sampled_from(["gpt2", 64, "mst"]),
)


@settings(max_examples=100)
@given(rows=st.lists(FIELDS, max_size=2))
def test_any_json_is_a_suite_or_refused(tmp_path, rows):
    path = write(tmp_path, *rows)
    with suppress(MeasurementError):  # anything else is a defect
        assert suites.read_cases(path, H100)
