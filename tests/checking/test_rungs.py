"""The formula rung against the trace. All of it is bench/rungs.py; here every family, and every strategy with every length."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice, repeat
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
import transformers

import mstplan
from mstplan.checking.rungs import PEAK_BOUNDS, Rungs, compare_rungs
from mstplan.plan.layout import layout_of, step_of
from mstplan.plan.solve import fixed_chunks, host_bytes
from mstplan.spec.catalog import load_model
from mstplan.step.layers import Writer, layer
from mstplan.step.recipe import STRATEGIES, Recipe
from mstplan.step.steps import step
from mstplan.tracing.trace import Trace
from mstplan.tracing.tracer import trace

from ..recipes import REFUSED, in_chunks

transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", category=UserWarning)

LENGTHS = (4096, 32768, 262144, 1048576)
CARD = mstplan.card("h100")
NAMES = mstplan.model_names()
SLOW = {"gated delta": (4096,), "mamba2": (4096, 32768), "attention and mamba2": (4096, 32768)}
"""Lengths for mixers whose plain code makes a trace of more tokens take minutes."""
SHORT = {"gated delta": 1024}
"""Tokens at most, where even the shortest of these takes one."""

BLOCK = 512
BLOCKS = 1 << 18
"""Bytes that some hundred small tensors, such as fused AdamW's counts of steps, take in whole blocks."""
EXACT = 0.0001
"""What separates the rungs: blocks of 512 bytes, of which a small model's norms fill some only in part (smollm2-135m, 0.01%)."""


model_named = cache(load_model)


def family(name: str) -> str:
    return model_named(name).model_type


def can(name: str, plan: str, seq_len: int) -> bool:
    """Whether the formula counts a strategy for a model, and a trace of that length is quick."""
    model = model_named(name)
    return plan not in REFUSED.get(name, ()) and all(
        seq_len in SLOW.get(kind.mixer, LENGTHS) for kind in model.layer_kinds
    )


def in_rotation() -> list[tuple[str, str, int]]:
    """(model, strategy, tokens): of each family as many as it has models, and no fewer than three; the strategies go round over
    all of them. The strategy that takes longest to trace, with several layers to a checkpoint, goes to the model of fewest layers."""
    others = cycle((plan, seq_len) for seq_len in LENGTHS for plan in STRATEGIES if plan != "checkpoint-sqrt")
    sqrt = cycle(("checkpoint-sqrt", seq_len) for seq_len in LENGTHS)
    cases = []
    for kind in dict.fromkeys(map(family, NAMES)):
        models = sorted((name for name in NAMES if family(name) == kind), key=lambda name: model_named(name).layers)
        count = max(len(models), 3)
        plans = [sqrt, *repeat(others, count - 1)]
        cases += [
            (name, *next(case for case in islice(plan, 2 * len(LENGTHS) * len(STRATEGIES)) if can(name, *case)))
            for name, plan in zip(islice(cycle(models), count), _that_can(models[0], plans, others), strict=True)
        ]
    return cases


def _that_can(name: str, plans: list[Iterator[tuple[str, int]]], others: Iterator[tuple[str, int]]) -> Iterator[Any]:
    """Where several layers to a checkpoint are not counted, another strategy."""
    return iter(plans if "checkpoint-sqrt" not in REFUSED.get(name, ()) else repeat(others, len(plans)))


def recipe_of(plan: str) -> Recipe:
    return in_chunks(mstplan.strategy(plan), 4, 8)


def in_blocks(name: str) -> int:
    """Bytes that a model's weights, their gradients and both moments leave empty in blocks, and those of AdamW's counts of steps."""
    recipe = mstplan.strategy("standard")
    weights = step_of(mstplan.load_model(name), recipe, CARD, fixed_chunks(recipe), 4096).weights
    return sum(count * (BLOCK + 4 * (-2 * weight.numel % BLOCK)) for weight, count in weights)


def off(rungs: Rungs, blocks: int = BLOCKS) -> dict[str, float]:
    """What is further off than it may be: the step's peak, and every instant by itself."""
    pairs = {"peak": rungs.peak, **{pair.instant: pair for pair in rungs.instants}}
    return {
        name: pair.difference
        for name, pair in pairs.items()
        if abs(pair.difference) > EXACT and abs(pair.formula - pair.trace) > blocks
    }


def chosen() -> list[tuple[str, str, int]]:
    """Of the rotation the first of each family, and what has a strategy with a length for the first time."""
    families, pairs = set(), set()
    cases = []
    for name, plan, seq_len in in_rotation():
        if family(name) not in families or (plan, seq_len) not in pairs:
            cases.append((name, plan, seq_len))
            families.add(family(name))
            pairs.add((plan, seq_len))
    return cases


@pytest.mark.parametrize(("name", "plan", "seq_len"), chosen())
def test_the_formula_agrees_with_the_trace(name: str, plan: str, seq_len: int) -> None:
    tokens = min(seq_len, *(SHORT.get(kind.mixer, seq_len) for kind in model_named(name).layer_kinds))
    rungs = compare_rungs(name, recipe_of(plan), tokens, CARD)
    further = off(rungs, BLOCKS // 2 + in_blocks(name))
    assert rungs.holds and not further, (rungs.peak, further)


def test_every_model_strategy_and_length_comes() -> None:
    cases = in_rotation()
    assert {name for name, _, _ in cases} == set(NAMES)
    assert {family(name) for name, _, _ in chosen()} == set(map(family, NAMES))
    assert {case[1:] for case in chosen()} == {case[1:] for case in cases}
    assert {(plan, seq_len) for _, plan, seq_len in cases} >= {
        (plan, seq_len) for plan in STRATEGIES for seq_len in LENGTHS
    }
    for kind in map(family, NAMES):
        mine = [plan for name, plan, _ in cases if family(name) == kind]
        assert len(mine) >= 3 and len(set(mine)) >= 3
        first = min((n for n in NAMES if family(n) == kind), key=lambda n: model_named(n).layers)
        assert "checkpoint-sqrt" in mine or "checkpoint-sqrt" in REFUSED.get(first, ())


@pytest.mark.parametrize("chunks", [(1, 1), (1, 32), (16, 1), (3, 7)])
def test_other_numbers_of_chunks(chunks: tuple[int, int]) -> None:
    """One chunk leaves a part of the model alone; three and seven do not divide the sequence."""
    recipe = mstplan.strategy("mst", mlp_chunks=chunks[0], loss_chunks=chunks[1])
    assert not off(compare_rungs("llama3.2-1b", recipe, 32768, CARD))


def test_masks_whose_rows_are_padded() -> None:
    """A length that is no multiple of 8, beyond the sliding window: the largest tensors of the step are two copies of its mask."""
    rungs = compare_rungs("mistral-7b-v0.1", recipe_of("mst-offload"), 300001, CARD)
    assert not off(rungs), off(rungs)


OTHERS = [
    ("gpt2", {"attention": "eager"}),
    ("gpt2", {"precision": "mixed"}),
    ("gemma3-1b", {"attention": "eager"}),
    ("llama3.2-1b", {"precision": "mixed"}),
    ("pythia-1.4b", {"precision": "fp32"}),
    ("qwen3-0.6b", {"batch": 3}),
    ("mistral-7b-v0.1", {"batch": 2}),
    ("llama3.2-1b", {"accumulation": 2}),
    ("llama3.2-1b", {"optimizer_in_backward": True}),
    ("deepseek-v2-lite", {"attention": "flash"}),
]


@pytest.mark.parametrize(("name", "changes"), OTHERS)
def test_other_recipes(name: str, changes: dict[str, object]) -> None:
    assert not off(compare_rungs(name, mstplan.strategy("standard", **changes), 8192, CARD))


LAYERS = [
    ("llama3.2-1b", 8, {"checkpoint": "sqrt"}),
    ("llama3.2-1b", 2, {"batch": 2, "accumulation": 2}),
    ("llama3.2-1b", 4, {"lora_rank": 16, "lora_targets": ("attention",)}),
    ("mistral-7b-v0.1", 2, {"checkpoint": "every-2", "precision": "mixed"}),
    ("phi3-mini-4k", 2, {"attention": "flash"}),
    ("phi3-mini-4k", 32, {"checkpoint": "selective", "freeze": ("attention",)}),
    ("gpt-oss-20b", 4, {"checkpoint": "none"}),
    ("deepseek-v2-lite", 4, {"attention": "flash"}),
    ("gemma2-2b", 4, {"kernels": "liger", "optimizer_in_backward": True}),
    ("gpt2", 3, {"attention": "eager", "precision": "fp32"}),
]


@pytest.mark.parametrize(("name", "groups", "changes"), LAYERS)
def test_layers_in_pieces(name: str, groups: int, changes: dict[str, object]) -> None:
    """With attention over groups of heads: of a single head nothing is copied, of several rows each piece is."""
    every_n = changes.get("checkpoint") in ("sqrt", "every-2")
    recipe = mstplan.strategy("mst-layer-offload" if every_n else "mst-layer", attention_groups=groups, **changes)
    rungs = compare_rungs(name, in_chunks(recipe, 4, 8), 8192, CARD)
    assert not off(rungs), off(rungs)


ON_HOST = [
    ("llama3.2-1b", 8, {}),
    ("llama3.2-1b", 1, {"batch": 2, "accumulation": 2}),
    ("llama3.2-1b", 4, {"lora_rank": 16, "lora_targets": ("attention",)}),
    ("mistral-7b-v0.1", 2, {"precision": "mixed"}),
    ("phi3-mini-4k", 4, {"attention": "flash", "optimizer_in_backward": True}),
    ("deepseek-v2-lite", 4, {"attention": "efficient"}),
    ("qwen3-0.6b", 4, {"freeze": ("attention",)}),
    ("gemma2-2b", 4, {}),
]


@pytest.mark.parametrize(("name", "groups", "changes"), ON_HOST)
def test_attention_from_the_host(
    name: str, groups: int, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the device, and what is on the host to a byte, in one trace."""
    traced: list[Trace] = []

    def trace_once(*arguments: Any, **how: Any) -> Trace:
        traced.append(trace(*arguments, **how))
        return traced[-1]

    monkeypatch.setattr("mstplan.checking.rungs.trace", trace_once)
    recipe = mstplan.strategy("mst-layer-offload", attention_groups=groups, attention_on_host=True, **changes)
    recipe = in_chunks(recipe, 16, 32)
    rungs = compare_rungs(name, recipe, 8192, CARD)
    assert not off(rungs), off(rungs)
    model, chunks = load_model(name), fixed_chunks(recipe)
    formula = step(model, layout_of(model, recipe, chunks, 8192, CARD.platform), CARD.gpu.workspaces_bytes)
    assert [host_bytes(model, recipe, 8192, formula)] == [each.host_peak for each in traced]


@pytest.fixture
def forgotten_product(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A formula in which products keep one of their factors only."""
    monkeypatch.setattr(Writer, "multiply", lambda w, name, x, z, y: w.pointwise(name, x, y, x))
    for cached in (layer, step):
        cached.cache_clear()
    yield
    for cached in (layer, step):
        cached.cache_clear()


@pytest.mark.usefixtures("forgotten_product")
def test_a_tensor_too_few_is_noticed() -> None:
    """Even where the loss binds and the step's peak is right all the same."""
    rungs = compare_rungs("llama3.2-1b", recipe_of("checkpoint"), 4096, CARD)
    assert off(rungs)["backward of the last layer"] < -20 * EXACT


def test_bounds_are_those_that_were_promised() -> None:
    assert PEAK_BOUNDS == {"dense": 0.02, "experts": 0.05}
