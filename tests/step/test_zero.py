"""DeepSpeed's ZeRO-1 and ZeRO-2: beside what its own engine allocated on the CPU (bench/deepspeed_zero.py), and what more cards, smaller buckets and
micro-batches change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.deepspeed_zero import BUCKETS, LEAST, TOKENS, attention_of, config_of, fields_of, tokens_of
from mstplan.errors import RecipeError
from mstplan.plan.layout import step_of, step_sizes
from mstplan.plan.solve import host_bytes, max_seq
from mstplan.spec.catalog import load_model
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.spec.model import Model
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe, strategy
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, InstantPeak, Step
from mstplan.step.tape import Change, Event, Happening, Tensor, backward, finish_reducing, forward, grad_of
from mstplan.step.zero import Zero, slices_of

ON, ONE = card("h100"), Chunks(1, 1)
MODEL = load_model("qwen3-0.6b")
RECORDED = json.loads((Path(__file__).parent / "deepspeed_zero.json").read_text())


def zero(stage: int, **fields: object) -> Recipe:
    return strategy("checkpoint", **{"gpus": 8, "sharding": f"zero{stage}", **fields})


def built(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> Step:
    return step_of(model, recipe, ON, ONE, tokens)


def instants(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> dict[Instant, InstantPeak]:
    found = built(recipe, model, tokens).instants(step_sizes(recipe, tokens, ONE))
    return {each.name: each for each in found}


def peak(recipe: Recipe, model: Model = MODEL, tokens: int = 1024) -> int:
    return max(each.bytes for each in instants(recipe, model, tokens).values())


# ---- beside DeepSpeed's own engine ------------------------------------------------------------------------------------


class Live:
    """Bytes of tensors that are large enough to have been recorded, beside what there was before a step."""

    def __init__(self, units: tuple[int, ...]):
        self.units, self.live, self.most = units, 0, 0
        self.flattened: list[int] = []

    def size(self, tensor: Tensor) -> int:
        size = tensor.bytes * self.units[tensor.basis]
        return size if size >= LEAST else 0

    def put(self, tensor: Tensor) -> None:
        self.live += self.size(tensor)
        self.most = max(self.most, self.live)
        if tensor.name == "slices of the bucket, flat" and self.size(tensor):
            self.flattened.append(tensor.bytes)

    def drop(self, tensor: Tensor) -> None:
        self.live -= self.size(tensor)

    def follow(self, events: Iterable[Event]) -> None:
        for event in events:
            assert isinstance(event, Change)
            if event.happening is Happening.ALLOCATED:
                self.put(event.tensor)
            elif event.happening is Happening.RELEASED:
                self.drop(event.tensor)

    def take(self) -> int:
        """The most since the last time."""
        most, self.most = self.most, self.live
        return most


def recipe_of(case: dict[str, Any]) -> Recipe:
    fields = {"reduce_bucket_size": BUCKETS[case["bucket"]] if case["bucket"] != "auto" else "auto"}
    fields |= {"accumulation": case["accumulation"], "overlap_comm": case["overlap"], "optimizer_on_host": case["host"]}
    fields |= fields_of(case)
    return strategy(
        "standard", gpus=case["ranks"], sharding=f"zero{case['stage']}", attention=attention_of(case), **fields
    )


def follow(step: Step, accumulation: int, tokens: int = TOKENS) -> tuple[dict[str, int], list[int]]:
    """The most bytes by phase of a step, and what slices were flattened."""
    live = Live(step_sizes(step.layout.recipe, tokens, ONE).units)
    peaks: dict[str, int] = {}
    for number in [0, None] if accumulation > 1 else [None]:
        rules = step.rules(events=True, number=number)
        ahead = forward(step.replayed, rules, keep=True, prune=False)
        live.follow(ahead.events)
        live.take()
        live.flattened.clear()
        live.put(grad_of(step.replayed.output))
        live.follow(backward(step.replayed, rules, prune=False).events)
        live.follow(finish_reducing(rules).events)
        peaks["backward 0" if number == 0 else "last backward"] = live.take()
    peaks.setdefault("backward 0", peaks["last backward"])
    assert step.zero is not None
    peaks["step"] = max(sum(map(live.size, made)) for _, made in step.zero.step_moments())
    return peaks, live.flattened


def words(case: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in case.items() if name != "found")


@pytest.mark.parametrize("case", RECORDED["cases"], ids=words)
def test_deepspeeds_engine_holds_as_much_in_each_phase(case: dict[str, Any]) -> None:
    """To the byte: the most of all ranks, in the first backward, the last, and the step."""
    step = built(recipe_of(case), read_config(config_of(case), "tiny"), tokens_of(case))
    peaks, flattened = follow(step, case["accumulation"], tokens_of(case))
    last = case["accumulation"] - 1
    names = {"backward 0": "backward 0", "last backward": f"backward {last}", "step": "step"}
    assert peaks == {name: max(rank["peaks"].get(real, 0) for rank in case["found"]) for name, real in names.items()}
    for rank in case["found"]:
        assert flattened == rank["flattened"]


@pytest.mark.parametrize("case", [case for case in RECORDED["cases"] if not case["host"]], ids=words)
def test_deepspeeds_engine_has_partitions_as_large(case: dict[str, Any]) -> None:
    step = built(recipe_of(case), read_config(config_of(case), "tiny"), tokens_of(case))
    assert step.zero is not None
    for number, rank in enumerate(case["found"]):
        assert (2 * step.zero.flat, 4 * step.zero.partition) == (rank["flat"], rank["partition"])
        assert 2 * step.zero.shares[number].gathered == rank["gathered"]
        assert sum(state.bytes for state in step.optimizer.states) == rank["states"]


# ---- properties -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(numels=st.lists(st.integers(1, 500), min_size=1, max_size=30), ranks=st.integers(1, 40))
def test_slices_fill_partitions_in_order(numels: list[int], ranks: int) -> None:
    partition = -(-sum(numels) // ranks)
    slices = slices_of(numels, partition)
    assert [sum(each.numel for each in own) for own in slices] == numels
    order = [each.rank for own in slices for each in own]
    assert order == sorted(order) and max(order) < ranks
    for rank in set(order[:-1]) - {order[-1]}:
        assert sum(each.numel for own in slices for each in own if each.rank == rank) == partition


@st.composite
def settings_of_zero(draw: st.DrawFn) -> dict[str, object]:
    return {
        "accumulation": draw(st.sampled_from([1, 2, 5])),
        "reduce_bucket_size": draw(st.sampled_from(["auto", 500_000_000, 20_000_000, 1])),
        "overlap_comm": draw(st.booleans()),
        "optimizer_on_host": draw(st.booleans()),
        "checkpoint": draw(st.sampled_from(["none", "layer", 4])),
        "optimizer": draw(st.sampled_from(["adamw", "sgd"])),
        "adamw_kernel": draw(st.sampled_from(["fused", "foreach"])),
    }


def largest_sum(recipe: Recipe) -> int:
    """Bytes of what is flattened at most: a bucket, or the largest weight."""
    step = built(recipe)
    assert step.zero is not None
    return 2 * max(min(step.zero.bucket, step.parameters), step.zero.largest)


@settings(max_examples=15)
@given(fields=settings_of_zero(), stage=st.sampled_from([1, 2]), gpus=st.integers(2, 60), times=st.integers(2, 4))
def test_more_cards_never_need_more(fields: dict[str, object], stage: int, gpus: int, times: int) -> None:
    """Whole multiples of them, as partitions lie within each other, but for padding, and for slices of a bucket, of which more are flattened."""
    few, many = (zero(stage, **fields, gpus=n) for n in (gpus, gpus * times))
    padding = 16 * 2 * gpus * times
    stay = [sum(each.bytes for each in [*built(r).stays(), *built(r).states()]) for r in (few, many)]
    assert stay[1] <= stay[0] + padding
    assert host_bytes(MODEL, many, 1024, built(many)) <= host_bytes(MODEL, few, 1024, built(few))
    assert instants(many)[Instant.END_OF_FORWARD].bytes <= instants(few)[Instant.END_OF_FORWARD].bytes + padding
    assert peak(many) <= peak(few) + largest_sum(many) + padding


@settings(max_examples=15)
@given(fields=settings_of_zero(), gpus=st.integers(2, 60))
def test_stage_2_holds_no_more_than_stage_1_when_backward_is_over(fields: dict[str, object], gpus: int) -> None:
    one, two = (instants(zero(stage, **{**fields, "accumulation": 1}, gpus=gpus)) for stage in (1, 2))
    assert two[Instant.EMBEDDING].bytes <= one[Instant.EMBEDDING].bytes
    assert two[Instant.OPTIMIZER].bytes == one[Instant.OPTIMIZER].bytes


@settings(max_examples=15)
@given(fields=settings_of_zero(), stage=st.sampled_from([1, 2]), gpus=st.integers(2, 60))
def test_what_cpu_ram_and_one_bucket_spare(fields: dict[str, object], stage: int, gpus: int) -> None:
    recipe = zero(stage, **fields, gpus=gpus)
    here, there = (recipe.changed(optimizer_on_host=on_host) for on_host in (False, True))
    gained = instants(here)[Instant.OPTIMIZER].bytes - instants(there)[Instant.OPTIMIZER].bytes
    step = built(here)
    assert step.zero is not None
    assert gained >= 4 * step.zero.partition - 2 * step.zero.largest
    assert not any(
        entry.dtype == "float32" and entry.role is Role.WEIGHT for entry in instants(there)[Instant.LOSS].entries
    )
    assert host_bytes(MODEL, here, 1024, step) == 0 < host_bytes(MODEL, there, 1024, built(there))
    one, two = (instants(recipe.changed(overlap_comm=overlaps)) for overlaps in (False, True))
    if stage == 2:  # as stage 1 reduces in another order
        more = {name: two[name].bytes - one[name].bytes for name in one}
        assert all(0 <= size <= 2 * step.zero.bucket for size in more.values())
        assert more[Instant.FIRST_LAYER] == 2 * step.zero.bucket and more[Instant.OPTIMIZER] == 0


def test_two_micro_batches_need_as_much_as_many() -> None:
    for stage in (1, 2):
        for host in (False, True):
            two, many = (instants(zero(stage, accumulation=n, optimizer_on_host=host)) for n in (2, 100))
            assert {name: each.bytes for name, each in two.items()} == {name: each.bytes for name, each in many.items()}


def test_gradients_of_each_stage() -> None:
    """Stage 1 finds all of them in the next micro-batch, stage 2 those of its partition, each in bf16."""
    kept = {}
    for stage in (1, 2):
        loss = instants(zero(stage, accumulation=2))[Instant.LOSS]
        kept[stage] = sum(entry.bytes for entry in loss.entries if entry.role is Role.WEIGHT_GRADIENT)
    step = built(zero(1))
    assert step.zero is not None
    assert kept == {1: 2 * step.parameters, 2: 2 * step.zero.gathered}
    assert step.zero.gathered < step.parameters // 8 + step.zero.largest * 2


def test_auto_is_the_hidden_size_squared() -> None:
    auto, usual = zero(2, reduce_bucket_size="auto"), zero(2)
    assert auto.bucket_values(1024) == 1024**2 and usual.bucket_values(1024) == 500_000_000
    spared = peak(usual) - peak(auto)
    assert 0 < spared <= 2 * (500_000_000 - 1024**2)


@pytest.mark.parametrize("stage", [1, 2])
def test_s_max_runs_and_the_allocator_holds_what_the_tensors_are(stage: int) -> None:
    recipe = strategy("mst", gpus=4, sharding=f"zero{stage}", accumulation=2)
    answer = max_seq(MODEL, recipe, card("rtx-4090"))
    assert answer.s_max > 1024 and answer.plan.fits
    usage = answer.plan.usage
    assert 0.99 < usage.allocated / answer.plan.peak_bytes <= 1.01 and usage.steps > 1


REFUSED = [
    ({"precision": "mixed"}, "--precision bf16"),
    ({"autocast": True}, "--autocast"),
    ({"optimizer": "adamw-8bit"}, "--optimizer adamw"),
    ({"optimizer_in_backward": True}, "leave one of the two out"),
    ({"optimizer_on_host": True, "weights_on_host": True}, "--sharding fsdp"),
    ({"lora_rank": 8, "dora": True}, "leave --dora out"),
    ({"lora_rank": 8, "quantize": "int8"}, "use nf4"),
    ({"lora_rank": 8, "quantize": "nf4", "quant_storage": "fp32"}, "quant_storage='bf16'"),
    ({"lora_rank": 8, "quantize": "nf4", "kbit_preparation": True}, "leave --kbit-preparation out"),
    ({"lora_rank": 8, "optimizer_on_host": True, "weights_on_host": True}, "--sharding fsdp"),
    ({"gpus": 1}, "2 gpus or more"),
    ({"reduce_bucket_size": 0}, "whole number from 1"),
    ({"replicas": 2}, "is of fsdp"),
    ({"sync_each_batch": True}, "is of fsdp"),
    ({"sharding": "fsdp", "overlap_comm": True}, "is of ZeRO"),
    ({"sharding": "ddp", "reduce_bucket_size": "auto"}, "is of ZeRO"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED, ids=str)
def test_what_is_not_planned_is_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        zero(2, **fields)
    assert len(str(caught.value).splitlines()) <= 2


def test_adapters_on_experts_are_refused() -> None:
    with pytest.raises(RecipeError, match="--lora-targets attention"):
        built(zero(2, lora_rank=8), load_model("qwen3-30b-a3b"))
    assert built(zero(2, lora_rank=8, lora_targets=("attention",)), load_model("qwen3-30b-a3b")).zero is not None


ADAPTERS = {
    "lora": {"lora_rank": 16},
    "of attention": {"lora_rank": 8, "lora_targets": ("attention",)},
    "qlora": {"lora_rank": 16, "quantize": "nf4", "double_quantize": True},
    "beside a head": {"lora_rank": 16, "lora_modules_to_save": ("lm_head",)},
    "frozen embeddings": {"freeze": ("embeddings",)},
}


@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=list(ADAPTERS))
@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_frozen_is_whole_as_on_one_gpu(stage: int, fields: dict[str, object]) -> None:
    """And what is trained is in partitions alone: bf16 weights of all of it, and an eighth of fp32 ones and of states."""
    step, alone = (
        built(zero(stage, **fields)),
        built(strategy("checkpoint", **fields, **({"adapter_dtype": "bf16"} if "lora_rank" in fields else {}))),
    )
    assert isinstance(step.zero, Zero)
    frozen, whole = (sum(w.numel * n for w, n in each.weights if not w.trained) for each in (step, alone))
    trained = sum(w.numel * n for w, n in step.weights if w.trained)
    assert frozen == whole > 0 and 0 <= step.zero.flat - trained < 2 * 8
    bytes_of_weights = [sum(t.bytes for t in each.stays() if t.role is Role.WEIGHT) for each in (step, alone)]
    assert bytes_of_weights[0] - bytes_of_weights[1] == 2 * (step.zero.flat - trained) + 4 * step.zero.partition
    assert sum(t.bytes for t in step.states()) == 2 * 4 * step.zero.partition + 4  # and the number of steps


def test_peft_s_dtype_of_adapters_is_of_no_account() -> None:
    """DeepSpeed's engine casts all weights to bf16."""
    fp32, bf16 = (instants(zero(2, lora_rank=16, adapter_dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert {name: each.bytes for name, each in fp32.items()} == {name: each.bytes for name, each in bf16.items()}


def test_a_model_with_dtypes_of_its_own_is_refused() -> None:
    with pytest.raises(RecipeError, match="dtype of their own"):
        built(zero(2), load_model("ernie-4.5-21b-a3b"))
