"""The public surface: what `mstplan.__all__` lists is there, and importing it loads nothing heavy."""

from __future__ import annotations

import doctest
import subprocess
import sys

import pytest

import mstplan


def test_every_listed_name_is_there() -> None:
    for name in mstplan.__all__:
        assert getattr(mstplan, name) is not None
    assert set(mstplan.__all__) <= set(dir(mstplan))


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
