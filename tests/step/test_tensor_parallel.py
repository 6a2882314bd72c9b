"""Matrices that several GPUs split: what makes no sense is refused, with what would do; what is split and what is whole."""

from __future__ import annotations

from typing import Any

import pytest

from mstplan import load_model
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of
from mstplan.plan.solve import longest_sequence, plan_at
from mstplan.spec.hardware import card
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.runnable import check_measurable
from mstplan.step.steps import Chunks

MODEL, ON = load_model("llama3.1-8b"), card("h100")


def of(ranks: int, **more: Any) -> Recipe:
    return strategy("checkpoint", **{"gpus": ranks, "tensor_parallel": ranks, "adamw_kernel": "for-loop", **more})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"gpus": 8, "tensor_parallel": 3}, "does not divide 8 gpus: add --gpus 3 or --tensor-parallel 8"),
        (
            {"gpus": 8, "tensor_parallel": 4},
            "leaves 2 copies of the model: add sharding='fsdp' (--sharding fsdp), or --gpus 4",
        ),
        ({"gpus": 8, "tensor_parallel": 4, "context_parallel": 2}, "leave one of the two out"),
        ({"gpus": 8, "tensor_parallel": 8, "sharding": "fsdp"}, "leaves none to share weights: add --gpus 16, or"),
        ({"gpus": 8, "tensor_parallel": 3, "sharding": "fsdp"}, "does not divide 8 gpus: add --gpus 9 or"),
        (
            {"gpus": 8, "tensor_parallel": 2, "sharding": "fsdp", "replicas": 4},
            "4 replicas of 4 groups of 2 gpus leave no whole number of 2 or more for shards: replicas (--replicas) can be 2",
        ),
        (
            {"gpus": 8, "tensor_parallel": 2, "sharding": "ddp"},
            "torch's DistributedDataParallel refuses split matrices",
        ),
        (
            {"gpus": 8, "tensor_parallel": 2, "sharding": "zero3"},
            "with sharding='zero3' (--sharding zero3) is not planned: take --sharding",
        ),
        (
            {"gpus": 8, "tensor_parallel": 2, "sharding": "fsdp", "padding_free": True, "attention": "flash"},
            "with padding_free=True (--padding-free) is not planned",
        ),
        ({"gpus": 8, "tensor_parallel": 8, "mlp_chunks": 4}, "with mlp_chunks=4 (--chunks 4) is not planned"),
        (
            {"gpus": 8, "tensor_parallel": 8, "checkpoint": "layer", "offload": "saved-tensors"},
            "with offload='saved-tensors'",
        ),
        (
            {"gpus": 8, "tensor_parallel": 8, "checkpoint": "sqrt"},
            "checkpoint='sqrt' (--checkpoint sqrt) is not planned: set checkpoint='layer'",
        ),
        ({"gpus": 8, "tensor_parallel": 8, "attention": "eager"}, "use sdpa"),
    ],
    ids=str,
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe(**fields)
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        ("llama3.1-8b", of(6), "8 of keys, .* which 6 GPUs cannot split evenly.\nUse 1, 2, 4 or 8."),
        ("llama3.1-8b", of(3, gpus=12, sharding="fsdp"), "which 3 GPUs cannot split evenly.\nUse 1, 2 or 4."),
        ("llama3.2-1b", of(2), "embeddings tied to its head"),
        ("mixtral-8x7b", of(2), "a plan \\(mixtral\\)"),
        ("phi3-mini-4k", of(2), "a plan \\(phi3\\)"),
        ("llama3.1-8b", of(2, gpus=4, sharding="fsdp", optimizer="sgd"), "AdamW alone.\nUse --optimizer adamw"),
    ],
    ids=str,
)
def test_models_that_are_not_split(model: str, recipe: Recipe, said: str) -> None:
    with pytest.raises(RecipeError, match=f"--tensor-parallel.*{said}"):
        plan_at(load_model(model), recipe, ON, 2048)


def test_norms_are_whole_and_all_else_is_split() -> None:
    """8.03B parameters, of which 65 norms of 4,096 are on every rank; the embedding's gradient is whole."""
    whole, split = (step_of(MODEL, recipe, ON, Chunks(1, 1), 4096) for recipe in (strategy("checkpoint"), of(8)))
    norms = 65 * 4096
    assert 8 * (split.card_parameters - norms) + norms == whole.card_parameters
    gradients = sum(t.bytes for t in split._gradients(always_alive=False))
    assert gradients == 2 * (split.card_parameters + 128256 * 4096 * 7 // 8)


def test_parts_of_matrices_are_shared_out_as_weights_are() -> None:
    """Of each a rank of four by two has an eighth; norms, which are not split, are shared over the four."""
    whole, shared = (
        step_of(MODEL, recipe, ON, Chunks(1, 1), 4096)
        for recipe in (strategy("checkpoint"), of(2, gpus=8, sharding="fsdp", adamw_kernel="fused"))
    )
    norms = 65 * 4096
    assert 8 * shared.card_parameters == whole.card_parameters + norms
    assert sum(t.bytes for t in shared._gradients(always_alive=False)) == 2 * shared.card_parameters


def test_hidden_states_and_logits_are_not() -> None:
    """So that with twice the GPUs less than twice the length trains, however many there are."""
    reach = [longest_sequence(MODEL, of(n), ON, Chunks(1, 1)) for n in (2, 4, 8)]
    assert reach == sorted(reach) and reach[2] < 1.2 * reach[1]


def test_steps_are_not_run() -> None:
    with pytest.raises(RecipeError, match="planned and traced, and not run here"):
        check_measurable(of(2))
