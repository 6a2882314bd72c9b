"""Steps with images, by trace of transformers' whole classes: as on the CPU, allocation by allocation; sizes of images; refusals."""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.measuring.allocations import Allocations, record_step
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import attention_of, stand_in_for, trace, with_images
from mstplan.train.images import FAMILIES, MOST_TILES, _tiles, image_batch, image_of
from mstplan.train.step import TrainingStep, build_model, read_settings

from .test_against_cpu import assert_same_sequence

IMAGE = 1999  # its token id
TEXT: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 512,
    "vocab_size": 2000,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
QWEN = {
    "depth": 3,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "patch_size": 14,
    "out_hidden_size": 256,
}
ROPE = {"rope_type": "default", "mrope_section": [16, 8, 8], "rope_theta": 1e6}


def whole(model_type: str, text: dict[str, Any], vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    parts = {"text_config": {**TEXT, **text}, "vision_config": vision}
    return {"model_type": model_type, "image_token_id": IMAGE, "image_token_index": IMAGE, **parts, **more}


CONFIGS = {
    "llava": whole(
        "llava", {"model_type": "llama"}, {**VIT, "model_type": "clip_vision_model"}, vision_feature_layer=-2
    ),
    "gemma3": whole(
        "gemma3",
        {"model_type": "gemma3_text", "query_pre_attn_scalar": 64},
        {**VIT, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
    ),
    "qwen2_vl": whole(
        "qwen2_vl",
        {"model_type": "qwen2_vl_text", "rope_parameters": ROPE},
        {"depth": 3, "embed_dim": 64, "hidden_size": 256, "num_heads": 4},
    ),
    "qwen2_5_vl": whole(
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
        {**QWEN, "fullatt_block_indexes": [1]},
    ),
    "qwen3_vl": whole(
        "qwen3_vl",
        {"model_type": "qwen3_vl_text", "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        {**QWEN, "deepstack_visual_indexes": [1, 2]},
    ),
    "mistral3": whole(
        "mistral3", {"model_type": "mistral"}, {**VIT, "model_type": "pixtral", "head_dim": 16, "image_size": 560}
    ),
    "llama4": whole(
        "llama4",
        {"model_type": "llama4_text", "num_local_experts": 4, "intermediate_size_mlp": 512},
        {
            **VIT,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "vision_output_dim": 64,
            "intermediate_size": 256,
        },
    ),
}
FIXED = ("llava", "gemma3", "llama4")


def with_two(family: str, name: str = "standard", **fields: Any) -> Recipe:
    tokens = {} if family in FIXED else {"image_tokens": 64}
    return strategy(name, images=2, **tokens, **fields)


def really(config: dict[str, Any], recipe: Recipe, seq_len: int) -> Allocations:
    settings = read_settings(config, whole=True)
    torch.manual_seed(0)
    model = build_model(settings, recipe, attention_of(recipe, settings, "cpu"), "cpu")
    step = TrainingStep(model, recipe, seq_len)
    step.run()  # which makes the optimizer's states
    return record_step(step)


@pytest.mark.parametrize("name", ["standard", "checkpoint"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl"])
def test_as_on_the_cpu(family, name):
    recipe = with_two(family, name, precision="fp32")
    traced, real = trace(CONFIGS[family], recipe, 1055, on="cpu", whole=True), really(CONFIGS[family], recipe, 1055)
    assert_same_sequence(traced, real)
    assert sum(alive.bytes for alive in traced.resident) == real.resident
    peaks, there = {p.instant: p.bytes for p in traced.peaks}, real.peaks()
    known = "backward of the embedding"  # where the CPU counts the places of image tokens (KNOWN_ON_CPU)
    off = {instant: size / there[instant] - 1 for instant, size in peaks.items() if instant != known}
    assert set(peaks) == set(there) and all(abs(share) < 0.001 for share in off.values()), off


def test_a_frozen_tower_as_on_the_cpu():
    recipe = with_two("qwen2_vl", precision="fp32", freeze=("vision",))
    traced, real = (
        trace(CONFIGS["qwen2_vl"], recipe, 599, on="cpu", whole=True),
        really(CONFIGS["qwen2_vl"], recipe, 599),
    )
    assert_same_sequence(traced, real)
    assert sum(alive.bytes for alive in traced.resident) == real.resident
    assert {w.name for w in traced.weights if "merger" in w.name and w.trained}
    assert not {w.name for w in traced.weights if "blocks" in w.name and w.trained}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() & CONFIGS.keys()))
def test_few_layers_equal_all_of_them(family):
    """Also where a tower's features are added behind the first layers (Qwen3-VL)."""
    config = {**CONFIGS[family], "text_config": {**CONFIGS[family]["text_config"], "num_hidden_layers": 9}}
    recipe = with_two(family, "checkpoint")
    few, all_of_them = trace(config, recipe, 1055), trace(config, recipe, 1055, whole=True)
    assert few.live == all_of_them.live
    assert few.weights == all_of_them.weights and few.states == all_of_them.states
    assert family in ("gemma3", "llama4") or len(few.kept) < 9


def bytes_of(found: Trace, word: str) -> int:
    return sum(w.bytes for w in found.weights if word in w.name)


def test_text_alone_holds_towers_without_states():
    config = CONFIGS["qwen2_vl"]
    alone, none = trace(config, Recipe(), 1055), trace(config, Recipe(), 1055, towers=False)
    towers = bytes_of(alone, "visual")
    assert towers > 0 and bytes_of(none, "visual") == 0 and alone.states == none.states
    assert not any(w.trained for w in alone.weights if "visual" in w.name)
    assert alone.peak.bytes - none.peak.bytes >= towers
    pictured = trace(config, with_two("qwen2_vl"), 1055)
    assert bytes_of(pictured, "visual") >= towers and len(pictured.states) > len(alone.states)


def test_more_images_take_more():
    peaks = [trace(CONFIGS["llava"], Recipe(images=n), 1055).peaks[0].bytes for n in (1, 2, 8)]
    assert peaks == sorted(set(peaks))


def test_adapters_are_of_the_text_part():
    found = trace(CONFIGS["llava"], with_two("llava", lora_rank=8), 599)
    adapters = [w.name for w in found.weights if w.trained]
    assert adapters and all("language_model" in name for name in adapters)


@pytest.mark.parametrize(
    ("family", "fields", "tokens"),
    [
        ("llava", {}, 16),
        ("llava", {"image_size": "900x400"}, 16),
        ("gemma3", {}, 4),
        ("qwen2_vl", {"image_size": "1080x1920"}, 39 * 69),
        ("qwen2_vl", {"image_tokens": 64}, 64),
        ("qwen2_vl", {"image_size": "5x5"}, 1),
        ("mistral3", {"image_size": "300x100"}, 11 * 4),
        ("mistral3", {"image_size": "1120x560"}, 20 * 10),
        ("llama4", {}, 4),
        ("llama4", {"image_tokens": 20}, 20),
        ("llama4", {"image_size": "40x50"}, 4),
        ("llama4", {"image_size": "56x56"}, 4),
        ("llama4", {"image_size": "57x56"}, 4 * 3),  # two tiles, and the whole
        ("llama4", {"image_size": "112x168"}, 4 * 7),
        ("llama4", {"image_size": "9000x9000"}, 4 * 17),
    ],
)
def test_tokens_of_an_image(family, fields, tokens):
    settings = read_settings(CONFIGS[family], whole=True)
    recipe = Recipe(images=3, batch=2, **fields)
    assert image_of(settings, recipe).tokens == tokens
    batch = image_batch(settings, recipe, 3 * tokens + 5)
    assert batch.ids.shape == (2, 3 * tokens + 5)
    assert [(row == IMAGE).sum().item() for row in batch.ids] == [3 * tokens] * 2
    assert image_batch(settings, recipe, 3 * tokens + 1).ids[0, 0] != IMAGE


@pytest.mark.parametrize(
    ("family", "fields", "said"),
    [
        ("llava", {"image_tokens": 17}, "every image is 16 tokens in llava"),
        ("qwen2_vl", {}, "images of qwen2_vl have any size"),
        ("qwen2_vl", {"image_tokens": 211}, "no rectangle"),
        ("qwen2_vl", {"image_size": "1x9999"}, "one side is over 200 times the other"),
        ("mistral3", {"image_tokens": 404}, "beyond the tower's 560"),
        ("llama4", {"image_tokens": 8}, "an image of Llama-4 is one tile of 4 tokens"),
    ],
)
def test_images_that_a_model_cannot_have(family, fields, said):
    with pytest.raises(RecipeError, match=said) as refusal:
        image_of(read_settings(CONFIGS[family], whole=True), Recipe(images=1, **fields))
    assert str(refusal.value).count("\n") == 1


def functions_of_llama4s_processor() -> dict[str, Any]:
    """Those that choose tiles, of a file whose imports want torchvision."""
    source = Path(transformers.__file__).with_name("models") / "llama4" / "image_processing_llama4.py"
    wanted = ("get_factors", "find_supported_resolutions", "get_best_fit")
    functions = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", "") in wanted]
    found: dict[str, Any] = {"torch": torch, "lru_cache": lru_cache, "defaultdict": defaultdict, "SizeDict": object}
    exec(compile(ast.Module(functions, []), str(source), "exec"), found)
    return found


class Square(NamedTuple):
    """A SizeDict, as far as they read it."""

    height: int
    width: int


PROCESSOR = functions_of_llama4s_processor()


@settings(max_examples=60, deadline=None)
@given(height=st.integers(1, 9999), width=st.integers(1, 9999), side=st.sampled_from([224, 336, 448]))
def test_tiles_are_those_of_llama_4s_processor(height, width, side):
    canvases = PROCESSOR["find_supported_resolutions"](MOST_TILES, Square(side, side))
    rows, columns = (PROCESSOR["get_best_fit"]((height, width), torch.tensor(canvases)) // side).tolist()
    assert _tiles(height, width, side) == rows * columns


def test_images_that_leave_no_token_for_text():
    with pytest.raises(RecipeError, match=r"(?s)2 images of 16 tokens take 32 .* from 33"):
        trace(CONFIGS["llava"], Recipe(images=2), 32)
    assert trace(CONFIGS["llava"], Recipe(images=2), 33).seq_len == 33


def test_a_model_of_text_has_no_images():
    with pytest.raises(RecipeError, match="how llama is given images is not known"):
        trace({"model_type": "llama", **TEXT}, Recipe(images=1), 64)


def test_what_is_in_is_said():
    config = CONFIGS["qwen2_vl"]
    model = stand_in_for(config, "m", "why")
    assert [tower.kind for tower in model.towers] == ["vision", "projector"] and "wait" in model.notes[-1]
    pictured = with_images(model, config, Recipe(images=2, image_tokens=64))
    assert pictured.notes[1].startswith("of each sequence's tokens 128 are 2 images'")
    assert pictured.stand_in is not None and pictured.stand_in.shortest == 129
    assert not any("wait" in note for note in pictured.notes)


def test_a_flat_file_with_code_of_its_own_has_the_towers_of_transformers():
    """Phi-4-multimodal: what its file says of towers stands in its code, whose sizes transformers has as defaults."""
    sizes = {"hidden_size": 3072, "num_hidden_layers": 2, "num_attention_heads": 24, "num_key_value_heads": 8}
    sizes |= {"intermediate_size": 8192, "vocab_size": 200064, "pad_token_id": 0, "tie_word_embeddings": True}
    found = trace({"model_type": "phi4mm", **sizes, "embd_layer": {"image_embd_layer": {}}}, Recipe(), 64)
    towers = [w for w in found.weights if "embed_tokens_extend" in w.name]
    assert sum(w.bytes for w in towers) > 2 * 900e6 and not any(w.trained for w in towers)
