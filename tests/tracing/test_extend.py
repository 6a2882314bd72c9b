"""A step written down from few layers and few chunks is the step of all of them, event by event."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstplan import profiles
from mstplan.step.instants import Pass
from mstplan.step.recipe import USUAL_STRATEGIES, Recipe, strategy
from mstplan.tracing.extend import Unlike, extend, layers_to_run, make_row, select_layers
from mstplan.tracing.recording import Place, Recording, Storage
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..recipes import in_chunks

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW_EXPERTS = {
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
}


def narrow(name: str, layers: int) -> dict[str, Any]:
    """A shipped configuration with its layers as they are, but narrow and fewer, of dense ones before experts two; with eight experts."""
    config = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    if config.get("first_k_dense_replace"):
        config["first_k_dense_replace"] = 2
    experts = FEW_EXPERTS.get(config["model_type"], {})
    return {**config, **SMALL, **experts, "num_hidden_layers": layers}


def happened(traced: Trace) -> Iterator[tuple[Place, int, Storage]]:
    """(where, +1 or -1, what) of every event."""
    step = traced.step
    for place, span in step.blocks():
        for index, sign in step.events[span.start : span.stop]:
            yield place, sign, step.storages[index]


def check(config: dict[str, Any], recipe: Recipe) -> None:
    short, whole = trace(config, recipe, 5000), trace(config, recipe, 5000, whole=True)
    assert len(short.kept) < short.units == len(whole.kept)
    assert [(p.instant, p.bytes) for p in short.peaks] == [(p.instant, p.bytes) for p in whole.peaks]
    if recipe.loss != "chunked":  # with chunks left out events are fewer, but no moment is higher or lower
        assert list(happened(short)) == list(happened(whole))
    assert short.live[-1] == whole.live[-1]
    assert {(a.category, a.shape, a.dtype, a.copies) for a in short.alive(short.peak.event)} == {
        (a.category, a.shape, a.dtype, a.copies) for a in whole.alive(whole.peak.event)
    }


# As few layers as show that some are written down: plain or checkpointed, in chunks, and with layer inputs on the host.
CASES = {
    "llama3.1-8b": (7, 6, 7),
    "gemma2-2b": (8, 7, 9),
    "gemma3-1b": (14, 8, 11),
    "deepseek-v3": (9, 7, 8),
    "gpt-oss-20b": (8, 7, 9),
}


@pytest.mark.parametrize("model", ["llama3.1-8b", "gemma2-2b"])
@pytest.mark.parametrize("name", ["mst-layer", "mst-layer-offload"])
def test_few_layers_and_chunks_tell_all_of_layers_in_chunks(model, name):
    check(narrow(model, 9), in_chunks(strategy(name), 4, 4))


@pytest.mark.parametrize("name", USUAL_STRATEGIES)
@pytest.mark.parametrize("model", CASES)
def test_few_layers_and_chunks_tell_all(model, name):
    recipe = strategy(name)
    layers = CASES[model][("mst", "mst-offload").index(name) + 1 if recipe.mlp_chunks == "auto" else 0]
    check(narrow(model, layers), in_chunks(recipe, 4, 4))


SEVERAL = [
    ("llama3.1-8b", 12, "sqrt", {}),
    ("llama3.1-8b", 14, 4, {}),  # the last checkpoint is shorter
    ("gemma2-2b", 12, 4, {}),
    ("gemma3-1b", 16, 3, {}),  # layers' kinds and checkpoints do not repeat together, and there is one layer more
    ("deepseek-v3", 12, 3, {}),
    ("gpt-oss-20b", 12, 4, {}),
    ("llama3.1-8b", 13, 2, {"offload_layer_inputs": True}),
    ("gemma3-1b", 17, 2, {"offload_layer_inputs": True}),
    ("llama3.1-8b", 9, 3, {"mlp_chunks": 4, "loss_chunks": 4}),
]


@pytest.mark.parametrize(("model", "layers", "every", "more"), SEVERAL)
def test_few_layers_tell_all_with_several_to_a_checkpoint(model, layers, every, more):
    name = "mst" if "mlp_chunks" in more else "checkpoint"
    check(narrow(model, layers), strategy(name).changed(checkpoint=every, **more))


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=40), st.integers(1, 6), st.integers(1, 2))
def test_few_shows_every_pattern(kinds, every, reach):
    whole = make_row(kinds, every, reach)
    kept = layers_to_run(whole)
    patterns = whole.patterns()
    assert {patterns[i] for i in kept} == set(patterns)
    assert len(set(kept)) == len(kept)
    assert select_layers(whole, kept).patterns() == [
        patterns[i] for i in kept
    ]  # each between the neighbours that it has in the whole
    assert kept[: whole.count_leading()] == list(range(whole.count_leading()))


def test_few_of_many_alike():
    assert len(layers_to_run(make_row(["a"] * 126))) == 4
    assert len(layers_to_run(make_row(["a"] * 3 + ["b"] * 58))) <= 8
    assert len(layers_to_run(make_row(["a"] * 126, 11))) <= 16
    assert len(layers_to_run(make_row(list("sssssf" * 10 + "ss"), 8))) <= 25


class Step:
    """A step by hand, some or all of `count` layers: each makes something in its forward pass, and lets go of it in its backward."""

    def __init__(self, *units: int, count: int = 5):
        self.done: list[tuple[Place, int, str]] = []  # (where, +1 or -1, what)
        self.number = {-1: -1, **{unit: n for n, unit in enumerate(units)}, count: len(units)}
        for unit in (-1, *units, count):
            self.at(Pass.FORWARD, unit, 1)
        for unit in (count, *reversed(units), -1):
            self.at(Pass.BACKWARD, unit, -1)

    def at(self, run: str, unit: int, sign: int, what: str = "") -> None:
        self.done.append((Place(run, unit), sign, what or f"of {unit}"))

    def moved(self, what: str, *, before: tuple[str, int] | None) -> Step:
        """Where something is let go of: before what else is at a place; None: never."""
        self.done = [(place, sign, name) for place, sign, name in self.done if (sign, name) != (-1, what)]
        if before is not None:
            at = next(n for n, (place, _, _) in enumerate(self.done) if place == Place(*before))
            self.done.insert(at, (Place(*before), -1, what))
        return self

    def recording(self) -> Recording:
        found, index = Recording(), dict[str, int]()
        for place, sign, what in self.done:
            found.enter(Place(place.run, self.number[place.unit]))
            if sign > 0:
                index[what] = found.add(Storage(8, (4,), "bfloat16", "empty", ""))
            else:
                found.events.append((index[what], -1))
        return found


ALIKE = make_row("aaaaa")
FEW = layers_to_run(ALIKE)


def test_by_hand():
    assert FEW == [0, 1, 2, 4]
    assert extend(Step(*FEW).recording(), FEW, ALIKE) == Step(0, 1, 2, 3, 4).recording()


def test_what_is_left_is_let_go_of_before_all_layers():
    def left(*units: int) -> Recording:
        step = Step(*units)
        for unit in reversed(units[1:-1]):
            step.moved(f"of {unit}", before=(Pass.BACKWARD, -1))
        return step.recording()

    assert extend(left(*FEW), FEW, ALIKE) == left(0, 1, 2, 3, 4)


@pytest.mark.parametrize("unit", [1, 2])
def test_only_one_of_two_alike_is_let_go_of(unit):
    """The other would tell that the layers between keep what they made, or that they all let go of it."""
    step = Step(*FEW).moved(f"of {3 - unit}", before=None).moved(f"of {unit}", before=(Pass.BACKWARD, -1))
    with pytest.raises(Unlike):
        extend(step.recording(), FEW, ALIKE)


def test_what_all_share():
    first = Step(*FEW).moved("of -1", before=(Pass.BACKWARD, 0))
    assert (
        extend(first.recording(), FEW, ALIKE)
        == Step(0, 1, 2, 3, 4).moved("of -1", before=(Pass.BACKWARD, 0)).recording()
    )
    for place in (
        (Pass.BACKWARD, 1),
        (Pass.FORWARD, 1),
        (Pass.FORWARD, 2),
    ):  # does the second of the whole do that, or the last but one?
        with pytest.raises(Unlike):
            extend(Step(*FEW).moved("of -1", before=place).recording(), FEW, ALIKE)


def test_what_some_share():
    """Layer 3 is the last of its kind that is run, but not the last of the whole."""
    whole = make_row("aaabaaabaaabaaa")
    kept = layers_to_run(whole)
    assert kept[:4] == [0, 1, 2, 3] and [whole.kinds[i] for i in kept].count("b") == 1

    def shared(run: str, *units: int) -> Recording:
        return Step(*units, count=15).moved("of -1", before=(run, 3)).recording()

    assert extend(shared(Pass.BACKWARD, *kept), kept, whole) == shared(Pass.BACKWARD, *range(15))
    with pytest.raises(Unlike):
        extend(shared(Pass.FORWARD, *kept), kept, whole)


def test_units_that_come_in_another_order():
    step = Step(*FEW)
    backward = next(n for n, (place, _, _) in enumerate(step.done) if place.run == Pass.BACKWARD)
    step.done[backward + 2 : backward + 4] = reversed(step.done[backward + 2 : backward + 4])
    with pytest.raises(Unlike):
        extend(step.recording(), FEW, ALIKE)


def test_lives_over_more_than_the_neighbours():
    step = Step(*FEW).moved("of 4", before=(Pass.BACKWARD, 0))
    with pytest.raises(Unlike):
        extend(step.recording(), FEW, ALIKE)
