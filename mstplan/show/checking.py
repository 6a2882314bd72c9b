"""The reports of `mstplan check-smax` and `check-throughput`: predictions that were measured at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checking.limits import MAX_LOST_SHARE, SHARE_ABOVE, SHARE_BELOW, Bench, Limit, Prediction, Throughput
from ..measuring.measurement import OK, Measurement
from ..step.recipe import strategy_label
from ..units import format_gib, format_seconds, format_tokens
from . import payload
from .parts import cell, strategy_cell
from .report import Block, Cell, Column, Report, Row, Table, line


def _document(command: str, bench: Bench, **data: Any) -> dict[str, Any]:
    return payload.document(
        command, "measurement", environment=dict(bench.environment), file=str(Path(bench.out)), **data
    )


# ---- S_max ----------------------------------------------------------------------------------------------------------------

HOW_SMAX = "each must run at 98% of the trace's S_max and run out of memory at 103%; differs: of the trace's from the longest that ran."


def smax(bench: Bench, rows: Sequence[tuple[Limit, Prediction]]) -> Report:
    table = _limits(rows)
    title = f"S_max of {bench.model.name} in {format_gib(bench.card.total_bytes)}, tokens"
    results = [_limit_data(limit, prediction) for limit, prediction in rows]
    facts = _document("check-smax", bench, limit_bytes=bench.card.total_bytes, results=results)
    return Report("check-smax", facts, [line(title, "strong"), table, line(HOW_SMAX, whole=True)], table)


def _limits(rows: Sequence[tuple[Limit, Prediction]]) -> Table:
    columns = (
        Column("strategy", "strategy"),
        Column("formula", "formula", right=True),
        Column("predicted", "trace", right=True),
        Column("outcome_below", "98%", right=True),
        Column("outcome_above", "103%", right=True),
        Column("runs", "ran", right=True),
        Column("fails", "ran out", right=True),
        Column("error", "differs", right=True),
        Column("holds", None),
    )
    return Table("limits", columns, tuple(_limit(limit, prediction) for limit, prediction in rows))


def _limit(limit: Limit, prediction: Prediction) -> Row:
    cells = (
        strategy_cell(limit.strategy),
        _tokens(prediction.formula),
        _tokens(limit.predicted),
        *(_outcome(limit.outcome_at(share)) for share in (SHARE_BELOW, SHARE_ABOVE)),
        _tokens(limit.longest_run),
        _tokens(limit.shortest_failure or None),
        Cell(limit.error, f"{limit.error:+.1%}"),
        cell(limit.holds),
    )
    return Row(cells, "" if limit.holds else "strong")


def _tokens(tokens: int | None) -> Cell:
    return Cell(tokens, format_tokens(tokens) if tokens is not None else "-")


def _outcome(outcome: str) -> Cell:
    return Cell(outcome, "ran" if outcome == OK else outcome)


def _limit_data(limit: Limit, prediction: Prediction) -> dict[str, Any]:
    return {
        "strategy": limit.strategy,
        "rung": limit.rung,
        "predicted": limit.predicted,
        "formula": prediction.formula,
        "runs": limit.longest_run,
        "fails": limit.shortest_failure,
        "error": limit.error,
        "holds": limit.holds,
        "points": [{"seq_len": m.case.seq_len, "outcome": m.outcome} for m in limit.points],
    }


# ---- chunks ---------------------------------------------------------------------------------------------------------------

HOW_CHUNKS = f"the recommended number may cost {MAX_LOST_SHARE:.0%} of the throughput in one chunk."
FEW_CHUNKS = "what is recommended is so few chunks that half, all and twice of it are not three different numbers."


def chunks(m: Measurement) -> str:
    """What a line of check-throughput begins with."""
    return f"M {m.case.recipe.mlp_chunks}, {m.case.recipe.loss_chunks}"


def throughput(bench: Bench, seq_len: int, throughputs: Mapping[str, Sequence[Throughput]]) -> Report:
    of_each = {
        strategy: _throughputs([(strategy, row) for row in rows], strategy) for strategy, rows in throughputs.items()
    }
    title = f"{bench.model.name} at {format_tokens(seq_len)} tokens: what chunks cost"
    few = any(len(rows) < 4 for rows in throughputs.values())
    blocks: list[Block] = [
        line(title, "strong"),
        *of_each.values(),
        *([line(FEW_CHUNKS, whole=True)] if few else []),
        line(HOW_CHUNKS, whole=True),
    ]
    everything = [(strategy, row) for strategy, rows in throughputs.items() for row in rows]
    results = [_throughput_data(strategy, row) for strategy, row in everything]
    facts = _document("check-throughput", bench, seq_len=seq_len, results=results, most_lost=MAX_LOST_SHARE)
    return Report("check-throughput", facts, blocks, _throughputs(everything))


def _throughputs(rows: Iterable[tuple[str, Throughput]], strategy: str = "") -> Table:
    columns = (
        Column("strategy", None),
        Column("", "M: MLP, loss"),
        Column("mlp_chunks", None),
        Column("loss_chunks", None),
        Column("attention_groups", None),
        Column("", "tokens"),
        Column("outcome", None),
        Column("step_seconds", "step", right=True),
        Column("tokens_per_second", "tokens/s", right=True),
        Column("share", "of one chunk", right=True),
        Column("recommended", ""),
    )
    title = f"{strategy_label(strategy)}:" if strategy else ""
    return Table("throughput", columns, tuple(_throughput(name, row) for name, row in rows), title)


def _throughput(strategy: str, row: Throughput) -> Row:
    m = row.measurement
    seconds, speed = (m.seconds, m.tokens_per_second) if m.ranks else (None, None)
    cells = (
        strategy_cell(strategy),
        Cell(None, f"{row.chunks.mlp}, {row.chunks.loss}"),
        *map(cell, row.chunks),
        Cell(None, "{:,}, {:,}".format(*row.tokens)),
        cell(m.outcome),
        Cell(seconds, format_seconds(seconds) if seconds is not None else m.outcome),
        Cell(speed, f"{speed:,.0f}" if speed is not None else ""),
        Cell(row.share, f"{row.share:.1%}" if row.share is not None else "-"),
        Cell(row.recommended, "<- recommended" if row.recommended else ""),
    )
    return Row(cells, "strong" if row.recommended else "")


def _throughput_data(strategy: str, row: Throughput) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "chunks": list(row.chunks),
        "chunk_tokens": list(row.tokens),
        "recommended": row.recommended,
        "share": row.share,
        "outcome": row.measurement.outcome,
        "seconds": row.measurement.seconds if row.measurement.ranks else None,
    }
