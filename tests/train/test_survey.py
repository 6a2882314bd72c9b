"""Every causal-LM class of transformers trains exactly in mini-sequences or is refused by name; README gives the count."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from .survey import Record, difference, float64, line, survey
from .tiny import VOCABULARY

README = Path(__file__).parents[2] / "README.md"
CLAIM = "Of transformers X's N causal-LM classes, N train exactly, N are refused by name"
SHARE = 0.9  # of all classes must train exactly
LAYERS_CLAIM = "With their layers in chunks N train exactly, N are refused by name"
LAYERS_SHARE = 0.8

pytestmark = [pytest.mark.slow, pytest.mark.survey]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(survey())


@pytest.fixture(scope="module")
def classes(records) -> list[Record]:
    return [record for record in records if not record.variant]


def test_no_class_trains_on_something_else(records):
    """Wrong gradients, crashes, and what stays in one piece though chunks were asked for."""
    assert not [line(record) for record in records if record.outcome in ("wrong", "crash", "whole")]


def test_the_comparison_notices():
    """A lost gradient, one that is off in the tenth digit, and tensors for all tokens at once."""
    weights = {"one": torch.ones(4).double(), "other": torch.full((4,), 1e-3).double()}
    assert difference((1.0, dict(weights)), (1.0, weights)) == ""
    assert "loss" in difference((1.0 + 2e-10, weights), (1.0, weights))
    assert "missing" in difference((1.0, {"one": weights["one"]}), (1.0, weights))
    assert "other" in difference((1.0, {**weights, "other": weights["other"] * (1 + 2e-10)}), (1.0, weights))
    with float64() as seen:
        assert torch.zeros(2, 13, VOCABULARY, dtype=torch.float32).float().dtype == torch.float64
    assert seen.whole([26], VOCABULARY) and not seen.whole([24], VOCABULARY)


def test_every_class_is_examined(records):
    """All but two, which transformers 5.23 itself cannot build: their configs contradict themselves, and they have no loss."""
    unbuildable = {record.name: record.reason for record in records if record.outcome == "unbuildable"}
    assert unbuildable.keys() <= {"Gemma4AssistantForCausalLM", "Gemma4UnifiedAssistantForCausalLM"}, unbuildable


def test_refusals_name_the_class_or_say_what_to_set(records):
    refused = [record for record in records if record.outcome == "refused"]
    assert not [line(record) for record in refused if record.name not in record.reason and "Set " not in record.reason]


def test_nearly_all_classes_train_exactly(classes):
    others = [line(record) for record in classes if record.outcome != "exact"]
    assert len(others) <= (1 - SHARE) * len(classes), "\n".join(others)


def test_no_class_trains_on_something_else_with_its_layers_in_chunks(records):
    wrong = [record for record in records if record.layers[0] in ("wrong", "crash", "whole")]
    assert not [f"{record.name}: {record.layers}" for record in wrong]


def test_most_classes_train_exactly_with_their_layers_in_chunks(classes):
    others = [f"{record.name}: {record.layers[1]}" for record in classes if record.layers[0] != "exact"]
    assert len(others) <= (1 - LAYERS_SHARE) * len(classes), "\n".join(others)
    refused = [record for record in classes if record.layers[0] == "refused"]
    assert not [record for record in refused if not re.search("cannot run|cannot be rehearsed|Set ", record.layers[1])]


def as_pattern(claim: str) -> str:
    return r"\s+".join(re.escape(word) for word in claim.split()).replace("X's", r"(\S+)'s").replace("N", r"(\d+)")


def test_readme_gives_the_count(classes):
    claim = re.search(as_pattern(CLAIM), README.read_text())
    of_layers = re.search(as_pattern(LAYERS_CLAIM), README.read_text())
    assert claim is not None and of_layers is not None
    if not transformers.__version__.startswith(claim[1] + "."):
        pytest.skip(f"README gives the count of transformers {claim[1]}, here is {transformers.__version__}")
    outcomes = Counter(record.outcome for record in classes)
    assert [int(n) for n in claim.groups()[1:]] == [len(classes), outcomes["exact"], outcomes["refused"]]
    in_layers = Counter(record.layers[0] for record in classes)
    assert [int(n) for n in of_layers.groups()] == [in_layers["exact"], in_layers["refused"]]
