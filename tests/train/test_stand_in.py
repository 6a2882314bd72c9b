"""What stands in for the description of a model that the formula does not read is near what the module is."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Ernie4_5_MoeConfig,
    FalconConfig,
    GPTJConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
)

from mstplan import minisequence
from mstplan.spec.config import read_config
from mstplan.step.parameters import parameter_count
from mstplan.train.stand_in import stand_in
from tests.train.survey import causal_lm_classes
from tests.train.tiny import tiny_config

CLASSES = [cls for n, cls in enumerate(causal_lm_classes()) if n % 6 == 0]


def built(settings) -> transformers.PreTrainedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    model.tie_weights()
    return model


@pytest.mark.parametrize(
    "settings",
    [OPTConfig, FalconConfig, GPTJConfig, BloomConfig, MptConfig, Ernie4_5_MoeConfig],
    ids=lambda c: c.__name__,
)
def test_published_sizes(settings):
    """But for what it has no place for: norms' biases, position tables, one key for all heads."""
    model = built(settings())
    found = stand_in(model, "m", "why")
    there = sum(weight.numel() for weight in model.parameters())
    assert found.stand_in is not None and parameter_count(found) == (there, there) == (found.stand_in.parameters,) * 2
    assert parameter_count(found._replace(stand_in=None))[0] == pytest.approx(there, rel=0.2)
    assert found.notes == ("answered by the trace: why",)


def test_a_llamas_stand_in_is_the_llama():
    settings = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=256,
        intermediate_size=600,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=999,
    )
    known, found = read_config(settings.to_dict(), "m"), stand_in(built(settings), "m", "why")
    assert found._replace(stand_in=None, notes=(), dtype=known.dtype) == known._replace(notes=())


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_any_class_has_one(cls):
    try:
        model = built(tiny_config(cls.config_class))
    except Exception:  # noqa: BLE001 - of those that AutoModelForCausalLM makes of another config
        pytest.skip("not made of its own config")
    found = stand_in(model, "m", "why")
    assert (
        found.layers >= 1
        and found.vocab >= 1
        and parameter_count(found)[0] == sum(weight.numel() for weight in model.parameters())
    )
    assert parameter_count(found._replace(stand_in=None))[0] > 0


@pytest.mark.parametrize(
    "settings",
    [
        OPTConfig(hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=99),
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99),
    ],
    ids=lambda c: c.model_type,
)
def test_chunks_are_recommended_for_what_the_planner_does_not_read(settings):
    model = AutoModelForCausalLM.from_config(settings).train()
    minisequence(model)
    tokens = torch.randint(3, 90, (1, 40))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_a_model_without_an_mlp_has_a_stand_in():
    found = stand_in(built(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=99)), "m", "why")
    assert found.mlp is not None and found.experts is None
