"""The floor of memory curves: what a step holds however short its sequence, as bands below the curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..plan import solve
from ..step.instants import Instant
from ..step.optimizers import OPTIMIZERS, optimizer_memory
from ..step.steps import CALIBRATED, Entry
from ..step.tape import Weight
from ..units import SHORTEST, format_gib

if TYPE_CHECKING:
    from ..spec.hardware import Card
    from ..spec.model import Model
    from ..step.recipe import Recipe
    from .plot import Curve

LEAST = 0.01
"""The share of the floor below which a band would not be seen: it is left out."""
STATES = "optimizer states"


class Band(NamedTuple):
    name: str
    bytes: int

    @property
    def said(self) -> str:
        return f"{self.name} {format_gib(self.bytes)}"


def bands(curves: Sequence[Curve], model: Model, card: Card) -> list[Band]:
    """What every curve holds at the shortest length drawn, from the bottom up: what stays, gradients, temporaries of the
    optimizer's step. Of what the curves hold differently, the least; the floor lies below all of them."""
    floors = [_floor(curve, model, card) for curve in curves]
    shared = [name for name in floors[0] if all(name in floor for floor in floors)]
    found = [Band(name, min(floor[name] for floor in floors)) for name in shared]
    least = LEAST * sum(band.bytes for band in found)
    return [band for band in found if band.bytes > least]


def _floor(curve: Curve, model: Model, card: Card) -> dict[str, int]:
    """Bytes by band: of the optimizer's step; without one, of what is alive at every instant."""
    plan = solve.plan_at(model, curve.recipe, card, max(SHORTEST, curve.points[0].seq_len), curve.chunks)
    instants = {peak.name: _bytes_by_name(peak.entries) for peak in plan.instants()}
    always = {
        name: min(sizes.get(name, 0) for sizes in instants.values())
        for name in next(iter(instants.values()))
        if all(name in sizes for sizes in instants.values())
    }
    held = instants.get(Instant.OPTIMIZER, always)
    words = _words(curve.recipe)
    ordered = sorted(held, key=lambda name: (_rank(name, words, always), -held[name]))
    found: dict[str, int] = {}
    for name in ordered:
        found[words.get(name, name)] = found.get(words.get(name, name), 0) + held[name]
    return found


def _bytes_by_name(entries: Iterable[Entry]) -> dict[str, int]:
    found: dict[str, int] = {}
    for entry in entries:
        if entry.name != CALIBRATED:
            found[entry.name] = found.get(entry.name, 0) + entry.bytes
    return found


def _words(recipe: Recipe) -> dict[str, str]:
    """What people call the optimizer's own tensors, by the names that they have in the step."""
    memory = optimizer_memory(recipe, [(Weight("of any size", (4096, 4096)), 1)])
    temporary = f"{OPTIMIZERS[recipe.optimizer].short}'s temporary"
    return {name: STATES for name, _, _ in memory.states} | {name: temporary for name, _, _ in memory.temporaries}


def _rank(name: str, words: dict[str, str], always: dict[str, int]) -> int:
    """Place from the bottom: what stays, states, what comes and goes (gradients), temporaries."""
    if name in words:
        return 1 if words[name] == STATES else 3
    return 0 if name in always else 2


def merged(found: Sequence[Band], least: float) -> list[Band]:
    """Bands of at least so many bytes: thinner ones are joined to the one below, or at the bottom to the one above."""
    result: list[Band] = []
    for band in found:
        if result and min(band.bytes, result[-1].bytes) < least:
            below = result[-1]
            result[-1] = Band(f"{below.name}, {band.name}", below.bytes + band.bytes)
        else:
            result.append(band)
    return result
