"""Suites: sets of points to measure, in a JSON file. No torch.

    {"cases": [{"model": "llama3.1-8b", "seq_len": ["8k", "16k"], "strategy": ["mst"], "layers": 4, "recipe": {"batch": 2}}]}

`strategy` (all of them), `layers` (all of them), `recipe` (what differs from the strategy), `allocator` (expandable or default; as the
environment says) and `trainer` (transformers; mstplan's own training loop) may be left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from .. import files, profiles
from ..errors import MeasurementError, MstplanError, did_you_mean, one_line, quoted
from ..spec.hardware import Card
from ..step.recipe import STRATEGIES, strategy, strategy_name
from ..units import parse_length
from . import sweep
from .measurement import Case

_LARGEST_FILE = 1_000_000  # bytes
_WAY_OUT = 'Write {"cases": [{"model": "llama3.1-8b", "seq_len": ["8k", "16k"], "strategy": ["mst"], "layers": 4}]}.'

_Text = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
_Texts = Annotated[
    list[_Text], BeforeValidator(lambda value: value if isinstance(value, list) else [value]), Field(min_length=1)
]


class _SuiteRow(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    seq_len: _Texts
    strategy: _Texts = list(STRATEGIES)
    layers: Annotated[int, Field(ge=1)] | None = None
    recipe: dict[str, Any] = {}
    allocator: Literal["expandable", "default"] | None = None
    trainer: Literal["transformers"] | None = None


class _Suite(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    about: str = ""
    cases: list[_SuiteRow]


def read_cases(
    path: str | os.PathLike[str],
    card: Card,
    device: str = "cuda",
    limit: int | None = None,
    steps: int = 3,
    leave_out: Callable[[str], object] = lambda _words: None,
) -> list[Case]:
    """Cases of a suite: of a file, or of one that ships. Those that ship are for any GPU: `leave_out` is told of models too large for
    this one. Raises MeasurementError, which names the file and the case."""
    points: list[Case] = []
    suite, ships = _read_suite(path)
    for number, row in enumerate(suite.cases, 1):
        with _naming(path, number), _leaving_out(leave_out if ships else None):
            recipes = {strategy_name(name): strategy(name).changed(**row.recipe) for name in row.strategy}
            lengths = [parse_length(text) for text in row.seq_len]
            allocator = row.allocator if device == "cuda" else None  # a CPU has none of the kind
            cases = sweep.plan_cases(
                row.model,
                lengths,
                recipes,
                card,
                row.layers,
                device,
                limit,
                steps,
                allocator=allocator,
                trainer=row.trainer,
            )
            points += [case for case in cases if case not in points]
    if not points:
        raise MeasurementError(f"{quoted(path)} has no point to measure.\n{_WAY_OUT}")
    return points


def shipped_suites() -> list[str]:
    """Names of the suites that ship with mstplan."""
    return sorted(path.stem for path in (profiles.ROOT / "suites").glob("*.json"))


def _read_suite(path: str | os.PathLike[str]) -> tuple[_Suite, bool]:
    """The suite, and whether it is one that ships."""
    names, name = shipped_suites(), str(path)
    ships = not os.path.exists(path)  # whatever it is: False for what can be no path
    if ships:
        if name not in names:
            raise MeasurementError(
                f"there is no file {quoted(path)}.\nGive the path of a suite in JSON, or the name of one that ships: {', '.join(names)}."
            )
        path = profiles.ROOT / "suites" / f"{name}.json"
    text = files.read_text(path, "a suite in JSON", _LARGEST_FILE, MeasurementError)
    if (key := files.repeated_key(text)) is not None:
        raise MeasurementError(f"{quoted(path)}: {quoted(key)} is given twice.\nLeave one of the two out.")
    try:
        return _Suite.model_validate_json(text), ships
    except ValidationError as e:
        raise MeasurementError(f"{quoted(path)}{_describe_problem(e)}\n{_WAY_OUT}") from None


def _describe_problem(error: ValidationError) -> str:
    """Place of the first thing that pydantic found wrong, and what it is."""
    problem = error.errors(include_url=False)[0]
    where = list(problem["loc"])
    if problem["type"] == "json_invalid":
        return f" is not valid JSON{problem['msg'].removeprefix('Invalid JSON')}."
    case = f", case {int(where[1]) + 1}" if len(where) > 1 else ""
    field = str(where[2] if len(where) > 2 else where[0] if len(where) == 1 else "")
    if problem["type"] == "extra_forbidden":
        return f"{case}: there is no {quoted(field)} in a suite.{did_you_mean(field, _SuiteRow.model_fields if case else _Suite.model_fields)}"
    if problem["type"] in ("missing", "too_short"):
        return f"{case}: {quoted(field)} is {problem['type'].replace('too_short', 'empty')}."
    return f"{case}: {field + ' ' if field else ''}{problem['msg'].replace('Input should', 'must')} (got {quoted(problem['input'])})."


@contextmanager
def _leaving_out(leave_out: Callable[[str], object] | None) -> Iterator[None]:
    """Leave a case out whose model is too large, and say so."""
    try:
        yield
    except sweep.TooLargeError as e:
        if leave_out is None:
            raise
        leave_out(f"left out: {one_line(str(e).splitlines()[0], 200)}")


@contextmanager
def _naming(path: str | os.PathLike[str], number: int) -> Iterator[None]:
    """Let errors inside name that case of the suite."""
    try:
        yield
    except MstplanError as e:
        raise MeasurementError(f"{quoted(path)}, case {number}: {e}") from None
