"""Every causal-LM class of transformers, from its config.json: counted exactly by the formula, or refused by name. README gives the count."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mstplan.errors import ModelError, UnreadError
from mstplan.spec.config import _REFUSED_TYPES, _TEXT_TYPES, read_config
from mstplan.spec.families import FAMILIES
from mstplan.spec.unread import _HYBRIDS, TRANSFORMERS_TYPES, WAY_OUT
from mstplan.step.parameters import parameter_count
from tests.train.survey import causal_lm_classes
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.survey

README = Path(__file__).parents[2] / "README.md"
CLAIM = (
    "Of transformers X's N causal-LM classes, the formula counts N exactly, of N the text part, and refuses N by name"
)
UNBUILDABLE = {"dots3_note", "gemma4_assistant", "gemma4_unified_assistant", "ministral"}
"""Of which transformers 5.23 itself makes no config, or no model, out of defaults or of a tiny config."""


class Record(NamedTuple):
    """What the formula makes of a config.json. text: the text part is exact, and a note says that towers are not counted."""

    classes: tuple[str, ...]
    model_type: str
    config: str  # default | tiny
    outcome: str  # exact | text | refused | wrong | unbuildable
    said: str = ""


def survey() -> Iterator[Record]:
    for config_cls in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()):
        entry = MODEL_FOR_CAUSAL_LM_MAPPING[config_cls]
        classes = tuple(cls.__name__ for cls in (entry if isinstance(entry, tuple) else (entry,)))
        for how, make in (("default", config_cls), ("tiny", lambda cls=config_cls: tiny_config(cls))):
            try:
                settings = make()
            except Exception as e:  # noqa: BLE001 - transformers refuses its own defaults
                yield Record(classes, config_cls.model_type, how, "unbuildable", str(e))
                continue
            yield Record(classes, config_cls.model_type, how, *examine(settings, classes[0]))


def examine(settings: PreTrainedConfig, cls: str) -> tuple[str, str]:
    """The outcome for a config.json with all its fields, and with those alone that differ from the class's defaults."""
    whole = json.loads(settings.to_json_string(use_diff=False))
    outcome, said = outcome_of({**whole, "architectures": [cls]}, settings)
    short = json.loads(settings.to_json_string())
    again = outcome_of({**short, "model_type": settings.model_type}, settings)
    return again if again[0] == "wrong" else (outcome, said)


def outcome_of(config: dict[str, Any], settings: PreTrainedConfig) -> tuple[str, str]:
    try:
        model = read_config(config, "FILE")
    except ModelError as e:
        return "refused", str(e)
    try:
        there, text = parameters_of(settings), settings.get_text_config()
    except Exception as e:  # noqa: BLE001 - transformers cannot build its own defaults
        return "unbuildable", str(e)
    counted = parameter_count(model)[0]
    if counted == there:
        return "exact", ""
    towers = any("tower is not counted" in note for note in model.notes)
    if towers and text is not settings:
        text.tie_word_embeddings = settings.tie_word_embeddings  # the head is the whole's
        return (
            ("text", "")
            if counted == parameters_of(text)
            else ("wrong", f"{counted} counted, {parameters_of(text)} in the text part")
        )
    return "wrong", f"{counted} counted, {there} there"


def parameters_of(settings: PreTrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    model.tie_weights()
    return sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(survey())


def test_no_class_is_counted_wrong(records):
    assert not [r for r in records if r.outcome == "wrong"]


def test_every_class_is_examined(records):
    assert {name for r in records for name in r.classes} >= {cls.__name__ for cls in causal_lm_classes()}
    assert {r.model_type for r in records if r.outcome == "unbuildable"} <= UNBUILDABLE
    assert len({r.model_type for r in records if r.outcome in ("exact", "text")}) > 25


def test_refusals_name_the_family_or_the_field_and_the_way_out(records):
    for r in records:
        if r.outcome == "refused":
            first, way_out = r.said.split("\n")
            assert first.startswith("FILE") and way_out
            assert "(model_type '" in first or " is " in first, r
            if (
                "trained on next-token loss" not in first and r.model_type != "deepseek_v2"
            ):  # whose defaults name no experts per token
                assert way_out == WAY_OUT, r


def test_every_family_of_transformers_is_known_by_name():
    """Or its files would be planned as a Llama's as soon as all their fields have a Llama's names."""
    named = {*FAMILIES, *_TEXT_TYPES, *set().union(*_REFUSED_TYPES.values()), *TRANSFORMERS_TYPES, *_HYBRIDS}
    assert not {name for name in CONFIG_MAPPING if name not in named}
    assert not TRANSFORMERS_TYPES & {*FAMILIES, *_HYBRIDS, *set().union(*_REFUSED_TYPES.values())} - {
        "gemma3",
        "qwen2_vl",
        "qwen2_5_vl",
    }


def test_no_family_of_transformers_without_a_row_is_planned_from_a_llamas_fields():
    llama = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
        "intermediate_size": 128,
    }
    for name in sorted(TRANSFORMERS_TYPES | _HYBRIDS):
        if name not in _TEXT_TYPES:
            with pytest.raises(UnreadError, match=re.escape(f"'{name}'")):
                read_config({**llama, "model_type": name, "tie_word_embeddings": False}, "FILE")


def test_readme_gives_the_count(records):
    pattern = r"\s+".join(re.escape(word) for word in CLAIM.split()).replace("X's", r"(\S+)'s").replace("N", r"(\d+)")
    claim = re.search(pattern, README.read_text(encoding="utf-8"))
    assert claim is not None
    if not transformers.__version__.startswith(claim[1] + "."):
        pytest.skip(f"README gives the count of transformers {claim[1]}, here is {transformers.__version__}")
    counts = Counter(by_class(records).values())
    assert [int(n) for n in claim.groups()[1:]] == [counts.total(), counts["exact"], counts["text"], counts["refused"]]


def by_class(records: list[Record]) -> dict[str, str]:
    """The outcome of each class: the best that any of its configs has, for a class of several serves the same model."""
    order = ("exact", "text", "refused", "unbuildable")
    found: dict[str, str] = {}
    for r in records:
        for name in r.classes:
            found[name] = min(found.get(name, r.outcome), r.outcome, key=order.index)
    return found


def test_the_text_part_of_models_of_images_and_text_is_counted_exactly_or_refused():
    counted = 0
    for config_cls in list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.keys()):
        entry = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_cls]
        name = (entry[0] if isinstance(entry, tuple) else entry).__name__
        try:
            settings = config_cls()
            model = read_config(
                {**json.loads(settings.to_json_string(use_diff=False)), "architectures": [name]}, "FILE"
            )
            with torch.device("meta"):
                whole = AutoModelForImageTextToText.from_config(settings)
        except Exception:  # noqa: BLE001 - refused; or transformers cannot build its own defaults without further packages
            continue
        whole.tie_weights()
        parts = (whole.get_decoder(), whole.get_output_embeddings(), whole.get_input_embeddings())
        there = {id(weight): weight.numel() for part in parts if part is not None for weight in part.parameters()}
        assert parameter_count(model)[0] == sum(there.values()), config_cls.model_type
        assert any("tower is not counted" in note for note in model.notes), config_cls.model_type
        counted += 1
    assert counted > 20
