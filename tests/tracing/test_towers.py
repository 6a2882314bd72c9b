"""Steps with images by the formula: every instant is the trace's; more images need more, none the text model's; refusals."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import Card, card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.selection import Named
from mstplan.step.steps import named_in_towers
from mstplan.step.towers import TOWERS, uncounted
from mstplan.tracing.tracer import trace, whole_model
from mstplan.train.images import image_of
from mstplan.train.selecting import named_weights
from mstplan.train.step import read_settings

from ..recipes import in_chunks

CARD = card("h100")
EXACT = 0.0005
TEXT: dict[str, Any] = {
    "hidden_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 2816,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
}
VIT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "patch_size": 14,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        "image_token_index": 32000,
        "image_token_id": 32000,
        "mm_tokens_per_image": 64,
        "text_config": {
            **TEXT,
            "model_type": "gemma3_text",
            "query_pre_attn_scalar": 128,
            "sliding_window": 1024,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        "vision_config": {**VIT, "model_type": "siglip_vision_model", "image_size": 448, "vision_use_head": False},
    },
    "llava": {
        "model_type": "llava",
        "image_token_index": 32000,
        "image_token_id": 32000,
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VIT, "model_type": "clip_vision_model", "image_size": 336},
    },
}


def changed(family: str, whole: dict[str, Any] | None = None, **vision: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIGS[family])
    config["vision_config"] |= vision
    return config | (whole or {})


def agree(config: dict[str, Any], recipe: Recipe, seq_len: int, on: Card = CARD) -> None:
    traced = trace(config, recipe, seq_len, workspace=on.gpu.workspaces_bytes, platform=on.platform)
    told = {i.name: i.bytes for i in solve.plan_at(read_config(config, "m"), recipe, on, seq_len).exactly().instants()}
    assert told == {peak.instant: pytest.approx(peak.bytes, rel=EXACT) for peak in traced.peaks}


STRATEGIES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload", "mst-layer")


@pytest.mark.parametrize("strategy_name", STRATEGIES)
@pytest.mark.parametrize("family", sorted(TOWERS))
def test_every_instant(family, strategy_name):
    recipe = in_chunks(strategy(strategy_name, images=3), 4, 4)
    agree(CONFIGS[family], recipe, 4096)


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_a_long_sequence_of_many_images(family):
    agree(CONFIGS[family], strategy("checkpoint", images=16), 16384)


CHANGES = [
    {"images": 1, "batch": 2},
    {"precision": "fp32"},
    {"checkpoint": "selective"},
    {"lora_rank": 16, "checkpoint": "none"},
    {"lora_rank": 16, "quantize": "nf4"},
    {"freeze": ["vision"], "checkpoint": "none"},
    {"train": ["projector"]},
    {"train": ["layers.2.*"]},
]
CHANGES_OF_CLIP = [
    {"images": 1},
    {"batch": 2},
    {"accumulation": 2},
    {"optimizer_in_backward": True},
    {"checkpoint": "every-2"},
    {"lora_rank": 16, "freeze": ["vision"]},
    {"freeze": ["vision", "projector"]},
    {"freeze": ["projector"]},
    {"freeze": ["language_model"]},
    {"freeze": ["norms"]},
    {"freeze": ["embeddings"], "checkpoint": "none"},
    {"train": ["vision"]},
    {"attention": "flash"},
]
"""Beside the others, of a tower with layers that no gradient comes to."""


@pytest.mark.parametrize(
    ("family", "changes"),
    [*product(sorted(TOWERS), CHANGES), *product(["llava"], CHANGES_OF_CLIP)],
    ids=str,
)
def test_every_instant_otherwise_trained(family, changes):
    agree(CONFIGS[family], strategy("checkpoint", **{"images": 2, **changes}), 2048)


@pytest.mark.parametrize(
    ("family", "whole", "vision"),
    [
        (
            "gemma3",
            {"mm_tokens_per_image": 256},
            {"image_size": 896},
        ),  # places beyond what is looked up without sorting
        ("llava", {"vision_feature_select_strategy": "full"}, {}),
        ("llava", {"vision_feature_layer": -1}, {}),
        ("llava", {"vision_feature_layer": 2, "multimodal_projector_bias": False}, {}),
        ("llava", {}, {"hidden_act": "gelu"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy_name", ["standard", "checkpoint"])
def test_other_towers(family, whole, vision, strategy_name):
    agree(changed(family, whole, **vision), strategy(strategy_name, images=2), 2048)


@pytest.mark.parametrize("family", sorted(TOWERS))
@pytest.mark.parametrize("gpu", ["a100-80gb", "rtx-4090"])
def test_other_cards(family, gpu):
    """Whose attention is another kernel's."""
    agree(CONFIGS[family], strategy("standard", images=2), 2048, card(gpu))


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_lengths_whose_masks_are_padded(family):
    agree(CONFIGS[family], strategy("checkpoint", images=2), 2047)


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_weights_have_transformers_names_and_kinds(family):
    config = CONFIGS[family]
    found = named_weights(whole_model(read_settings(config, whole=True), Recipe(images=1), "cuda", False))
    theirs = {w for w in found.values() if not w.names[0].startswith(("model.language_model", "lm_head"))}
    idle = {w for w in theirs if "vision_tower.encoder.layers.3." in w.names[0] or "post_layernorm" in w.names[0]}
    ours: set[Named] = set(named_in_towers(read_config(config, "m")))
    assert ours == theirs and idle < ours


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_tokens_of_an_image_are_those_that_the_step_is_given(family):
    vision = read_config(CONFIGS[family], "m").vision
    assert vision is not None
    image = image_of(read_settings(CONFIGS[family], whole=True), Recipe(images=1))
    encoder = vision.encoder
    assert (vision.tokens, (1, 3, encoder.side, encoder.side)) == (image.tokens, image.pixels)


MODELS = {family: read_config(config, family) for family, config in CONFIGS.items()}


@settings(max_examples=20, deadline=None)
@given(
    family=st.sampled_from(sorted(TOWERS)),
    name=st.sampled_from(STRATEGIES),
    few=st.integers(0, 20),
    more=st.integers(1, 20),
    lora=st.booleans(),
)
def test_more_images_never_need_less(family, name, few, more, lora):
    def peak(images: int) -> int:
        recipe = in_chunks(strategy(name, images=images, lora_rank=16 * lora), 2, 2)
        return solve.plan_at(MODELS[family], recipe, CARD, 32768).peak_bytes

    assert peak(few) < peak(few + more)


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_no_images_are_a_step_on_text_alone(family):
    plans = [
        solve.plan_at(model, strategy("checkpoint"), CARD, 4096)
        for model in (MODELS[family], MODELS[family]._replace(vision=None))
    ]
    assert plans[0].instants() == plans[1].instants() and plans[0].step_seconds == plans[1].step_seconds


def test_a_sequence_is_no_shorter_than_its_images():
    with pytest.raises(RecipeError, match=r"(?s)2 images of 576 tokens take 1,152 .* from 1,153"):
        solve.plan_at(MODELS["llava"], Recipe(images=2), CARD, 1152)
    assert solve.plan_at(MODELS["llava"], Recipe(images=2), CARD, 1153).seq_len == 1153
    small = solve.max_seq(MODELS["llava"], Recipe(images=40), card(memory=4 << 30))
    assert small.s_max == 0 and small.plan.seq_len == 40 * 576 + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kernels": "liger"}, "--kernels liger"),
        ({"attention": "eager"}, "--attention eager"),
        ({"precision": "mixed"}, "--precision mixed"),
        ({"checkpoint": "layer", "offload": "saved-tensors"}, "--offload saved-tensors"),
        ({"checkpoint": "children"}, "--checkpoint children"),
        ({"image_tokens": 99}, "every image is 576 tokens"),
    ],
)
def test_what_is_not_counted_is_refused_by_name(changes, said):
    with pytest.raises(RecipeError, match=said) as refusal:
        solve.plan_at(MODELS["llava"], Recipe(images=2, **changes), CARD, 4096)
    assert str(refusal.value).count("\n") == 1


@pytest.mark.parametrize(
    ("family", "whole", "vision"),
    [
        ("gemma3", {}, {"vision_use_head": True}),
        ("gemma3", {"mm_tokens_per_image": 99}, {}),
        ("gemma3", {}, {"attention_dropout": 0.1}),
        ("llava", {"vision_feature_layer": [-2, -3]}, {}),
        ("llava", {"vision_feature_layer": -9}, {}),
        ("llava", {}, {"model_type": "siglip_vision_model"}),
        ("llava", {}, {"hidden_size": "wide"}),
    ],
    ids=str,
)
def test_towers_that_are_not_laid_out(family, whole, vision):
    assert read_config(changed(family, whole, **vision), "m").vision is None


def test_what_is_counted_of_a_model_without_a_tower():
    assert uncounted(MODELS["llava"]._replace(vision=None), Recipe(images=1)) and not uncounted(
        MODELS["llava"], Recipe()
    )
