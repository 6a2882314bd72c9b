"""Enumerations whose values are the words that people read."""

from __future__ import annotations

from enum import Enum


class Word(str, Enum):
    """A member equals its value, is written as it, and stands in JSON and in messages as it."""

    def __str__(self) -> str:
        return str(self.value)

    def __repr__(self) -> str:
        return repr(self.value)
