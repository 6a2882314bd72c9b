"""Published runs on several GPUs: all are there, the page is generated, known stacks stand within 2%."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mstplan.plan import many_gpus
from mstplan.plan.many_gpus import Run
from mstplan.profiles import ROOT
from mstplan.show.many_gpus import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "many_gpus.md"


@pytest.fixture(scope="module")
def rows() -> tuple[Run, ...]:
    return many_gpus.runs()


def test_the_page_is_what_the_module_prints() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_row_is_predicted_or_says_what_is_missing(rows: tuple[Run, ...]) -> None:
    assert len(rows) == 69
    for row in rows:
        assert row.source and row.explained_by and row.kind in ("peak", "longest", "verdict")
        assert bool(row.missing) == (row.recipe is None or bool(row.stands_for)), row
        if row.recipe is not None:
            assert row.fits is not None and row.recipe.gpus == row.gpus and row.recipe.batch == row.batch


def test_known_stacks_stand_within_2_percent_and_bytes_within_a_megabyte(rows: tuple[Run, ...]) -> None:
    known = [row for row in rows if row.kind == "peak" and row.known_stack]
    assert len(known) == 16
    for row in known:
        assert row.difference is not None and abs(row.difference) < 0.02, row
        if row.unit == "B":
            assert row.predicted is not None and row.published is not None
            assert abs(row.predicted - row.published) < 1_000_000, row


def test_what_runs_and_what_runs_out(rows: tuple[Run, ...]) -> None:
    wrong = {row.model for row in rows if row.agrees is False}
    assert wrong == {"Qwen3-32B", "Qwen2.5-7B"}  # a GiB below the card; a report that names no model, loss or attention
    assert sum(row.agrees is True for row in rows) == 7


def test_alst_ran_at_the_published_lengths_with_room_to_spare(rows: tuple[Run, ...]) -> None:
    """Every length is shorter than the longest that is planned, and what nvidia-smi showed is below the card."""
    lengths = [row for row in rows if row.kind == "longest"]
    assert len(lengths) == 13
    for row in lengths:
        assert row.fits and row.predicted_tokens is not None and row.predicted_tokens > row.seq_len
    told = [row for row in lengths if row.published_device_gib is not None]
    assert len(told) == 4
    for row in told:
        assert row.predicted_gib is not None and row.published_device_gib is not None
        assert row.predicted_gib == pytest.approx(row.published_device_gib, rel=0.14)


def test_a_row_answers_as_soon_as_its_recipe_is_planned() -> None:
    """A row that stands on the recipe next to it is answered by its own once that is planned, and nothing is missing any more."""
    told = json.loads((ROOT / "many_gpus.json").read_text(encoding="utf-8"))["rows"]
    row = next(each for each in told if "nearest" in each["read_as"] and each["figure"]["kind"] == "peak")
    before = many_gpus._compare(row)
    assert before.missing and before.stands_for
    after = many_gpus._compare({**row, "read_as": {**row["read_as"], "recipe": row["read_as"]["nearest"]}})
    assert not after.missing and not after.stands_for and after.predicted == before.predicted
