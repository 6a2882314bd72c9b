"""Every family of the registry, in a tiny size of its own code: the step model against a real step on fake tensors."""

import warnings

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers
from transformers import AutoConfig

from mstplan.spec.families import FAMILIES, family_of
from mstplan.spec.families.base import TINY
from mstplan.step.recipe import Recipe

from ..step.test_against_torch import agree, errors

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning)

NO_CLASS = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen2_5_omni_text", "qwen3_vl_text", "qwen3_vl_moe_text")
"""Text parts without a causal language model of their own: their code is Qwen2's and Qwen3's."""
OWN_ATTENTION = tuple(name for name, family in FAMILIES.items() if family.code.attends_itself or family.indexed)
"""Whose code takes no stand-in for attention by name: tests/tracing/test_families.py and test_indexer.py have them."""
BOUND = 0.0015
"""Of tiny layers, single rows of numbers are some thousandths."""


def tiny(family):
    config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family].tiny}).to_dict()
    dropouts = {name: 0.0 for name, value in config.items() if "drop" in name and isinstance(value, float)}
    return {**config, **dropouts}


@pytest.mark.parametrize("checkpoint", ["none", "layer"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*NO_CLASS, *OWN_ATTENTION)])
def test_a_step_of_every_family(family, checkpoint):
    agree(errors(tiny(family), Recipe(checkpoint=checkpoint), 8192), BOUND)


def test_a_family_nobody_knows_is_read_as_a_llama():
    assert not family_of("no such").registered and all(family.registered for family in FAMILIES.values())
    assert family_of("no such").weight_names == family_of("llama").weight_names
