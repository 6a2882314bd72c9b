"""Families of models, a file each: what their config.json leaves out, what their code does otherwise than Llama's, their weights' names.

The reader of config files, the layers that are laid out, names of weights and the tests read `FAMILIES`.
"""

from __future__ import annotations

from . import (
    apertus,
    bamba,
    bloom,
    cohere,
    deepseek,
    dots,
    ernie,
    ernie_moe,
    exaone,
    falcon,
    falcon_h1,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    gpt_oss,
    gptj,
    lfm2,
    llama,
    llama4,
    mamba,
    minimax,
    mistral,
    nemotron,
    nemotron_h,
    olmo,
    opt,
    phi,
    qwen,
    seed_oss,
    stablelm,
    starcoder,
)
from .base import Family, Routed

_DENSE = (
    llama,
    mistral,
    qwen,
    gemma,
    phi,
    olmo,
    gpt2,
    gpt_neox,
    starcoder,
    stablelm,
    glm,
    ernie,
    exaone,
    nemotron,
    cohere,
    apertus,
    opt,
    falcon,
    gptj,
    bloom,
)
_STATE_SPACES = (bamba, falcon_h1, mamba, nemotron_h)
_FILES = (*_DENSE, seed_oss, gpt_oss, deepseek, dots, minimax, ernie_moe, llama4, lfm2, *_STATE_SPACES)
FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
"""By the model_type of a config.json."""

LLAMA_LIKE = Family(
    mlp_bias="mlp_bias",
    windows="found",
    experts=Routed(may_be_none=True, shared_width="shared_expert_intermediate_size"),
    registered=False,
)
"""Of a model_type that none of them is."""


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, LLAMA_LIKE)
