"""Fused losses and Liger's kernels: what the formula says of every instant is what the trace finds."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from mstplan.errors import RecipeError
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.liger import SERVED
from mstplan.step.losses import LOSSES
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, step
from mstplan.tracing.tracer import trace

from .test_families import SIZES
from .tiny import TINY

CARD = card("h100")
EXACT = 0.0006  # of models so small that CCE's order of the vocabulary counts
FUSED = [name for name, loss in LOSSES.items() if loss.is_fused]


def errors(config: dict[str, Any], recipe: Recipe, tokens: int = 4096, **options: Any) -> dict[str, float]:
    """Formula over trace, less 1, of every instant."""
    traced = trace(config, recipe, tokens, workspace=CARD.gpu.workspaces_bytes, platform=CARD.platform, **options)
    model, chunks = read_config(config, config["model_type"]), Chunks(int(recipe.mlp_chunks), int(recipe.loss_chunks))
    planned = step(model, layout_of(model, recipe, chunks, tokens, CARD.platform), CARD.gpu.workspaces_bytes)
    peaks = {peak.name: peak.bytes for peak in planned.instants(step_sizes(recipe, tokens, chunks))}
    return {str(peak.instant): peaks[peak.instant] / peak.bytes - 1 for peak in traced.peaks if peak.instant in peaks}


def config_of(family: str, **fields: Any) -> dict[str, Any]:
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 64, **fields}
    return json.loads(CONFIG_MAPPING[family](**sizes).to_json_string(use_diff=False))


def assert_exact(found: dict[str, float]) -> None:
    assert len(found) >= 4 and all(abs(error) < EXACT for error in found.values()), found


@pytest.mark.parametrize(
    "family", sorted(SERVED.keys() - {"granite"})
)  # whose residual's scaling the formula leaves out
@pytest.mark.parametrize("checkpoint", ["none", "layer"])
def test_a_family_on_ligers_kernels(family: str, checkpoint: str) -> None:
    recipe = Recipe(kernels="liger", loss="liger", checkpoint=checkpoint, batch=2)
    assert_exact(errors(config_of(family), recipe, 2048))


@pytest.mark.parametrize("attention", ["eager", "flash"])
def test_kernels_under_other_attention(attention: str) -> None:
    assert_exact(errors(config_of("llama"), Recipe(kernels="liger", attention=attention), 2048))


@pytest.mark.parametrize(("loss", "precision", "tied"), [*product(FUSED, ["bf16", "mixed", "fp32"], [True, False])])
def test_a_loss(loss: str, precision: str, tied: bool) -> None:
    if (loss, precision) == ("cce", "fp32"):
        pytest.skip("it does not serve fp32")
    batch = (
        1 if precision == "fp32" else 2
    )  # the math kernel copies the queries of several sequences, which is not counted
    recipe = Recipe(loss=loss, precision=precision, accumulation=2, batch=batch)
    assert_exact(errors(config_of("llama", tie_word_embeddings=tied), recipe, 2048))


@pytest.mark.parametrize(
    "fields",
    [
        {"freeze": ("head",)},
        {"freeze": ("head", "norms", "embeddings"), "kernels": "liger"},
        {"train": ("layers.2.*",), "kernels": "liger", "checkpoint": "layer", "input_gradients": True},
        {"optimizer_in_backward": True, "kernels": "liger"},
        {"mlp_chunks": 4, "mlp_recompute": True, "checkpoint": "layer"},
        {"mlp_chunks": 4, "mlp_recompute": True, "checkpoint": "layer", "kernels": "liger"},
    ],
    ids=str,
)
@pytest.mark.parametrize("loss", FUSED)
def test_ways_to_train(loss: str, fields: dict[str, Any]) -> None:
    assert_exact(errors(config_of("llama", tie_word_embeddings=False), Recipe(loss=loss, **fields)))


def test_the_head_alone() -> None:
    config = config_of("llama", tie_word_embeddings=False)
    for loss in ("trl", "cce"):
        assert_exact(errors(config, Recipe(loss=loss, train=("head",))))
    with pytest.raises(RecipeError, match="nothing below it is trained"):
        trace(config, Recipe(loss="liger", train=("head",)), 512)


@pytest.mark.parametrize("tokens", [300, 4095, 4097, 8193])
@pytest.mark.parametrize("loss", FUSED)
def test_lengths_about_the_sizes_that_a_loss_works_in(loss: str, tokens: int) -> None:
    assert_exact(errors(config_of("llama"), Recipe(loss=loss), tokens))


def test_capped_logits() -> None:
    for loss in FUSED:
        assert_exact(
            errors(config_of("gemma2", final_logit_softcapping=30.0), Recipe(loss=loss, checkpoint="layer"), 2048)
        )


def test_chunked_loss_over_ligers_layers() -> None:
    recipe = Recipe(
        loss="chunked", loss_chunks=4, mlp_chunks=4, mlp_recompute=True, kernels="liger", checkpoint="layer"
    )
    assert_exact(errors(config_of("llama"), recipe))


def test_few_layers_give_the_peaks_of_all() -> None:
    recipe = Recipe(loss="trl", kernels="liger", checkpoint="layer")
    few, whole = (trace(TINY, recipe, 1024, whole=whole) for whole in (False, True))
    assert [(peak.instant, peak.bytes) for peak in few.peaks] == [(peak.instant, peak.bytes) for peak in whole.peaks]


@pytest.mark.parametrize("fields", [{"loss": "liger"}, {"loss": "cce"}, {"kernels": "liger"}], ids=str)
def test_no_step_of_a_cpu(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="card"):
        trace(TINY, Recipe(**fields), 64, on="cpu")


def test_the_models_code_is_as_it_was() -> None:
    from transformers.models.llama import modeling_llama

    before = modeling_llama.apply_rotary_pos_emb
    trace(TINY, Recipe(kernels="liger"), 64)
    assert modeling_llama.apply_rotary_pos_emb is before and torch.is_grad_enabled()
