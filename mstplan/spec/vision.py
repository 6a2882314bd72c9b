"""Vision towers whose step the formula lays out: their sizes, as a whole's config.json has them, without torch.

from source: transformers 5.23, configuration_*.py of each tower and family. Towers that are counted, but not laid out, are in `towers.py` alone:
their steps are answered by the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Literal, NamedTuple

from .towers import Fields


class Encoder(NamedTuple):
    """A tower of layers of attention and an MLP over an image's patches, all images of one size: CLIP's and SigLIP's."""

    hidden: int
    width: int  # of the MLP
    heads: int
    layers: int
    side: int  # of an image, in pixels
    patch: int  # its side
    channels: int
    activation: str

    @property
    def patches(self) -> int:
        """Of an image."""
        return (self.side // self.patch) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


class Vision(NamedTuple):
    """What a model makes of an image. family: of the whole (`step/towers`). tokens: that an image takes of its sequence."""

    family: Literal["gemma3", "llava"]
    encoder: Encoder
    tokens: int
    used_layers: int = 0  # of the encoder: those that features come from, when not all of its layers
    keeps_class: bool = False  # its token is a feature, too
    projector_bias: bool = True
    projector_activation: str = "gelu"


def vision_of(config: Mapping[str, object]) -> Vision | None:
    """The vision tower of a whole's config.json. None: its step is not laid out, or the file leaves out what that asks."""
    rule = RULES.get(str(config.get("model_type")))
    vision = config.get("vision_config")
    if rule is None or not isinstance(vision, Mapping):
        return None
    try:
        found = rule(Fields(config), Fields(vision))
    except (KeyError, TypeError):
        return None
    if found is None or found.encoder.hidden % found.encoder.heads or found.encoder.side < found.encoder.patch:
        return None
    return found


def _encoder(v: Fields, patch: int, activation: str) -> Encoder | None:
    """With transformers' default of sizes that differ. None: it has dropout."""
    if v.fields.get("attention_dropout", 0.0):
        return None
    return Encoder(
        v.size("hidden_size", 768),
        v.size("intermediate_size", 3072),
        v.size("num_attention_heads", 12),
        v.size("num_hidden_layers", 12),
        v.size("image_size", 224),
        v.size("patch_size", patch),
        v.size("num_channels", 3),
        v.word("hidden_act", activation),
    )


def _gemma3(w: Fields, v: Fields) -> Vision | None:
    """A head of the tower, which Gemma-3 has not, is not laid out."""
    if v.fields.get("model_type") != "siglip_vision_model" or v.flag("vision_use_head", True):
        return None
    encoder, tokens = _encoder(v, 16, "gelu_pytorch_tanh"), w.size("mm_tokens_per_image", 256)
    if encoder is None or encoder.side // encoder.patch < isqrt(tokens):
        return None
    pooled = encoder.side // encoder.patch // isqrt(tokens)
    return Vision("gemma3", encoder, tokens) if (encoder.side // encoder.patch // pooled) ** 2 == tokens else None


def _llava(w: Fields, v: Fields) -> Vision | None:
    """Features of one layer, counted from the last."""
    if v.fields.get("model_type") != "clip_vision_model":
        return None
    encoder, strategy = _encoder(v, 32, "quick_gelu"), w.word("vision_feature_select_strategy", "default")
    layer = w.fields.get("vision_feature_layer", -2)
    if encoder is None or strategy not in ("default", "full") or not isinstance(layer, int):
        return None
    used = layer + encoder.layers + 1 if layer < 0 else layer
    if not 0 < used <= encoder.layers:
        return None
    keeps_class = strategy == "full"
    bias, activation = w.flag("multimodal_projector_bias", True), w.word("projector_hidden_act", "gelu")
    return Vision("llava", encoder, encoder.patches + keeps_class, used, keeps_class, bias, activation)


RULES: Mapping[str, Callable[[Fields, Fields], Vision | None]] = {"gemma3": _gemma3, "llava": _llava}
