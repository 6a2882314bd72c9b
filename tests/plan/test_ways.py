"""Ways to make a step fit, against the plans that they lead to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan.plan import ways
from mstplan.plan.solve import Plan, max_seq, plan_at
from mstplan.plan.ways import (
    Way,
    fewest_gpus,
    furthest_way,
    master_weights,
    nearest_plan,
    smallest_gpu,
    ways_to_fit,
    ways_to_train,
)
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.spec.model import StandIn
from mstplan.step.recipe import STRATEGIES, USUAL_STRATEGIES, Recipe, options_of, strategy
from mstplan.units import GIB

from ..step.strategies import recipes

MODEL = load_model("llama3.1-8b")
SMALL = load_model("llama3.2-1b")


def check(start: Plan, found: tuple[Way, ...]) -> None:
    """Each way fits, reaches as far as it says, changes what it says, and does without none of its changes; what gives up nothing comes
    first, then adapters, then the cheapest."""
    costs = [sum(change.cost for change in way.changes) for way in found if way.adapters is None]
    assert costs == sorted(costs) and len(costs) <= ways.MAX_WAYS
    priced = [way for way in found if way.gives_up != "nothing"]
    assert found[-len(priced) :] == tuple(priced) and all(way.adapters is None for way in priced[1:])
    for way in found:
        plan = plan_at(start.model, way.plan.recipe, start.card, start.seq_len)
        assert (
            plan.fits
            and plan == way.plan
            and way.s_max == max_seq(start.model, plan.recipe, start.card).s_max >= start.seq_len
        )
        fields = {name: value for change in way.changes for name, value in change.fields.items()}
        assert start.recipe.changed(**fields) == plan.recipe != start.recipe
        for left_out in way.changes:
            fewer = {
                name: value for change in way.changes if change is not left_out for name, value in change.fields.items()
            }
            try:
                without = start.recipe.changed(**fewer)
            except ways.RecipeError:
                continue
            assert not plan_at(start.model, without, start.card, start.seq_len).fits
    named = [{change.name for change in way.changes} for way in found]
    assert not any(a < b for a in named for b in named)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("seq_len", [16384, 65536, 262144])
def test_what_is_said_to_fit_fits(name: str, seq_len: int) -> None:
    start = plan_at(MODEL, strategy(name), card("h100"), seq_len)
    if not start.fits:
        found = ways_to_fit(start)
        check(start, found)
        assert found


@settings(max_examples=2)
@given(
    recipes(pad_to=1),
    st.sampled_from([1, 2, 4, 8, 24]),
    st.sampled_from([512, 8192, 65536]),
    st.sampled_from([None, 0, GIB]),
)
def test_ways_of_any_recipe(recipe: Recipe, gib: int, seq_len: int, host: int | None) -> None:
    start = plan_at(SMALL, recipe, card(memory=gib * GIB, host_memory=host), seq_len)
    if not start.fits:
        check(start, found := ways_to_fit(start))
        best = furthest_way(start)
        assert max((way.s_max for way in found), default=0) <= (best.s_max if best is not None else 0)


@pytest.mark.parametrize("host", [0, GIB, None])
def test_what_asks_nothing_of_the_host_is_found_whatever_it_holds(host: int | None) -> None:
    start = plan_at(MODEL, strategy("standard"), card("h100", host_memory=host), 65536)
    names = {change.name for change in ways_to_fit(start)[0].changes}
    assert names == {"the loss in chunks", "the MLP in chunks", "checkpoint every layer"}
    best, least = furthest_way(start), max_seq(MODEL, strategy("mst", optimizer="adafactor"), start.card).s_max
    assert best is not None and best.s_max >= least


def test_what_gives_up_nothing_comes_first() -> None:
    start = plan_at(load_model("mistral-7b-v0.1"), strategy("checkpoint", batch=2, accumulation=8), card("h100"), 24576)
    found = ways_to_fit(start)
    assert found[0].gives_up == "nothing" and all(way.gives_up != "nothing" for way in found[1:])


def test_the_simplest_change_comes_first_and_alone() -> None:
    start = plan_at(MODEL, strategy("checkpoint"), card("h100"), 49152)
    assert [c.name for c in ways_to_fit(start)[0].changes] == ["the loss in chunks"]


@pytest.mark.parametrize(("name", "targets"), [("mixtral-8x7b", ("attention",)), ("gpt-oss-20b", ("all-linear",))])
def test_adapters_leave_out_experts_that_would_be_made_anew(name: str, targets: tuple[str, ...]) -> None:
    found = ways_to_fit(plan_at(load_model(name), strategy("standard"), card("h200"), 4096))
    (adapted,) = (way for way in found if way.adapters is not None)
    assert adapted.plan.recipe.lora_targets == targets


def test_adafactor_before_the_host() -> None:
    """Qwen3-4B on 24 GB: after adapters, half of the states would do, and no optimizer on the host."""
    found = ways_to_train(
        [max_seq(load_model("qwen3-4b"), STRATEGIES[name], card("rtx-4090"), name).plan for name in USUAL_STRATEGIES]
    )
    assert [c.name for way in found[:2] for c in way.changes] == ["LoRA of rank 16", "Adafactor"]
    assert found[1].plan.host_bytes == 0 and found[1].s_max > 35_000
    assert all("CPU RAM" not in c.name for way in found[:3] for c in way.changes)


@pytest.mark.parametrize(
    "asked",
    [{"optimizer_on_host": True}, {"optimizer_on_host": True, "weights_on_host": True}, {"offload": "layer-inputs"}],
)
def test_host_memory_that_is_short_is_turned_back_from(asked: dict[str, object]) -> None:
    recipe, small = strategy("mst", **asked), card("h100", host_memory=GIB // 8)
    start = plan_at(MODEL, recipe, small, 65536)
    assert start.peak_bytes <= small.budget_bytes and not start.fits
    first = ways_to_fit(start)[0]
    usual = Recipe()
    assert all(getattr(first.plan.recipe, field) == getattr(usual, field) for field in asked)
    assert first.gives_up == "nothing"


def test_a_smaller_batch_is_offered() -> None:
    start = plan_at(MODEL, strategy("mst", batch=16), card("h100"), 16384)
    first = ways_to_fit(start)[0]
    assert [c.name for c in first.changes] == ["batch 1, accumulated"]
    assert first.plan.recipe.batch == 1 and first.plan.recipe.accumulation == 16


def test_changes_fit_the_attention_at_hand() -> None:
    def offered(attention: str) -> set[object]:
        start = plan_at(MODEL, strategy("mst", attention=attention), card("h100"), 4096)
        return {
            change.fields.get("attention")
            for changes in ways._choose_changes(start.recipe, ways._token_levers(start))
            for change in changes
        } - {None}

    assert (offered("eager"), offered("sdpa"), offered("flash")) == ({"sdpa"}, {"flash"}, set())


def test_the_furthest_is_what_no_change_exceeds() -> None:
    start = plan_at(MODEL, strategy("mst"), card("h100"), 1 << 22)
    assert ways_to_fit(start) == ()
    best = furthest_way(start)
    assert (
        best is not None
        and best.s_max
        == max_seq(MODEL, best.plan.recipe, start.card).s_max
        > max_seq(MODEL, start.recipe, start.card).s_max
    )
    assert furthest_way(plan_at(MODEL, strategy("mst"), card(memory=GIB), 4096)) is None


NAMES = ("standard", "checkpoint", "checkpoint-sqrt", "mst", "mst-offload")


def test_the_nearest_asks_no_more_of_the_host_than_it_must() -> None:
    def plans(gpu: str, name: str) -> list[Plan]:
        recipes = (STRATEGIES[each].changed(adamw_kernel="foreach") for each in NAMES)
        return [plan_at(load_model(name), recipe, card(gpu), 1024) for recipe in recipes]

    same = plans("rtx-4090", "qwen3-4b")
    assert len({plan.peak_bytes for plan in same[1:]}) == 1 and nearest_plan(same) is same[3]


def test_the_smallest_card_that_holds_it() -> None:
    start = plan_at(MODEL, strategy("checkpoint"), card("h100"), 65536)
    bigger = smallest_gpu(start)
    assert bigger is not None and plan_at(MODEL, start.recipe, card(bigger.name), 65536).fits
    assert not plan_at(MODEL, start.recipe, card("h200"), 65536).fits


def test_the_smallest_card_keeps_the_reserve() -> None:
    free, held = (plan_at(MODEL, strategy("mst"), card("rtx-4090", reserve=n * GIB), 8192) for n in (0, 4))
    first, second = smallest_gpu(free), smallest_gpu(held)
    assert first is not None and second is not None and first.usable_bytes <= second.usable_bytes
    assert plan_at(MODEL, strategy("mst"), card(second.name, reserve=4 * GIB), 8192).fits


def test_a_peak_and_its_card_are_of_the_step_that_was_asked_for() -> None:
    """70B over 8 cards at 32k fits nowhere: chunks are those of that length all the same, and so is the card that would hold it."""
    start = plan_at(load_model("llama3.1-70b"), strategy("mst", gpus=8, sharding="fsdp"), card("h100"), 32768)
    assert not start.fits and min(start.chunks[:2]) > 1
    bigger = smallest_gpu(start)
    assert bigger is not None and bigger.usable_bytes >= start.peak_bytes


def test_what_brings_nothing_is_no_way_whatever_it_stands_on() -> None:
    """A step that is calibrated misses the budget by a byte. Chunks that are no shorter and an attention without masks that there are none of
    lead to recipes without a calibration, which the formula counts some 500 bytes lower: that is no advice."""
    recipe, usual = strategy("checkpoint"), card("a100-80gb")
    whole = plan_at(MODEL, recipe, usual, 16384)
    start = plan_at(MODEL, recipe, card("a100-80gb", reserve=usual.budget_bytes - whole.peak_bytes + 1), 16384)
    idle = recipe.changed(attention="flash")
    same = plan_at(MODEL, idle, start.card, 16384)
    assert start.calibration is not None and same.calibration is None
    assert same.tensors_fit and not start.tensors_fit
    for way in ways_to_fit(start):
        assert way.plan.fits and way.plan.peak_bytes < start.peak_bytes - 2**20, way.changes
        assert {c.name for c in way.changes} != {"flash-attn: no explicit masks"}


def test_the_furthest_has_no_change_that_brings_nothing() -> None:
    """By the formula, of recipes of which some are calibrated: attention without masks brings a Llama nothing."""
    for name in ("standard", "checkpoint", "mst"):
        best = furthest_way(plan_at(MODEL, strategy(name), card("h100"), 1 << 22))
        assert best is not None and not any("flash" in c.name for c in best.changes)
        assert best.s_max == max_seq(MODEL, best.plan.recipe, best.plan.card).s_max


@pytest.mark.parametrize(
    ("name", "gpu", "fields", "said"),
    [
        ("llama3.1-8b", "rtx-4090", {}, "--lora 16"),
        ("llama3.1-8b", "t4", {}, "--lora 16 --quantize nf4"),
        ("llama3.1-8b", "rtx-4090", {"precision": "mixed"}, "--autocast --lora 16"),
        ("mixtral-8x7b", "h200", {}, "--lora 16 --lora-targets attention"),
        ("llama3.1-8b", "t4", {"lora_rank": 8}, "--lora 8 --quantize nf4"),
        ("llama3.1-8b", "t4", {"lora_rank": 8, "quantize": "int8"}, "--lora 8 --quantize nf4"),
    ],
)
def test_adapters_come_first_where_nothing_else_trains(
    name: str, gpu: str, fields: dict[str, object], said: str
) -> None:
    """The first of the ways, with as little as it needs: what was asked for, and adapters."""
    start = plan_at(load_model(name), strategy("mst", **fields), card(gpu, host_memory=0), 8192)
    way = ways_to_fit(start)[0]
    assert options_of(way.plan.recipe) == f"--strategy mst {said}"
    assert way.s_max == max_seq(start.model, way.plan.recipe, start.card).s_max >= 8192
    price = "weights rounded to 4 bits" if start.recipe.lora_rank else "trains adapters instead of all weights"
    assert way.adapters is not None and price in way.gives_up


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer_on_host": True, "weights_on_host": True},
        {"freeze": ("embeddings",)},
        {"lora_rank": 8, "quantize": "nf4"},
    ],
)
def test_where_adapters_cannot_be_or_are_they_are_not_offered(fields: dict[str, object]) -> None:
    start = plan_at(MODEL, strategy("mst", **fields), card("t4", host_memory=0), 65536)
    assert not start.fits and not ways.tries_adapters(start)
    assert all(way.adapters is None for way in ways_to_fit(start))
    best = furthest_way(start)
    assert best is None or best.adapters is None


def test_stand_ins_have_no_adapters() -> None:
    model = MODEL._replace(stand_in=StandIn(1 << 30, "unknown"))
    assert not ways.tries_adapters(plan_at(MODEL, strategy("mst"), card("t4"), 4096)._replace(model=model))


def test_adapters_are_not_offered_where_chunks_and_checkpoints_do() -> None:
    start = plan_at(MODEL, strategy("standard"), card("h100"), 32768)
    assert not start.fits and ways_to_fit(start) and all(way.adapters is None for way in ways_to_fit(start))


def test_a_length_that_adapters_alone_do_not_hold_has_them_with_offload() -> None:
    """Layers in chunks before weights in 4 bits, which change what is trained."""
    start = plan_at(MODEL, strategy("mst"), card("rtx-4090"), 65536)
    first = ways_to_fit(start)[0]
    assert options_of(first.plan.recipe) == "--strategy mst-layer-offload --lora 16" and first.s_max >= 65536


def test_layers_in_chunks_come_before_attention_from_the_host() -> None:
    """300k tokens of Llama-3.2-1B on 24 GB: no other change holds them alone, and attention's tensors need not leave the GPU."""
    first, second = ways_to_fit(plan_at(SMALL, strategy("mst-offload"), card("rtx-4090"), 300_000))
    assert [c.name for c in first.changes] == ["the layers in chunks"]
    assert [c.name for c in second.changes] == ["attention from CPU RAM"] and second.s_max > first.s_max


def test_attention_with_weights_of_its_own_is_never_taken_from_the_host() -> None:
    start = plan_at(load_model("gpt-oss-20b"), strategy("mst"), card("h100"), 1 << 20)
    found = [*ways_to_fit(start), furthest_way(start)]
    assert found and all(way is None or not way.plan.recipe.attention_on_host for way in found)


def test_kbit_preparation_is_left_out_before_adapters_change() -> None:
    recipe = strategy("mst", lora_rank=16, quantize="nf4", kbit_preparation=True)
    first = ways_to_fit(plan_at(MODEL, recipe, card("rtx-4090"), 24576))[0]
    assert [change.name for change in first.changes] == ["no kbit preparation"]


def test_a_recipe_in_shards_fits_from_the_number_that_is_said():
    model, small = load_model("llama3.1-8b"), card(memory=40 * GIB)
    recipe = strategy("checkpoint", gpus=2, sharding="fsdp", precision="mixed")
    start = plan_at(model, recipe, small, 8192)
    fewest = fewest_gpus(start)
    assert not start.fits and fewest is not None and fewest > 2
    assert plan_at(model, recipe.changed(gpus=fewest), small, 8192).fits
    assert not plan_at(model, recipe.changed(gpus=fewest - 1), small, 8192).fits


def test_no_number_of_gpus_makes_the_embeddings_smaller():
    small = card(memory=4 * 2**30)
    start = plan_at(load_model("llama3.1-8b"), strategy("checkpoint", gpus=2, sharding="fsdp"), small, 4096)
    assert fewest_gpus(start) is None
    assert fewest_gpus(plan_at(load_model("llama3.1-8b"), strategy("checkpoint"), small, 4096)) is None


def test_master_weights_are_of_shards_in_bf16_only():
    model, h100 = load_model("qwen3-0.6b"), card("h100")
    recipe = strategy("checkpoint", gpus=2, sharding="fsdp")
    plan = plan_at(model, recipe, h100, 4096)
    mixed = master_weights(plan)
    assert mixed is not None and mixed.peak_bytes > plan.peak_bytes and mixed.recipe.reduce_dtype == "bf16"
    assert master_weights(mixed) is None


def test_whole_gradients_between_micro_batches_can_be_scattered():
    recipe = strategy("checkpoint", gpus=8, sharding="fsdp", accumulation=4)
    start = next(
        plan
        for plan in (plan_at(load_model("llama3.1-8b"), recipe, card("l40s"), n) for n in range(4096, 65536, 4096))
        if not plan.fits
    )
    ways = ways_to_fit(start)
    assert any(way.plan.recipe.sync_each_batch and way.plan.fits for way in ways)


def test_several_gpus_can_share_weights_or_sequences():
    start = plan_at(load_model("llama3.1-8b"), strategy("mst-offload", gpus=2, sharding="ddp"), card("h100"), 49152)
    assert not start.fits
    recipes = [way.plan.recipe for way in ways_to_fit(start)]
    assert any(recipe.sequence_parallel == 2 or recipe.sharding == "fsdp" for recipe in recipes)
    assert all(recipe.gpus == 2 for recipe in recipes)


def test_heads_that_gpus_cannot_share_stay_on_each():
    start = plan_at(load_model("llama3.2-1b"), strategy("checkpoint", gpus=6, sharding="fsdp"), card("rtx-4090"), 65536)
    assert all(way.plan.recipe.sequence_parallel == 1 for way in ways_to_fit(start))


def test_adapters_are_offered_in_shards() -> None:
    start = plan_at(load_model("llama3.1-8b"), strategy("mst-offload", gpus=2, sharding="fsdp"), card("rtx-4090"), 8192)
    assert not start.fits
    way = ways_to_fit(start)[0]
    assert way.adapters is not None and way.plan.fits and way.plan.recipe.sharded
