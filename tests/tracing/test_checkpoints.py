"""Ways to checkpoint, offload and pack: the trace, which runs the models' own code, beside the formula."""

from __future__ import annotations

from typing import Any

import pytest

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, step
from mstplan.tracing.extend import layers_to_run, make_row
from mstplan.tracing.tracer import trace

H100 = card("h100")
SAVED = {"offload": "saved-tensors"}
MST = {"loss": "chunked", "loss_chunks": 4, "mlp_chunks": 2, "mlp_recompute": True}
CASES: list[tuple[str, int, dict[str, Any]]] = [
    ("llama3.2-1b", 4, {"checkpoint": "selective"}),
    ("llama3.2-1b", 4, {"checkpoint": "selective", "train": ("norms",)}),
    ("llama3.2-1b", 4, {"checkpoint": "selective", "offload": "layer-inputs"}),
    ("llama3.2-1b", 4, {"checkpoint": "selective", **MST}),
    ("llama3.2-1b", 8, {"checkpoint": "every-3"}),
    ("llama3.2-1b", 4, {"checkpoint": "every-2", "train": ("mlp",)}),
    ("llama3.2-1b", 4, SAVED),
    ("llama3.2-1b", 4, {**SAVED, "checkpoint": "layer", **MST}),
    ("llama3.2-1b", 4, {**SAVED, **MST}),
    ("llama3.2-1b", 4, {**SAVED, "freeze": ("embeddings",)}),
    ("llama3.2-1b", 4, {**SAVED, "attention": "flash", "accumulation": 2}),
    ("llama3.2-1b", 4, {"packing": 4, "batch": 2}),
    ("llama3.2-1b", 4, {"packing": 4, "attention": "flash"}),
    ("llama3.2-1b", 4, {"packing": 2, "batch": 3, "padding_free": True, "attention": "flash"}),
    ("llama3.2-1b", 2, {"packing": 4, "attention": "eager", "checkpoint": "layer"}),
    ("gpt2", 2, {**SAVED, "packing": 2, "batch": 2}),
    ("gemma2-2b", 2, {**SAVED, "checkpoint": "layer"}),
    ("qwen3-30b-a3b", 2, {**SAVED, "checkpoint": "every-2"}),
    ("deepseek-v2-lite", 2, {"checkpoint": "selective"}),
]


@pytest.mark.parametrize(("name", "layers", "fields"), CASES)
def test_formula_and_trace_agree(name: str, layers: int, fields: dict[str, Any]) -> None:
    """To the rounding of tensors to blocks: 0.002% of the peak, 0.01% of every instant."""
    recipe, tokens = Recipe(**fields), 1024
    chunks = Chunks(int(recipe.mlp_chunks), int(recipe.loss_chunks))
    model = load_model(name).first(layers)
    layout = layout_of(model, recipe, chunks, tokens, H100.platform)
    formula = step(model, layout, H100.gpu.workspaces_bytes).instants(step_sizes(recipe, tokens, chunks))
    config = dict(load_config(name))
    config["n_layer" if "n_layer" in config else "num_hidden_layers"] = layers
    if config.get("layer_types"):
        config["layer_types"] = list(config["layer_types"])[:layers]
    traced = trace(config, recipe, tokens, workspace=H100.gpu.workspaces_bytes, platform=H100.platform)
    peaks = {peak.instant: peak.bytes for peak in traced.peaks}
    assert max(p.bytes for p in formula) == pytest.approx(traced.peak.bytes, rel=2e-5)
    for instant in formula:
        assert instant.bytes == pytest.approx(peaks[instant.name], rel=1e-4), instant.name


@pytest.mark.parametrize("fields", [{"checkpoint": "every-3"}, {**SAVED, "checkpoint": "layer"}, SAVED])
def test_few_layers_say_what_all_say(fields: dict[str, Any]) -> None:
    config = {**load_config("llama3.2-1b"), "num_hidden_layers": 16}
    few, all_layers = (trace(config, Recipe(**fields), 256, whole=whole) for whole in (False, True))
    assert few.peaks == all_layers.peaks and few.host_peak == all_layers.host_peak


def test_layers_that_are_not_checkpointed_are_another_kind() -> None:
    kinds = [("llama", n % 3 == 0) for n in range(30)]
    assert len(layers_to_run(make_row(kinds))) < 20
