"""The formula's peaks beside the trace's, for the whole step and instant by instant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..plan.layout import layout_of, step_sizes
from ..plan.solve import fixed_chunks
from ..spec.catalog import load_config
from ..spec.config import read_config
from ..spec.hardware import Card
from ..step.instants import Instant
from ..step.recipe import Recipe
from ..step.steps import step
from ..tracing.tracer import trace

PEAK_BOUNDS = {"dense": 0.02, "experts": 0.05}
"""The largest difference of a step's peak, as a share of the trace's, that a formula may have."""


class PeakPair(NamedTuple):
    """The peak of one instant on both rungs. Bytes."""

    instant: Instant
    formula: int
    trace: int

    @property
    def difference(self) -> float:
        """Difference of the formula, as a share of the trace."""
        return self.formula / self.trace - 1


class Rungs(NamedTuple):
    """One step on both rungs. `peak` is named by the instant that binds in the trace; seq_len in tokens."""

    model: str
    kind: str  # dense | experts
    seq_len: int
    peak: PeakPair
    instants: tuple[PeakPair, ...]  # in the order of a step

    @property
    def worst_instant(self) -> PeakPair:
        return max(self.instants, key=lambda pair: abs(pair.difference))

    @property
    def holds(self) -> bool:
        return abs(self.peak.difference) <= PEAK_BOUNDS[self.kind]


def compare_rungs(
    name: str, recipe: Recipe, seq_len: int, card: Card, config: Mapping[str, object] | None = None
) -> Rungs:
    """A model's step of `recipe`, its chunks given as numbers, at `seq_len` tokens on `card`. The formula's own word:
    calibrations are left aside. config: of a model that does not ship."""
    config = load_config(name) if config is None else config
    model, chunks = read_config(config, name), fixed_chunks(recipe)
    formula_step = step(model, layout_of(model, recipe, chunks, seq_len, card.platform), card.gpu.workspaces_bytes)
    sizes = step_sizes(recipe, seq_len, chunks)
    traced = trace(config, recipe, seq_len, workspace=card.gpu.workspaces_bytes, platform=card.platform)
    by_name = {instant.name: instant.bytes for instant in formula_step.instants(sizes)}
    pairs = tuple(PeakPair(peak.instant, by_name.get(peak.instant, 0), peak.bytes) for peak in traced.peaks)
    peak = PeakPair(traced.peak.instant, formula_step.largest(sizes)[1], traced.peak.bytes)
    return Rungs(name, "experts" if model.experts is not None else "dense", seq_len, peak, pairs)
