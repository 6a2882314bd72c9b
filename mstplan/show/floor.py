"""The floor of memory curves: what a step holds however short its sequence, as bands below the curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..plan import solve
from ..step.instants import Instant
from ..step.optimizers import OPTIMIZERS
from ..step.roles import Role, State
from ..step.steps import Entry
from ..units import SHORTEST, format_gib

if TYPE_CHECKING:
    from ..spec.hardware import Card
    from ..spec.model import Model
    from .plot import Curve

LEAST = 0.01
"""The share of the floor below which a band would not be seen: it is left out."""
STATES = "optimizer states"


class Band(NamedTuple):
    name: str
    bytes: int

    @property
    def label(self) -> str:
        return f"{self.name} {format_gib(self.bytes)}"


def bands(curves: Sequence[Curve], model: Model, card: Card) -> list[Band]:
    """What every curve holds at the shortest length drawn, from the bottom up: what stays, gradients, temporaries of the
    optimizer's step. Of what the curves hold differently, the least; the floor lies below all of them."""
    floors = [_floor(curve, model, card) for curve in curves]
    shared = [name for name in floors[0] if all(name in floor for floor in floors)]
    candidates = [Band(name, min(floor[name] for floor in floors)) for name in shared]
    least = LEAST * sum(band.bytes for band in candidates)
    return [band for band in candidates if band.bytes > least]


def _floor(curve: Curve, model: Model, card: Card) -> dict[str, int]:
    """Bytes by band, from the bottom up: of the optimizer's step; without one, of what is alive at every instant."""
    plan = solve.plan_at(model, curve.recipe, card, max(SHORTEST, curve.points[0].seq_len), curve.chunks)
    temporary = f"{OPTIMIZERS[curve.recipe.optimizer].short}'s temporary"
    instants = {peak.name: _bytes_by_band(peak.entries, temporary) for peak in plan.instants()}
    first, *others = instants.values()
    always = {
        band: min(sizes[band] for sizes in instants.values())
        for band in first
        if all(band in sizes for sizes in others)
    }

    def from_the_bottom(band: str) -> tuple[int, int]:
        """What stays, states, what comes and goes (gradients), temporaries; of equals the largest first."""
        return {STATES: 1, temporary: 3}.get(band, 0 if band in always else 2), -sizes[band]

    sizes = instants.get(Instant.OPTIMIZER, always)
    return {band: sizes[band] for band in sorted(sizes, key=from_the_bottom)}


def _bytes_by_band(entries: Iterable[Entry], temporary: str) -> dict[str, int]:
    """Bytes of an instant: of optimizer states in sum, of their temporaries in sum, of others by what they are called."""
    sizes: dict[str, int] = {}
    for entry in entries:
        if entry.role is not Role.CALIBRATION:
            name = STATES if isinstance(entry.role, State) else temporary if entry.role is Role.UPDATE else entry.name
            sizes[name] = sizes.get(name, 0) + entry.bytes
    return sizes


def merged(bands: Sequence[Band], least: float) -> list[Band]:
    """Bands of at least so many bytes: thinner ones are joined to the one below, or at the bottom to the one above."""
    result: list[Band] = []
    for band in bands:
        if result and min(band.bytes, result[-1].bytes) < least:
            below = result[-1]
            result[-1] = Band(f"{below.name}, {band.name}", below.bytes + band.bytes)
        else:
            result.append(band)
    return result
