"""Steps of transformers' Trainer: the same bytes as those of mstplan's own loop, but for the tokens that it holds beside."""

from __future__ import annotations

import pytest
import torch

from mstplan import MissingError, RecipeError, card, strategy
from mstplan.measuring import sweep, trainers
from mstplan.measuring.measurement import OK, Case
from mstplan.measuring.processes import Processes
from mstplan.step.instants import Pass
from mstplan.step.runnable import check_trainer
from mstplan.train.step import build_model, read_settings

from ..tracing.tiny import TINY
from .measured import CPU, case

LENGTH, STEPS = 300, 2


@pytest.mark.parametrize(("name", "precision"), [("checkpoint", "bf16"), ("standard", "bf16"), ("checkpoint", "mixed")])
def test_a_trainer_holds_nothing_beside_a_step_but_tokens(name, precision):
    own = case(name, LENGTH, precision=precision, adamw_kernel="fused", steps=STEPS)
    of_trainer = case(name, LENGTH, precision=precision, adamw_kernel="fused", steps=STEPS, trainer="transformers")
    with Processes() as processes:
        expected = sweep.measure_case(own, CPU, processes=processes)
        found = sweep.measure_case(of_trainer, CPU, processes=processes)
    assert (found.outcome, found.error, expected.outcome) == (OK, "", OK)
    dataset, next_batch = (STEPS + 1) * LENGTH * 8, 2 * LENGTH * 8  # accelerate fetches one batch ahead
    beside = {name: found.instants[name] - size - dataset - next_batch for name, size in expected.instants.items()}
    assert all(0 <= size <= 64 for size in beside.values()), beside  # counts of tokens, the loss so far
    assert len(found.ranks[0].step_seconds) == STEPS and found.instants.keys() == expected.instants.keys()
    assert found.key != expected.key and found.case.words.endswith(f"{LENGTH} tokens, transformers' Trainer")
    assert Case.from_data(of_trainer.as_data()) == of_trainer and "trainer" not in own.as_data()


def test_passes_of_each_step():
    recipe = strategy("checkpoint", accumulation=2, precision="fp32", optimizer="sgd")
    heard: list[object] = []
    watch = trainers.Watch(
        lambda step: heard.append(("begins", step)), heard.append, lambda step: heard.append(("ends", step))
    )
    model = build_model(read_settings(TINY), recipe, "sdpa", "cpu")
    before = [weight.detach().clone() for weight in model.parameters()]
    assert trainers.train(model, recipe, 16, 2, watch) > 0
    passes = [Pass.FORWARD, Pass.BACKWARD] * 2 + [Pass.OPTIMIZER]
    assert heard == [item for step in range(2) for item in (("begins", step), *passes, ("ends", step))]
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_without_accelerate_it_is_said(monkeypatch):
    def needs(**_: object) -> None:
        raise ImportError("Using the `Trainer` with `PyTorch` requires `accelerate>=1.1.0`")

    monkeypatch.setattr(trainers, "TrainingArguments", needs)
    recipe = strategy("checkpoint")
    model = build_model(read_settings(TINY), recipe, "sdpa", "cpu")
    with pytest.raises(MissingError, match="pip install accelerate"):
        trainers.train(model, recipe, 16, 1, trainers.Watch(print, print, print))


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("checkpoint", {"adamw_kernel": "for-loop"}, "no such optimizer"),
        ("checkpoint", {"optimizer": "adamw-8bit"}, "no such optimizer"),
        ("checkpoint", {"optimizer_in_backward": True}, "steps after backward"),
        ("checkpoint-sqrt", {}, "every layer, or none"),
        ("mst", {}, "loss is transformers' own"),
        ("checkpoint", {"mlp_chunks": 2, "mlp_recompute": True}, "no chunks"),
        ("checkpoint", {"offload_layer_inputs": True}, "offloads nothing"),
        ("checkpoint", {"gpus": 2, "sharding": "fsdp"}, "on one GPU"),
    ],
)
def test_what_a_trainer_cannot_follow_is_refused(name, changes, why):
    with pytest.raises(RecipeError, match=why) as refused:
        check_trainer(strategy(name).changed(**changes))
    assert len(str(refused.value).splitlines()) == 2
    assert check_trainer(strategy("checkpoint", adamw_kernel="fused", accumulation=4)) is None


def test_a_sweep_refuses_it_before_anything_runs():
    with pytest.raises(RecipeError, match="transformers' Trainer cannot follow"):
        sweep.plan_cases("gpt2", [64], {"mst": strategy("mst")}, card("h100"), trainer="transformers")
