"""The report of `mstplan calibrate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checking.calibrate import WrittenCalibration
from ..errors import one_line
from . import parts, payload
from .parts import cell, strategy_cell
from .report import Block, Cell, Column, Folded, Report, Row, Table, line


def report(rows: Sequence[WrittenCalibration], rung: str, folder: Path, notes: Sequence[str]) -> Report:
    """What was solved and written. said: what else is to be told of it."""
    columns = (
        Column("model", "model"),
        Column("strategy", "strategy"),
        Column("in_chunks", "in chunks"),
        Column("vectors", "vectors", right=True),
        Column("residual", "residual", right=True),
        Column("file", None),
    )
    table = Table("calibrations", columns, tuple(Row(_cells(row)) for row in rows))
    blocks: list[Block] = [
        Folded((line("Calibrations"),)),
        table,
        *parts.written(dict.fromkeys(row.file for row in rows)),
        *(line(each, whole=True) for each in notes),
    ]
    calibrations = [row._asdict() for row in rows]
    facts = payload.document("calibrate", rung, folder=str(folder), calibrations=calibrations, notes=list(notes))
    return Report("calibrate", facts, blocks, table)


def _cells(row: WrittenCalibration) -> tuple[Cell, ...]:
    several = (("MLP", row.mlp_in_chunks), ("loss", row.loss_in_chunks))
    how = " and ".join(part for part, in_chunks in several if in_chunks) or "nothing"
    return (
        cell(one_line(row.model)),
        strategy_cell(one_line(row.strategy)),
        cell(how + (", masks" if row.masked else "")),
        cell(row.vectors),
        Cell(row.residual, f"{row.residual:.1e}"),
        cell(row.file),
    )
