"""Published figures: all are there, the page is generated, nothing is fitted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.plan.published import all_series, comparisons, series_model
from mstplan.show.published import page
from mstplan.spec.hardware import card
from mstplan.step.allocator import Allocator
from mstplan.step.events import events_of
from mstplan.step.steps import Chunks, step
from mstplan.units import GIB

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_what_the_command_prints() -> None:
    assert (ROOT / "docs" / "published.md").read_text(encoding="utf-8") == page()


def test_every_row_is_predicted_or_says_why_not() -> None:
    rows = comparisons()
    assert len(rows) == 39
    for row in rows:
        assert row.source
        assert bool(row.not_predicted) != bool(row.recipe)
        if row.recipe is not None:
            assert row.explained_by and row.predicted_gib is not None
            assert (row.predicted_tokens is not None) == (row.kind == "s_max")


def test_peaks_of_the_paper_stand_within_4_percent() -> None:
    """Tables 8 to 11, and the notebook's 74.807488 GiB within 0.01%."""
    peaks = [
        row
        for row in comparisons()
        if row.kind == "fit_point" and ("2407.15892" in row.source or "mini-s" in row.source)
    ]
    assert len(peaks) == 5
    for row in peaks:
        bound = 0.0001 if row.published_gib == 74.807488 else 0.04
        assert row.gib_difference is not None and abs(row.gib_difference) <= bound, row


def test_standard_lengths_stand_within_10_percent() -> None:
    rows = [row for row in comparisons() if row.kind == "s_max" and row.case.startswith("vanilla")]
    assert len(rows) == 2
    for row in rows:
        assert row.tokens_difference is not None and abs(row.tokens_difference) <= 0.10, row


def test_peaks_of_fms_and_trl_stand_within_2_percent() -> None:
    """max_memory_allocated in bytes, within 0.75% and for bf16 0.01%; TRL's releases, rounded."""
    bounds = {"fms-acceleration": 0.0075, "trl": 0.02}
    rows = [(row, bound) for name, bound in bounds.items() for row in comparisons() if name in row.source]
    peaks = [(row, bound) for row, bound in rows if row.kind == "fit_point" and row.recipe is not None]
    assert len(peaks) == 4 + 6
    for row, bound in peaks:
        exact = row.model == "Llama3-8B"
        assert row.gib_difference is not None and abs(row.gib_difference) <= (0.0001 if exact else bound), row


KBIT = "TRL 0.13 casts embeddings and head back to bf16 after peft's preparation, which has them in fp32"
KERNELS = "Unsloth's RMSNorm and rotary kernels, which are not planned, run in place of transformers' code"
GPTQ = "no autocast: Qwen's own loss stays in 16 bits, where the planned one has fp32"
LENGTHS = "reserved for rows of every length up to the limit, where one length is simulated"
LITGPT = "litgpt's own model code, not transformers'"
EXCEPTIONS = {
    "Mistral-7B, nf4, kbit preparation": KBIT,
    "Llama3-8B, LoRA, Liger's loss": KERNELS,
    "Llama3-8B, nf4, Liger's loss": KERNELS,
    "Qwen-1.8B, Q-LoRA": GPTQ,
    "Qwen-7B, Q-LoRA": GPTQ,
    "Qwen-72B, Q-LoRA": GPTQ,
    "Qwen-1.8B, LoRA, ms-swift": LENGTHS,
    "Qwen-7B, LoRA, ms-swift": LENGTHS,
    "Qwen-14B, LoRA, ms-swift": LENGTHS,
    "Yi-6B, LoRA, ms-swift": LENGTHS,
    "Yi-34B, LoRA, ms-swift": LENGTHS,
    "zephyr-7b (Mistral), LoRA, ms-swift": LENGTHS,
    "Llama2-7B, LoRA, litgpt": LITGPT,
}
"""Series that stand outside the bounds, and why."""


def test_series_stand_within_their_bounds_or_have_a_reason() -> None:
    """Figures of known stacks within 1%, slopes of others within 5%; an exception that holds is none."""
    outside = set()
    for each in all_series():
        errors = [point.difference for point in each.points] if each.known_stack else [each.slope_difference]
        bound = 0.01 if each.known_stack else 0.05
        if any(error is not None and abs(error) > bound for error in errors):
            outside.add(each.name)
    assert outside == set(EXCEPTIONS)


def test_every_series_is_predicted_or_says_why_not() -> None:
    series = all_series()
    assert len({each.name for each in series}) == len(series) == 40
    for each in series:
        assert each.source and each.points and each.measured in ("allocated", "reserved", "not stated")
        assert bool(each.not_predicted) != bool(each.recipe)
        if each.recipe is not None:
            assert each.explained_by and all(point.predicted for point in each.points)


def test_lora_and_nf4_stand_within_500_kilobytes() -> None:
    """fms-acceleration without kernels of its own, in bytes: full, LoRA and nf4 of Mistral-7B at two batch sizes."""
    rows = {"Mistral-7B, full", "Mistral-7B, LoRA", "Mistral-7B, nf4"}
    points = [point for each in all_series() if each.name in rows for point in each.points]
    assert len(points) == 6
    for point in points:
        assert point.predicted is not None and abs(point.predicted - point.published) < 500_000, point


def test_reserved_memory_of_pefts_comparison_stands_within_5_percent() -> None:
    points = [point for each in all_series() if "method_comparison" in each.source for point in each.points]
    assert len(points) == 5
    for point in points:
        assert point.difference is not None and abs(point.difference) <= 0.05, point


def test_double_quantisation_saves_what_litgpt_published() -> None:
    """In GB, with two decimals."""
    figures = {each.name: each.points[0] for each in all_series() if "litgpt" in each.name}
    for model in ("Llama2-7B", "Llama2-13B"):
        single, double = (figures[f"{model}, LoRA, {how}, litgpt"] for how in ("nf4", "nf4-dq"))
        assert single.predicted is not None and double.predicted is not None
        saved = single.predicted - double.predicted
        assert abs(saved - (single.published - double.published)) < 0.01


def test_rows_of_many_lengths_reserve_more_than_the_longest() -> None:
    """Yi-6B in ms-swift's benchmark, 43.81 GiB at 8,192 tokens: 25 rows of random lengths, 3,234 tokens in the mean, and the longest."""
    (series,) = (each for each in all_series() if each.name == "Yi-6B, LoRA, ms-swift")
    assert series.recipe is not None and series.points[-1].seq_len == 8192
    lengths = random.Random(0)
    rows = [min(8192, max(64, int(lengths.expovariate(1 / 3234)))) for _ in range(25)]
    rows[20] = 8192
    model, chunks, gpu = series_model("yi-6b"), Chunks(1, 1), card("a100-80gb")
    allocator, first = Allocator(expandable=False, limit=gpu.allocatable_bytes), True
    offset = 0
    for tokens in rows:
        formula = step(model, layout_of(model, series.recipe, chunks, tokens), gpu.gpu.workspaces_bytes)
        events = events_of(formula, chunks).at(step_sizes(series.recipe, tokens, chunks))
        offset += 0 if first else events.total
        for number, size, _stream in [*events.before, *events.first] if first else events.step:
            if size < 0:
                allocator.free(number + offset)
            else:
                assert allocator.allocate(number + offset, size) is None
        first = False
    assert series.points[-1].predicted is not None
    assert allocator.peak_reserved / GIB == pytest.approx(43.0, abs=0.1) and series.points[-1].predicted < 24
