"""Answers as plain data for --json. Bytes, tokens and seconds are numbers; absent means null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..plan.advice import kept_notes
from ..plan.calibration import Calibration
from ..plan.hardware import Card, Gpu
from ..plan.model import Model
from ..plan.parameters import parameter_count, trained_count
from ..plan.recipe import options_of
from ..plan.shapes import Shape
from ..plan.solve import Answer, Plan
from ..plan.steps import Entry, InstantPeak
from ..plan.theorem import Coefficients, Row
from ..plan.theorem import View as TheView
from ..plan.ways import Way

if TYPE_CHECKING:
    from ..observe.card import Held
    from ..observe.search import Found
    from .trace import View

SCHEMA_VERSION = 1


def document(command: str, rung: str = "formula", /, **fields: Any) -> dict[str, Any]:
    return {"schema_version": SCHEMA_VERSION, "command": command, "rung": rung, **fields}


def model(m: Model) -> dict[str, Any]:
    total, active = parameter_count(m)
    return {
        "name": m.name,
        "parameters": total,
        "active_parameters": active if m.stand_in is None else None,
        "layers": m.layers,
        "hidden_size": m.hidden,
        "intermediate_size": m.mlp_width,
        "vocab_size": m.vocab,
        "context": m.context,
        "model_type": m.model_type,
        "hub_id": m.hub_id,
        "notes": list(m.notes),
    }


def card(c: Card) -> dict[str, Any]:
    return {
        "gpu": c.gpu.name if c.named else None,
        "rates_of": c.gpu.name,
        "total_bytes": c.total_bytes,
        "context_bytes": c.gpu.context_bytes,
        "reserve_bytes": c.reserve_bytes,
        "budget_bytes": c.budget_bytes,
        "host_bytes": c.host_bytes,
    }


def gpu(g: Gpu) -> dict[str, Any]:
    return {field: getattr(g, field) for field in g._fields}


def calibrated(c: Calibration | None) -> dict[str, Any] | None:
    return {"residual": c.residual, **c.provenance} if c is not None else None


def answer(a: Answer) -> dict[str, Any]:
    p = a.plan
    return {
        "strategy": a.strategy,
        "s_max": a.s_max,
        "peak_bytes": p.peak_bytes,
        "instant": p.instant,
        "calibration": calibrated(p.calibration),
        "mlp_chunks": p.chunks.mlp,
        "loss_chunks": p.chunks.loss,
        "chunk_tokens": p.chunk_tokens._asdict(),
        "host_bytes": p.host_bytes,
        "step_seconds": p.step_seconds or None,
        "trained_parameters": trained_parameters(p),
        "recipe": p.recipe.model_dump(),
    }


def trained_parameters(p: Plan) -> int | None:
    """None: the model is one that the formula does not know."""
    return trained_count(p.model, p.recipe) if p.model.stand_in is None else None


def entry(e: Entry) -> dict[str, Any]:
    return {"name": e.name, "shape": e.shape, "dtype": e.dtype, "count": e.copies, "bytes": e.bytes}


def instant(i: InstantPeak) -> dict[str, Any]:
    return {"name": i.name, "bytes": i.bytes, "operation": i.operation, "entries": [entry(e) for e in i.entries]}


def brief(p: Plan) -> dict[str, Any]:
    return {
        "fits": p.fits,
        "seq_len": p.seq_len,
        "peak_bytes": p.peak_bytes,
        "peak_tokens": p.peak.tokens,
        "budget_bytes": p.budget_bytes,
        "instant": p.instant,
        "calibration": calibrated(p.calibration),
        "mlp_chunks": p.chunks.mlp,
        "loss_chunks": p.chunks.loss,
        "host_bytes": p.host_bytes,
        "step_seconds": p.step_seconds,
        "trained_parameters": trained_parameters(p),
        "recipe": p.recipe.model_dump(),
    }


def plan(p: Plan) -> dict[str, Any]:
    return {**brief(p), "instants": [instant(i) for i in p.instants()]}


def way(w: Way) -> dict[str, Any]:
    return {
        "options": options_of(w.plan.recipe),
        "changes": [{"name": c.name, "fields": c.fields} for c in w.changes],
        "gives_up": w.gives_up,
        "s_max": w.s_max,
        "fits": w.plan.fits,
        "seq_len": w.plan.seq_len,
        "peak_bytes": w.plan.peak_bytes,
        "host_bytes": w.plan.host_bytes,
        "step_seconds": w.plan.step_seconds,
    }


def coefficients(c: Coefficients) -> dict[str, Any]:
    return {
        "w_mem": c.w_mem,
        "i_mem": c.i_mem,
        "a_mem": c.a_mem,
        "layers": c.layers,
        "chunks": c.chunks,
        "m_max": c.m_max,
        "w_from": [entry(e) for e in c.w_from],
        "i_from": [entry(e) for e in c.i_from],
        "a_from": [entry(e) for e in c.a_from],
    }


def row(r: Row) -> dict[str, Any]:
    return {"formula": r.formula, "s_max": r.s_max, "memory_bytes": r.memory}


def shape(s: Shape) -> dict[str, Any]:
    return {
        "name": s.name,
        "shape": s.symbols,
        "sizes": list(s.sizes),
        "dtype": s.dtype,
        "bytes": s.bytes,
        "quoted": s.quoted or None,
    }


def max_seq(m: Model, c: Card, found: Sequence[Answer], best: Answer, to_fit: Sequence[Way]) -> dict[str, Any]:
    from .report import max_seq_notes

    return document(
        "max-seq",
        model=model(m),
        card=card(c),
        budget_bytes=c.budget_bytes,
        results=[answer(a) for a in found],
        best=best.strategy,
        binding=[entry(e) for e in best.plan.binding_entries()],
        ways_to_fit=[way(w) for w in to_fit],
        notes=[*m.notes, *max_seq_notes(m, c, found, to_fit)],
    )


def max_seq_by_trace(m: Model, c: Card, found: Sequence[Found], best: Found) -> dict[str, Any]:
    from ..observe.cache import versions
    from .trace import max_seq_notes

    return document(
        "max-seq",
        "trace",
        model=model(m),
        card=card(c),
        budget_bytes=c.budget_bytes,
        versions=versions(),
        results=[{**answer(f.answer), "calibration": None, "traces": f.traces} for f in found],
        best=best.answer.strategy,
        alive=[a._asdict() for a in best.trace.alive(best.trace.peak.event)],
        notes=[*m.notes, *max_seq_notes(m, c, found)],
    )


def plan_document(
    plans: Mapping[str, Plan], reaches: Mapping[str, int], name: str, to_fit: Sequence[Way], beyond: Way | None
) -> dict[str, Any]:
    """The detailed plan, and of every strategy that was asked for whether it fits."""
    from .report import plan_notes

    p = plans[name]
    strategies = [{"strategy": each, "s_max": reaches[each], **brief(its)} for each, its in plans.items()]
    return document(
        "plan",
        model=model(p.model),
        card=card(p.card),
        strategy=name,
        **plan(p),
        s_max=reaches[name],
        strategies=strategies,
        ways_to_fit=[way(w) for w in to_fit],
        furthest=way(beyond) if beyond is not None else None,
        notes=[*p.model.notes, *plan_notes(p, reaches[name])],
    )


def theorem_document(m: Model, c: Card, view: TheView) -> dict[str, Any]:
    return document(
        "theorem",
        model=model(m),
        card=card(c),
        coefficients=coefficients(view.coefficients),
        seq_len=view.seq_len,
        formulas=[row(r) for r in view.rows],
        differences=list(view.differences),
        step_model=[
            {"strategy": a.strategy, "s_max": a.s_max, "calibration": calibrated(a.plan.calibration)}
            for a in view.answers
        ],
        notes=kept_notes(m),
    )


def trace_document(v: View, command: str = "trace", others: Sequence[View] = ()) -> dict[str, Any]:
    """Of a trace; `others`: traces of other strategies at the same length."""
    from .trace import notes

    def kept(h: Held) -> dict[str, Any]:
        lost = h.out_of_memory._asdict() if h.out_of_memory is not None else None
        return {"allocated": h.allocated, "reserved": h.reserved, "retries": h.retries, "out_of_memory": lost}

    formula = {i.name: i.bytes for i in v.formula}
    return document(
        command,
        "trace",
        model=model(v.model),
        card=card(v.card),
        strategy=v.strategy,
        versions=v.versions,
        seq_len=v.trace.seq_len,
        recipe=v.trace.recipe.model_dump(),
        mlp_chunks=v.plan.chunks.mlp,
        loss_chunks=v.plan.chunks.loss,
        fits=v.fits,
        peak_bytes=v.trace.peak.bytes,
        budget_bytes=v.card.budget_bytes,
        instant=v.trace.peak.instant,
        host_bytes=v.trace.host_peak,
        instants=[
            {"name": p.instant, "bytes": p.bytes, "formula_bytes": formula.get(p.instant)} for p in v.trace.peaks
        ],
        alive=[a._asdict() for a in v.trace.alive(v.trace.peak.event)],
        allocator={"expandable_segments": kept(v.expandable), "default": kept(v.usual)},
        differences=[{**row._asdict(), "difference": row.difference} for row in v.differences if row.difference],
        strategies=[
            {"strategy": each.strategy, "fits": each.fits, "peak_bytes": each.trace.peak.bytes} for each in (*others, v)
        ],
        units={"all": v.trace.units, "run": list(v.trace.kept)},
        notes=[*v.model.notes, *notes(v)],
    )
