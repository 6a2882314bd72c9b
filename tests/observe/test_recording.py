"""A step's allocations, recorded: as many bytes as an independent count has, and each with the module that it is for."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mstplan.errors import RecipeError
from mstplan.observe.recording import Recorder, Recording
from mstplan.observe.step import PHASES, TrainingStep
from mstplan.plan.recipe import Recipe, strategy

from ..plan.fake_step import STAND_IN, cut, run_step

TINY = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "vocab_size": 61, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MST = strategy("mst", mlp_chunks=4, loss_chunks=8)


def recorded(config, recipe: Recipe, seq_len: int) -> Recording:
    """The second step, on fake tensors."""
    recorder = Recorder()
    with FakeTensorMode(allow_non_fake_inputs=True), recorder:
        step = TrainingStep(config, recipe, seq_len, STAND_IN)
        with recorder.modules_of(step.model):
            step.run()
            step.run(recorder.phase)
    return recorder.recording


@pytest.mark.parametrize("recipe", [MST, Recipe(), Recipe(optimizer="sgd", precision="mixed"), MST.changed(optimizer_in_backward=True)])
def test_as_many_bytes_as_another_count(recipe):
    config = cut("qwen3-4b", 2)
    found, counted = recorded(config, recipe, 2048), run_step(config, recipe, 2048)
    for phase in PHASES[:2]:
        assert found.peak(phase)[0] == counted[phase].bytes


def test_what_is_alive_adds_up():
    found = recorded(TINY, MST, 32)
    for phase in PHASES:
        most, at = found.peak(phase)
        assert sum(made.bytes for made in found.alive_at(at)) == most
    assert [name for name, _ in found.phases] == list(PHASES)
    released = [index for index, sign in found.events if sign < 0]
    assert len(set(released)) == len(released) and len(found.events) == len(found.made) + len(released)


def test_modules_are_named_in_both_passes():
    found = recorded(TINY, Recipe(), 32)
    for backward in (False, True):
        wide = {made.module for made in found.made if made.phase and made.backward is backward and made.shape[1:] == (32, 48)}
        assert wide and all(".mlp" in name for name in wide), wide
    scores = {made.module for made in found.made if made.backward and made.shape == (32, 61)}
    assert scores <= {"", "lm_head"}


@pytest.mark.parametrize(
    "recipe", [MST, Recipe(optimizer="adafactor"), Recipe(adamw_kernel="fused", accumulation=2), Recipe(checkpoint=2, optimizer_in_backward=True)]
)
def test_the_same_step_runs_for_real(recipe):
    step = TrainingStep(TINY, recipe, 32, "sdpa")
    before = [weight.detach().clone() for weight in step.model.parameters()]
    phases: list[str] = []
    losses = [step.run(phases.append).item() for _ in range(3)]
    assert losses[-1] < losses[0] + 1e-3
    assert not all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))
    assert all(weight.grad is None for weight in step.model.parameters())
    assert phases == [*["forward", "backward"] * recipe.accumulation, "optimizer"] * 3


def test_what_cannot_be_run_is_refused():
    for recipe in (strategy("mst"), Recipe(optimizer="adamw-8bit"), Recipe(optimizer_on_host=True)):
        with pytest.raises(RecipeError):
            TrainingStep(TINY, recipe, 32, "sdpa")
