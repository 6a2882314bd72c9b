"""FSDP2 in closed form: what more cards, replicas, a sum's dtype and micro-batches change. Beside the trace: tests/tracing/test_fsdp.py."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import host_bytes
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.cuda import pinned_bytes
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, InstantPeak, Step

ON = card("h100")
MODEL = load_model("qwen3-0.6b")
ONE = Chunks(1, 1)
HOST = {"optimizer_on_host": True, "weights_on_host": True}


def sharded(**fields: object) -> Recipe:
    return strategy("checkpoint", **{"gpus": 8, "sharding": "fsdp", **fields})


def built(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> Step:
    return step_of(model, recipe, ON, ONE, tokens)


def instants(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> dict[Instant, InstantPeak]:
    found = built(recipe, model, tokens).instants(step_sizes(recipe, tokens, ONE))
    return {each.name: each for each in found}


def peak(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> int:
    return max(each.bytes for each in instants(recipe, model, tokens).values())


@st.composite
def settings_of_fsdp(draw: st.DrawFn) -> dict[str, object]:
    precision = draw(st.sampled_from(["bf16", "mixed", "fp32"]))
    attention = "eager" if precision == "fp32" else "sdpa"
    accumulation = draw(st.sampled_from([1, 2, 3, 7]))
    fields: dict[str, object] = {"precision": precision, "attention": attention, "accumulation": accumulation}
    fields["sync_each_batch"] = draw(st.booleans())
    fields["checkpoint"] = draw(st.sampled_from(["none", "layer"]))
    if precision == "mixed":
        fields["reduce_dtype"] = draw(st.sampled_from(["fp32", "bf16"]))
    if draw(st.booleans()):
        fields |= HOST
    elif accumulation == 1:
        fields["optimizer_in_backward"] = draw(st.booleans())
    return fields


@settings(max_examples=30)
@given(fields=settings_of_fsdp(), shards=st.integers(2, 40), replicas=st.integers(1, 5), times=st.integers(2, 4))
def test_more_cards_never_need_more(fields: dict[str, object], shards: int, replicas: int, times: int) -> None:
    """Whole multiples of them: a number that does not divide rows pads them. As many shards need the same in one replica, or more."""
    few = peak(sharded(**fields, gpus=shards * replicas, replicas=replicas))
    assert peak(sharded(**fields, gpus=shards * replicas * times, replicas=replicas)) <= few * 1.001
    alone = peak(sharded(**fields, gpus=shards))
    assert alone <= few


@settings(max_examples=30)
@given(fields=settings_of_fsdp())
def test_what_sync_cpu_ram_and_sums_in_bf16_spare(fields: dict[str, object]) -> None:
    given_fields = {**fields, "optimizer_in_backward": False}
    assert peak(sharded(**{**given_fields, "sync_each_batch": True})) <= peak(
        sharded(**{**given_fields, "sync_each_batch": False})
    )
    assert peak(sharded(**{**given_fields, **HOST})) <= peak(
        sharded(**{**given_fields, "optimizer_on_host": False, "weights_on_host": False})
    )
    if fields["precision"] == "mixed":
        assert peak(sharded(**{**given_fields, "reduce_dtype": "bf16"})) <= peak(
            sharded(**{**given_fields, "reduce_dtype": "fp32"})
        )


@pytest.mark.parametrize(
    ("fields", "each"),
    [({}, 2), ({"precision": "mixed"}, 4), ({"precision": "mixed", "reduce_dtype": "bf16"}, 2)],
    ids=str,
)
def test_whole_gradients_stay_in_the_dtype_they_are_summed_in(fields, each):
    for gpus in (4, 64):
        recipe = sharded(**fields, gpus=gpus, accumulation=4)
        loss = instants(recipe)[Instant.LOSS]
        kept = sum(entry.bytes for entry in loss.entries if entry.role is Role.WEIGHT_GRADIENT)
        assert kept == each * built(recipe).parameters
        synced = instants(recipe.changed(sync_each_batch=True))[Instant.LOSS]
        assert sum(entry.bytes for entry in synced.entries if entry.role is Role.WEIGHT_GRADIENT) < kept


def test_the_optimizer_finds_shards_of_gradients_only():
    recipes = sharded(accumulation=4), sharded(accumulation=4, sync_each_batch=True), sharded()
    assert len({instants(recipe)[Instant.OPTIMIZER].bytes for recipe in recipes}) == 1


def test_two_micro_batches_need_as_much_as_many():
    """Of more than two the largest moment is one of the second or the last."""
    three, many = (instants(sharded(accumulation=n)) for n in (3, 100))
    assert {name: each.bytes for name, each in three.items()} == {name: each.bytes for name, each in many.items()}


def test_bytes_in_cpu_ram():
    """Of each shard weights and gradients, pinned, and AdamW's two moments, in the weights' dtype."""
    for precision, size in (("bf16", 2), ("mixed", 4)):
        recipe = sharded(**HOST, precision=precision)
        step = built(recipe)
        pinned = sum(2 * pinned_bytes(weight.numel * size) * n for weight, n in step.card_weights)
        moments = sum(2 * weight.numel * size * n for weight, n in step.card_weights)
        found = host_bytes(MODEL, recipe, 1024, step)
        assert pinned + moments <= found <= pinned + moments + 8 * 1024  # numbers of steps
        assert Instant.OPTIMIZER not in instants(recipe)
        assert not any(entry.role is Role.WEIGHT for entry in instants(recipe)[Instant.LOSS].entries)
