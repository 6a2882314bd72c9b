"""What a step asks of its runtime: all of it of the one that it was given, and none of any other."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mstplan.train import minisequence
from mstplan.train.runtime import Runtime
from mstplan.train.wrap import Minisequence

from .families import small_batch, small_model

OF_STEPS = ("keep_attention", "offload_saved", "replicate", "ring_kernel")  # what recipes ask for beyond `minisequence`
METHODS = [name for name in vars(Runtime) if not name.startswith("_") and name not in OF_STEPS]
LAYERS = {"layer_in_chunks": True, "attention_groups": 1, "attention_on_host": True}
EVERYTHING: dict[str, Any] = {"mlp_chunks": 3, "loss_chunks": 4, "checkpoint": "layer", "offload": True, **LAYERS}


class Counting(Runtime):
    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __getattribute__(self, name: str) -> Any:
        if name in METHODS:
            self.asked[name] += 1
        return super().__getattribute__(name)


def trained_on(runtime: Runtime) -> torch.nn.Module:
    """In bf16, with dropout in its MLPs."""
    model = small_model("gpt2", dropout=0.1).bfloat16()
    return Minisequence(runtime)(model, **EVERYTHING)


def make_step(model: torch.nn.Module) -> None:
    ids, labels = small_batch(2, 13)
    model(input_ids=ids, labels=labels).loss.backward()


def test_everything_is_asked_of_the_runtime_that_was_given():
    runtime = Counting()
    make_step(trained_on(runtime))
    assert set(runtime.asked) == set(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_and_of_no_other(name):
    """Runtimes of the plain class fail at whatever is asked of them."""
    model = trained_on(Counting())
    plain = getattr(Runtime, name)

    def not_this(self: Runtime, *args: Any, **kwargs: Any) -> Any:
        assert type(self) is not Runtime, name
        return plain(self, *args, **kwargs)

    with patch.object(Runtime, name, not_this):
        make_step(model)
        with pytest.raises(AssertionError, match=name):
            make_step(minisequence(small_model("gpt2", dropout=0.1).bfloat16(), **EVERYTHING))


def test_a_copy_of_a_model_runs_on_the_same_kind():
    make_step(copied := copy.deepcopy(trained_on(Counting())))
    assert set(copied._mstplan.runtime.asked) >= {"chunk_slices", "draw_seed"}
