"""Finds the S_max that ship in profiles/longest.json: `python -m tests.plan.precompute [--write] [MODEL...]`, some minutes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from mstplan import profiles
from mstplan.plan import allocation, findings, precomputed
from mstplan.spec.catalog import load_model
from mstplan.spec.hardware import Card, card
from mstplan.step.recipe import STRATEGIES, USUAL_STRATEGIES
from mstplan.units import GIB

MODELS = (
    "llama3.1-8b",
    "llama3.2-1b",
    "llama3.2-3b",
    "qwen3-8b",
    "qwen3-4b",
    "qwen3-0.6b",
    "qwen2.5-7b",
    "gemma3-4b",
    "mistral-7b-v0.3",
    "phi4",
)
AMOUNTS = (24, 48, 80)
GPUS = ("rtx-4090", "l40s", "a100-80gb", "h100", "h200")


def cards() -> Iterator[Card]:
    yield from (card(memory=gib * GIB) for gib in AMOUNTS)
    yield from (card(name) for name in GPUS)


def answers_of(name: str, on: Card) -> dict[str, int]:
    """S_max by key, of every strategy on a card, the best of all and the best of the usual ones with either allocator, and of the ways to
    train where none fits; all found anew."""
    answers: dict[str, int] = {}

    simulate = allocation.search.__wrapped__

    def search(*arguments: Any) -> int:
        key = precomputed.key_of(*arguments)
        if key not in answers:
            answers[key] = simulate(*arguments)
        return answers[key]

    with mock.patch.object(precomputed, "find", return_value=None), mock.patch.object(allocation, "search", search):
        for strategies in (STRATEGIES, {each: STRATEGIES[each] for each in USUAL_STRATEGIES}):
            findings.find_longest(load_model(name), on, strategies)
    return answers


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("-")] or list(MODELS)
    answers: dict[str, int] = {}
    for name in names:
        for on in cards():
            answers |= answers_of(name, on)
        print(name, len(answers), flush=True)
    if "--write" in sys.argv:
        path = profiles.ROOT / precomputed.FILE
        rows = dict(sorted(answers.items()))
        provenance = (
            "simulated by formula: mstplan/plan/allocation.py, for the models and GPUs of tests/plan/precompute.py"
        )
        path.write_text(json.dumps({"schema_version": 1, "provenance": provenance, "s_max": rows}, indent=0) + "\n")


if __name__ == "__main__":
    main()
