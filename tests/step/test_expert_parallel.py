"""Experts that several GPUs share out: what makes no sense is refused, with what would do; what is shared out, and what the router decides."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import load_model
from mstplan.errors import RecipeError
from mstplan.plan.advice import recipe_notes
from mstplan.plan.findings import assess_length
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.several_gpus import compare, list_ways
from mstplan.plan.solve import fixed_chunks, longest_sequence, plan_at
from mstplan.plan.ways import master_weights
from mstplan.spec.hardware import card
from mstplan.step.clipping import clipping
from mstplan.step.expert_parallel import most_rows, rows_of_a_token
from mstplan.step.optimizers.base import bytes_of
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.runnable import check_measurable
from mstplan.step.steps import Chunks, Step

MODEL, ON = load_model("qwen3-30b-a3b"), card("h100")
IN_PIECES = Chunks(1, 1)


def of(ranks: int, gpus: int = 8, name: str = "checkpoint", **more: Any) -> Recipe:
    return strategy(name, **{"gpus": gpus, "sharding": "fsdp", "expert_parallel": ranks, **more})


def laid_out(recipe: Recipe, tokens: int = 4096) -> Step:
    return step_of(MODEL, recipe, ON, fixed_chunks(recipe), tokens)


def peak(recipe: Recipe, tokens: int = 4096) -> int:
    return laid_out(recipe, tokens).largest(step_sizes(recipe, tokens, fixed_chunks(recipe)))[1]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"expert_parallel": 3}, "does not divide 8 gpus: set --expert-parallel 2, 4, 8"),
        ({"expert_parallel": 8, "sharding": "ddp"}, "with all other weights in shards: add sharding='fsdp'"),
        ({"expert_parallel": 8, "sharding": "none"}, "with all other weights in shards: add sharding='fsdp'"),
        ({"expert_parallel": 8, "expert_imbalance": 9.0}, "more than 8 GPUs can send one: set it to 8 or less"),
        ({"expert_imbalance": 2.0}, "add expert_parallel=8 (--expert-parallel 8)"),
        ({"expert_parallel": 8, "expert_imbalance": 0.5}, "expert_imbalance"),
        ({"expert_parallel": 8, "sequence_parallel": 2}, "leave one of the two out"),
        ({"expert_parallel": 8, "replicas": 2}, "with replicas=2 (--replicas 2) is not planned"),
        ({"expert_parallel": 8, "mlp_chunks": 4}, "with mlp_chunks=4 (--chunks 4) is not planned"),
        ({"expert_parallel": 8, "lora_rank": 8, "autocast": True}, "with autocast=True (--autocast) is not planned"),
        ({"expert_parallel": 8, "kernels": "liger"}, "with kernels='liger' (--kernels liger) is not planned"),
        (
            {"expert_parallel": 8, "precision": "mixed", "reduce_dtype": "bf16"},
            "with reduce_dtype='bf16' (--reduce-dtype bf16) is not planned",
        ),
        (
            {"expert_parallel": 8, "optimizer_in_backward": True},
            "with optimizer_in_backward=True (--optimizer-in-backward) is not planned",
        ),
        ({"expert_parallel": 8, "lora_rank": 8, "dora": True}, "with adapters and dora=True (--dora) is not planned"),
        (
            {"expert_parallel": 8, "lora_rank": 8, "precision": "mixed"},
            "with adapters and precision='mixed' (--precision mixed) is not planned",
        ),
        (
            {"expert_parallel": 8, "lora_rank": 8, "quantize": "nf4"},
            "with adapters and quantize='nf4' (--quantize nf4) is not planned",
        ),
        ({"expert_parallel": 8, "checkpoint": "selective"}, "set checkpoint='layer'"),
        ({"expert_parallel": 8, "adamw_kernel": "foreach"}, "--adamw-kernel fused"),
    ],
    ids=str,
)
def test_recipes_that_contradict_themselves(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        Recipe(**{"gpus": 8, "sharding": "fsdp", **fields})
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "recipe", "said"),
    [
        ("qwen1.5-moe-a2.7b", of(8), "60 experts, which 8 GPUs cannot share out evenly.\nUse 2 or 4."),
        ("llama3.1-8b", of(8), "llama3.1-8b has no experts.\nLeave --expert-parallel out."),
        ("llama4-scout", of(8), "a family \\(llama4_text\\) .*\nPlanned are deepseek_v2, "),
        ("mixtral-8x7b", of(8, lora_rank=8), "each GPU has a part of these.\nUse --lora-targets attention."),
        ("qwen3-30b-a3b", of(8, train=("mlp",)), "where all before them is frozen.\nTrain embeddings, too"),
        ("mixtral-8x7b", of(8, expert_imbalance=6.0), "at most 4 times as many rows as it sends.\nUse 4 or less."),
    ],
    ids=str,
)
def test_models_whose_experts_are_not_shared_out(model: str, recipe: Recipe, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        plan_at(load_model(model), recipe, ON, 2048)


@pytest.mark.parametrize("name", ["standard", "checkpoint"])
def test_one_rank_shares_out_nothing(name: str) -> None:
    """`expert_parallel` 1 is FSDP2 as ever, tensor by tensor."""
    alone, fsdp = laid_out(of(1, name=name)), laid_out(strategy(name, gpus=8, sharding="fsdp"))
    assert of(1, name=name) == strategy(name, gpus=8, sharding="fsdp")
    assert alone.moments == fsdp.moments and alone.card_weights == fsdp.card_weights


@given(st.sampled_from([(2, 2), (4, 2), (4, 4), (8, 2), (8, 8), (16, 4), (128, 128), (256, 128)]))
def test_every_gpu_has_its_share_of_the_experts_and_of_all_else(sizes: tuple[int, int]) -> None:
    """Whoever has the experts: with as many GPUs, of which each number divides all, a card has as many parameters."""
    gpus, ranks = sizes
    spread = [(w, n) for w, n in laid_out(of(ranks, gpus)).card_weights if w.spread_over > 1]
    experts = 48 * 128 * 3 * 2048 * 768
    assert sum(w.numel * n for w, n in spread) == max(experts // gpus, experts // 128)
    assert {w.shape[0] for w, _ in spread} == {max(1, 128 // gpus)}
    if gpus <= 128:
        fsdp = laid_out(strategy("checkpoint", gpus=gpus, sharding="fsdp"))
        assert laid_out(of(ranks, gpus)).card_parameters == fsdp.card_parameters


def test_fewer_experts_of_its_own_take_less_while_they_run() -> None:
    """A layer's experts, gathered, their buffer and their gradients: the more GPUs share them out, the fewer; whole on each under FSDP2."""
    peaks = [peak(of(n, 64), 1024) for n in (2, 4, 8, 16, 32, 64)]
    assert peaks == sorted(peaks, reverse=True) and peaks[0] < peak(
        strategy("checkpoint", gpus=64, sharding="fsdp"), 1024
    )


@given(st.integers(1, 64), st.floats(1, 8), st.floats(1, 8))
def test_a_fuller_gpu_holds_more(tokens: int, one: float, other: float) -> None:
    """Rows are whole ones: of the same number of them two steps are the same."""
    few, many = sorted((one, other))
    held = [peak(of(8, name="standard", expert_imbalance=each), 1024 * tokens) for each in (few, many)]
    rows = [rows_of_a_token(8, each) for each in (few, many)]
    assert held[0] < held[1] if rows[0] < rows[1] else held[0] == held[1]


@given(st.integers(1, 16), st.sampled_from([1, 2, 4, 8]), st.sampled_from([8, 64, 128]))
def test_no_router_sends_more_than_all_rows(per_token: int, ranks: int, experts: int) -> None:
    """One GPU receives at least what an even router sends it, at most all rows of all GPUs, and no token twice for an expert."""
    per_token = min(per_token, experts)
    even, most = rows_of_a_token(per_token, 1.0), most_rows(per_token, experts, ranks)
    assert even == per_token <= most <= ranks * per_token
    assert most <= ranks * (experts // ranks)


def test_clipping_takes_the_norms_of_one_mesh_at_a_time() -> None:
    """Of experts, and of all else: each mesh has as many norms as weights, and room for the squares of the largest of its own."""
    clipped, plain = laid_out(of(8, max_grad_norm=1.0)), laid_out(of(8))
    assert not plain.clipping
    counts = [sum(n for w, n in clipped.trained_on_card if (w.spread_over > 1) is own) for own in (True, False)]
    norms = next(held for held in clipped.clipping if held.name == "norms of gradients")
    assert norms.copies in counts and counts[0] == 2 * 48
    alone = clipping(of(8, max_grad_norm=1.0), [(w, n) for w, n in clipped.trained_on_card if w.spread_over == 1])
    assert bytes_of(clipped.clipping) >= bytes_of(alone)


def test_adapters_are_whole_on_every_gpu() -> None:
    """They come to a model that is in shards already, as transformers' Trainer has it: with more GPUs none gets smaller."""
    adapters = [
        [(w.shape, n) for w, n in laid_out(of(8, gpus, lora_rank=8, lora_targets=("attention",))).trained_on_card]
        for gpus in (8, 64)
    ]
    assert adapters[0] == adapters[1] and sum(n for _, n in adapters[0]) == 48 * 2 * 4


def test_answers_say_what_the_router_decides() -> None:
    recipe = of(8)
    notes = " ".join(recipe_notes(MODEL, recipe))
    assert "DistributedConfig(fsdp_size=8, ep_size=8)), 16 of 128 experts of every layer" in notes
    assert "8 rows, as many as it sends" in notes and "it is 64: --expert-imbalance 8." in notes
    uneven = " ".join(recipe_notes(MODEL, recipe.changed(expert_imbalance=1.5)))
    assert "12 rows, 1.5 times the 8 of a router that shares tokens out evenly" in uneven


def test_the_worst_router_trains_a_shorter_sequence() -> None:
    even, worst = (
        longest_sequence(MODEL, of(8, name="standard", expert_imbalance=each), ON, IN_PIECES) for each in (1.0, 8.0)
    )
    assert 0 < worst < even / 2


def test_ways_of_several_gpus_list_it_where_there_are_experts() -> None:
    experts = [way for way in list_ways(8, experts=60) if "expert_parallel" in way.fields]
    assert [way.name for way in experts] == ["fsdp, experts over 2", "fsdp, experts over 4"]  # 8 do not divide 60
    assert not [way for way in list_ways(8) if "expert_parallel" in way.fields]
    found = compare(
        load_model("qwen1.5-moe-a2.7b"), ON, {"checkpoint": strategy("checkpoint"), "mst": strategy("mst")}, experts
    )
    assert [answer.strategy for _, answer in found.answers] == ["checkpoint"] * 2 and not found.left_out


def test_steps_are_not_run() -> None:
    with pytest.raises(RecipeError, match="planned and traced, and not run here"):
        check_measurable(of(8))


def test_a_plan_tries_nothing_that_is_refused() -> None:
    """Notes and ways to fit of a plan vary its recipe, also to what experts over several GPUs do not go with."""
    for tokens in (512, 400_000):
        plan = plan_at(MODEL, of(8), ON, tokens)
        assert master_weights(plan) is None
        assert plan.fits is (tokens == 512) and assess_length({"checkpoint": plan}, "checkpoint").notes
