"""What varies has one place: an output format that only this file knows works in every command, and every format tells what the others do."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from mstplan.measuring.measurement import OK, OUT_OF_MEMORY, Case, Measurement
from mstplan.show.formats import FORMATS
from mstplan.show.formats.base import Format
from mstplan.show.report import Notes, Report, Table

from ..measuring.measured import measure_by, measured
from ..tracing.tiny import TINY
from .conftest import Run, Said


class Shout(Format):
    """The command's name and the main table's first column, in capitals."""

    name = "shout"
    about = "the tests' own"
    suffixes = (".loud",)

    def render(self, report: Report) -> str:
        first = [row.cells[0].text or str(row.cells[0].value) for row in report.main.rows]
        return "\n".join([report.command, *dict.fromkeys(first)]).upper() + "\n"


@pytest.fixture
def shout(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(FORMATS, "shout", Shout())
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))


ON = ("--gpu", "rtx-4090", "-s", "checkpoint")
COMMANDS = {
    "max-seq": ("max-seq", "-m", "tiny.json", *ON),
    "plan": ("plan", "-m", "tiny.json", "--seq-len", "1k", *ON),
    "trace": ("trace", "-m", "tiny.json", "--seq-len", "512", "--no-cache", *ON),
    "plot": ("plot", "-m", "tiny.json", "-o", "memory.csv", "--force", "--points", "3", *ON),
    "theorem": ("theorem", "-m", "tiny.json", "--gpu", "rtx-4090", "--seq-len", "1k"),
    "shapes": ("shapes", "-m", "tiny.json", "--seq-len", "1k"),
    "models": ("models", "gpt2"),
    "gpus": ("gpus", "--sources"),
    "published": ("published",),
    "validate": ("validate", "--rung", "formula"),
    "calibrate": ("calibrate", "--from", "trace", "-m", "tiny.json", "-s", "checkpoint", "-o", "here", "--no-cache"),
}
MEASURED = ("-m", "tiny.json", "--device", "cpu", "-o", "r.jsonl", "--seq-len")
TELLING = {
    "measure": ("measure", *MEASURED, "64,96", "-s", "checkpoint"),
    "check-throughput": ("check-throughput", *MEASURED, "64"),
    "check-smax": ("check-smax", *MEASURED[:-1], "--gpu-mem", "60MiB", "-s", "checkpoint"),
}
"""What tells of each point as it comes, on stderr."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_format_from_outside_works_in_every_command(run: Run, shout: None, command: str) -> None:
    said = run(*COMMANDS[command], "--format", "shout")
    assert (said.code, said.err) == (0, "") and said.out == said.out.upper()
    assert said.out.startswith(command.upper() + "\n") and len(said.out.splitlines()) > 1


@pytest.fixture
def card_of_512_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures at once; up to 512 tokens run, and so many are predicted."""
    from mstplan.checking import limits
    from mstplan.step.steps import Chunks

    def run_here(case: Case, _known: Mapping[str, Any]) -> Measurement:
        return measured(case, {"loss": 2**30 + case.seq_len}, OK if case.seq_len <= 512 else OUT_OF_MEMORY)

    measure_by(monkeypatch, run_here)
    monkeypatch.setattr(limits.Bench, "predict", lambda *_: limits.Prediction(512, 500, Chunks(1, 1)))


@pytest.mark.parametrize("command", TELLING)
def test_every_form_of_what_is_measured(run: Run, shout: None, card_of_512_tokens: None, command: str) -> None:
    """The answer alone is on stdout: whatever is measured meanwhile is told on stderr."""
    asked = TELLING[command]
    said = run(*asked, "--format", "shout")
    assert (said.code, said.out) == (0, said.out.upper()) and said.out.startswith(command.upper() + "\n")
    assert said.err.startswith("measuring: real steps on cpu")
    told, rows = run(*asked, "--json").json, rows_of(run(*asked, "--format", "csv"))
    assert told["command"] == command and told["file"] == "r.jsonl" and len(rows) == len(told["results"])
    page = run(*asked, "--format", "markdown").out
    assert page.startswith("# ") and all(len(table) == len(rows) + 2 for table in tables(page))
    text = run(*asked)
    assert all(len(line) <= 80 or " " in line for line in text.out.splitlines()) and text.code == 0
    if command == "measure":
        assert [row["seq_len"] for row in rows] == ["64", "96"] and rows[0]["allocated_bytes"] == str(2**30 + 64)
        assert told["measured_before"] == 2 and "2 of 2 had been measured before" in text.out
    if command == "check-smax":
        assert rows[0]["predicted"] == "512" and rows[0]["holds"] == "true"


WHY = " ".join(["why"] * 30)


def test_points_that_fail_are_told_whole(run: Run, shout: None, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_by(monkeypatch, lambda case, known: Measurement(case, dict(known), "failed", WHY))
    said = run(*TELLING["measure"], "-s", "checkpoint")
    assert said.code == 1 and f"tiny, checkpoint, 64 tokens: failed: {WHY}\n" in said.out
    assert rows_of(run(*TELLING["measure"], "--format", "csv"))[0]["outcome"] == "failed"


def test_choices_help_and_refusals_are_read_from_the_registry(run: Run, shout: None, tmp_path) -> None:
    shown = " ".join(run("max-seq", "--help").out.replace("│", " ").split())
    assert "shout (the tests' own)" in shown and all(
        f"{each.name} ({each.about})" in shown for each in FORMATS.values()
    )
    for command in ("max-seq", "plan", "trace", "plot"):
        said = run(*COMMANDS[command], "--format", "shuot")
        assert said.code == 2 and not said.out
        assert "unknown format 'shuot'. Did you mean shout?" in said.err and ", ".join(FORMATS) in said.err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.json"}


def test_a_format_that_makes_no_picture_is_refused_by_name(run: Run, shout: None, tmp_path) -> None:
    for asked in (
        ("plot", "-m", "tiny.json", "-o", "memory.loud", *ON),
        ("trace", "-m", "tiny.json", "--seq-len", "512", "--plot", "memory.loud", *ON),
    ):
        said = run(*asked)
        assert said.code == 2 and not said.out and "shout makes no picture" in said.err
        assert ".png, .svg, .pdf" in said.err
    assert "markdown makes no picture" in run("plot", "-m", "tiny.json", "-o", "memory.md", *ON).err
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.json"}


def test_once_it_is_gone_it_is_unknown(run: Run) -> None:
    said = run("models", "--format", "shout")
    assert said.code == 2 and "unknown format 'shout'" in said.err and not said.out


# ---- --json, --markdown and --format ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["max-seq", "gpus"])
def test_json_is_short_for_format_json(run: Run, shout: None, command: str) -> None:
    long = run(*COMMANDS[command], "--format", "json")
    assert (
        long.json
        == run(*COMMANDS[command], "--json").json
        == run(*COMMANDS[command], "--json", "--format", "json").json
    )


@pytest.mark.parametrize(
    "asked",
    [
        ("gpus", "--json", "--format", "csv"),
        ("gpus", "--json", "--format", "text"),
        ("validate", "--json", "--format", "markdown"),
        ("validate", "--markdown", "--format", "json"),
    ],
)
def test_two_forms_at_once_are_refused(run: Run, asked: tuple[str, ...]) -> None:
    said = run(*asked)
    assert said.code == 2 and not said.out and "exclude each other" in said.err and len(said.err.splitlines()) == 2


@pytest.mark.parametrize("asked", [("published",), ("validate", "--rung", "formula")])
def test_markdown_and_json_are_short_for_formats(run: Run, asked: tuple[str, ...]) -> None:
    assert run(*asked, "--format", "markdown").out == run(*asked, "--markdown").out
    assert run(*asked, "--format", "json").json == run(*asked, "--json").json
    assert len(rows_of(run(*asked, "--format", "csv"))) == len(run(*asked, "--json").json[ROWS[asked[0]]])


ROWS = {"published": "published", "validate": "rows"}


# ---- all forms tell the same --------------------------------------------------------------------------------------------

REAL = {
    "max-seq": ("max-seq", "-m", "llama3.1-8b", "--gpu", "h100"),
    "nothing fits": ("max-seq", "-m", "llama3.1-70b", "--gpu", "rtx-4090"),
    "plan": ("plan", "-m", "llama3.1-8b", "--gpu", "h100", "--seq-len", "64k"),
    "too long": ("plan", "-m", "llama3.1-8b", "--gpu", "h100", "--seq-len", "64k", "-s", "checkpoint"),
    "far too long": ("plan", "-m", "gemma2-9b", "--gpu", "h100", "--seq-len", "4M"),
}


@pytest.mark.parametrize("case", REAL)
def test_everything_that_text_says_stands_in_json(run: Run, case: str) -> None:
    """Notes, advice, how far the recipe reaches, the smallest card, and what the answer stands on."""
    told, text = run(*REAL[case], "--json").json, " ".join(run(*REAL[case]).out.split())
    assert told["provenance"] in text and told["notes"]
    for note in told["notes"]:
        assert " ".join(note.split()) in text, note
    for line in told.get("advice", []):
        assert " ".join(line.split()) in text, line
    if told["smallest_card"] is not None and not told["ways_to_fit"]:
        assert f": {told['smallest_card']['gpu']}" in text
    if case in ("too long", "far too long"):
        reach = f"reaches {told['s_max']:,} tokens" if told["s_max"] else "fits no length"
        assert any(reach in line for line in told["advice"])
    else:
        assert not told.get("advice")


def test_no_time_of_a_step_that_does_not_fit(run: Run) -> None:
    told = run(*REAL["nothing fits"], "--json").json
    assert all(result["s_max"] == 0 and result["step_seconds"] is None for result in told["results"])
    assert {row["step_seconds"] for row in rows_of(run(*REAL["nothing fits"], "--format", "csv"))} == {""}


def rows_of(said: Said) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(said.out)))


def test_csv_has_the_numbers_of_json(run: Run) -> None:
    told, rows = run(*REAL["max-seq"], "--json").json, rows_of(run(*REAL["max-seq"], "--format", "csv"))
    for result, row in zip(told["results"], rows, strict=True):
        for name in ("strategy", "s_max", "peak_bytes", "host_bytes", "instant", "mlp_chunks", "loss_chunks"):
            assert row[name] == str(result[name])
        assert float(row["step_seconds"]) == result["step_seconds"]
    for asked in (REAL["plan"], REAL["too long"]):
        told, rows = run(*asked, "--json").json, rows_of(run(*asked, "--format", "csv"))
        for strategy, row in zip(told["strategies"], rows, strict=True):
            assert row["fits"] == str(strategy["fits"]).lower()
            for name in ("strategy", "s_max", "seq_len", "peak_bytes", "budget_bytes"):
                assert row[name] == str(strategy[name])


def test_csv_of_plot_is_the_file_that_plot_writes(run: Run, tmp_path, shout: None) -> None:
    said = run(*COMMANDS["plot"], "--format", "csv")
    assert (tmp_path / "memory.csv").read_bytes().decode().replace("\r\n", "\n") == said.out


@pytest.mark.parametrize("case", REAL)
def test_markdown_is_a_page_with_every_table_and_note(run: Run, case: str) -> None:
    told, page = run(*REAL[case], "--json").json, run(*REAL[case], "--format", "markdown").out
    assert page.startswith(f"# {told['model']['name']} ") and page.endswith("\n") and "\n\n\n" not in page
    plain = page.replace("\\", "")
    for note in told["notes"]:
        assert f"\n- {note}\n" in plain, note
    for table in tables(page):
        widths = {line.replace("\\|", "").count("|") for line in table}
        assert len(widths) == 1 and len(table) > 2 and set(table[1]) <= set("|-: ")
    for way in told["ways_to_fit"]:
        assert f"`{way['options']}`" in page
    entries = told["binding"] if "binding" in told and told["results"][0]["s_max"] else []
    assert all(f"| {entry['name']} |" in plain for entry in entries)


def tables(page: str) -> Iterator[list[str]]:
    for paragraph in page.split("\n\n"):
        lines = paragraph.splitlines()
        if lines[0].startswith("|"):
            yield lines


def test_a_report_is_plain_data_and_says_where_its_main_table_is(
    monkeypatch: pytest.MonkeyPatch, run: Run, shout: None, card_of_512_tokens: None
) -> None:
    """Every table's rows have a cell for every column, and columns for programs have names of their own."""
    seen: list[Report] = []
    monkeypatch.setattr(Shout, "emit", lambda _self, report: seen.append(report))
    for asked in (*COMMANDS.values(), *TELLING.values(), *REAL.values()):
        run(*asked, "--format", "shout")
    assert len(seen) == len(COMMANDS) + len(TELLING) + len(REAL)
    for report in seen:
        json.dumps(report.facts)
        tables = [block for block in report.blocks if isinstance(block, Table)]
        for table in (report.main, *tables):
            names = [column.name for column in table.columns if column.name]
            assert len(set(names)) == len(names) > 0
            assert {len(row.cells) for row in table.rows} <= {len(table.columns)}
        notes = [line for block in report.blocks if isinstance(block, Notes) for line in block.lines]
        told = [*report.facts.get("notes", ()), *report.facts.get("differences", ())]
        assert all(note in told for note in notes)
