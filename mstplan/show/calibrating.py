"""What `mstplan calibrate` says."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from ..errors import one_line
from ..observe.calibrate import Written
from . import tables


def report(console: Console, rows: Sequence[Written]) -> None:
    table = tables.new_table(
        ("model", "left"), ("strategy", "left"), ("in chunks", "left"), ("vectors", "right"), ("residual", "right")
    )
    for row in rows:
        chunked = " and ".join(
            part for part, several in (("MLP", row.mlp_in_chunks), ("loss", row.loss_in_chunks)) if several
        )
        how = (chunked or "nothing") + (", masks" if row.masked else "")
        table.add_row(one_line(row.model), one_line(row.strategy), how, str(row.vectors), f"{row.residual:.1e}")
    console.print(table)
    for path in dict.fromkeys(row.file for row in rows):
        console.print(f"wrote {one_line(path, 200)}", soft_wrap=True)
