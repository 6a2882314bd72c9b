"""Damage to JSON documents: every kind of wrong value at every place of a document."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

Path = tuple[Any, ...]

VALUES: tuple[Any, ...] = (
    None,
    True,
    "",
    "x",
    "\x1b[31m",
    "9" * 400,
    1.5,
    -1,
    -(10**12),
    10**15,
    10**30,
    float("nan"),
    float("inf"),
    [],
    [[]],
    {},
    {"a": 1},
    [None],
)


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place of a document; of long lists both ends."""
    yield path
    if isinstance(value, dict):
        for key, inside in value.items():
            yield from places(inside, (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, len(value) - 1}) if value else ():
            yield from places(value[index], (*path, index))


def at(document: Any, path: Path) -> Any:
    for step in path:
        document = document[step]
    return document


MISSING = object()


def changed(document: Any, path: Path, value: Any) -> Any:
    """A copy with another value there, or none."""
    if not path:
        return value
    step, *rest = path
    found = copy.copy(document)
    if rest or value is not MISSING:
        found[step] = changed(document[step], tuple(rest), value)
    else:
        del found[step]
    return found


def damages(document: Any, seed: int, per_place: int = 2) -> Iterator[tuple[str, str]]:
    """(what was done, JSON text): some kinds of damage at each place, so that over the places every kind comes often."""
    chance = random.Random(seed)
    for path in places(document):
        here = at(document, path)
        kinds: list[tuple[str, Any]] = [(f"is {str(value)[:12]!r}", value) for value in VALUES if value != here]
        kinds += [("is nested", [here]), *([("is missing", MISSING)] if path else [])]
        if isinstance(here, dict):
            kinds.append(("has more", {**here, "\x1b": 1}))
        if isinstance(here, list) and here:
            kinds += [("is twice as long", here * 2), ("is cut", here[:-1])]
        for what, value in chance.sample(kinds, min(per_place, len(kinds))):
            yield f"{'/'.join(map(str, path)) or 'all'} {what}", json.dumps(changed(document, path, value))


def strict(text: str) -> Any:
    """JSON as the standard has it: no NaN, no Infinity."""
    return json.loads(text, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
