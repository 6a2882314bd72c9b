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
from mstplan.train.quiet import quiet_packages

NO_CLASS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3_vl_text", "qwen3_vl_moe_text", "ministral")
"""Text parts without a causal language model of their own, and a default config that its own module cannot use."""

MISSING = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "glm4_moe": {"head_dim": 128},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "nemotron": {"num_key_value_heads": 8},
}
"""What a default config leaves out and its own module needs."""


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NO_CLASS])
def test_names_and_kinds(family):
    with quiet_packages(), torch.device("meta"):
        config = AutoConfig.for_model(family, **MISSING.get(family, {}))
        module = AutoModelForCausalLM.from_config(config)
    real = {frozenset(named.names): named.kinds for named in selecting.named_weights(module).values()}
    told = {frozenset(named.names): named.kinds for named in named_weights(read_config(config.to_dict(), family))}
    assert told == real
