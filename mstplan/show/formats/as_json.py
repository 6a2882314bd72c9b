"""JSON: all facts, for programs."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, Any

from .base import Format

if TYPE_CHECKING:
    from ..report import Report


class Json(Format):
    name = "json"
    about = "all facts"
    suffixes = (".json",)

    def render(self, report: Report) -> str:
        return written(dict(report.facts))


def written(document: dict[str, Any]) -> str:
    """A document as JSON. What is infinite or no number has no place in it: null."""
    import json

    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(document), indent=1, allow_nan=False)
    return text + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
