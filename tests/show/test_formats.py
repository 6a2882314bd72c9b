"""Output formats on a report of one's own."""

from __future__ import annotations

import csv
import io
import subprocess
import sys

import pytest

from mstplan.show.formats import FORMATS
from mstplan.show.formats.as_text import NARROWEST
from mstplan.show.report import GAP, Cell, Column, Folded, Line, Notes, Report, Row, Span, Table, line

from ..processes import ROOT

ODD = "a | b_c *d* `e` <f> \\ [g]"
COLUMNS = (
    Column("name", "name"),
    Column("bytes", "GiB", right=True),
    Column("fits", None),
    Column("", "for people only"),
    Column("options", "options", code=True),
)


def row(name: str, size: int, options: str = "") -> Row:
    return Row(
        (Cell(name, name), Cell(size, f"{size / 2**30:.2f}"), Cell(size < 3, "-"), Cell(None, "x"), Cell(None, options))
    )


TABLE = Table(
    "main", COLUMNS, (row(ODD, 2**30, "--a 'b|c' <d"), row("second", 1)), "A title:", most=1, rest=row("1 smaller", 1)
)
REPORT = Report(
    "max-seq",
    {"schema_version": 1, "share": float("inf"), "rows": [1, float("nan")]},
    [
        Line((Span("A model", "strong"), Span("  on a card"))),
        TABLE,
        Folded((line("folded"),)),
        GAP,
        Notes((f"note {ODD}",)),
    ],
    TABLE,
)


def test_text_shows_a_screen() -> None:
    told = FORMATS["text"].render(REPORT)
    assert told.startswith("A model  on a card\n") and "A title:" in told and "1 smaller" in told
    assert "second" not in told and "folded" not in told and ODD in told
    assert max(map(len, told.splitlines())) <= max(80, NARROWEST)


def test_json_is_the_facts_without_what_json_cannot_say() -> None:
    import json

    assert json.loads(FORMATS["json"].render(REPORT)) == {"schema_version": 1, "share": None, "rows": [1, None]}


def test_csv_is_the_main_table_for_programs() -> None:
    told = FORMATS["csv"].render(REPORT)
    first, second = csv.DictReader(io.StringIO(told))
    assert first == {"name": ODD, "bytes": str(2**30), "fits": "false", "options": ""}
    assert second["bytes"] == "1" and second["fits"] == "true" and "\r" not in told


def test_markdown_is_all_of_it_and_no_sign_is_taken_for_markdown() -> None:
    told = FORMATS["markdown"].render(REPORT)
    assert told.startswith("# A model on a card\n\n") and told.endswith("]\n")
    assert "## A title\n\n| name | GiB | for people only | options |\n| --- | ---: | --- | --- |\n" in told
    assert "\n\nfolded\n\n" in told and "| second | 0.00 | x |  |" in told and "smaller" not in told
    escaped = "a \\| b\\_c \\*d\\* \\`e\\` \\<f\\> \\\\ \\[g\\]"
    assert f"| {escaped} | 1.00 | x | `--a 'b\\|c' <d` |" in told and told.endswith(f"- note {escaped}\n")


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_in_one_newline(name: str) -> None:
    told = FORMATS[name].render(REPORT)
    assert told.endswith("\n") and not told.endswith("\n\n") and FORMATS[name].about and FORMATS[name].name == name


@pytest.mark.parametrize(
    ("form", "unwanted"),
    [("text", ("torch", "matplotlib")), ("json", ("torch", "matplotlib", "rich.table"))],
)
def test_nothing_is_imported_that_the_form_does_not_need(form: str, unwanted: tuple[str, ...]) -> None:
    program = (
        "import sys, mstplan.cli as cli\n"
        f"sys.argv = ['mstplan', 'max-seq', '-m', 'gpt2', '--gpu', 'h100', '--format', {form!r}]\n"
        "try: cli.main()\n"
        f"except SystemExit: print([m for m in {unwanted!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr.strip() == "[]" and done.stdout
