"""Families whose parameters alone do not show how their layers run: the formula's peaks are the trace's."""

from __future__ import annotations

import json

import pytest
from transformers import CONFIG_MAPPING

from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.tracing.tracer import trace

CARD = card("h100")
FAMILIES = ("granite", "granitemoe", "internlm3", "iquestcoder", "ministral3", "youtu")
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "vocab_size": 16000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXACT = 0.0005


def config_of(family: str) -> dict:
    sizes = {**SIZES, "num_key_value_heads": 8 if family == "youtu" else 2}
    return json.loads(CONFIG_MAPPING[family](**sizes).to_json_string(use_diff=False))


@pytest.mark.parametrize("name", ["standard", "mst"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_formulas_peak_is_the_traces(family, name):
    recipe = strategy(name) if name == "standard" else strategy(name, mlp_chunks=4, loss_chunks=4)
    config = config_of(family)
    traced = trace(config, recipe, 4096, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform)
    told = solve.plan_at(read_config(config, family), recipe, CARD, 4096)
    assert told.peak_bytes == pytest.approx(traced.peak.bytes, rel=EXACT)
    assert told.instant == traced.peak.instant
