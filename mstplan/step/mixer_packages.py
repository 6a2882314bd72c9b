"""Packages with fused kernels for what mixes tokens otherwise than by attention, which transformers calls where it can import them.

from source: fla-core 0.6.0 (flash-linear-attention), causal-conv1d 1.7.0, mamba-ssm 2.3.2.post1; transformers 5.23.0,
integrations/hub_kernels.py, use_kernel_func_from_hub_with_fallback. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import RecipeError
from ..spec.model import GatedDelta, Mamba2, Mixing, Model, ShortConv

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "fla": ("fla",),
    "causal-conv1d": ("causal-conv1d",),
    "fla+causal-conv1d": ("fla", "causal-conv1d"),
    "mamba-ssm": ("mamba-ssm", "causal-conv1d"),
}
"""Packages that are there, by `Recipe.kernels`."""
VERSIONS: Mapping[str, str] = {
    "fla": "fla-core 0.6.0",
    "causal-conv1d": "1.7.0",
    "fla+causal-conv1d": "fla-core 0.6.0, causal-conv1d 1.7.0",
    "mamba-ssm": "2.3.2, with causal-conv1d 1.7.0, which it needs",
}
"""Of what was counted."""
_OF_MIXERS: Mapping[type, tuple[str, ...]] = {
    GatedDelta: ("fla", "causal-conv1d", "fla+causal-conv1d"),
    ShortConv: ("causal-conv1d",),
    Mamba2: ("causal-conv1d", "mamba-ssm"),
}
_WORDS = {"liger": "Liger's", "fla": "flash-linear-attention's"}


def packages_of(kernels: str) -> tuple[str, ...]:
    """Packages that are there."""
    return PACKAGES.get(kernels, ())


def kernels_in_words(kernels: str) -> str:
    """'Liger's kernels', 'flash-linear-attention's and causal-conv1d's kernels'; nothing of torch."""
    names = PACKAGES.get(kernels, (kernels,) if kernels != "torch" else ())
    return " and ".join(_WORDS.get(name, f"{name}'s") for name in names) + " kernels" * bool(names)


def kernels_for(mixer: Mixing | None) -> tuple[str, ...]:
    """Values of `Recipe.kernels` with kernels for such layers, those of most packages last."""
    return _OF_MIXERS[type(mixer)] if mixer is not None else ()


def check_kernels(model: Model, kernels: str) -> None:
    """Check that what packages have is for the model's layers, and counted. Raises RecipeError."""
    if kernels not in PACKAGES:
        return
    planned = kernels_for(model.mixer)
    if kernels not in planned:
        others = "".join(f", or --kernels {name}" for name in planned)
        raise RecipeError(
            f"{model.name} has no layers for {kernels_in_words(kernels)}.\nSet kernels='torch' (--kernels torch){others}."
        )
    if (why := _beyond(model.mixer, packages_of(kernels))) is not None:
        raise RecipeError(
            f"layers of {model.name} are not counted with {kernels_in_words(kernels)}: {why}.\nSet kernels='torch' (--kernels torch)."
        )


def _beyond(mixer: Mixing | None, packages: tuple[str, ...]) -> str | None:
    """Why kernels do not serve a mixer's sizes, or are not counted for them."""
    if "causal-conv1d" in packages and mixer is not None and not 2 <= mixer.kernel <= 4:
        return f"causal-conv1d reaches over 2 to 4 tokens, not {mixer.kernel}"  # csrc/causal_conv1d.cpp
    if "fla" in packages and isinstance(mixer, GatedDelta):
        if mixer.key_dim > 256:
            return f"flash-linear-attention has keys of up to 256, not {mixer.key_dim}"  # ops/common/chunk_delta_h.py
        if (
            mixer.value_heads * mixer.key_dim
            > 2 * mixer.key_heads * mixer.key_dim + mixer.value_heads * mixer.value_dim
        ):
            return "gradients of keys that are so much wider than values are largest elsewhere"  # `_fused_rule`
    return None
