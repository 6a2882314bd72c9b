"""Ways to use several GPUs beside each other."""

from __future__ import annotations

from mstplan import load_model
from mstplan.plan.several_gpus import ON_HOST, GpusWay, compare, list_ways, with_own_fields
from mstplan.plan.solve import max_seq
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES, planned

MODEL, CARD = load_model("llama3.2-1b"), card("rtx-4090")
RECIPES = {name: STRATEGIES[name] for name in ("checkpoint", "mst")}


def test_every_sharding_is_listed_with_every_way_to_share_sequences():
    ways = [way.fields for way in list_ways(12)]
    assert {fields["sharding"] for fields in ways} == set(planned("sharding")[0])
    assert sorted({fields["sequence_parallel"] for fields in ways}) == [1, 2, 4, 12]
    assert {"gpus": 12, "sharding": "none", "sequence_parallel": 1} not in ways
    assert {fields["sequence_parallel"] for fields in (way.fields for way in list_ways(8, ranks=4))} == {4}


def test_matrices_are_split_over_all_gpus_or_over_some_that_share_the_parts():
    ways = [way for way in list_ways(8) if way.fields.get("tensor_parallel", 1) != 1]
    splits, shared_out = (
        ["fsdp, matrices over 2", "fsdp, matrices over 4", "matrices over 8"],
        "norms and loss in parts",
    )
    assert [way.name for way in ways] == [name for split in splits for name in (split, f"{split}, {shared_out}")]
    assert [way.name for way in list_ways(8, splits=4)] == [splits[1], f"{splits[1]}, {shared_out}"]
    alone = [way.name for way in list_ways(8, splits=4, in_parts=[{"sequence_parallel_norms": True}])]
    assert alone == [f"{splits[1]}, norms in parts"]
    assert not [way for way in list_ways(8, ranks=2) if "tensor_parallel" in way.fields]
    found = compare(load_model("qwen3-8b"), card("h100"), RECIPES, ways)
    assert {answer.strategy for _, answer in found.answers} == {"checkpoint"} and not found.left_out
    assert len(found.answers) == 6 and min(answer.s_max for _, answer in found.answers) > 20_000
    assert found.answers[0][0].name == f"matrices over 8, {shared_out}"


def test_what_means_something_under_some_shardings_goes_to_these():
    given = {"prefetch_bucket_size": "auto", "reduce_bucket_size": 1000, "replicas": 2}
    ways = {way.sharding: way.fields for way in with_own_fields(list_ways(8, ranks=1), given)}
    assert {name: set(given) & set(fields) for name, fields in ways.items()} == {
        "none": set(),
        "ddp": set(),
        "zero1": {"reduce_bucket_size"},
        "zero2": {"reduce_bucket_size"},
        "zero3": {"reduce_bucket_size", "prefetch_bucket_size"},
        "fsdp": {"replicas"},
        "fsdp1": set(),
    }


def test_each_answer_is_that_of_its_recipe_and_the_longest_is_first():
    found = compare(MODEL, CARD, RECIPES, list(list_ways(2)))
    lengths = [answer.s_max for _, answer in found.answers]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > 3 * lengths[-1]
    for way, answer in found.answers[:3]:
        others = [max_seq(MODEL, recipe.changed(**way.fields), CARD).s_max for recipe in RECIPES.values()]
        assert answer.s_max == max(others)
        assert answer.plan.recipe.changed(**way.fields) == answer.plan.recipe


def test_a_way_that_contradicts_itself_is_left_out_with_the_reason():
    ways = [GpusWay({"gpus": 2, "sharding": "ddp", "sequence_parallel": 1, **ON_HOST})]
    ways += list(list_ways(6, ranks=6))  # of 32 heads
    found = compare(MODEL, CARD, RECIPES, ways)
    assert not found.answers
    assert {"ddp, weights in CPU RAM", "sequences over 6", "fsdp, sequences over 6"} <= {
        name for names in found.left_out.values() for name in names
    }
    assert any("share evenly" in why for why in found.left_out)


def test_a_strategy_that_cannot_go_a_way_leaves_it_to_the_others():
    way = GpusWay({"gpus": 2, "sharding": "fsdp", "sequence_parallel": 1})
    found = compare(MODEL, CARD, {"checkpoint-sqrt": STRATEGIES["checkpoint-sqrt"], **RECIPES}, [way])
    assert [answer.strategy for _, answer in found.answers] == ["mst"] and not found.left_out
