"""DeepSpeed's ZeRO-3: beside what its own engine allocated on the CPU (bench/deepspeed_zero3.py), event by event; and what its settings change."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.deepspeed_zero import LEAST, PART, TOKENS, config_of
from bench.deepspeed_zero3 import CASES as ASKED
from bench.deepspeed_zero3 import SETTINGS
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.several_gpus import compare, list_ways
from mstplan.plan.solve import host_bytes, max_seq
from mstplan.spec.catalog import load_model
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.cuda import pinned_bytes
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, InstantPeak, Step
from mstplan.step.tape import Change, Event, Happening, backward, finish_reducing, forward
from mstplan.step.zero3 import FROM_HOST, FROZEN_PARTS, PARTS, PERSISTENT, SHARD_FROM_HOST, Zero3, sub_groups, values_of

ON, ONE = card("h100"), Chunks(1, 1)
MODEL = load_model("qwen3-0.6b")
RECORDED = json.loads((Path(__file__).parent / "deepspeed_zero3.json").read_text())
NOT_ON_CPU = {FROM_HOST, SHARD_FROM_HOST}
"""What comes from CPU RAM: for processes on the CPU it is there."""


def zero(**fields: object) -> Recipe:
    return strategy("checkpoint", **{"gpus": 8, "sharding": "zero3", **fields})


def built(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> Step:
    return step_of(model, recipe, ON, ONE, tokens)


def zero_of(step: Step) -> Zero3:
    assert isinstance(step.zero, Zero3)
    return step.zero


def instants(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> dict[Instant, InstantPeak]:
    found = built(recipe, model, tokens).instants(step_sizes(recipe, tokens, ONE))
    return {each.name: each for each in found}


def peak(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> int:
    return max(each.bytes for each in instants(recipe, model, tokens).values())


# ---- beside DeepSpeed's own engine ------------------------------------------------------------------------------------


def step_of_case(case: dict[str, Any]) -> Step:
    fields = {"accumulation": case["accumulation"], "attention": "eager", "optimizer_on_host": bool(case["host"])}
    sizes = SETTINGS[case["settings"]]
    if case["settings"] == "auto":
        sizes = dict.fromkeys(sizes, "auto")  # type: ignore[arg-type]
    fields |= PART.get(case.get("part", ""), {}) | ({"loss": case["loss"]} if case.get("loss") else {})
    recipe = Recipe(
        checkpoint={False: "none", True: "layer"}.get(case["checkpoint"], case["checkpoint"]),
        gpus=case["ranks"],
        sharding="zero3",
        weights_on_host=case["host"] == "all",
        **fields,
        **sizes,
    )
    return built(recipe, read_config(config_of(case), "tiny"), TOKENS)


def sizes_of(step: Step, events: Iterable[Event]) -> Iterator[int]:
    """Bytes that come, or go, of what is large enough to have been recorded."""
    units = step_sizes(step.layout.recipe, TOKENS, ONE).units
    for event in events:
        assert isinstance(event, Change)
        size = event.tensor.bytes * units[event.tensor.basis]
        if size >= LEAST and event.happening is not Happening.RENAMED and event.tensor.name not in NOT_ON_CPU:
            yield size * event.happening.value


def passes(step: Step) -> dict[str, list[int]]:
    """What comes and goes, by phase."""
    phases = {}
    for number in range(step.layout.recipe.accumulation):
        rules = step.rules(events=True, number=number)
        phases[f"forward {number}"] = list(sizes_of(step, forward(step.replayed, rules, keep=True, prune=False).events))
        behind = backward(step.replayed, rules, prune=False).events
        phases[f"backward {number}"] = list(sizes_of(step, (*behind, *finish_reducing(rules).events)))
    return phases


def in_order(events: Iterable[int]) -> list[int]:
    """Events, of which those that go together are sorted: DeepSpeed lets go of sets of weights."""
    runs = groupby(events, key=lambda size: size > 0)
    return [size for comes, run in runs for size in (run if comes else sorted(run))]


def words(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items() if name != "found")


def test_what_is_recorded_is_what_the_script_asks() -> None:
    recorded = [{name: case[name] for name in case if name != "found"} for case in RECORDED["cases"]]
    assert recorded == sorted(ASKED, key=lambda case: case["ranks"])


CASES = pytest.mark.parametrize("case", RECORDED["cases"], ids=words)


@CASES
def test_deepspeeds_engine_allocates_the_same_in_the_same_order(case: dict[str, Any]) -> None:
    """Every gather, gradient and bucket of every micro-batch, and when it goes."""
    expected = passes(step_of_case(case))
    for rank in case["found"]:
        found = {phase: [int(size) for size in text.split()] for phase, text in rank["events"].items()}
        assert {phase: in_order(found.get(phase, [])) for phase in expected} == {
            phase: in_order(events) for phase, events in expected.items()
        }


@CASES
def test_deepspeeds_engine_holds_as_much_in_each_phase(case: dict[str, Any]) -> None:
    """To the byte, beside what stays."""
    step = step_of_case(case)
    live, peaks = 0, {}
    for phase, events in passes(step).items():
        totals = list(accumulate(events, initial=live))
        live, peaks[phase] = totals[-1], max(totals[1:], default=0)
    assert live == 0
    stepping = [sum(t.bytes for t in made if t.bytes >= LEAST) for _, made in zero_of(step).step_moments()[:-1]]
    state = zero_of(step)
    whole = (2 * values for values in map(values_of, state.weights) if values <= state.threshold)
    moments = [made for _, made in state.step_moments()[:-1]]
    stepping = [sum(tensor.bytes for tensor in made if tensor.bytes >= LEAST) for made in moments]
    peaks["step"] = max(*stepping, sum(size for size in whole if size >= LEAST))  # at its end that is gathered anew
    for rank in case["found"]:
        assert {phase: rank["peaks"].get(phase, 0) for phase in peaks} == peaks


@CASES
def test_deepspeeds_engine_keeps_parts_as_large(case: dict[str, Any]) -> None:
    step = step_of_case(case)
    state = zero_of(step)
    names = {
        PARTS: "parts",
        FROZEN_PARTS: "frozen",
        "fp32 parts of all weights": "fp32",
        "parts of all gradients": "gradients",
        "bucket of gradients": "bucket",
        PERSISTENT: "persistent",
    }
    stays = {names[tensor.name]: tensor.bytes for tensor in state.stays()}
    for rank in case["found"]:
        assert stays == {name: rank[name] for name in stays}
        assert len(state.groups) == rank["sub_groups"]
        assert case["host"] or sum(each.bytes for each in step.optimizer.states) == rank["states"]
    assert ("fp32" in stays) == (not case["host"]) and ("parts" in stays) == (case["host"] != "all")


# ---- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(shares=st.lists(st.integers(1, 500), min_size=1, max_size=30), size=st.integers(0, 2_000))
def test_sub_groups_are_whole_weights_in_order(shares: list[int], size: int) -> None:
    groups = sub_groups(shares, size)
    assert [share for group in groups for share in group] == shares
    assert all(sum(group) >= size and sum(group[:-1]) < max(size, 1) for group in groups[:-1]) and groups[-1]


@st.composite
def settings_of_zero(draw: st.DrawFn) -> dict[str, object]:
    return {
        "accumulation": draw(st.sampled_from([1, 3])),
        "reduce_bucket_size": draw(st.sampled_from(["auto", 500_000_000, 20_000_000, 1])),
        "prefetch_bucket_size": draw(st.sampled_from(["auto", 50_000_000, 1_000_000, 0])),
        "param_persistence_threshold": draw(st.sampled_from(["auto", 100_000, 0])),
        "max_live_parameters": draw(st.sampled_from([1_000_000_000, 30_000_000, 0])),
        "max_reuse_distance": draw(st.sampled_from([1_000_000_000, 30_000_000, 0])),
        "sub_group_size": draw(st.sampled_from([1_000_000_000, 1_000_000])),
        "checkpoint": draw(st.sampled_from(["none", "layer", "reentrant"])),
        "adamw_kernel": draw(st.sampled_from(["fused", "foreach"])),
    }


@settings(max_examples=12)
@given(fields=settings_of_zero(), gpus=st.integers(2, 60), times=st.integers(2, 4))
def test_more_cards_keep_less(fields: dict[str, object], gpus: int, times: int) -> None:
    """Parts of all weights, but for padding: one value at most for each weight and kind of part."""
    few, many = (built(zero(**fields, gpus=n)) for n in (gpus, gpus * times))
    sizes = [sum(t.bytes for t in (*step.stays(), *step.states()) if t.name != PERSISTENT) for step in (few, many)]
    assert sizes[1] <= sizes[0]
    assert host_bytes(MODEL, few.layout.recipe, 1024, few) == 0


@settings(max_examples=12)
@given(fields=settings_of_zero(), gpus=st.integers(2, 60))
def test_what_is_gathered_goes_and_is_never_more_than_all_weights_and_a_buffer(
    fields: dict[str, object], gpus: int
) -> None:
    step = built(zero(**fields, gpus=gpus))
    live = most = 0
    rules = step.rules(events=True)
    ahead = forward(step.replayed, rules, keep=True, prune=False).events
    behind = backward(step.replayed, rules, prune=False).events
    for event in (*ahead, *behind, *finish_reducing(rules).events):
        assert isinstance(event, Change)
        if event.tensor.role is Role.GATHERED:
            live += event.happening.value * event.tensor.bytes
            most = max(most, live)
    all_weights = 2 * (step.parameters + gpus * len(step.card_weights) * step.model.layers)
    assert live == 0 < most <= (2 + (fields["checkpoint"] == "layer")) * all_weights


@settings(max_examples=12)
@given(fields=settings_of_zero(), gpus=st.integers(2, 60))
def test_what_cpu_ram_spares(fields: dict[str, object], gpus: int) -> None:
    recipe = zero(**fields, gpus=gpus)
    here, optimizer, everything = (
        recipe,
        recipe.changed(optimizer_on_host=True),
        recipe.changed(optimizer_on_host=True, weights_on_host=True),
    )
    sizes = [instants(each)[Instant.END_OF_FORWARD].bytes for each in (here, optimizer, everything)]
    partition = zero_of(built(here)).partition
    assert sizes[0] - sizes[1] >= (4 + 4 + 4 + 2) * partition
    assert sizes[1] - sizes[2] <= 2 * partition
    on_host = [host_bytes(MODEL, each, 1024, built(each)) for each in (here, optimizer, everything)]
    # of the weights in CPU RAM a process has its part alone, in place of a copy of a sub-group
    assert on_host[0] == 0 < on_host[1] and on_host[2] - on_host[1] <= pinned_bytes(2 * partition)


def test_two_micro_batches_need_as_much_as_many() -> None:
    for host in (False, True):
        two, many = (instants(zero(accumulation=n, optimizer_on_host=host)) for n in (2, 100))
        assert {name: each.bytes for name, each in two.items()} == {name: each.bytes for name, each in many.items()}


def test_checkpoints_hold_on_to_weights_that_are_let_go() -> None:
    """A layer that is run again saves its weights, detached: without reuse each is gathered twice for its backward."""
    never = {"max_reuse_distance": 0, "prefetch_bucket_size": 0, "param_persistence_threshold": 0}
    backwards = {}
    for checkpoint in ("none", "layer"):
        peaks = instants(zero(checkpoint=checkpoint, **never))
        entries = peaks[Instant.FIRST_LAYER].entries
        backwards[checkpoint] = sum(entry.bytes for entry in entries if entry.role is Role.GATHERED)
    layer = sum(w.numel for w, n in built(zero()).weights if n > 1)
    assert backwards["layer"] - backwards["none"] >= layer


def test_gathered_weights_stop_at_what_may_live() -> None:
    """Ahead are at most max_live_parameters and the bucket that reaches it; what runs has its own beside."""
    few, usual = (peak(zero(max_live_parameters=n, max_reuse_distance=0)) for n in (100_000_000, 1_000_000_000))
    assert few < usual


def test_auto_is_what_transformers_fills_in() -> None:
    auto = zero(reduce_bucket_size="auto", prefetch_bucket_size="auto", param_persistence_threshold="auto")
    assert auto.bucket_values(4096) == 4096**2
    assert auto.prefetch_values(4096) == 15_099_494 and auto.persistent_values(4096) == 40_960
    assert zero().prefetch_values(4096) == 50_000_000 and zero().persistent_values(4096) == 100_000


def test_s_max_runs_and_the_allocator_holds_what_the_tensors_are() -> None:
    answer = max_seq(MODEL, strategy("mst", gpus=4, sharding="zero3", accumulation=2), card("rtx-4090"))
    assert answer.s_max > 1024 and answer.plan.fits
    usage = answer.plan.usage
    assert 0.99 < usage.allocated / answer.plan.peak_bytes <= 1.01 and usage.steps > 1


REFUSED = [
    ({"precision": "mixed"}, "--precision bf16"),
    ({"optimizer": "adamw-8bit"}, "--optimizer adamw"),
    ({"optimizer_in_backward": True}, "leave one of the two out"),
    ({"weights_on_host": True}, "--optimizer-on-host"),
    ({"lora_rank": 8, "dora": True}, "leave --dora out"),
    ({"lora_rank": 8, "quantize": "nf4"}, "--quant-storage bf16"),
    ({"lora_rank": 8, "quantize": "int8"}, "--quantize nf4"),
    ({"lora_rank": 8, "lora_modules_to_save": ("lm_head",)}, "leave --lora-modules-to-save out"),
    ({"lora_rank": 8, "loss": "chunked"}, "-s checkpointing"),
    ({"freeze": ("embeddings",), "mlp_chunks": 4}, "-s checkpointing"),
    ({"freeze": ("embeddings",), "optimizer_on_host": True, "weights_on_host": True}, "leave weights_on_host"),
    ({"checkpoint": 4}, "--checkpoint layer"),
    ({"checkpoint": "selective"}, "--checkpoint layer"),
    ({"offload": "saved-tensors"}, "--offload layer-inputs"),
    ({"max_live_parameters": -1}, "whole number from 0"),
    ({"prefetch_bucket_size": -1}, "'auto' or a whole number from 0"),
    ({"gpus": 1}, "2 gpus or more"),
    ({"replicas": 2}, "is of fsdp"),
    ({"sharding": "zero2", "sub_group_size": 5}, "is of ZeRO-3"),
    ({"sharding": "fsdp", "max_reuse_distance": 5}, "is of ZeRO-3"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=str)
def test_what_is_not_planned_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        zero(**fields)
    assert len(str(caught.value).splitlines()) <= 2


def test_models_whose_modules_are_not_known_are_refused() -> None:
    with pytest.raises(RecipeError, match="order of a model's modules"):
        built(zero(), load_model("gpt2"))


# ---- experts ------------------------------------------------------------------------------------------------------------


MIXTURE = load_model("qwen3-30b-a3b")


def test_all_experts_of_a_layer_are_gathered_at_once() -> None:
    """They are two weights, of which each is whole, whatever may live; of a dense model one matrix at a time."""
    few = {"max_live_parameters": 0, "prefetch_bucket_size": 0, "max_reuse_distance": 0, "reduce_bucket_size": 1}
    gathered = []
    for model in (MIXTURE, MODEL):
        entries = instants(zero(**few), model)[Instant.LAST_LAYER].entries
        gathered.append(sum(entry.bytes for entry in entries if entry.role is Role.GATHERED))
    assert MIXTURE.experts is not None
    experts = 3 * MIXTURE.experts.number * MIXTURE.experts.width * MIXTURE.hidden
    assert gathered[0] >= 2 * experts > 1 << 30 > gathered[1]


@pytest.mark.parametrize("checkpoint", ["none", "layer", "reentrant"])
def test_experts_are_let_go_where_their_next_use_is_far(checkpoint: str) -> None:
    """Of 48 layers at most as many values are there as may live, with a layer's experts beside them: but what autograd saves, without checkpoints."""
    assert MIXTURE.experts is not None
    experts = 2 * 3 * MIXTURE.experts.number * MIXTURE.experts.width * MIXTURE.hidden
    for found in instants(zero(checkpoint=checkpoint), MIXTURE).values():
        gathered = sum(entry.bytes for entry in found.entries if entry.role is Role.GATHERED)
        assert (gathered > 4 * 10**9 + 2 * experts) <= (checkpoint == "none")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mlp_chunks": 4}, "experts in pieces"),
        ({"train": ("mlp",)}, "--input-gradients"),
        ({"lora_rank": 8, "lora_targets": ("all-linear", "experts")}, "attention"),
    ],
    ids=str,
)
def test_what_is_not_planned_of_mixtures_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        step_of(MIXTURE, zero(**fields), ON, Chunks(4 if "mlp_chunks" in fields else 1, 1), 1024)
    assert len(str(caught.value).splitlines()) <= 2


def test_mixtures_are_compared_under_zero_3_too() -> None:
    ways = [way for way in list_ways(8, ranks=1) if way.fields["sharding"] == "zero3"]
    compared = compare(MIXTURE, card("h200"), {"checkpoint": strategy("checkpoint")}, ways)
    assert [way.name for way, _ in compared.answers] == ["zero3, weights in CPU RAM", "zero3"] and not compared.left_out


# ---- quantised weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", ["none", "layer", "reentrant"])
def test_a_product_of_4_bits_holds_what_was_gathered_for_it_but_in_reentrant_checkpoints(checkpoint: str) -> None:
    """bitsandbytes' node has a view of it, until the graph goes: where the last layer's backward begins all packed weights are there."""
    fields = {"lora_rank": 8, "quantize": "nf4", "quant_storage": "bf16", "input_gradients": True}
    few = {"max_live_parameters": 0, "prefetch_bucket_size": 0, "max_reuse_distance": 0}
    step = built(zero(**fields, **few, checkpoint=checkpoint))
    found = {each.name: each for each in step.instants(step_sizes(step.layout.recipe, 1024, ONE))}
    entries = found[Instant.LAST_LAYER].entries
    gathered = sum(entry.bytes for entry in entries if entry.role is Role.GATHERED)
    packed = sum(2 * n * values_of(weight) for weight, n in step.weights if weight.quantised)
    assert packed == sum(n * weight.numel // 2 for weight, n in step.weights if weight.quantised)
    assert (gathered >= packed) == (checkpoint != "reentrant")


# ---- adapters ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(fields=settings_of_zero(), gpus=st.integers(2, 60), rank=st.sampled_from([1, 16, 256]), below=st.booleans())
def test_what_is_frozen_has_parts_alone(fields: dict[str, object], gpus: int, rank: int, below: bool) -> None:
    """And all that is gathered goes, whether or not a gradient comes to the lowest layer."""
    below = below or fields["checkpoint"] == "reentrant"
    step = built(zero(**fields, gpus=gpus, lora_rank=rank, input_gradients=below))
    state = zero_of(step)
    counts = {trained: sum(w.numel * n for w, n in step.weights if w.trained == trained) for trained in (True, False)}
    stays = {tensor.name: tensor.bytes for tensor in state.stays()}
    padding = 2 * len(state.weights)
    assert 0 <= stays[FROZEN_PARTS] - 2 * counts[False] / gpus <= padding
    assert 0 <= stays[PARTS] - 2 * counts[True] / gpus <= padding
    assert stays["fp32 parts of all weights"] == 2 * stays[PARTS] == 2 * stays["parts of all gradients"]
    rules = step.rules(events=True)
    events = (
        *forward(step.replayed, rules, keep=True, prune=False).events,
        *backward(step.replayed, rules, prune=False).events,
        *finish_reducing(rules).events,
    )
    gathered = [e for e in events if isinstance(e, Change) and e.tensor.role is Role.GATHERED]
    assert sum(e.happening.value * e.tensor.bytes for e in gathered) == 0 < len(gathered)


def test_a_frozen_weight_s_input_is_kept() -> None:
    """By DeepSpeed's linear: of an MLP without adapters too, which torch's keeps under DDP where the activation's backward wants it, alone."""
    fields = {"lora_rank": 8, "lora_targets": ("attention",), "checkpoint": "none", "adapter_dtype": "bf16"}
    rows = [strategy("checkpoint", gpus=8, sharding=sharding, **fields) for sharding in ("zero3", "ddp")]
    kept = []
    for recipe in rows:
        entries = instants(recipe, tokens=4096)[Instant.END_OF_FORWARD].entries
        kept.append(sum(entry.bytes for entry in entries if entry.role is Role.MLP))
    layer = 2 * 4096 * 3072
    assert kept[0] - kept[1] >= MODEL.layers * layer // 2
