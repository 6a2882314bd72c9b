"""Saved tensors in CPU RAM: what leaves, what stays and what comes back, and what the ways to checkpoint hold beside each other."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError
from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.solve import host_bytes, longest_sequence, max_seq, plan_at
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import card
from mstplan.step.autograd import record_step
from mstplan.step.cuda import pinned_bytes
from mstplan.step.instants import Stage
from mstplan.step.recipe import Recipe, options_of, recipe_in_words
from mstplan.step.saved_tensors import IN_FLIGHT, offload_saved
from mstplan.step.steps import Chunks, Step, checkpointed_layers, step, stored_inputs
from mstplan.step.tape import ZERO, Rules, Tape, TapeWriter, add, backward, count_bytes, forward, grad_of
from mstplan.step.timing import step_seconds
from mstplan.units import GIB

H100 = card("h100")
LLAMA = load_model("llama3.2-1b").first(4)


def built(recipe: Recipe, seq_len: int = 4096, model: Any = LLAMA) -> Step:
    layout = layout_of(model, recipe, Chunks(1, 1), seq_len, H100.platform)
    return step(model, layout, H100.gpu.workspaces_bytes)


def peak(recipe: Recipe, seq_len: int = 4096, model: Any = LLAMA) -> int:
    return built(recipe, seq_len, model).largest(step_sizes(recipe, seq_len, Chunks(1, 1)))[1]


# ---- the hook ---------------------------------------------------------------------------------------------------------


def chain(*saved: str) -> Tape:
    """Operations one after the other, each of the one before: which of "input" and "output" each saves, or nothing."""
    w = TapeWriter({"d": 1024}, Stage.LOSS)
    x = w.new("x0", "b s d", "bfloat16")
    w.op("make x0", [], x)
    for n, what in enumerate(saved, 1):
        y = w.new(f"x{n}", "b s d", "bfloat16")
        kept = {"input": (x,), "output": (y,), "both": (x, y), "": ()}[what]
        x = w.op(f"make x{n}", [x], y, keeps=kept, grads=((x, w.grad(x)),))
    return record_step(w.build_tape(), w.ops[0].makes[0])


def test_what_is_saved_twice_within_five_stays() -> None:
    """x1 is saved as an output and as the next one's input."""
    offloaded = offload_saved(chain("output", "input", "input"))
    assert [tensor.name for tensor in offloaded.on_host] == ["x0", "x1", "x2"]
    kept = [[tensor.name for tensor in op.keeps] for op in offloaded.tape.ops]
    assert kept[2][0] == "x1"


def test_the_last_five_are_there_when_forward_ends() -> None:
    offloaded = offload_saved(chain(*["input"] * 9))
    first = next(op for op in reversed(offloaded.tape.ops) if op.fetched is not None)
    assert first.fetched == ()  # its own is one of them
    assert len(first.keeps) == IN_FLIGHT
    back = [op.fetched for op in offloaded.tape.ops if op.fetched]
    assert len(back) == 8 and all(len(fetched) == 1 for fetched in back)


def test_nothing_that_is_saved_leaves_nothing() -> None:
    tape = chain("", "", "")
    assert [tensor.name for tensor in offload_saved(tape).on_host] == ["x0"]  # the leaf, whose gradient is wanted


@given(st.lists(st.sampled_from(["input", "output", "both", ""]), min_size=1, max_size=12))
def test_all_that_comes_goes_again(saved: list[str]) -> None:
    """After backward no more is alive than before, whatever is saved."""
    tape = offload_saved(chain(*saved)).tape
    rules = Rules(every_moment=True)
    ahead, behind = forward(tape, rules, keep=True), backward(tape, rules)
    left = add(add(ahead.net, behind.net), count_bytes(grad_of(tape.output)))
    assert left in (ZERO, count_bytes(tape.output))  # the caller's own, where nothing saves it


# ---- steps -------------------------------------------------------------------------------------------------------------

LAYERS = load_model("llama3.2-1b").first(6)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.sampled_from([256, 1000, 4096]), st.sampled_from(["none", "saved-tensors"]))
def test_each_nth_layer_lies_between_all_and_none(n: int, seq_len: int, offload: str) -> None:
    none, nth, layer = (
        peak(Recipe(checkpoint=how, offload=offload), seq_len, LAYERS) for how in ("none", f"every-{n}", "layer")
    )
    assert layer <= nth <= none
    if n == 1:
        assert nth == layer


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([256, 2048, 8192]), st.integers(1, 3), st.booleans())
def test_selective_lies_between_layer_and_none(seq_len: int, batch: int, saved: bool) -> None:
    more = {"batch": batch, "offload": "saved-tensors" if saved else "none"}
    layer, selective, none = (peak(Recipe(checkpoint=how, **more), seq_len) for how in ("layer", "selective", "none"))
    assert layer <= selective <= none


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([256, 2048, 8192]), st.integers(1, 3), st.sampled_from(["none", "layer-inputs"]))
def test_reentrant_checkpoints_never_need_less(seq_len: int, batch: int, offload: str) -> None:
    """They hold a layer's output, and the gradient that came in, a moment longer: at most two hidden states."""
    layer, reentrant = (
        peak(Recipe(checkpoint=how, batch=batch, offload=offload), seq_len) for how in ("layer", "reentrant")
    )
    assert layer <= reentrant <= layer + 2 * batch * seq_len * LAYERS.hidden * 2


def test_eager_attention_has_nothing_that_a_selective_checkpoint_keeps() -> None:
    how = {"attention": "eager"}
    assert peak(Recipe(checkpoint="selective", **how)) == peak(Recipe(checkpoint="layer", **how))


def test_numbers_of_stored_inputs() -> None:
    counts = {how: stored_inputs(Recipe(checkpoint=how), 7) for how in ("none", "layer", "selective", "every-3", 3)}
    assert counts == {"none": 0, "layer": 7, "selective": 7, "every-3": 3, 3: 3}
    assert list(checkpointed_layers(Recipe(checkpoint="every-100"), 7)) == [0]


def test_a_selective_checkpoint_runs_all_but_attention_again() -> None:
    def seconds(checkpoint: str) -> float:
        recipe = Recipe(checkpoint=checkpoint)
        sizes = step_sizes(recipe, 16384, Chunks(1, 1))
        return step_seconds(built(recipe, 16384), recipe, H100.gpu, sizes, Chunks(1, 1))

    none, selective, layer, reentrant = map(seconds, ("none", "selective", "layer", "reentrant"))
    assert none < selective < layer < reentrant  # which makes the last product again, too


def test_reentrant_checkpoints_need_gradients_of_inputs() -> None:
    """torch's CheckpointFunction is left without a node in the graph where none of its inputs wants one."""
    frozen = Recipe(checkpoint="reentrant", lora_rank=8)
    with pytest.raises(RecipeError, match="--input-gradients"):
        peak(frozen, 1024)
    assert peak(frozen.changed(input_gradients=True), 1024) > 0


def test_cpu_ram_holds_what_is_sent() -> None:
    recipe = Recipe(checkpoint="layer", offload="saved-tensors")
    step_of = built(recipe)
    names = [tensor.name for tensor in step_of.on_host]
    assert names[0] == "token ids" and names.count("layer input") == LLAMA.layers
    host = host_bytes(LLAMA, recipe, 4096, step_of)
    assert host >= LLAMA.layers * 4096 * LLAMA.hidden * 2
    assert [pinned_bytes(n) for n in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]


def test_short_cpu_ram_limits_the_length() -> None:
    recipe, small = Recipe(offload="saved-tensors"), card("h100", host_memory=4 * GIB)
    answer = max_seq(LLAMA, recipe, small)
    s_max, others = answer.s_max, max_seq(LLAMA, recipe, H100).s_max
    assert 0 < s_max < others
    assert plan_at(LLAMA, recipe, small, s_max).fits and not plan_at(LLAMA, recipe, small, s_max + 1).fits


# ---- rows of several samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_batch_in_one_row_fits_as_far_as_it_says(batch: int) -> None:
    recipe = Recipe(checkpoint="layer", attention="flash", padding_free=True, batch=batch)
    longest = longest_sequence(LLAMA, recipe, H100, Chunks(1, 1))
    assert peak(recipe, longest) <= H100.budget_bytes < peak(recipe, longest + 1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 16), st.sampled_from([512, 1000, 4096]), st.sampled_from(["sdpa", "eager", "flash", "cudnn"]))
def test_packed_rows_hold_no_less(samples: int, seq_len: int, attention: str) -> None:
    plain, packed = (peak(Recipe(attention=attention, packing=n), seq_len) for n in (1, samples))
    assert packed > plain
    if attention != "flash":  # a mask does not depend on how many samples it tells apart
        assert packed == peak(Recipe(attention=attention, packing=2), seq_len)


def test_packed_samples_take_a_mask_at_any_length() -> None:
    layout = layout_of(LLAMA, Recipe(packing=2), Chunks(1, 1), 64, H100.platform)
    assert layout.masked and not layout_of(LLAMA, Recipe(), Chunks(1, 1), 1 << 20, H100.platform).masked
    with_flash = Recipe(packing=2, attention="flash")
    assert not layout_of(LLAMA, with_flash, Chunks(1, 1), 64, H100.platform).masked


# ---- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"padding_free": True}, "--attention flash"),
        ({"padding_free": True, "attention": "eager"}, "not eager"),
        ({"packing": 2, "batch": 2, "attention": "flash"}, "--padding-free"),
        ({"packing": 0}, "packing"),
        ({"checkpoint": "every-0"}, "every-n"),
        ({"checkpoint": "every-2", "gpus": 2, "sharding": "fsdp1"}, "--checkpoint layer"),
        ({"checkpoint": "selective", "gpus": 2, "sharding": "fsdp1"}, "--checkpoint layer"),
        ({"checkpoint": 2, "gpus": 2, "sharding": "fsdp"}, "--checkpoint layer"),
        ({"checkpoint": "reentrant", "images": 1}, "--checkpoint layer"),
        ({"checkpoint": "reentrant", "offload": "saved-tensors"}, "--checkpoint layer"),
        ({"offload": "saved-tensors", "gpus": 2, "sharding": "fsdp"}, "--offload layer-inputs"),
        ({"offload": "saved-tensors", "mlp_chunks": 4}, "--no-recompute"),
        ({"offload": "layer-inputs"}, "--checkpoint layer"),
    ],
)
def test_what_makes_no_sense(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as e:
        Recipe(**fields)
    assert says in str(e.value) and len(str(e.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"checkpoint": "selective"}, "--checkpoint selective"),
        ({"checkpoint": "every-2"}, "--checkpoint every-2"),
        ({"checkpoint": "reentrant"}, "--checkpoint reentrant"),
        ({"offload": "saved-tensors"}, "--offload saved-tensors"),
        ({"packing": 8}, "--strategy no-checkpointing --packing 8"),
        ({"attention": "flash", "padding_free": True, "batch": 2}, "--batch 2 --padding-free --attention flash"),
    ],
)
def test_as_options_and_in_json(fields: dict[str, Any], options: str) -> None:
    recipe = Recipe(**fields)
    assert options_of(recipe).endswith(options)
    assert Recipe.from_json(recipe.model_dump_json()) == recipe


def test_rows_in_words() -> None:
    assert "8 samples a row" in recipe_in_words(Recipe(packing=8))
    assert "a batch in one row" in recipe_in_words(Recipe(attention="flash", padding_free=True))


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 5000), st.booleans())
def test_rows_hold_all_tokens(batch: int, packing: int, seq_len: int, padding_free: bool) -> None:
    assume(batch == 1 or packing == 1 or padding_free)
    recipe = Recipe(batch=batch, packing=packing, padding_free=padding_free, attention="flash")
    assert recipe.rows * recipe.row_tokens(seq_len) == batch * seq_len
    assert recipe.rows * recipe.samples_in_row == batch * packing
