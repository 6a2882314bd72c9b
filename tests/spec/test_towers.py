"""Towers and projectors by formula: as many parameters, part for part, as transformers' modules have."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForMultimodalLM, Gemma4AudioConfig, Gemma4VisionConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mstplan.spec.config import read_config
from mstplan.spec.towers import RULES, towers_of
from mstplan.step.parameters import parameter_count
from mstplan.train.text_part import towers_of as towers_in

from ..train.tiny import tiny_config

PUBLISHED: dict[str, dict[str, Any]] = {  # what the published config.json of the towers say
    "google/gemma-3-4b-it": {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 2},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "num_hidden_layers": 2,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
        "vision_config": {
            "depth": 32,
            "hidden_act": "silu",
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_chans": 3,
            "out_hidden_size": 3584,
            "patch_size": 14,
            "spatial_merge_size": 2,
        },
    },
}
MILLIONS = {"google/gemma-3-4b-it": 416.9 + 2.9, "Qwen/Qwen2.5-VL-7B-Instruct": 676.6}


def in_modules(settings: Any) -> tuple[int, int]:
    """Parameters of all, and outside of the text part, as transformers builds it."""
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(settings)
    model.tie_weights()
    inside = set(towers_in(model))
    everything = {name: w.numel() for name, w in model.named_parameters()}
    own = sum(n for name, n in everything.items() if name.startswith(tuple(f"{path}." for path in inside)))
    return sum(everything.values()), own + everything.get("model.image_newline", 0)


TOWERS = {"gemma4": {"vision_config": Gemma4VisionConfig(), "audio_config": Gemma4AudioConfig()}}
"""Towers that a whole has only where its file says so."""


@pytest.mark.parametrize("how", ["default", "tiny"])
@pytest.mark.parametrize("model_type", RULES)
def test_as_many_as_the_modules_have(model_type, how):
    cls = CONFIG_MAPPING[model_type]
    given = TOWERS.get(model_type, {})
    settings = cls(**given) if how == "default" else tiny_config(cls, **given)
    config = json.loads(settings.to_json_string(use_diff=False))
    total, own = in_modules(settings)
    assert sum(tower.parameters for tower in towers_of(config)) == own > 0
    model = read_config(config, "FILE")
    assert parameter_count(model)[0] == total
    assert sum(tower.parameters for tower in model.towers) == own


@pytest.mark.parametrize(
    ("vision", "audio"),
    [
        ({"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "head_dim": 72}, None),
        (
            {"standardize": True, "num_key_value_heads": 6},
            {"subsampling_conv_channels": [16, 8], "conv_kernel_size": 3},
        ),
    ],
    ids=("the large ones", "other sizes"),
)
def test_gemma4s_towers_of_other_sizes(vision, audio):
    text = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 10, "hidden_size_per_layer_input": 0}
    settings = CONFIG_MAPPING["gemma4"](text_config=text, vision_config=vision, audio_config=audio)
    towers = towers_of(json.loads(settings.to_json_string(use_diff=False)))
    assert sum(tower.parameters for tower in towers) == in_modules(settings)[1]
    assert [tower.kind for tower in towers] == ["vision", *(["audio"] if audio else [])]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    model = read_config({**PUBLISHED[name], "architectures": ["XForConditionalGeneration"]}, name)
    assert sum(tower.parameters for tower in model.towers) / 1e6 == pytest.approx(MILLIONS[name], abs=0.1)
    assert [tower.kind for tower in model.towers] == ["vision", "projector"]


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": None},
        {"vision_config": {"model_type": "a_new_tower"}},
        {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": "wide"}},
        {"vision_config": {"model_type": "siglip_vision_model", "vision_use_head": 1}},
        {"vision_config": {"model_type": "siglip_vision_model", "patch_size": -14}},
        {"model_type": "a_new_whole"},
    ],
)
def test_what_no_rule_reads_is_not_counted(change):
    assert towers_of({**PUBLISHED["google/gemma-3-4b-it"], **change}) is None
