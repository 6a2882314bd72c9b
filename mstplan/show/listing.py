"""The reports of what is known: models and cards."""

from __future__ import annotations

from collections.abc import Sequence

from ..spec.hardware import Gpu
from ..spec.model import Model
from ..step.parameters import parameter_count
from ..units import GIB, format_count
from . import payload
from .parts import cell
from .report import Block, Cell, Column, Folded, Notes, Report, Row, Table, line


def models(rows: Sequence[Model]) -> Report:
    columns = (
        Column("model", "model"),
        Column("parameters", "params", right=True),
        Column("active_parameters", "active", right=True),
        Column("layers", "layers", right=True),
        Column("hidden_size", "hidden", right=True),
        Column("context", "context", right=True),
        Column("intermediate_size", "MLP", right=True),
        Column("vocab_size", "vocab", right=True),
        Column("model_type", None),
        Column("hub_id", None),
    )
    table = Table("models", columns, tuple(Row(_model(m)) for m in rows))
    document = payload.document("models", models=[payload.model(m) for m in rows])
    return Report("models", document, [Folded((line("Models"),)), table], table)


def _model(m: Model) -> tuple[Cell, ...]:
    total, active = parameter_count(m)
    return (
        cell(m.name),
        Cell(total, format_count(total)),
        Cell(active, format_count(active) if active != total else ""),
        cell(m.layers),
        cell(m.hidden),
        Cell(m.context, str(m.context or "-")),
        Cell(m.mlp_width, str(m.mlp_width or "-")),
        cell(m.vocab),
        cell(m.model_type),
        cell(m.hub_id),
    )


def gpus(rows: Sequence[Gpu], sources: bool, notes: Sequence[str]) -> Report:
    """said: what of the user's own was left out."""
    columns = (
        Column("gpu", "gpu"),
        Column("nominal_gib", "sold GB", right=True),
        Column("usable_bytes", "torch GiB", right=True),
        Column("bf16_flops", "bf16 TFLOP/s", right=True),
        Column("memory_bandwidth", "GB/s", right=True),
        Column("host_link", "host link"),
        Column("usable_kind", None),
        Column("context_bytes", None),
        Column("context_kind", None),
    )
    table = Table("gpus", columns, tuple(Row(_gpu(g)) for g in rows))
    blocks: list[Block] = [Folded((line("Cards"),)), table]
    for g in rows if sources else ():
        where_from = f"{g.label}. Memory: {g.usable_source} Rates: {g.rates_source} Context: {g.context_source}"
        blocks += [line(g.name, "strong"), line(where_from, "quiet", deep=2)]
    legend = "torch GiB: what torch reports as total memory; * derived, not a reported print.  --sources: where from."
    blocks += [line(legend, "quiet"), Notes(tuple(notes))]
    document = payload.document("gpus", gpus=[payload.gpu(g) for g in rows], notes=list(notes))
    return Report("gpus", document, blocks, table)


def _gpu(g: Gpu) -> tuple[Cell, ...]:
    mark = "" if g.usable_kind == "reported" else " *"
    return (
        cell(g.name),
        Cell(g.nominal_gib, f"{g.nominal_gib:g}"),
        Cell(g.usable_bytes, f"{g.usable_bytes / GIB:.2f}{mark}"),
        Cell(g.bf16_flops, f"{g.bf16_flops / 1e12:,.1f}"),
        Cell(g.memory_bandwidth, f"{g.memory_bandwidth / 1e9:,.0f}"),
        cell(g.host_link_name),
        cell(g.usable_kind),
        cell(g.context_bytes),
        cell(g.context_kind),
    )
