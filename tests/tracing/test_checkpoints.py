"""Ways to checkpoint, offload and pack: the trace, which runs the models' own code, beside the formula."""

from __future__ import annotations

from typing import Any

import pytest

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.solve import plan_at
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, step
from mstplan.tracing.extend import layers_to_run, make_row
from mstplan.tracing.tracer import trace

H100 = card("h100")
SAVED = {"offload": "saved-tensors"}
MST = {"loss": "chunked", "loss_chunks": 4, "mlp_chunks": 2, "mlp_recompute": True}
CHILDREN = {"checkpoint": "children"}
REENTRANT = {"checkpoint": "reentrant"}
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
    ("llama3.2-1b", 4, {"batch": 3, "padding_free": True, "attention": "flash", **MST}),
    ("llama3.2-1b", 2, {"packing": 4, "attention": "eager", "checkpoint": "layer"}),
    ("gpt2", 2, {**SAVED, "packing": 2, "batch": 2}),
    ("gemma2-2b", 2, {**SAVED, "checkpoint": "layer"}),
    ("qwen3-30b-a3b", 2, {**SAVED, "checkpoint": "every-2"}),
    ("deepseek-v2-lite", 2, {"checkpoint": "selective"}),
    ("llama3.2-1b", 4, REENTRANT),
    ("llama3.2-1b", 4, {**REENTRANT, "precision": "mixed"}),
    ("llama3.2-1b", 4, {**REENTRANT, "batch": 2, "accumulation": 2}),
    ("llama3.2-1b", 4, {**REENTRANT, "offload": "layer-inputs"}),
    ("llama3.2-1b", 4, {**REENTRANT, "offload": "layer-inputs", **MST}),
    ("llama3.2-1b", 4, {**REENTRANT, **MST}),
    ("llama3.2-1b", 4, {**REENTRANT, "lora_rank": 8, "lora_targets": ("all-linear",), "input_gradients": True}),
    ("llama3.2-1b", 4, {**REENTRANT, "lora_rank": 8, "quantize": "int8", "input_gradients": True}),
    ("llama3.2-1b", 4, {**REENTRANT, "freeze": ("mlp",)}),
    ("llama3.2-1b", 4, {**REENTRANT, "sharding": "ddp", "gpus": 4}),
    ("llama3.2-1b", 4, {**REENTRANT, "sharding": "ddp", "gpus": 2, "sequence_parallel": 2}),
    ("llama3.2-1b", 4, {**REENTRANT, "optimizer_in_backward": True}),
    ("llama3.2-1b", 4, {**REENTRANT, "attention": "eager"}),
    ("llama3.2-1b", 4, {**REENTRANT, "attention": "flash", "kernels": "liger", "loss": "liger"}),
    ("granite3.3-2b", 2, {**REENTRANT, "lora_rank": 8, "input_gradients": True}),
    ("gpt2", 2, REENTRANT),
    ("pythia-1.4b", 2, REENTRANT),
    ("gemma2-9b", 12, REENTRANT),
    ("olmo2-7b", 2, REENTRANT),
    ("qwen3-30b-a3b", 2, REENTRANT),
    ("deepseek-v2-lite", 2, REENTRANT),
    ("gpt-oss-20b", 2, REENTRANT),
    ("llama3.2-1b", 4, CHILDREN),
    ("llama3.2-1b", 4, {**CHILDREN, "precision": "mixed"}),
    ("llama3.2-1b", 4, {**CHILDREN, "batch": 2, "accumulation": 2}),
    ("llama3.2-1b", 4, {**CHILDREN, "lora_rank": 8, "lora_targets": ("all-linear",)}),
    ("llama3.2-1b", 4, {**CHILDREN, "freeze": ("mlp",)}),
    ("llama3.2-1b", 4, {**CHILDREN, "optimizer_in_backward": True}),
    ("llama3.2-1b", 4, {**CHILDREN, "attention": "eager"}),
    ("gpt2", 2, CHILDREN),
    ("pythia-1.4b", 2, CHILDREN),
    ("phi4-mini", 8, CHILDREN),
    ("command-r7b", 8, CHILDREN),
    ("gemma2-9b", 12, CHILDREN),
    ("olmo2-7b", 2, CHILDREN),
    ("deepseek-v2-lite", 2, CHILDREN),
    ("gpt-oss-20b", 2, CHILDREN),
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


@pytest.mark.parametrize(
    "fields", [{"checkpoint": "every-3"}, {**SAVED, "checkpoint": "layer"}, SAVED, CHILDREN, REENTRANT]
)
def test_few_layers_say_what_all_say(fields: dict[str, Any]) -> None:
    config = {**load_config("llama3.2-1b"), "num_hidden_layers": 16}
    few, all_layers = (trace(config, Recipe(**fields), 256, whole=whole) for whole in (False, True))
    assert few.peaks == all_layers.peaks and few.host_peak == all_layers.host_peak


def test_a_public_step_with_checkpoints_of_children() -> None:
    """Qwen3-0.6B at 131,072 tokens on 8 GPUs under accelerate's FSDP2: 40.8 GB measured, of which 29 between the children (accelerate issue 3897);
    with whole layers half of it. What it measured with is not known: tensors are within 4%."""
    fields: dict[str, Any] = {
        "precision": "mixed",
        "gpus": 8,
        "sharding": "fsdp",
        "loss": "chunked",
        "loss_chunks": "auto",
    }
    model, on = load_model("qwen3-0.6b"), card("h200")
    children, layers = (
        plan_at(model, Recipe(**fields, checkpoint=how), on, 131072).peak_bytes for how in ("children", "layer")
    )
    assert children == pytest.approx(40.8e9, rel=0.04) and layers < 0.55 * children


def test_layers_that_are_not_checkpointed_are_another_kind() -> None:
    kinds = [("llama", n % 3 == 0) for n in range(30)]
    assert len(layers_to_run(make_row(kinds))) < 20
