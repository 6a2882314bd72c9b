"""A few of the answers that `python -m tests.golden.answers` compares, in every run."""

import json

import pytest

from .answers import FOLDER, differences, formula, trace


@pytest.mark.parametrize("name", ["gemma3-1b", "gpt2", "gpt-oss-20b", "deepseek-v2-lite"])
def test_the_formula_answers_as_before(name):
    before = json.loads((FOLDER / "formula.json").read_text())
    assert not [*differences(json.loads(json.dumps(formula(name))), before[name])]


@pytest.mark.parametrize("name", ["olmo2-7b", "phi3-mini-4k"])
def test_the_trace_answers_as_before(name):
    before = json.loads((FOLDER / "trace.json").read_text())
    assert not [*differences(json.loads(json.dumps(trace(name))), before[name])]


def test_a_difference_is_seen():
    assert [*differences({"a": [1], "b": 2}, {"a": [1], "b": 3, "c": 4}, "x")] == ["x / b: 3 -> 2", "x / c: 4 -> None"]
