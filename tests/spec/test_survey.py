"""Every causal-LM and image-text class of transformers, from its config.json: counted exactly by the formula, or by the module that the
trace runs, or refused by name. README gives the counts."""

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
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from mstplan.cli.options import refuse_what_is_not_counted
from mstplan.errors import ModelError, UnreadError
from mstplan.spec.config import _REFUSED_TYPES, NO_TOWERS, TEXT_TYPES, read_config
from mstplan.spec.families import FAMILIES
from mstplan.spec.unread import _HYBRIDS, TRANSFORMERS_TYPES, WAY_OUT
from mstplan.step.parameters import parameter_count
from mstplan.tracing.tracer import stand_in_for
from tests.train.survey import causal_lm_classes
from tests.train.tiny import tiny_config

pytestmark = pytest.mark.survey

README = Path(__file__).parents[2] / "README.md"
CLAIM = (
    "Of transformers X's N causal-LM classes, the formula counts N exactly and of N the text part, N go to the trace and of N the text part, "
    "and N are refused by name; of its N classes of images and text, the formula counts N exactly and of N the text part, N go to the trace and "
    "of N the text part, and N are refused by name"
)
TASKS = {
    "causal-LM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "image-text": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
}
RIGHT = ("exact", "text", "traced", "traced text", "refused")


class Record(NamedTuple):
    """What comes of a config.json. exact: the formula counts the whole. text: the formula counts the text part, and a note says that
    towers are not counted. traced, traced text: so does the module that the trace runs, and a note says that it was asked."""

    task: str
    classes: tuple[str, ...]
    model_type: str
    config: str  # default | tiny
    outcome: str  # of RIGHT | wrong | unbuildable
    said: str = ""  # the formula's refusal
    counted: int = 0
    there: tuple[int, ...] = ()  # in the whole, in the text part


def survey() -> Iterator[Record]:
    for task, (auto, mapping) in TASKS.items():
        for config_cls in list(mapping.keys()):
            entry = mapping[config_cls]
            classes = tuple(cls.__name__ for cls in (entry if isinstance(entry, tuple) else (entry,)))
            for how, make in (("default", config_cls), ("tiny", lambda cls=config_cls: tiny_config(cls))):
                record = Record(task, classes, config_cls.model_type, how, "unbuildable")
                try:
                    settings = make()
                except Exception:  # noqa: BLE001 - transformers refuses its own defaults; tiny sizes do not fit together
                    yield record
                    continue
                yield examine(record, settings, parameters_there(auto, settings))


def examine(record: Record, settings: PreTrainedConfig, there: tuple[int, ...]) -> Record:
    """The outcome for a config.json with all its fields; that for one with those alone that differ from the class's defaults, where it is
    wrong."""
    named = {"model_type": settings.model_type, "architectures": [record.classes[0]]}
    whole, short = (json.loads(settings.to_json_string(use_diff=alone)) for alone in (False, True))
    first, again = (outcome_of(record, {**fields, **named}, there) for fields in (whole, short))
    return again if again.outcome == "wrong" else first


def outcome_of(record: Record, config: dict[str, Any], there: tuple[int, ...]) -> Record:
    said = ""
    try:
        model = read_config(config, "FILE")
        refuse_what_is_not_counted(model)
    except UnreadError as e:
        said = str(e)
        try:
            model = stand_in_for(config, "FILE", said.splitlines()[0])
        except ModelError:
            return record._replace(outcome="refused", said=said)
        assert model.notes[0].startswith("answered by the trace: FILE: ")
    except ModelError as e:
        return record._replace(outcome="refused", said=str(e))
    counted = parameter_count(model)[0]
    record = record._replace(said=said, counted=counted, there=there)
    part = NO_TOWERS in model.notes
    if not there:
        return record
    if counted != there[part]:
        return record._replace(outcome="wrong")
    return record._replace(outcome=("traced text" if part else "traced") if said else ("text" if part else "exact"))


def parameters_there(auto: Any, settings: PreTrainedConfig) -> tuple[int, ...]:
    """In the whole and in its text part, as transformers builds them; () where it cannot."""
    if type(settings) in MODEL_FOR_MULTIMODAL_LM_MAPPING and hasattr(settings, "vision_config"):
        auto = AutoModelForMultimodalLM  # a class of the text part may be there as well
    if (model := built(auto, settings)) is not None:
        try:
            parts = (model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings())
        except NotImplementedError:  # of one without an embedding of tokens
            return count(model), -1
        text = {id(weight): weight.numel() for part in parts if part is not None for weight in part.parameters()}
        return count(model), sum(text.values())
    text_settings = getattr(settings, "text_config", None)
    if text_settings is None or not hasattr(settings, "tie_word_embeddings"):
        return ()
    text_settings.tie_word_embeddings = settings.tie_word_embeddings  # the head is the whole's
    model = built(AutoModelForCausalLM, text_settings) or built(AutoModelForCausalLM, settings)
    return (-1, count(model)) if model is not None else ()


def built(auto: Any, settings: PreTrainedConfig) -> PreTrainedModel | None:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(settings)
    except Exception:  # noqa: BLE001 - whatever a class raises; a whole may want further packages
        return None
    model.tie_weights()
    return model


def count(model: PreTrainedModel) -> int:
    return sum(weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return list(survey())


def test_no_class_is_counted_wrong(records):
    assert not [r for r in records if r.outcome == "wrong"]


def test_every_class_is_examined(records):
    assert {name for r in records for name in r.classes} >= {cls.__name__ for cls in causal_lm_classes()}
    assert not {name for name, outcome in by_class(records, "causal-LM").items() if outcome == "unbuildable"}
    assert not {name for name, outcome in by_class(records, "image-text").items() if outcome == "unbuildable"}
    assert len({r.model_type for r in records if r.outcome in ("exact", "text")}) > 25
    assert len({r.model_type for r in records if r.outcome in ("traced", "traced text")}) > 125


UNFINISHED = ("deepseek_v2", "dots1", "glm4_moe", "lfm2_moe")
"""Families whose defaults name no experts or no kinds of layers, or have heads that do not divide the hidden size."""


def test_refusals_name_the_family_or_the_field_and_the_way_out(records):
    for r in records:
        if r.said:
            first, way_out = r.said.split("\n")
            assert first.startswith("FILE") and way_out
            assert "(model_type '" in first or " is " in first or "its towers" in first, r
            if "its towers" in first:
                assert way_out.endswith("--assume no-towers plans its text part alone.")
            elif "trained on next-token loss" not in first and r.model_type not in UNFINISHED:
                assert way_out == WAY_OUT, r


def test_every_family_of_transformers_is_known_by_name():
    """Or its files would be planned as a Llama's as soon as all their fields have a Llama's names."""
    named = {*FAMILIES, *TEXT_TYPES, *set().union(*_REFUSED_TYPES.values()), *TRANSFORMERS_TYPES, *_HYBRIDS}
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
        if name not in TEXT_TYPES:
            with pytest.raises(UnreadError, match=re.escape(f"'{name}'")):
                read_config({**llama, "model_type": name, "tie_word_embeddings": False}, "FILE")


def test_readme_gives_the_counts(records):
    pattern = r"\s+".join(re.escape(word) for word in CLAIM.split()).replace("X's", r"(\S+)'s").replace("N", r"(\d+)")
    claim = re.search(pattern, README.read_text(encoding="utf-8"))
    counts = {task: Counter(by_class(records, task).values()) for task in TASKS}
    numbers = [n for each in counts.values() for n in (each.total(), *(each[outcome] for outcome in RIGHT))]
    assert claim is not None, numbers
    if not transformers.__version__.startswith(claim[1] + "."):
        pytest.skip(f"README gives the counts of transformers {claim[1]}, here is {transformers.__version__}")
    assert [int(n) for n in claim.groups()[1:]] == numbers


def by_class(records: list[Record], task: str) -> dict[str, str]:
    """The outcome of each class: the best that any of its configs has, for a class of several serves the same model."""
    order = (*RIGHT, "unbuildable")
    found: dict[str, str] = {}
    for r in records:
        for name in r.classes if r.task == task else ():
            found[name] = min(found.get(name, r.outcome), r.outcome, key=order.index)
    return found
