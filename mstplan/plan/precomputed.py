"""S_max that were found before, for shipped models on common GPUs: they ship, since to simulate the allocator takes longer than to start Python.

Each is kept by everything that decides it; where one is missing it is found anew. `python -m tests.plan.precompute --write` finds those that ship.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

from .. import profiles
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.recipe import Recipe
from ..step.steps import Chunks
from .calibration import fingerprint

FILE = "longest.json"


def key_of(model: Model, recipe: Recipe, card: Card, chunks: Chunks, fitting: int) -> str:
    """Digest of what decides S_max. fitting: the longest whose tensors fit, which changes with what the step model counts."""
    fields = sorted((name, str(value)) for name, value in recipe.unusual_fields())
    memory = card.allocatable_bytes, card.gpu.workspaces_bytes, card.allocator, card.platform
    facts = repr((fingerprint(model), fields, memory, tuple(chunks), fitting))
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def find(key: str) -> int | None:
    """The S_max kept under a key, in tokens."""
    return _read().get(key)


@cache
def _read() -> dict[str, int]:
    path = profiles.ROOT / FILE
    if not path.exists():
        return {}
    answers: dict[str, int] = json.loads(path.read_text(encoding="utf-8"))["s_max"]
    return answers
