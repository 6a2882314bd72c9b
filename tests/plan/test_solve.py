"""S_max and chunk counts against their definitions, for any model, recipe and card; and against published lengths."""

from math import lcm

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mstplan.errors import RecipeError, UnitError
from mstplan.plan.layout import cap_chunks, chunk_tokens, step_of, window_of
from mstplan.plan.solve import (
    MIN_GAIN,
    fixed_chunks,
    longest_sequence,
    max_seq,
    max_seq_of_tensors,
    peak_at,
    plan_at,
    recommend_chunks,
    smallest_chunks_tokens,
)
from mstplan.spec.catalog import load_model, model_names
from mstplan.spec.hardware import ALLOCATORS, card
from mstplan.step.cuda import BIAS_ROWS
from mstplan.step.recipe import STRATEGIES, USUAL_STRATEGIES, strategy
from mstplan.step.steps import Chunks
from mstplan.units import GIB, LONGEST, SHORTEST

from ..recipes import REFUSED, counted_strategies
from ..step.strategies import POWERS, cards, chunk_counts, models, recipes

A100 = card("a100-80gb")
quick = settings(max_examples=100)
fewer = settings(quick, max_examples=40)


def peak(model, recipe, a_card, seq_len, chunks):
    """The peak of a batch of just so many tokens, which is run in no more pieces than it has tokens."""
    run = recipe.padded(seq_len)
    return peak_at(model, recipe, a_card, run, cap_chunks(chunks, run))[1]


# ---- S_max --------------------------------------------------------------------------------------------------------------


def check_definition(model, recipe, a_card, chunks):
    """S_max and what is shorter fits; one more token does not."""
    s_max = longest_sequence(model, recipe, a_card, chunks)
    assert 0 <= s_max <= LONGEST
    shorter = {
        *range(max(SHORTEST, s_max - 17), s_max + 1),
        *(s_max * n // 12 for n in range(1, 12)),
        *range(2, min(5, s_max + 1)),
    } - {0, 1}
    for seq_len in sorted(shorter):
        assert peak(model, recipe, a_card, seq_len, chunks) <= a_card.budget_bytes, (seq_len, s_max)
    if s_max < LONGEST - recipe.pad_to:
        assert a_card.budget_bytes < peak(model, recipe, a_card, max(SHORTEST, s_max + 1), chunks)
    return s_max


def bisected(model, recipe, a_card, chunks, top=1 << 24):
    """The same by nothing but the peak at a length; `top` when even that fits. Lengths that leave the same remainder are bisected by
    themselves: explicit masks take more where their rows have to be padded, and batches are padded first."""
    period = lcm(BIAS_ROWS, recipe.pad_to)
    found = min(_first_too_long(model, recipe, a_card, chunks, rest, period, top) for rest in range(period)) - 1
    return found if found >= SHORTEST else 0


def _first_too_long(model, recipe, a_card, chunks, rest, period, top):
    low, high = -1, (top - rest) // period + 1  # fits, or is no length; is taken not to fit
    while high - low > 1:
        middle = (low + high) // 2
        seq_len = middle * period + rest
        if seq_len < SHORTEST or peak(model, recipe, a_card, seq_len, chunks) <= a_card.budget_bytes:
            low = middle
        else:
            high = middle
    return min(high * period + rest, top + 1)


@quick
@given(st.data())
def test_longest_is_what_it_says(data):
    model, recipe, a_card = data.draw(models()), data.draw(recipes()), data.draw(cards())
    chunks = data.draw(chunk_counts(recipe))
    s_max = check_definition(model, recipe, a_card, chunks)
    assert min(s_max, 1 << 24) == bisected(model, recipe, a_card, chunks)


@pytest.mark.parametrize("plan", ["mst", "mst-offload"])
@pytest.mark.parametrize("gib", [120, 200, 700, 3000])
def test_every_shorter_length_fits_with_masks(gib, plan):
    """Mistral's first release: between lengths whose mask needs no padding lie some that take more than the next one does."""
    model, recipe = load_model("mistral-7b-v0.1"), strategy(plan)
    large = card(memory=gib * GIB, torch="2.10")  # whose sdpa has the memory-efficient kernel take masks
    s_max = check_definition(model, recipe, large, Chunks(16, 32))
    assert s_max > 4096
    padded = recipe.changed(pad_to=BIAS_ROWS)
    longer = longest_sequence(model, padded, large, Chunks(16, 32))
    assert longer > s_max and longer % BIAS_ROWS == 0
    assert (
        peak(model, recipe, large, longer, Chunks(16, 32))
        <= large.budget_bytes
        < peak(model, recipe, large, longer - 1, Chunks(16, 32))
    )
    assert max_seq(model, recipe, large).s_max < max_seq(model, padded, large).s_max


@quick
@given(st.data())
def test_tensors_fit_exactly_up_to_their_s_max(data):
    """`plan` and `max-seq` agree, whatever the chunks, the host memory and what batches are padded to."""
    model, recipe, a_card = data.draw(models()), data.draw(recipes()), data.draw(cards())
    if data.draw(st.booleans()):
        a_card = a_card._replace(host_bytes=data.draw(st.integers(0, 64 * GIB)))
    longest, _ = max_seq_of_tensors(model, recipe, a_card)
    near = [longest + n for n in range(-9, 10)]
    windows = {window + n for window in (256, 4096) for n in (-1, 0, 1)}
    for seq_len in {2, 3, *windows, *near, *data.draw(st.lists(st.integers(2, 1 << 20), min_size=3, max_size=3))}:
        if SHORTEST <= seq_len <= LONGEST:
            plan = plan_at(model, recipe, a_card, seq_len)
            assert (plan.tensors_fit and plan.fits_host) == (seq_len <= longest), (seq_len, longest)


@fewer
@given(st.data())
def test_what_runs_is_no_longer_than_what_fits(data):
    """With either setting of the allocator, which finds room for S_max."""
    model, recipe = data.draw(models()), data.draw(recipes())
    a_card = data.draw(cards())._replace(allocator=data.draw(st.sampled_from(sorted(ALLOCATORS))))
    answer = max_seq(model, recipe, a_card)
    assert answer.s_max <= answer.s_max_tensors == max_seq_of_tensors(model, recipe, a_card)[0]
    assert answer.plan.fits == (answer.s_max > 0)
    assert answer.s_max % recipe.pad_to == 0


OF_EACH_FAMILY = {load_model(name).model_type: name for name in model_names()}


@pytest.mark.parametrize("name", OF_EACH_FAMILY.values())
def test_longest_is_what_it_says_for_a_model_of_each_family(name):
    """With every strategy, on one of two cards, in few chunks or many."""
    model, first = load_model(name), model_names().index(name)
    for n, recipe in enumerate(counted_strategies(model).values(), first):
        on = card(("a100-80gb", "h200")[n % 2])
        chunks = fixed_chunks(recipe, 24, 48) if n // 2 % 2 else fixed_chunks(recipe)
        assert check_definition(model, recipe, on, chunks) == bisected(model, recipe, on, chunks)


def test_strategies_that_are_refused():
    refused = {name: STRATEGIES.keys() - counted_strategies(load_model(name)).keys() for name in model_names()}
    assert {name: which for name, which in refused.items() if which} == REFUSED
    assert not set(USUAL_STRATEGIES) & set().union(*REFUSED.values())


def test_a_model_without_an_mlp_has_no_pieces_of_it():
    """They are left to us: one. Two that are asked for are refused by name."""
    mamba, on = load_model("mamba2-2.7b"), card("h200")
    assert max_seq(mamba, STRATEGIES["mst"], on).plan.chunks.mlp == 1
    assert plan_at(mamba, STRATEGIES["mst-offload"], on, 32768).chunks.mlp == 1
    with pytest.raises(RecipeError, match="has no MLP to run in pieces"):
        plan_at(mamba, STRATEGIES["mst"].changed(mlp_chunks=2), on, 32768)


@pytest.mark.parametrize("pad_to", [4096, 65536, 100_000])
@pytest.mark.parametrize("name", ["mst", "mst-offload"])
def test_chunks_are_chosen_for_padded_batches(name, pad_to):
    """Also where the shortest batch is padded to more than one chunk holds."""
    model, on = load_model("llama3.1-8b"), card("h100")
    free, padded = (max_seq(model, strategy(name, pad_to=n), on) for n in (1, pad_to))
    assert padded.s_max_tensors == free.s_max_tensors // pad_to * pad_to
    plan = plan_at(model, strategy(name, pad_to=pad_to), on, 100)
    assert plan.fits == (padded.s_max > 0) and plan.chunk_tokens.loss * plan.chunks.loss >= pad_to


def test_a_window_may_need_less_than_none():
    """In fp32 with grouped queries sdpa writes the scores out, but with a mask it does not: lengths beyond the window follow those below."""
    model, recipe, on = load_model("mistral-7b-v0.1"), strategy("standard", precision="fp32"), card(memory=160 * GIB)
    s_max = max_seq(model, recipe, on).s_max_tensors
    assert s_max < 4096 and not any(plan_at(model, recipe, on, n).fits for n in (s_max + 1, 4095, 4096, 4097, 5000))


@quick
@given(st.data())
def test_more_memory_never_shortens(data):
    model, recipe, a_card = data.draw(models()), data.draw(recipes()), data.draw(cards())
    chunks, more = data.draw(chunk_counts(recipe)), data.draw(st.integers(0, 20 * GIB))
    larger = a_card._replace(total_bytes=a_card.total_bytes + more)
    assert longest_sequence(model, recipe, a_card, chunks) <= longest_sequence(model, recipe, larger, chunks)


@quick
@given(st.data())
def test_twice_the_chunks_never_shorten(data):
    """From two on; the step from one to two also brings fp32 sums of the weights' gradients."""
    recipe = data.draw(recipes(mlp_chunks="auto", mlp_recompute=True, loss="chunked", loss_chunks="auto"))
    model, a_card = data.draw(models()), data.draw(cards())
    mlp, loss = 2 * data.draw(POWERS), 2 * data.draw(POWERS)
    few = longest_sequence(model, recipe, a_card, Chunks(mlp, loss))
    assert few <= longest_sequence(model, recipe, a_card, Chunks(2 * mlp, loss))
    assert few <= longest_sequence(model, recipe, a_card, Chunks(mlp, 2 * loss))


@quick
@given(st.data())
def test_two_sequences_of_half_the_length(data):
    """Two sequences fit at half of what one reaches, but for what rounding up adds: to whole chunks (one token of each,
    twice) and to the 128 rows of attention's workspace."""
    one = data.draw(recipes(batch=1, pad_to=1))
    two = one.changed(batch=2)
    model, a_card = data.draw(models(window=False)), data.draw(cards())
    chunks = data.draw(chunk_counts(one))
    alone, together = (longest_sequence(model, recipe, a_card, chunks) for recipe in (one, two))
    assert together <= alone
    assert together >= (alone - max(254, 2 * max(chunks))) // 2


# ---- mst beside checkpointing -------------------------------------------------------------------------------------------


def fp32_sums(model, recipe, chunks, seq_len):
    """What several chunks cost: fp32 sums of the weights' gradients, of one MLP and of the head."""
    step = step_of(model, recipe, A100, chunks, seq_len)
    parts = [op.part for op in step.tape.ops if op.part is not None]
    inner = [op.part for part in parts if not part.in_forward for op in part.tape.ops if op.part is not None]
    head = sum(t.bytes for part in parts if part.in_forward for t in part.sums)
    return head, max((sum(t.bytes for t in part.sums) for part in inner), default=0)


@pytest.mark.parametrize("name", model_names())
def test_mst_needs_no_more_than_checkpointing(name):
    """At the same length, beyond one chunk: no more than checkpointing and the fp32 sums."""
    model = load_model(name)
    checkpointing, mst = STRATEGIES["checkpoint"], STRATEGIES["mst"]
    for seq_len in (512, 8192, 100_000):
        plain = peak(model, checkpointing, A100, seq_len, Chunks(1, 1))
        for mlp, loss in ((2, 2), (2, 16), (16, 2), (64, 64)):
            chunks = Chunks(mlp if model.feeds_forward else 1, loss)
            sums = fp32_sums(model, mst, chunks, seq_len)
            assert peak(model, mst, A100, seq_len, chunks) <= plain + max(sums), (seq_len, chunks)


@quick
@given(st.data())
def test_mst_beside_checkpointing_for_any_model(data):
    """Where MLP and vocabulary are no wider than the hidden states, chunks have next to nothing to save. Then the cost
    shows: the fp32 sums, the bf16 gradients that they become while they live, and one whole tensor of hidden states."""
    plain = data.draw(
        recipes(checkpoint="layer", mlp_chunks=1, mlp_recompute=False, loss="transformers", loss_chunks=1)
    )
    mst = plain.changed(mlp_chunks="auto", mlp_recompute=True, loss="chunked", loss_chunks="auto")
    model, seq_len = data.draw(models(window=False)), plain.padded(data.draw(st.integers(1, 200_000)))
    chunks = Chunks(data.draw(st.integers(2, 64)), data.draw(st.integers(2, 64)))
    whole = mst.batch * seq_len * model.hidden * (2 if mst.precision == "bf16" else 4)
    cost = max(fp32_sums(model, mst, chunks, seq_len)) * 3 // 2 + whole
    assert peak(model, mst, A100, seq_len, chunks) <= peak(model, plain, A100, seq_len, Chunks(1, 1)) + cost


# ---- recommended chunks -------------------------------------------------------------------------------------------------


def compute_bound(model, recipe, a_card, chunks, share=1.0):
    """Every chunk, where there are several, keeps the tokens its matrix products need at S_max."""
    s_max = longest_sequence(model, recipe, a_card, chunks)
    least = smallest_chunks_tokens(model, a_card.gpu)
    return all(
        m == 1 or recipe.batch * chunk_tokens(s_max, m) >= share * n for m, n in zip(chunks[:2], least, strict=True)
    )


def check_recommendation(model, recipe, a_card):
    chosen = recommend_chunks(model, recipe, a_card)
    assert chosen == fixed_chunks(recipe, *chosen[:2])
    assert all(m & (m - 1) == 0 for m in chosen[:2])
    assert compute_bound(model, recipe, a_card, chosen, 1 - MIN_GAIN)
    reached = longest_sequence(model, recipe, a_card, chosen)
    powers = [1 << n for n in range(1, 18)]
    allowed = [Chunks(1, 1), *(Chunks(m, n) for m in powers for n in powers)]
    allowed = [c for c in {fixed_chunks(recipe, *c[:2]) for c in allowed} if compute_bound(model, recipe, a_card, c)]
    best = max(longest_sequence(model, recipe, a_card, c) for c in allowed)
    assert reached >= best * (1 - MIN_GAIN), (chosen, reached, best)


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-4b", "gemma2-2b", "gpt2", "qwen2.5-14b", "phi4"])
@pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb", "rtx-4090"])
def test_recommended_chunks_of_shipped_models(name, gpu):
    check_recommendation(load_model(name), strategy("mst", optimizer="adafactor"), card(gpu))


@fewer
@given(
    models(window=False), recipes(mlp_chunks="auto", mlp_recompute=True, loss="chunked", loss_chunks="auto"), cards()
)
def test_recommended_chunks(model, recipe, a_card):
    assume(longest_sequence(model, recipe, a_card, Chunks(1, 1)) < LONGEST)
    check_recommendation(model, recipe, a_card)


# ---- published lengths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tokens"), [("llama3-8b", 5000), ("llama2-7b", 7000)])
def test_published_lengths_of_standard_training(name, tokens):
    """arXiv 2407.15892, table 2: one A100-80GB, bf16, optimizer in backward. (Its other rows ran an older loss.)"""
    reached = longest_sequence(load_model(name), strategy("standard", optimizer_in_backward=True), A100, Chunks(1, 1))
    assert reached == pytest.approx(tokens, rel=0.1)


# ---- max-seq and plan say the same ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3.1-8b", "qwen3-4b", "gemma3-1b", "qwen3-30b-a3b", "gpt2"])
@pytest.mark.parametrize("gpu", ["rtx-4090", "h100", "b200"])
@pytest.mark.parametrize("which", ["mst", "mst-offload"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_plan_agrees_with_max_seq(name, gpu, which, in_backward):
    """With recommended chunks too, tensors fit exactly up to their S_max (of lengths whose masks need no padding), and S_max runs."""
    model, recipe, on = load_model(name), strategy(which, optimizer_in_backward=in_backward), card(gpu)
    answer = max_seq(model, recipe, on)
    assert plan_at(model, recipe, on, max(SHORTEST, answer.s_max)).fits == (answer.s_max > 0)
    s_max, step = answer.s_max_tensors, 1 if window_of(model, recipe) is None else BIAS_ROWS
    if s_max:
        assert plan_at(model, recipe, on, s_max).tensors_fit
        assert all(
            plan_at(model, recipe, on, max(SHORTEST, (s_max * n // 7 // step + 1) * step)).tensors_fit for n in range(7)
        )
    assert not plan_at(model, recipe, on, max(SHORTEST, s_max + 1)).fits
    assert not plan_at(model, recipe, on, s_max * 2 + SHORTEST).fits


def test_host_memory_decides_as_well():
    model, recipe = load_model("llama3.1-8b"), strategy("mst-offload")
    free, short = (max_seq(model, recipe, card("h100", host_memory=size)) for size in (1 << 40, 1 << 30))
    assert short.s_max == 4096 < free.s_max == max_seq(model, recipe, card("h100")).s_max  # 32 inputs of 8 KiB a token
    on = card("h100", host_memory=1 << 30)
    assert (
        plan_at(model, recipe, on, 4096, short.plan.chunks).fits
        and not plan_at(model, recipe, on, 4097, short.plan.chunks).fits
    )
    assert max_seq(model, recipe.changed(optimizer_on_host=True), on).s_max == 0


def test_no_more_pieces_than_tokens():
    found = plan_at(load_model("llama3.1-8b"), strategy("mst"), card("h100"), 5, Chunks(1 << 30, 64))
    assert found.chunks == Chunks(5, 5) and found.step_seconds < 60


@pytest.mark.parametrize("seq_len", [0, -5, 1.5, "64k", None, True, 1 << 50])
def test_lengths_that_are_none(seq_len):
    with pytest.raises(UnitError, match="seq_len"):
        plan_at(load_model("gpt2"), strategy("mst"), card("h100"), seq_len)
