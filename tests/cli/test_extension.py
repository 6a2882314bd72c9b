"""What varies has one place: an optimizer that only this file knows works in every command."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest

from mstplan.plan import advice
from mstplan.plan.optimizers import OPTIMIZERS
from mstplan.plan.optimizers.base import Memory, Optimizer, numel_of
from mstplan.plan.tape import Weight

from ..observe.tiny import TINY
from .conftest import Run


class Signs(Optimizer):
    """Momentum in the weights' dtype, and a step by its sign, for which one weight's is made at a time."""

    name = "signs"
    label = "the tests' optimizer"
    short = "signs alone"
    gives_up = "the sizes of updates"
    host_state_bytes = 4
    steps_shards = False
    torch_states = {"momentum of signs": "momentum"}  # noqa: RUF012

    def memory(self, recipe, weights: Sequence[tuple[Weight, int]]) -> Memory:
        size, largest = recipe.weight_bytes, max(weight.numel for weight, _ in weights)
        states = (("momentum of signs", recipe.weight_dtype, size * numel_of(weights)),)
        return Memory(states, (("signs of one weight", recipe.weight_dtype, size * largest),), size)

    def make(self, recipe):
        import torch

        class Step(torch.optim.Optimizer):
            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for weight in group["params"]:
                        if weight.grad is not None:
                            kept = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                            kept.mul_(0.9).add_(weight.grad, alpha=0.1)
                            weight.add_(kept.sign(), alpha=-1e-5)

        return lambda weights: Step(weights, {})


@pytest.fixture
def signs(monkeypatch, tmp_path):
    monkeypatch.setitem(OPTIMIZERS, "signs", Signs())
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))


MODEL = ("-m", "tiny.json", "--gpu", "rtx-4090", "--optimizer", "signs")


def test_formula_and_trace_agree_on_an_optimizer_from_outside(run: Run, signs):
    """As on any other: its states and its temporaries are counted alike, and compared by their names."""
    for more in ((), ("--optimizer-in-backward",)):
        told = run("trace", *MODEL, "-s", "checkpoint", "--seq-len", "512", "--no-cache", "--json", *more).json
        planned = run("plan", *MODEL, "-s", "checkpoint", "--seq-len", "512", "--json", *more).json
        peaks = {each["name"]: each["bytes"] for each in told["instants"]}
        ours = {each["name"]: each["bytes"] for each in planned["instants"]}
        assert peaks and all(
            ours[name] == pytest.approx(peak, rel=0.002) for name, peak in peaks.items() if name in ours
        )


def test_max_seq_plan_and_plot_know_it(run: Run, signs, tmp_path):
    answers = {name: run("max-seq", *MODEL[:-1], name, "--json").json for name in ("sgd", "signs", "adamw")}
    lengths = [[a["s_max"] for a in answers[name]["results"]] for name in ("sgd", "signs", "adamw")]
    assert all(few >= some >= many for few, some, many in zip(*lengths, strict=True)) and lengths[0] != lengths[2]
    host = run("plan", *MODEL, "-s", "mst", "--seq-len", "1k", "--optimizer-on-host", "--json").json
    parameters = host["model"]["parameters"]
    assert host["host_bytes"] == parameters * (4 + 4 + 2)
    assert run("plot", *MODEL, "-o", "plot.svg").code == 0 and (tmp_path / "plot.svg").read_text().count("signs")


def test_it_is_refused_by_name_where_it_cannot_step(run: Run, signs):
    said = run("plan", *MODEL, "--seq-len", "1k", "--sharding", "fsdp", "--gpus", "2")
    assert said.code == 2 and "the tests' optimizer cannot step fsdp's shards" in said.err
    assert "signs" in run("plan", *MODEL[:-1], "sings", "--seq-len", "1k").err


def test_it_is_among_the_ways_to_fit(run: Run, signs):
    """A recipe that AdamW's states do not fit with is sent to it as well, as options to paste."""
    said = run("plan", "-m", "qwen3-4b", "--gpu", "rtx-4090", "-s", "mst", "--seq-len", "2k", "--json").json
    tried = [way["options"] for way in said["ways_to_fit"]]
    assert not said["fits"] and any("--optimizer" in options for options in tried)
    assert "signs alone" in advice.nothing_tried()
    for options in (o for o in tried if "--optimizer signs" in o):
        assert run("plan", "-m", "qwen3-4b", "--gpu", "rtx-4090", "--seq-len", "2k", *options.split()).code == 0


@pytest.mark.parametrize("typed", ["adamx", "lion", "muon", "", "ADAMW-9bit", "signs"])
def test_an_unknown_optimizer_is_an_error(run: Run, typed, tmp_path):
    """Nothing falls through to AdamW."""
    for command in (("plan", "--seq-len", "1k"), ("max-seq",), ("trace", "--seq-len", "1k"), ("plot",)):
        said = run(*command, "-m", "gpt2", "--gpu", "h100", "--optimizer", typed)
        assert said.code == 2 and len(said.err.strip().splitlines()) <= 4 and not said.out
        assert all(name in said.err for name in OPTIMIZERS), said.err
    assert [path.name for path in tmp_path.iterdir()] == []
