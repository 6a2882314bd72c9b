"""Allocations that a real process made on the CPU, as tests/tracing/two_ranks.py records them."""

from __future__ import annotations

import re
from typing import Any


def without(events: list[list[Any]], made_by: re.Pattern[str]) -> list[list[Any]]:
    """Events (bytes, phase, address, operations) without the tensors that such operations make, in both directions."""
    kept, out = [], set()
    for event in events:
        size, _, address, operations = event
        if size > 0 and made_by.search(" > ".join(operations)):
            out.add(address)
        elif size < 0 and address in out:
            out.remove(address)
        else:
            kept.append(event)
    return kept
