"""Families of models, a file each: what their config.json leaves out, what their code does otherwise than Llama's, their weights' names.

The reader of config files, the layers that are laid out, names of weights and the tests read `FAMILIES`.
"""

from __future__ import annotations

from . import deepseek, gemma, glm, gpt2, gpt_neox, gpt_oss, llama, mistral, olmo, phi, qwen, stablelm, starcoder
from .base import Family, Routed

_FILES = (llama, mistral, qwen, gemma, phi, gpt_oss, olmo, gpt2, gpt_neox, deepseek, starcoder, stablelm, glm)
FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
"""By the model_type of a config.json."""

LLAMA_LIKE = Family(mlp_bias="mlp_bias", windows="found", experts=Routed(may_be_none=True), registered=False)
"""Of a model_type that none of them is."""


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, LLAMA_LIKE)
