"""A step's allocations, recorded: as many bytes as an independent count has, and each with the module that it is for."""

from __future__ import annotations

import json

import pytest
import torch

from mstplan.errors import RecipeError
from mstplan.kept import adapter_for
from mstplan.step.instants import Pass
from mstplan.step.recipe import Recipe, strategy
from mstplan.tracing.recording import Category, Place, Recording, RecordingData, largest
from mstplan.tracing.tracer import trace
from mstplan.train.step import TrainingStep, build_model, read_settings

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MST = strategy("mst", mlp_chunks=4, loss_chunks=8)


@pytest.fixture(scope="module")
def plain() -> Recording:
    return trace(TINY, Recipe(), 32, whole=True).step


def test_what_is_alive_adds_up(plain):
    most, at = largest(plain.live())
    assert sum(plain.storages[i].bytes for i in plain.alive_at(at)) == most
    released = [index for index, sign in plain.events if sign < 0]
    assert len(set(released)) == len(released) and len(plain.events) == len(plain.storages) + len(released)


def test_modules_are_named_in_both_passes(plain):
    for run in (Pass.FORWARD, Pass.BACKWARD):
        wide = {
            plain.storages[plain.events[e][0]].module
            for place, span in plain.blocks()
            if place.run == run
            for e in span
            if plain.events[e][1] > 0 and plain.storages[plain.events[e][0]].shape[1:] == (32, 48)
        }
        assert wide and all(".mlp" in name for name in wide), wide


def test_categories(plain):
    by_shape = {(m.shape, m.category) for m in plain.storages}
    assert ((1, 32, 48), Category.MLP) in by_shape
    assert ((1, 32, 32), Category.INPUTS) in by_shape
    assert ((1, 4, 32), Category.ATTENTION) in by_shape or ((1, 32, 4, 8), Category.ATTENTION) in by_shape
    gradients = [m for m in plain.storages if m.category == Category.GRADIENTS]
    assert len(gradients) == len(list(build_model(read_settings(TINY), Recipe(), "eager", "meta").parameters()))
    logits = [m for m in plain.storages if m.shape[-1:] == (61,) and m.shape[0] != 61]
    assert len(logits) > 4 and {m.category for m in logits} == {Category.LOSS}


def test_places_are_those_of_a_step():
    step = trace(TINY, strategy("checkpoint"), 32, whole=True).step
    places = [place for place, _ in step.places]
    forward = [place.unit for place in places if place.run == Pass.FORWARD]
    assert forward == [-1, 0, 1, 2, 3, 4]
    again = [place.unit for place in places if place.run == Pass.RECOMPUTE]
    assert again == [3, 2, 1, 0]
    assert next(p for p in places if p.run == Pass.BACKWARD) == Place(Pass.BACKWARD, 4)


def test_a_recording_survives_json(plain):
    assert Recording.from_data(adapter_for(RecordingData).validate_json(json.dumps(plain.as_data()))) == plain


@pytest.mark.parametrize(
    "recipe",
    [
        MST,
        Recipe(optimizer="adafactor"),
        Recipe(adamw_kernel="fused", accumulation=2),
        Recipe(checkpoint=2, optimizer_in_backward=True),
    ],
)
def test_the_same_step_runs_for_real(recipe):
    step = TrainingStep(build_model(read_settings(TINY), recipe, "sdpa", "cpu"), recipe, 32)
    before = [weight.detach().clone() for weight in step.model.parameters()]
    passes: list[str] = []
    losses = [step.run(passes.append).item() for _ in range(3)]
    assert losses[-1] < losses[0] + 1e-3
    assert not all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in step.model.parameters())
    assert passes == [*["forward", "backward"] * recipe.accumulation, "optimizer"] * 3


def test_what_cannot_be_run_is_refused():
    for recipe in (
        strategy("mst"),
        Recipe(optimizer_on_host=True),
        Recipe(loss="transformers<4.45"),
        Recipe(loss="transformers<4.49"),
    ):
        with pytest.raises(RecipeError):
            trace(TINY, recipe, 32)
