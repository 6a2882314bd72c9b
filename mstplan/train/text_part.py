"""The part of a model of text, images and sound that reads and writes tokens, which is what is planned.

It is transformers' causal language model of that part where there is one, else the whole without its towers and projectors.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

from ..spec.config import TEXT_PARTS
from ..spec.towers import Tower, TowerKind, TowerWeight


def text_settings(whole: PreTrainedConfig) -> PreTrainedConfig:
    """The settings that the part is built from: its own where transformers has a class for them, else those of what holds it."""
    part = next((part for name in TEXT_PARTS if isinstance(part := getattr(whole, name, None), PreTrainedConfig)), None)
    if part is None or _is_causal(whole):
        return whole
    text = text_settings(part)
    if model_class(text) is None:
        return whole
    text = copy.deepcopy(text)
    if (tied := getattr(whole, "tie_word_embeddings", None)) is not None:  # the head is the whole's
        text.tie_word_embeddings = tied
    return text


def _is_causal(settings: PreTrainedConfig) -> bool:
    """Whether transformers' causal language model of these settings is all that they describe."""
    cls = _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, settings)
    return cls is not None and cls.__name__.endswith("ForCausalLM") and cls.config_class is type(settings)


def model_class(settings: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """transformers' class that makes next tokens of these settings. None: it has none."""
    return _class_in(MODEL_FOR_CAUSAL_LM_MAPPING, settings) or _class_in(MODEL_FOR_MULTIMODAL_LM_MAPPING, settings)


def _class_in(mapping: Any, settings: PreTrainedConfig) -> type[PreTrainedModel] | None:
    entry = mapping.get(type(settings), None)
    found: type[PreTrainedModel] | None = entry[0] if isinstance(entry, tuple) else entry
    return found


def from_settings(settings: PreTrainedConfig, towers: bool = False, **more: Any) -> PreTrainedModel:
    """The part that speaks, with random weights; with `towers` all that the settings describe. more: for transformers' from_config."""
    if towers or _is_a_whole(settings):
        model: PreTrainedModel = AutoModelForMultimodalLM.from_config(settings, **more)
        if not towers:
            drop_towers(model)
    else:
        model = AutoModelForCausalLM.from_config(settings, **more)
    _sort_sets(model)
    return model


def _sort_sets(model: PreTrainedModel) -> None:
    """Order the sets of names that modules go through in their steps, as Gemma-4 its kinds of layers: Python's order of strings changes from
    process to process, and with it the order of allocations of unlike sizes."""
    for module in model.modules():
        for name, value in vars(module).items():
            if not name.startswith("_") and isinstance(value, set) and all(isinstance(each, str) for each in value):
                setattr(module, name, sorted(value))


def _is_a_whole(settings: PreTrainedConfig) -> bool:
    """Whether transformers has a class for the whole alone."""
    return type(settings) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(settings) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def is_part(model: PreTrainedModel, model_type: str) -> bool:
    """Whether `model` is less than what a config.json of this model_type describes."""
    return model.config.model_type != model_type or (
        _is_a_whole(model.config) and any(None in module._modules.values() for module in model.modules())
    )


def drop_towers(model: PreTrainedModel) -> None:
    """Leave of a model of several parts the decoder, the embedding and the head."""
    kept = text_modules(model)
    if model not in kept:
        _strip(model, kept)


def text_modules(model: PreTrainedModel) -> set[nn.Module]:
    """The modules of the decoder, the embedding and the head; of a model of text alone all."""
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    return {module for part in parts if part is not None for module in part.modules()}


def towers_of(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Towers and projectors, by path: modules with weights of which none is the text part's."""
    text, found = text_modules(model), dict[str, nn.Module]()

    def search(path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            inside = f"{path}.{name}" if path else name
            if child in text or next(child.parameters(), None) is None:
                continue
            if text.isdisjoint(child.modules()):
                found[inside] = child
            else:
                search(inside, child)

    if model not in text:
        search("", model)
    return found


def tower_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a whole that are not the text part's, by name."""
    text = {id(tensor) for module in text_modules(model) for tensor in (*module.parameters(), *module.buffers())}
    if model in text_modules(model):
        return {}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor for name, tensor in named if id(tensor) not in text}


def tower_kind(name: str) -> TowerKind:
    """What part of a model of several a weight of this name is of."""
    words = name.lower()
    if any(word in words for word in ("projector", "merger", "connector", "aligner", "newline")):
        return "projector"
    return "audio" if "audio" in words or "speech" in words else "vision"


def towers_in(model: PreTrainedModel) -> tuple[Tower, ...]:
    """Towers of a whole as the formula has them."""
    linear = {id(module.weight) for module in model.modules() if type(module) is nn.Linear}
    towers: dict[TowerKind, list[TowerWeight]] = {}
    for name, tensor in tower_tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            weight = TowerWeight(tuple(tensor.shape), linear=id(tensor) in linear)
            towers.setdefault(tower_kind(name), []).append(weight)
    return tuple(Tower(kind, tuple(weights)) for kind, weights in towers.items())


def _strip(module: nn.Module, kept: set[nn.Module]) -> None:
    for name in list(module._parameters):
        module._parameters[name] = None
    for name, child in module.named_children():
        if child in kept:
            continue
        if kept.isdisjoint(child.modules()):
            module._modules[name] = None if next(child.parameters(), None) is not None else child
        else:
            _strip(child, kept)
