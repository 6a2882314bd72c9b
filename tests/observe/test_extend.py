"""A step written down from few layers and few chunks is the step of all of them, event by event."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import profiles
from mstplan.observe.extend import few, patterns_of
from mstplan.observe.tracer import trace
from mstplan.plan.recipe import STRATEGIES, strategy

SMALL = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}


def narrow(name: str, layers: int, **more: Any) -> dict[str, Any]:
    """A shipped configuration with its layers as they are, but narrow and fewer."""
    config = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    return {**config, **SMALL, "num_hidden_layers": layers, **more}


CASES = [("llama3.1-8b", 7), ("gemma2-2b", 8), ("gemma3-1b", 14), ("deepseek-v3", 9), ("gpt-oss-20b", 8)]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(("model", "layers"), CASES)
def test_few_layers_and_chunks_tell_all(model, layers, name):
    recipe = strategy(name)
    if recipe.loss == "chunked":
        recipe = recipe.changed(mlp_chunks=5, loss_chunks=4)
    config = narrow(model, layers, **({"first_k_dense_replace": 2} if model == "deepseek-v3" else {}))
    short, whole = trace(config, recipe, 5000), trace(config, recipe, 5000, whole=True)
    assert len(short.kept) < layers or name in ("checkpoint-sqrt", "mst-offload")
    assert [(p.instant, p.bytes) for p in short.peaks] == [(p.instant, p.bytes) for p in whole.peaks]
    if recipe.loss != "chunked":  # with chunks left out events are fewer, but no moment is higher or lower
        assert short.live == whole.live
    assert short.live[-1] == whole.live[-1]
    assert {(a.category, a.shape, a.dtype, a.copies) for a in short.alive(short.peak.event)} == {
        (a.category, a.shape, a.dtype, a.copies) for a in whole.alive(whole.peak.event)
    }


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=40), st.integers(1, 2))
def test_few_shows_every_pattern(kinds, reach):
    kept = few(kinds, reach)
    patterns = patterns_of(kinds, reach)
    assert {patterns[i] for i in kept} == set(patterns)
    assert len(set(kept)) == len(kept)
    shown = [kinds[i] for i in kept]
    assert patterns_of(shown, reach) == [patterns[i] for i in kept]  # each between the neighbours that it has in the whole


def test_few_of_many_alike():
    assert len(few(["a"] * 126)) == 4
    assert len(few(["a"] * 3 + ["b"] * 58)) <= 8
