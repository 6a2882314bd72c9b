"""The step model against itself done the slow and obvious way, and against published figures."""

import json
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import profiles
from mstplan.plan.layout import cap_chunks, layout_of, step_of, step_sizes
from mstplan.plan.solve import fixed_chunks, peak_at
from mstplan.spec.catalog import load_model, model_names
from mstplan.spec.hardware import card
from mstplan.spec.model import LayerKind, Mlp
from mstplan.step.instants import Instant
from mstplan.step.recipe import STRATEGIES, strategy
from mstplan.step.steps import CALIBRATED, Chunks, Layout, Sizes, Step, evaluate, segment_length, step
from mstplan.step.tape import BASIS, Moment, undominated
from mstplan.units import GIB

from ..recipes import counted_strategies
from .strategies import cards, chunk_counts, models, recipes

A100 = card("a100-80gb")
INDEX = json.loads((profiles.ROOT / "models" / "index.json").read_text(encoding="utf-8"))
FEW = ("llama3.2-1b", "gemma3-1b", "qwen3-0.6b", "deepseek-v2-lite", "gpt2")
SHAPES = ((1, 1, 1), (1, 4096, 1), (2, 1000, 3), (1, 300_001, 64))  # batch, tokens, chunks

quick = settings(max_examples=150)


def chunks_of(recipe, count):
    return fixed_chunks(recipe, count, count)


def formula(model, recipe, chunks, seq_len):
    """The step without any calibration."""
    return step(model, layout_of(model, recipe, chunks, seq_len), A100.gpu.workspaces_bytes)


def slow_peaks(built, where):
    """Every layer replayed anew, no moment left out; the largest of each instant."""
    found = built._moments(every_moment=True)
    return {name: max(evaluate(m.live, where.units) for m in moments) for name, moments in found.items()}


# ---- the slow way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("plan", STRATEGIES)
def test_every_layer_by_itself_gives_the_same_peak(name, plan):
    model = load_model(name)
    for batch, seq_len, count in SHAPES:
        recipe = strategy(plan, batch=batch)
        chunks = chunks_of(recipe, count)
        built, where = formula(model, recipe, chunks, seq_len), step_sizes(recipe, seq_len, chunks)
        slow = slow_peaks(built, where)
        assert max(slow.values()) == built.largest(where)[1]
        shown = {i.name: i.bytes for i in built.instants(where)}
        for instant in (
            Instant.END_OF_FORWARD,
            Instant.LOSS,
            Instant.LOSS_BACKWARD,
            Instant.LAST_LAYER,
            Instant.FIRST_LAYER,
            Instant.EMBEDDING,
            Instant.OPTIMIZER,
        ):
            assert shown.get(instant) == slow.get(instant)


@quick
@given(st.data())
def test_the_same_holds_for_any_model_and_recipe(data):
    model, recipe = data.draw(models()), data.draw(recipes())
    chunks, seq_len = data.draw(chunk_counts(recipe)), data.draw(st.integers(1, 200_000))
    built, where = formula(model, recipe, chunks, seq_len), step_sizes(recipe, seq_len, chunks)
    assert max(slow_peaks(built, where).values()) == built.largest(where)[1]


@settings(quick, max_examples=40)
@given(st.data())
def test_the_same_holds_where_kinds_of_layers_repeat(data):
    """Local and global layers in turn, dense ones first, a pattern that is cut off or broken somewhere."""
    model, recipe = data.draw(models()), data.draw(recipes())
    kinds = (
        LayerKind(256),
        LayerKind(),
        *([LayerKind(256, True), LayerKind(None, True)] if model.experts is not None else []),
    )
    pattern = data.draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5))
    layers = [*data.draw(st.lists(st.sampled_from(kinds), max_size=2)), *pattern * data.draw(st.integers(3, 5))]
    layers[data.draw(st.integers(0, len(layers) - 1))] = data.draw(st.sampled_from(kinds))
    model = model._replace(layer_kinds=tuple(layers), mlp=model.mlp or Mlp(64, "silu"))
    chunks = data.draw(chunk_counts(recipe))
    for seq_len in (16, 300, 1000, 4000, 50_000):  # gradients that come outweigh inputs that go in short ones
        built, where = formula(model, recipe, chunks, seq_len), step_sizes(recipe, seq_len, chunks)
        slow = slow_peaks(built, where)
        assert max(slow.values()) == built.largest(where)[1]
        shown = {i.name: i.bytes for i in built.instants(where)}
        assert all(
            shown[name] == slow[name]
            for name in (Instant.END_OF_FORWARD, Instant.LAST_LAYER, Instant.MIDDLE_LAYER, Instant.FIRST_LAYER)
            if name in slow
        )


@quick
@given(
    st.lists(st.tuples(*[st.integers(-300, 900)] * 2, *[st.integers(0, 2)] * (len(BASIS) - 2)), max_size=40),
    st.lists(
        st.builds(
            Sizes,
            *[st.integers(1, top) for top in (4, 50, 50, 50)],
            ranks=st.just(1),
            ring=st.just(1),
            norm_sharers=st.integers(1, 4),
        ),
        min_size=30,
        max_size=30,
    ),
)
def test_what_is_left_out_is_never_the_largest(vectors, sizes):
    """Not for any batch, length and chunks."""
    moments = [Moment(vector, "", ()) for vector in vectors]
    kept = undominated(moments)
    assert set(kept) <= set(moments) and bool(kept) == bool(moments)
    for units in (each.units for each in sizes if moments):
        assert max(evaluate(m.live, units) for m in kept) == max(evaluate(v, units) for v in vectors)


PATTERNS = {
    "alike": lambda n: [0] * n,
    "in turn": lambda n: [i % 2 for i in range(n)],
    "one of six": lambda n: [int(i % 6 == 5) for i in range(n)],
    "one change": lambda n: [int(i > n // 3) for i in range(n)],
    "any": lambda n: Random(0).choices([0, 1], k=n),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("plan", ["standard", "checkpoint", "checkpoint-sqrt", "mst-offload"])
def test_many_layers_leave_few_moments(pattern, plan):
    """So that the deepest model that is read takes seconds at most, whatever its layers are like."""
    model = load_model("gemma2-2b")
    kinds = sorted(set(model.layer_kinds), key=str)
    deep = model._replace(layer_kinds=tuple(kinds[k] for k in PATTERNS[pattern](400)))
    built = formula(deep, strategy(plan), chunks_of(strategy(plan), 8), 4096)
    assert sum(map(len, built.moments.values())) < 150


def test_every_sqrt_of_the_layers():
    recipe = strategy("checkpoint-sqrt")
    assert [segment_length(recipe, n) for n in (1, 2, 3, 6, 7, 12, 13, 32, 80, 126)] == [1, 1, 2, 2, 3, 3, 4, 6, 9, 11]
    assert [segment_length(strategy("checkpoint", checkpoint=k), 32) for k in (1, 5, 40)] == [1, 5, 32]


# ---- entries ----------------------------------------------------------------------------------------------------------


def check_instants(built, where):
    instants = built.instants(where)
    assert [i.name for i in instants] == [name for name in Instant if name in {i.name for i in instants}]
    assert max(i.bytes for i in instants) == built.largest(where)[1]
    for instant in instants:
        assert sum(entry.bytes for entry in instant.entries) == instant.bytes
        assert all((entry.bytes > 0 or entry.name == CALIBRATED) and entry.copies > 0 for entry in instant.entries)
        assert [entry.bytes for entry in instant.entries] == sorted(
            (entry.bytes for entry in instant.entries), reverse=True
        )
        assert all(type(entry.bytes) is int for entry in instant.entries)


OF_EACH_FAMILY = {load_model(name).model_type: name for name in model_names()}


@pytest.mark.parametrize("name", OF_EACH_FAMILY.values())
def test_entries_add_up(name):
    model = load_model(name)
    for recipe in counted_strategies(model).values():
        chunks = chunks_of(recipe, 16)
        check_instants(step_of(model, recipe, A100, chunks, 32768), step_sizes(recipe, 32768, chunks))


@quick
@given(st.data())
def test_entries_add_up_for_any_model_and_recipe(data):
    model, recipe = data.draw(models()), data.draw(recipes())
    drawn, seq_len = data.draw(chunk_counts(recipe)), data.draw(st.integers(1, 200_000))
    chunks = cap_chunks(drawn, seq_len)  # as the planner does
    check_instants(step_of(model, recipe, A100, chunks, seq_len), step_sizes(recipe, seq_len, chunks))


@quick
@given(st.data())
def test_a_longer_sequence_never_needs_less(data):
    model, recipe, a_card = data.draw(models(window=False)), data.draw(recipes()), data.draw(cards())
    chunks, seq_len = data.draw(chunk_counts(recipe)), data.draw(st.integers(1, 200_000))
    peaks = [peak_at(model, recipe, a_card, s, chunks)[1] for s in (seq_len, seq_len + 1, 2 * seq_len)]
    assert peaks == sorted(peaks)


# ---- published figures --------------------------------------------------------------------------------------------------


def test_measured_peak_of_llama3_8b():
    """Published notebook of an MsT run: max_memory_allocated 74.807488 GiB, at the optimizer's step."""
    instant, peak = peak_at(load_model("llama3-8b"), strategy("mst", adamw_kernel="foreach"), A100, 8192, Chunks(4, 16))
    assert instant == Instant.OPTIMIZER
    assert peak / GIB == pytest.approx(74.807488, rel=1e-4)


IN_BACKWARD = {"optimizer_in_backward": True}
TABLES_8_TO_11 = [
    ("standard", {}, Chunks(1, 1), 75),
    ("standard", IN_BACKWARD, Chunks(1, 1), 74),
    ("checkpoint", IN_BACKWARD, Chunks(1, 1), 52),
    ("mst", IN_BACKWARD | {"mlp_chunks": 1, "loss_chunks": 32}, Chunks(1, 32), 48),
]


@pytest.mark.parametrize(("plan", "changes", "chunks", "gib"), TABLES_8_TO_11)
def test_published_peaks_of_llama3_8b_at_4k(plan, changes, chunks, gib):
    """arXiv 2407.15892, tables 8 to 11."""
    _, peak = peak_at(load_model("llama3-8b"), strategy(plan, **changes), A100, 4096, chunks)
    assert peak / GIB == pytest.approx(gib, rel=0.04)


# ---- parameters -----------------------------------------------------------------------------------------------------------


def bare_step_of(model):
    return Step(model, Layout(strategy("standard"), False, False, False), 0)


@pytest.mark.parametrize("name", model_names())
def test_parameter_counts(name):
    assert bare_step_of(load_model(name)).parameters == INDEX[name]["parameters"]


def counted(name):
    """transformers' own count: all parameters, and those that one token uses."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    routed = load_model(name).experts
    total = active = 0
    for path, weight in net.named_parameters():
        total += weight.numel()
        shared = routed is not None and ".experts." in path
        active += weight.numel() * (routed.per_token if shared else 1) // (routed.number if shared else 1)
    return total, active


@pytest.mark.parametrize("name", model_names())
def test_parameter_counts_of_the_real_model(name):
    weights = bare_step_of(load_model(name)).weights
    total = sum(w.numel * n for w, n in weights)
    active = sum(w.numel * w.active[0] // w.active[1] * n for w, n in weights)
    assert (total, active) == counted(name)
