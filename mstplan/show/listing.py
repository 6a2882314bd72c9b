"""The reports of what is known: models, cards and recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..spec.config import NO_TOWERS
from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..step.parameters import parameter_count
from ..step.trainers import Trainer
from ..units import GIB, format_count
from . import payload
from .parts import cell
from .report import Block, Cell, Column, Folded, Notes, Report, Row, Table, line


class ModelRow(NamedTuple):
    """A model, and the strategy with which it fits, where that was asked."""

    model: Model
    fits_with: str | None = None


class Asked(NamedTuple):
    """On which card, at which length, of how many models it was asked."""

    card: Card
    seq_len: int
    models: int


def models(rows: Sequence[ModelRow], asked: Asked | None = None, notes: Sequence[str] = ()) -> Report:
    columns = (
        Column("model", "model", whole=True),
        Column("model_type", "family" if asked is None else None),
        Column("parameters", "params", right=True),
        Column("active_parameters", "active", right=True),
        Column("experts", "experts", right=True),
        Column("layers", "layers" if asked is None else None, right=True),
        Column("hidden_size", None),
        Column("context", "context", right=True),
        Column("fits_with", "fits with" if asked is not None else None),
        Column("intermediate_size", None),
        Column("vocab_size", None),
        Column("towers_left_out", None),
        Column("hub_id", None),
    )
    table = Table("models", columns, tuple(Row(_model(row)) for row in rows))
    facts = [{**payload.model(row.model), **_experts(row.model), "fits_with": row.fits_with} for row in rows]
    head = Folded((line("Models"),)) if asked is None else line(_verdict(rows, asked))
    document = payload.document("models", models=facts, notes=list(notes))
    parts = [row.model.name for row in rows if NO_TOWERS in row.model.notes]
    remarks = [*notes, *([f"without their towers of images or sound: {', '.join(parts)}"] if parts else [])]
    return Report("models", document, [head, *([table] if rows else []), Notes(tuple(remarks))], table)


def _verdict(rows: Sequence[ModelRow], asked: Asked) -> str:
    return (
        f"{len(rows)} of {asked.models} train on {asked.card.gpu.name} at {asked.seq_len:,} tokens, each with the simplest strategy that fits; "
        "mstplan max-seq says how much longer."
    )


def _experts(m: Model) -> dict[str, object]:
    experts = m.experts
    facts = (
        {"number": experts.number, "per_token": experts.per_token, "shared_width": experts.shared_width}
        if experts
        else None
    )
    return {"experts": facts, "towers_left_out": NO_TOWERS in m.notes}


def _model(row: ModelRow) -> tuple[Cell, ...]:
    m = row.model
    total, active = parameter_count(m)
    experts = f"{m.experts.per_token} of {m.experts.number}" if m.experts is not None else ""
    return (
        cell(m.name),
        cell(m.model_type),
        Cell(total, format_count(total)),
        Cell(active, format_count(active) if active != total else ""),
        Cell(experts or None, experts),
        cell(m.layers),
        cell(m.hidden),
        Cell(m.context, str(m.context or "-")),
        cell(row.fits_with),
        cell(m.mlp_width),
        cell(m.vocab),
        cell(NO_TOWERS in m.notes),
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


def recipes(rows: Sequence[Trainer]) -> Report:
    columns = (Column("name", "--like"), Column("about", "defaults of"), Column("options", None))
    table = Table("recipes", columns, tuple(Row((cell(t.name), cell(t.about), cell(t.options))) for t in rows))
    blocks: list[Block] = [Folded((line("Recipes"),)), table]
    for t in rows:
        blocks += [
            line(t.name, "strong"),
            line(t.options, deep=2),
            *(line(f"{each}.", "quiet", deep=2) for each in t.assumptions),
        ]
    document = payload.document("recipes", recipes=[payload.trainer(t) for t in rows])
    return Report("recipes", document, blocks, table)
