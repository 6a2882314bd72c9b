"""Of a model of text, images and sound the part that reads and writes tokens is built, traced and trained; the rest is left out."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    AutoModelForMultimodalLM,
    FuyuConfig,
    Gemma4AssistantConfig,
    Gemma4Config,
    InstructBlipConfig,
    LlavaConfig,
    ModernBertDecoderConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5OmniConfig,
    Qwen2AudioConfig,
    Qwen3VLMoeConfig,
)

from mstplan.errors import ModelError
from mstplan.spec.config import NO_TOWERS, read_config, waiting
from mstplan.step.parameters import parameter_count
from mstplan.step.recipe import Recipe
from mstplan.tracing.tracer import stand_in_for
from mstplan.train.step import TrainingStep, build_model, read_settings
from mstplan.train.text_part import is_part, text_settings

from .tiny import tiny_config

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
TEXT = {
    "rope_parameters": ROPE,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
}
QWEN_VL = {
    "model_type": "qwen2_5_vl",
    "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 44, "out_hidden_size": 32},
    **TEXT,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
}
"""A flat file, as published."""
PLAIN = Recipe(precision="fp32")


def described(config_cls: type[PreTrainedConfig]) -> dict:
    settings = tiny_config(config_cls)
    return {**json.loads(settings.to_json_string(use_diff=False)), "model_type": settings.model_type}


def built(config: dict) -> torch.nn.Module:
    return build_model(read_settings(config), PLAIN, "eager", "meta")


def parameters(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize(
    ("config_cls", "name"),
    [
        (LlavaConfig, "LlamaForCausalLM"),
        (Gemma4Config, "Gemma4ForCausalLM"),  # though transformers would build the whole
        (Qwen2AudioConfig, "Qwen2ForCausalLM"),
        (Qwen3VLMoeConfig, "Qwen3VLMoeForConditionalGeneration"),  # transformers has no class for its text part alone
        (Qwen2_5OmniConfig, "Qwen2_5OmniThinkerForConditionalGeneration"),
        (InstructBlipConfig, "OPTForCausalLM"),
        (FuyuConfig, "FuyuForCausalLM"),  # a causal language model as it is
        (ModernBertDecoderConfig, "ModernBertDecoderForCausalLM"),
    ],
)
def test_the_class_that_is_built(config_cls, name):
    config = described(config_cls)
    model = built(config)
    assert type(model).__name__ == name
    assert is_part(model, config["model_type"]) is not name.startswith(("Fuyu", "Modern"))
    assert not [weight for weight, _ in model.named_parameters() if "visual" in weight or "audio" in weight]


def test_kinds_of_layers_are_gone_through_in_one_order_in_every_process():
    model = built(described(Gemma4Config))
    assert model.model.unique_layer_types == ["full_attention", "sliding_attention"]
    assert isinstance(model.model._non_persistent_buffers_set, set)


def test_a_drafter_of_a_model_of_images_is_itself():
    settings = tiny_config(Gemma4AssistantConfig)
    assert text_settings(settings) is settings


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_whole_says(tied):
    settings = tiny_config(LlavaConfig)
    settings.tie_word_embeddings, settings.text_config.tie_word_embeddings = tied, not tied
    assert text_settings(settings).tie_word_embeddings is tied
    assert settings.text_config.tie_word_embeddings is not tied  # stays as it is


def test_towers_and_projectors_are_left_out_and_nothing_else():
    model, text = built(QWEN_VL), read_config(QWEN_VL, "m")
    with torch.device("meta"):
        whole = AutoModelForMultimodalLM.from_config(Qwen2_5_VLConfig(**QWEN_VL))
    assert parameters(model) == parameter_count(text._replace(towers=()))[0]
    assert parameters(model) < parameter_count(text)[0] == parameters(whole)
    assert {name for name, _ in whole.named_parameters() if ".visual." not in name} == {
        name for name, _ in model.named_parameters()
    }


def test_it_trains_as_the_whole_does_on_text():
    torch.manual_seed(0)
    part = build_model(read_settings(QWEN_VL), PLAIN, "eager", "cpu")
    whole = AutoModelForMultimodalLM.from_config(Qwen2_5_VLConfig(**QWEN_VL), attn_implementation="eager").train()
    whole.load_state_dict(part.state_dict(), strict=False)
    step = TrainingStep(part, PLAIN, 16)
    loss = step.forward()
    assert loss.item() == pytest.approx(whole(input_ids=step.tokens, labels=step.labels).loss.item(), abs=1e-6)
    assert step.run().isfinite()


def test_what_is_answered_by_the_trace_says_what_of_towers_is_in():
    vl, text = stand_in_for(described(Qwen3VLMoeConfig), "m", "why"), stand_in_for(described(FuyuConfig), "m", "why")
    alone = stand_in_for(described(Qwen3VLMoeConfig), "m", "why", towers=False)
    assert alone.notes == ("answered by the trace: why", NO_TOWERS) and not alone.towers
    assert vl.notes == ("answered by the trace: why", waiting(vl.towers)) and vl.towers
    assert vl.stand_in is not None and alone.stand_in is not None
    assert vl.stand_in.parameters - alone.stand_in.parameters == sum(tower.parameters for tower in vl.towers)
    assert text.notes == ("answered by the trace: why",)


def test_what_has_no_language_model_is_refused_by_its_type():
    with pytest.raises(ModelError, match="cannot build clip"):
        built({"model_type": "clip"})


# --- numbers that JSON has not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0.0, {"__float__": "Infinity"}]], ids=["literal", "tagged"])
def test_infinite_limits_as_published_and_as_transformers_writes_them(limit):
    config = described(type(read_settings({"model_type": "mamba2", "num_heads": 128})))
    assert list(read_settings({**config, "time_step_limit": limit}).time_step_limit) == [0.0, float("inf")]


def test_other_marks_are_a_clear_refusal():
    with pytest.raises(ModelError, match="cannot read this model"):
        read_settings({"model_type": "llama", "rope_theta": {"__float__": "many"}})
