"""What holds of adapters and quantised weights for any dense model, by the formula."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from mstplan.plan import solve
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_model, model_names
from mstplan.spec.families import family_of
from mstplan.spec.hardware import card
from mstplan.step.instants import Instant
from mstplan.step.parameters import trained_count
from mstplan.step.recipe import STRATEGIES, Recipe, strategy
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, Step, step

from ..recipes import REFUSED

H100 = card("h100")
DENSE = [
    name
    for name, model in ((name, load_model(name)) for name in model_names() if name not in REFUSED)
    if model.experts is None and not family_of(model.model_type).code.bars_out_proj
]
STRATEGY = st.sampled_from(sorted(STRATEGIES))
LENGTHS = st.integers(1, 64).map(lambda n: 256 * n)
QUANTISED = ("nf4", "fp4", "int8")


def step_of(name: str, recipe: Recipe, seq_len: int) -> tuple[Step, Chunks]:
    model = load_model(name)
    chunks = Chunks(*(4 if count == "auto" else count for count in (recipe.mlp_chunks, recipe.loss_chunks)))
    fixed = chunks.put_into(recipe)
    return step(model, layout_of(model, fixed, chunks, seq_len, H100.platform), H100.gpu.workspaces_bytes), chunks


def peak(name: str, recipe: Recipe, seq_len: int) -> int:
    whole, chunks = step_of(name, recipe, seq_len)
    return whole.largest(step_sizes(recipe, seq_len, chunks))[1]


def instants(name: str, recipe: Recipe, seq_len: int) -> dict[Instant, int]:
    whole, chunks = step_of(name, recipe, seq_len)
    return {each.name: each.bytes for each in whole.instants(step_sizes(recipe, seq_len, chunks))}


def weights(name: str, recipe: Recipe) -> int:
    return sum(tensor.bytes for tensor in step_of(name, recipe, 512)[0].stays() if tensor.role is Role.WEIGHT)


# ---- adapters beside full fine-tuning ---------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(name=st.sampled_from(DENSE), chosen=STRATEGY, rank=st.integers(1, 64), length=LENGTHS)
@example("smollm2-1.7b", "checkpoint-sqrt", 64, 65536)
def test_adapters_in_bfloat16_never_need_more_than_full_fine_tuning(name, chosen, rank, length):
    with_adapters = strategy(chosen, lora_rank=rank, adapter_dtype="bf16")
    assert peak(name, with_adapters, length) <= peak(name, strategy(chosen), length)


@settings(max_examples=30)
@given(
    name=st.sampled_from(DENSE),
    chosen=st.sampled_from([name for name, recipe in STRATEGIES.items() if recipe.checkpoint == "layer"]),
    rank=st.integers(1, 64),
    length=LENGTHS,
)
def test_nor_do_those_in_fp32_where_every_layer_is_checkpointed(name, chosen, rank, length):
    assert peak(name, strategy(chosen, lora_rank=rank), length) <= peak(name, strategy(chosen), length)


def test_without_checkpoints_fp32_adapters_can_need_more():
    """Each keeps a copy in fp32 of its layer's input, which all weights' gradients and states do not outweigh at length."""
    full, lora = (peak("llama3.1-8b", strategy("standard", **way), 65536) for way in ({}, {"lora_rank": 8}))
    assert 1.2 * full < lora < 1.5 * full
    assert peak("llama3.1-8b", strategy("checkpoint", lora_rank=8), 65536) < peak(
        "llama3.1-8b", strategy("checkpoint"), 65536
    )


@settings(max_examples=6)
@given(
    name=st.sampled_from(["gpt2", "llama3.2-1b", "gemma3-1b"]),
    chosen=st.sampled_from(["standard", "checkpoint"]),
    ranks=st.tuples(st.integers(1, 512), st.integers(1, 512)).map(sorted),
    dtype=st.sampled_from(["fp32", "bf16"]),
    quantize=st.sampled_from(["none", *QUANTISED]),
)
def test_the_longest_sequence_never_rises_with_the_rank(name, chosen, ranks, dtype, quantize):
    model = load_model(name)
    lengths = [
        solve.max_seq(
            model, strategy(chosen, lora_rank=rank, adapter_dtype=dtype, quantize=quantize), H100
        ).s_max_tensors
        for rank in ranks
    ]
    assert lengths[0] >= lengths[1]


@settings(max_examples=25)
@given(
    name=st.sampled_from(DENSE),
    chosen=STRATEGY,
    ranks=st.tuples(st.integers(1, 512), st.integers(1, 512)).map(sorted),
    length=LENGTHS,
)
def test_no_instant_needs_less_with_a_larger_rank(name, chosen, ranks, length):
    fewer, more = (instants(name, strategy(chosen, lora_rank=rank), length) for rank in ranks)
    assert fewer.keys() == more.keys() and all(fewer[i] <= more[i] for i in fewer)


@settings(max_examples=25)
@given(name=st.sampled_from(DENSE), chosen=STRATEGY, rank=st.integers(1, 128), length=LENGTHS, dora=st.booleans())
def test_training_the_adapters_by_their_names_is_the_same(name, chosen, rank, length, dora):
    adapters = ("lora_A", "lora_B", *(("lora_magnitude_vector",) if dora else ()))
    recipe = strategy(chosen, lora_rank=rank, dora=dora)
    assert instants(name, recipe, length) == instants(name, recipe.changed(train=adapters), length)


@settings(max_examples=30)
@given(name=st.sampled_from(DENSE), rank=st.integers(1, 128), data=st.data())
def test_fewer_targets_need_no_more(name, rank, data):
    chosen, length = data.draw(STRATEGY), data.draw(LENGTHS)
    whole, attention = (
        peak(name, strategy(chosen, lora_rank=rank, lora_targets=(target,)), length)
        for target in ("all-linear", "attention")
    )
    assert attention <= whole


# ---- quantised weights ----------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    name=st.sampled_from(DENSE),
    quantize=st.sampled_from(QUANTISED),
    rank=st.integers(1, 64),
    precision=st.sampled_from(["bf16", "mixed", "fp32"]),
)
def test_quantising_never_raises_the_bytes_of_weights(name, quantize, rank, precision):
    plain = Recipe(lora_rank=rank, precision=precision)
    quantised = weights(name, plain.changed(quantize=quantize))
    assert quantised < weights(name, plain)
    if quantize != "int8":
        assert weights(name, plain.changed(quantize=quantize, double_quantize=True)) <= quantised
        assert quantised <= weights(name, plain.changed(quantize="int8"))


@settings(max_examples=30)
@given(name=st.sampled_from(DENSE), quantize=st.sampled_from(QUANTISED[:2]), chosen=STRATEGY, length=LENGTHS)
def test_what_is_frozen_and_quantised_has_no_gradient_and_no_state(name, quantize, chosen, length):
    plain, quantised = (
        step_of(name, strategy(chosen, lora_rank=16, quantize=how), length)[0] for how in ("none", quantize)
    )
    assert [state.bytes for state in quantised.states()] == [state.bytes for state in plain.states()]
    assert quantised.trained_card_parameters == plain.trained_card_parameters
    assert quantised.parameters == plain.parameters


def test_a_pattern_over_quantised_weights_trains_their_adapters_alone():
    model, recipe = load_model("llama3.2-1b"), strategy("checkpoint", lora_rank=8, train=("mlp",))
    plain, quantised = (trained_count(model, recipe.changed(quantize=how)) for how in ("none", "nf4"))
    width, hidden = model.mlp.width, model.hidden
    assert quantised == model.layers * 3 * 8 * (width + hidden)
    assert plain == quantised + model.layers * 3 * width * hidden
