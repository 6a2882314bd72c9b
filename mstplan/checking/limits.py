"""Predicted limits put to the test: steps a little below and above S_max, the true S_max, and what chunks cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import MeasurementError, RecipeError
from ..measuring.measurement import OK, OUT_OF_MEMORY, Case, Measurement
from ..measuring.processes import Processes
from ..measuring.sweep import load_subject, measure_all
from ..plan import layout, solve
from ..plan.layout import chunk_tokens
from ..showing import Showing, show_nothing
from ..spec.config import read_config
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks
from ..tracing import cache, search
from ..tracing.trace import Trace
from ..units import LONGEST, SHORTEST, format_gib, trainable_tokens

SHARE_BELOW, SHARE_ABOVE = 0.98, 1.03
"""Shares of S_max at which a step must run, and must not."""
PRECISION = 0.005
"""The true S_max is found to this share."""
MAX_POINTS = 16

Measure = Callable[[int], Measurement]
Tell = Callable[[Measurement], object]


@dataclass(frozen=True)
class Bench:
    """Place and subject of measurements. Every point is appended to the results file `out`, and one that is there already is not made once
    more but with `again`. limit: bytes of the card that may be used; timeout: seconds for a point."""

    spec: str
    environment: Mapping[str, Any]
    card: Card
    device: str
    limit: int | None
    layers: int | None
    steps: int
    timeout: float | None
    out: Path
    again: bool = False
    showing: Showing = show_nothing
    assume: str | None = None
    processes: Processes | None = None

    @cached_property
    def subject(self) -> tuple[str, dict[str, Any]]:
        return load_subject(self.spec, self.layers, self.assume)

    @cached_property
    def model(self) -> Model:
        name, config = self.subject
        return read_config(config, name, self.assume)

    def measure(self, strategy: str, recipe: Recipe, seq_len: int, chunks: Chunks, tell: Tell) -> Measurement:
        name, config = self.subject
        fixed = chunks.put_into(recipe)
        case = Case(
            name,
            strategy,
            config,
            fixed,
            recipe.padded(seq_len),
            self.layers,
            self.device,
            self.limit,
            self.steps,
            self.assume,
        )
        return measure_all(
            [case],
            self.environment,
            self.out,
            self.timeout,
            self.again,
            tell=tell,
            showing=self.showing,
            processes=self.processes,
        ).measurements[0]

    def trace_at(self, recipe: Recipe, seq_len: int, card: Card) -> Trace:
        workspace = card.gpu.workspaces_bytes if self.device == "cuda" else 0
        return cache.trace_of(
            self.subject[1],
            recipe,
            seq_len,
            on=self.device,
            workspace=workspace,
            platform=card.platform,
            threads=self.environment.get("threads"),
        )

    def predict(self, strategy: str, recipe: Recipe) -> Prediction:
        """Predicted S_max by trace. Raises MeasurementError when not even `SHORTEST` tokens fit."""
        prediction = self._search(strategy, recipe)
        if not prediction.s_max:
            raise MeasurementError(
                f"{self.model.name}, {strategy}: not even {SHORTEST} tokens are predicted to fit in {format_gib(self.card.total_bytes)}.\n"
                "Give more memory (--gpu-mem), or measure a slice of it (--layers)."
            )
        return prediction

    def _search(self, strategy: str, recipe: Recipe) -> Prediction:
        if self.device == "cuda":
            searched = search.find_longest(self.model, recipe, self.card, self.trace_at, strategy)
            return Prediction(searched.answer.s_max, searched.formula, searched.answer.plan.chunks)
        answer = solve.max_seq(self.model, recipe, self.card, strategy)
        chunks = answer.plan.chunks

        def trace_at(seq_len: int) -> Trace:
            capped = layout.cap_chunks(chunks, seq_len)
            return self.trace_at(capped.put_into(recipe), seq_len, self.card)

        return Prediction(longest_on_cpu(self.card.total_bytes, trace_at, max(2, answer.s_max)), None, chunks)


class Prediction(NamedTuple):
    """S_max by trace and by formula, in tokens, and the chunks to run it with. The formula has none for a CPU: it counts on a CUDA context."""

    s_max: int
    formula: int | None
    chunks: Chunks


# ---- S_max --------------------------------------------------------------------------------------------------------------


def check_all_limits(
    bench: Bench, recipes: Mapping[str, Recipe], begins: Callable[[], object], tell: Tell
) -> list[tuple[Limit, Prediction]]:
    """Try each strategy's S_max by trace from below and above, and find the true one. Raises MeasurementError, before anything is
    measured (which `begins` tells), where not even `SHORTEST` tokens are predicted to fit."""
    predictions = {strategy: bench.predict(strategy, recipe) for strategy, recipe in recipes.items()}
    begins()
    checked = []
    for strategy, prediction in predictions.items():

        def measure(seq_len: int) -> Measurement:
            chunks = layout.cap_chunks(prediction.chunks, seq_len)  # noqa: B023  used within this turn only
            return bench.measure(strategy, recipes[strategy], seq_len, chunks, tell)  # noqa: B023

        checked.append((check_limit(strategy, "trace", prediction.s_max, measure), prediction))
    return checked


class Limit(NamedTuple):
    """S_max as predicted and as found, in tokens; longest_run, shortest_failure: the longest length that ran, the shortest that did not."""

    strategy: str
    rung: str
    predicted: int
    longest_run: int
    shortest_failure: int | None
    points: tuple[Measurement, ...]

    def outcome_at(self, share: float) -> str:
        return next(
            (m.outcome for m in self.points if m.case.seq_len == length_at(self.predicted, share)), "not measured"
        )

    @property
    def holds(self) -> bool:
        return self.outcome_at(SHARE_BELOW) == OK and self.outcome_at(SHARE_ABOVE) == OUT_OF_MEMORY

    @property
    def error(self) -> float:
        """Signed, of the predicted length as a share of the longest that ran."""
        return self.predicted / self.longest_run - 1 if self.longest_run else float("inf")


def length_at(s_max: int, share: float) -> int:
    """The length to try: rounded away from S_max."""
    return max(SHORTEST, int(s_max * share)) if share < 1 else max(s_max + 1, -int(-s_max * share // 1))


def check_limit(strategy: str, rung: str, predicted: int, measure: Measure) -> Limit:
    """Measure below and above the predicted S_max, then close in on the true one. Raises MeasurementError for a step that neither
    runs nor runs out of memory."""
    points: list[Measurement] = []
    longest_run, shortest_failure = 0, LONGEST

    def try_length(seq_len: int) -> bool:
        nonlocal longest_run, shortest_failure
        points.append(measure(seq_len))
        if points[-1].outcome not in (OK, OUT_OF_MEMORY):
            raise MeasurementError(f"{points[-1].case.words}: {points[-1].outcome}: {points[-1].reason}")
        ran = points[-1].outcome == OK
        longest_run, shortest_failure = (
            (max(longest_run, seq_len), shortest_failure) if ran else (longest_run, min(shortest_failure, seq_len))
        )
        return ran

    try_length(length_at(predicted, SHARE_BELOW))
    try_length(length_at(predicted, SHARE_ABOVE))
    distance = max(1, predicted // 16)  # further and further away, until one runs and one does not
    while len(points) < MAX_POINTS and shortest_failure - max(longest_run, SHORTEST - 1) > max(
        1, int(longest_run * PRECISION)
    ):
        if longest_run and shortest_failure < LONGEST:
            try_length((longest_run + shortest_failure) // 2)
        else:
            try_length(longest_run + distance if longest_run else max(SHORTEST, shortest_failure - distance))
            distance *= 2
    return Limit(
        strategy, rung, predicted, longest_run, shortest_failure if shortest_failure < LONGEST else None, tuple(points)
    )


def longest_on_cpu(limit: int, trace_at: Callable[[int], Trace], start: int = 1024) -> int:
    """The longest sequence whose traced peak on a CPU is at most `limit` bytes; 0 when that of `SHORTEST` tokens is more."""
    low, high = SHORTEST - 1, LONGEST  # the longest known to fit, the shortest known not to
    seq_len, previous = max(SHORTEST, start), (SHORTEST, trace_at(SHORTEST).peak.bytes)
    while high - low > 1:
        peak = trace_at(seq_len).peak.bytes
        low, high = (seq_len, high) if peak <= limit else (low, seq_len)
        slope = (peak - previous[1]) / (seq_len - previous[0]) if seq_len != previous[0] else 0.0
        previous = (seq_len, peak)
        # As if peaks lay on a line; where that leads nowhere new, half the way.
        guess = seq_len + int((limit - peak) / slope) if slope > 0 else 0
        seq_len = (
            guess
            if low < guess < high
            else min(low + 1, high - 1)
            if guess == low
            else (low + high) // 2
            if high < LONGEST
            else 2 * seq_len
        )
    return trainable_tokens(low)


# ---- what chunks cost ---------------------------------------------------------------------------------------------------


class Throughput(NamedTuple):
    """A number of chunks and what came of it; share: of the tokens per second in one chunk."""

    chunks: Chunks
    tokens: tuple[int, int]  # in a chunk of MLP and of loss
    measurement: Measurement
    share: float | None
    recommended: bool


MAX_LOST_SHARE = 0.03
"""What the recommended number of chunks may cost of the throughput in one chunk."""


def chunk_counts(recommended: Chunks) -> list[Chunks]:
    """One chunk; half, all and twice the recommended number."""
    m, k, groups = recommended
    counts = [Chunks(max(1, m * n // 2), max(1, k * n // 2), groups) for n in (1, 2, 4)]
    return list(dict.fromkeys([Chunks(1, 1, groups), *counts]))


def measure_all_throughputs(
    bench: Bench, recipes: Mapping[str, Recipe], seq_len: int, begins: Callable[[], object], tell: Tell
) -> dict[str, list[Throughput]]:
    """Measure tokens per second of each strategy in chunks, over numbers of them around the recommended one. Raises RecipeError when
    none does."""
    recipes = {strategy: recipe for strategy, recipe in recipes.items() if recipe.loss_in_chunks}
    if not recipes:
        raise RecipeError(
            "none of these recipes runs in chunks, so that there is nothing to compare.\nTake -s mst, mst-offload or --loss chunked."
        )
    begins()

    def measure_rows(strategy: str, recipe: Recipe) -> list[Throughput]:
        return measure_throughput(
            bench.model,
            recipe,
            bench.card,
            seq_len,
            lambda chunks: bench.measure(strategy, recipe, seq_len, chunks, tell),
        )

    return {strategy: measure_rows(strategy, recipe) for strategy, recipe in recipes.items()}


def measure_throughput(
    model: Model, recipe: Recipe, card: Card, seq_len: int, measure: Callable[[Chunks], Measurement]
) -> list[Throughput]:
    """The step's time over numbers of chunks. In one chunk the loss still is that of chunks: only their number differs."""
    recommended = solve.plan_at(model, recipe, card, seq_len).chunks
    counts = dict.fromkeys(layout.cap_chunks(chunks, seq_len) for chunks in chunk_counts(recommended))
    measurements = {chunks: measure(chunks) for chunks in counts}
    unchunked = measurements[Chunks(1, 1, recommended.groups)]
    return [
        Throughput(
            chunks,
            (chunk_tokens(seq_len, chunks.mlp), chunk_tokens(seq_len, chunks.loss)),
            m,
            _share_of_speed(m, unchunked),
            chunks == recommended,
        )
        for chunks, m in measurements.items()
    ]


def _share_of_speed(m: Measurement, unchunked: Measurement) -> float | None:
    if m.outcome != OK or unchunked.outcome != OK or not m.tokens_per_second or not unchunked.tokens_per_second:
        return None
    return m.tokens_per_second / unchunked.tokens_per_second


def throughput_holds(rows: Iterable[Throughput]) -> bool:
    """Whether the recommended number costs no more than it may."""
    return all(row.share is not None and row.share >= 1 - MAX_LOST_SHARE for row in rows if row.recommended)
