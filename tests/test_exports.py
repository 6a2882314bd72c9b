"""The public surface: one list, the same for Python, for type checkers and in docs/api.md; importing it loads nothing heavy."""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mstplan


def test_every_listed_name_is_there() -> None:
    for name in mstplan.__all__:
        assert getattr(mstplan, name) is not None
    assert set(mstplan.__all__) <= set(dir(mstplan))


def test_the_list_is_what_type_checkers_see() -> None:
    """Both ways: no name is only listed, none only imported."""
    tree = ast.parse(Path(mstplan.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {(node.module, name.name) for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert seen == {(module, name) for module, names in mstplan.PUBLIC.items() for name in names}


def test_every_name_is_where_it_is_said_to_live() -> None:
    pytest.importorskip("torch")
    for module, names in mstplan.PUBLIC.items():
        for name in names:
            assert getattr(mstplan, name) is getattr(import_module(f"mstplan.{module}"), name)
    public = {name for names in mstplan.PUBLIC.values() for name in names}
    assert set(mstplan.__all__) == public - set(mstplan.PUBLIC[mstplan.NEEDS_TORCH])


def test_the_interface_offers_nothing_that_is_not_listed() -> None:
    """What mstplan/api.py defines without an underscore is public."""
    tree = ast.parse(Path(mstplan.__file__).with_name("api.py").read_text(encoding="utf-8"))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")}
    assert defined == set(mstplan.PUBLIC["api"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        mstplan.frobnicate  # noqa: B018


def test_the_docstring_example_is_true() -> None:
    assert doctest.testmod(mstplan).failed == 0


def test_import_alone_loads_nothing() -> None:
    code = "import sys, mstplan; print([m for m in ('torch', 'transformers', 'matplotlib', 'pydantic', 'rich') if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
