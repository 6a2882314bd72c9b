"""What `mstplan check-smax` and `check-throughput` say of predictions that were measured at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..checking.limits import MAX_LOST_SHARE, SHARE_ABOVE, SHARE_BELOW, Bench, Limit, Prediction, Throughput
from ..measuring.measurement import Measurement
from ..units import format_gib, format_seconds, format_tokens
from . import tables


def smax(console: Console, bench: Bench, found: Sequence[tuple[Limit, Prediction]]) -> None:
    console.print()
    console.print(Text(f"S_max of {bench.model.name} in {format_gib(bench.card.total_bytes)}, tokens", "bold"))
    table = tables.new_table(
        ("strategy", "left"),
        ("formula", "right"),
        ("trace", "right"),
        ("98%", "right"),
        ("103%", "right"),
        ("ran", "right"),
        ("ran out", "right"),
        ("differs", "right"),
    )
    for limit, told in found:
        outcomes = [limit.outcome_at(share) for share in (SHARE_BELOW, SHARE_ABOVE)]
        formula = format_tokens(told.formula) if told.formula is not None else "-"
        table.add_row(
            limit.strategy,
            formula,
            format_tokens(limit.predicted),
            *("ran" if o == "ok" else o for o in outcomes),
            format_tokens(limit.longest_run),
            format_tokens(limit.shortest_failure) if limit.shortest_failure else "-",
            f"{limit.error:+.1%}",
            style="" if limit.holds else "bold",
        )
    console.print(table)
    console.print(
        "each must run at 98% of the trace's S_max and run out of memory at 103%; differs: of the trace's from the longest that ran.",
        soft_wrap=True,
    )


def smax_data(bench: Bench, found: Sequence[tuple[Limit, Prediction]]) -> dict[str, Any]:
    return {"limit_bytes": bench.card.total_bytes, "results": [_limit_data(limit, told) for limit, told in found]}


def _limit_data(limit: Limit, told: Prediction) -> dict[str, Any]:
    return {
        "strategy": limit.strategy,
        "rung": limit.rung,
        "predicted": limit.predicted,
        "formula": told.formula,
        "runs": limit.longest_run,
        "fails": limit.shortest_failure,
        "error": limit.error,
        "holds": limit.holds,
        "points": [{"seq_len": m.case.seq_len, "outcome": m.outcome} for m in limit.points],
    }


def chunks(m: Measurement) -> str:
    """What a line of check-throughput begins with."""
    return f"M {m.case.recipe.mlp_chunks}, {m.case.recipe.loss_chunks}"


def throughput_data(seq_len: int, found: Mapping[str, Sequence[Throughput]]) -> dict[str, Any]:
    rows = [
        {
            "strategy": strategy,
            "chunks": list(row.chunks),
            "chunk_tokens": list(row.tokens),
            "recommended": row.recommended,
            "share": row.share,
            "outcome": row.measurement.outcome,
            "seconds": row.measurement.seconds if row.measurement.ranks else None,
        }
        for strategy, members in found.items()
        for row in members
    ]
    return {"seq_len": seq_len, "results": rows, "most_lost": MAX_LOST_SHARE}


def throughput(console: Console, strategy: str, rows: Sequence[Throughput]) -> None:
    table = tables.new_table(
        ("M: MLP, loss", "left"),
        ("tokens", "left"),
        ("step", "right"),
        ("tokens/s", "right"),
        ("of one chunk", "right"),
        ("", "left"),
    )
    for row in rows:
        m = row.measurement
        figures = (format_seconds(m.seconds), f"{m.tokens_per_second:,.0f}") if m.ranks else (m.outcome, "")
        share = f"{row.share:.1%}" if row.share is not None else "-"
        cells = (f"{row.chunks.mlp}, {row.chunks.loss}", "{:,}, {:,}".format(*row.tokens), *figures, share)
        table.add_row(*cells, "<- recommended" if row.recommended else "", style="bold" if row.recommended else "")
    console.print()
    console.print(Text(f"{strategy}:", "bold"))
    console.print(table)
    if len(rows) < 4:
        console.print(
            "what is recommended is so few chunks that half, all and twice of it are not three different numbers.",
            soft_wrap=True,
        )
    console.print(
        f"the recommended number may cost {MAX_LOST_SHARE:.0%} of the throughput in one chunk.", soft_wrap=True
    )
