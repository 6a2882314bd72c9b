"""docs/api.md, made from the docstrings and signatures of what is public: `python -m tests.test_api_page --write`."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest

import mstplan

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# The Python interface

Sizes are ints in bytes, lengths ints in tokens. Whatever cannot be used raises a subclass of `mstplan.InputError`.
Made from the docstrings; a test compares.

```python
import mstplan

answer = mstplan.max_seq("llama3.1-8b", "mst", "h100")
print(answer.s_max, answer.plan.instant)
```
"""
KINDS = {"Functions": inspect.isfunction, "Classes": inspect.isclass}


def page() -> str:
    public = {name: getattr(mstplan, name) for name in sorted({*mstplan.__all__, "minisequence"}, key=str.lower)}
    parts = [HEAD]
    for title, belongs in KINDS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name, value) for name, value in public.items() if belongs(value)]
    others = [name for name, value in public.items() if not any(belongs(value) for belongs in KINDS.values())]
    parts.append("## Others\n")
    parts += [_entry(name, public[name]) for name in others]
    return "\n".join(parts)


def _entry(name: str, value: object) -> str:
    if inspect.isclass(value):
        own = value.__doc__ if value.__doc__ and not value.__doc__.startswith(f"{name}(") else None
        if told := _told_of_fields(value):
            listed = "\n\n" + "\n".join(f"- `{field}`: {text}" for field, text in told.items())
        else:
            fields = ", ".join(f"`{field}`" for field in getattr(value, "_fields", ()))
            listed = f"\n\nFields: {fields}." if fields else ""
        return f"### {name}\n\n{inspect.cleandoc(own) if own else ''}{listed}\n".replace("\n\n\n", "\n\n")
    if name == "STRATEGIES":
        return f"### {name}\n\nThe named recipes: {', '.join(f'`{each}`' for each in value)}.\n"  # type: ignore[attr-defined]
    function = value if inspect.isfunction(value) else type(value).__call__
    signature = str(inspect.signature(function)).replace("(self, ", "(").replace("'", "")
    return f"### {name}\n\n```python\n{name}{signature}\n```\n\n{inspect.getdoc(function)}\n"


def _told_of_fields(value: type) -> dict[str, str]:
    """The docstrings below fields, which pydantic would read at every start (20 ms)."""
    if not hasattr(value, "model_fields"):
        return {}
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(found, ast.ClassDef)
    below = ((one.target, text) for one, text in pairwise(found.body) if isinstance(one, ast.AnnAssign))
    return {
        target.id: " ".join(text.value.value.split())
        for target, text in below
        if isinstance(target, ast.Name) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def test_every_field_of_a_recipe_is_described() -> None:
    assert _told_of_fields(mstplan.Recipe).keys() == mstplan.Recipe.model_fields.keys()


def test_the_page_is_that_of_the_docstrings() -> None:
    pytest.importorskip("torch")
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__" and "--write" in sys.argv:
    PAGE.write_text(page(), encoding="utf-8")
