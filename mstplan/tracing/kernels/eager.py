"""transformers' eager attention: torch's own operations, seen one by one."""

from __future__ import annotations

from .base import StandIn


class Eager(StandIn):
    name = "eager"
    implementation = real = "eager"
