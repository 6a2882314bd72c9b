"""The names and kinds of the formula's weights are those of transformers' modules, family by family."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan.spec.config import read_config
from mstplan.spec.families import FAMILIES
from mstplan.step.steps import named_weights
from mstplan.train import selecting
from mstplan.train.step import quiet_transformers

NO_CLASS = ("qwen2_vl_text", "qwen2_5_vl_text", "ministral")
"""Text parts without a causal language model of their own, and a default config that its own module cannot use."""

MISSING = {"deepseek_v2": {"num_experts_per_tok": 6}}
"""What a default config leaves out and its own module needs."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_CLASS])
def test_names_and_kinds(family):
    with quiet_transformers(), torch.device("meta"):
        config = AutoConfig.for_model(family, **MISSING.get(family, {}))
        module = AutoModelForCausalLM.from_config(config)
    real = {frozenset(named.names): named.kinds for named in selecting.named_weights(module).values()}
    told = {frozenset(named.names): named.kinds for named in named_weights(read_config(config.to_dict(), family))}
    assert told == real
