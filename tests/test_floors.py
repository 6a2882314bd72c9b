"""Who may import whom: the folders are floors, and arrows go down. Torch and matplotlib are met on the floors that need them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mstplan"
FLOORS = (
    {"errors", "words", "units", "files", "profiles", "kept", "showing"},  # of no floor: what everybody may use
    {"spec"},
    {"step"},
    {"plan"},
    {"train"},
    {"tracing"},
    {"measuring"},
    {"checking"},
    {"api"},
    {"show"},
    {"cli"},
)
"""From the ground up; a floor may import itself and those below. `show` draws the answers of all floors below it."""
WITH_TORCH = ("train", "tracing", "measuring", "checking")
IN_FUNCTIONS = ("step.optimizers.", "step.losses.")
"""Where torch may be imported beside the rooms of WITH_TORCH, when a function is called that no planner calls."""


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below mstplan."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imported(name: str, tree: ast.Module, is_package: bool) -> Iterator[tuple[str, bool]]:
    """(dotted name from mstplan on, or a library's; at the module's top?) of all that a module imports, types left out."""
    typing = {node for block in ast.walk(tree) if _is_for_types(block) for node in ast.walk(block)}
    top = set(tree.body)
    here = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(tree):
        if node in typing:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else []
            whole = ".".join([*(["mstplan"] if node.level else []), *base, *([node.module] if node.module else [])])
            yield whole, node in top
            yield from ((f"{whole}.{alias.name}", node in top) for alias in node.names)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def floor(module: str) -> int | None:
    first = module.removeprefix("mstplan.").split(".")[0]
    return next((n for n, rooms in enumerate(FLOORS) if first in rooms), None)


MODULES = modules()


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("", "__main__")])
def test_arrows_go_down(name):
    mine = floor(name)
    assert mine is not None, f"{name} is on no floor"
    is_package = (PACKAGE / name.replace(".", "/")).is_dir()
    for other, _ in imported(name, MODULES[name], is_package):
        if other.startswith("mstplan.") and (theirs := floor(other)) is not None:
            assert theirs <= mine, f"{name} imports {other}, which is above it"


@pytest.mark.parametrize("name", list(MODULES))
def test_heavy_libraries_are_met_where_they_are_used(name):
    is_package = not name or (PACKAGE / name.replace(".", "/")).is_dir()
    room = name.split(".")[0]
    for other, at_top in imported(name, MODULES[name], is_package):
        library = other.split(".")[0]
        if library in ("torch", "transformers"):
            assert room in WITH_TORCH or (name.startswith(IN_FUNCTIONS) and not at_top), (name, other)
        if library == "matplotlib":
            assert room == "show", (name, other)
        assert library != "unittest", (name, other)


def test_the_rule_notices_an_arrow_up():
    tree = ast.parse("from ..show import tables")
    found = {other for other, _ in imported("plan.solve", tree, is_package=False)}
    assert "mstplan.show.tables" in found and floor("mstplan.show.tables") > floor("plan.solve")
