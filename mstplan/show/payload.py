"""Answers as plain data, the facts of reports. Bytes, tokens and seconds are numbers; absent means null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..plan.advice import other_allocator
from ..plan.calibration import Calibration
from ..plan.solve import Answer, Plan
from ..plan.ways import Way
from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..step.parameters import parameter_count, trained_count
from ..step.recipe import Recipe, options_of, strategy_label
from ..step.steps import Entry, InstantPeak
from ..step.trainers import Trainer

if TYPE_CHECKING:
    from pathlib import Path

    from ..plan.findings import LengthFinding, LengthsFinding, LongestFinding
    from ..plan.several_gpus import Compared
    from ..plan.shapes import Shape
    from ..plan.theorem import Coefficients, Row
    from ..plan.theorem import View as TheView
    from ..step.simulation import Usage
    from ..tracing.findings import TracedLongest, TraceView
    from .plot import Curve

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
        "towers": [{"kind": tower.kind, "parameters": tower.parameters} for tower in m.towers],
        "notes": list(m.notes),
    }


def card(c: Card) -> dict[str, Any]:
    return {
        "gpu": c.gpu.name if c.named else None,
        "rates_of": c.gpu.name,
        "total_bytes": c.total_bytes,
        "context_bytes": c.gpu.context_bytes,
        "context_kind": c.gpu.context_kind,
        "reserve_bytes": c.reserve_bytes,
        "budget_bytes": c.budget_bytes,
        "host_bytes": c.host_bytes,
        "allocator": c.allocator,
        "torch_build": {"name": c.build.name, "cudnn": c.build.cudnn, "assumed": c.build.assumed},
    }


def gpu(g: Gpu) -> dict[str, Any]:
    return {field: getattr(g, field) for field in g._fields}


def trainer(t: Trainer) -> dict[str, Any]:
    return {
        "name": t.name,
        "about": t.about,
        "options": t.options,
        "recipe": t.recipe.model_dump(),
        "assumptions": list(t.assumptions),
    }


def calibrated(c: Calibration | None) -> dict[str, Any] | None:
    return {"residual": c.residual, **c.provenance} if c is not None else None


def answer(a: Answer) -> dict[str, Any]:
    p = a.plan
    return {
        "strategy": a.strategy,
        "label": strategy_label(a.strategy),
        "s_max": a.s_max,
        "s_max_tensors": a.s_max_tensors,
        "peak_bytes": p.peak_bytes,
        "peak_at": p.instant,
        "instant": p.instant,
        "calibration": calibrated(p.calibration),
        "attention_kernels": attention_kernels(p),
        "mlp_chunks": p.chunks.mlp,
        "loss_chunks": p.chunks.loss,
        "chunk_tokens": p.chunk_tokens._asdict(),
        "cpu_ram_bytes": p.host_bytes,
        "host_bytes": p.host_bytes,
        "step_seconds": a.step_seconds,
        "expected_seconds": a.expected_seconds,
        "tokens_per_second": a.tokens_per_second,
        "trained_parameters": trained_parameters(p),
        "recipe": fields(p.recipe),
    }


def fields(r: Recipe) -> dict[str, Any]:
    """As its `model_dump`, for which pydantic would first build what dumps, a tenth of an answer."""
    return {name: getattr(r, name) for name in Recipe.model_fields}


def attention_kernels(p: Plan) -> list[str] | None:
    """Of layers without an explicit mask, and of those with one. None: the model is one that the formula does not know."""
    return [kernel.name for kernel in p.kernels] if p.model.stand_in is None else None


def trained_parameters(p: Plan) -> int | None:
    """None: the model is one that the formula does not know."""
    return trained_count(p.model, p.recipe) if p.model.stand_in is None else None


def entry(e: Entry) -> dict[str, Any]:
    return {"name": e.name, "shape": e.shape, "dtype": e.dtype, "count": e.copies, "bytes": e.bytes}


def instant(i: InstantPeak) -> dict[str, Any]:
    return {"name": i.name, "bytes": i.bytes, "operation": i.operation, "entries": [entry(e) for e in i.entries]}


def usage(u: Usage) -> dict[str, Any]:
    """What the caching allocator holds, in bytes, and the request that found no room, in which step."""
    lost = u.out_of_memory._asdict() if u.out_of_memory is not None else None
    return {
        "allocated": u.allocated,
        "reserved": u.reserved,
        "retries": u.retries,
        "steps": u.steps,
        "out_of_memory": lost,
    }


def brief(p: Plan) -> dict[str, Any]:
    return {
        "fits": p.fits,
        "seq_len": p.seq_len,
        "peak_bytes": p.peak_bytes,
        "peak_tokens": p.peak.tokens,
        "budget_bytes": p.budget_bytes,
        "tensors_fit": p.tensors_fit,
        "allocator": usage(p.usage) if p.tensors_fit else None,
        "peak_at": p.instant,
        "instant": p.instant,
        "calibration": calibrated(p.calibration),
        "attention_kernels": attention_kernels(p),
        "mlp_chunks": p.chunks.mlp,
        "loss_chunks": p.chunks.loss,
        "cpu_ram_bytes": p.host_bytes,
        "host_bytes": p.host_bytes,
        "step_seconds": p.step_seconds,
        "expected_seconds": p.expected_seconds,
        "tokens_per_second": p.tokens_per_second,
        "trained_parameters": trained_parameters(p),
        "recipe": fields(p.recipe),
    }


def way(w: Way) -> dict[str, Any]:
    return {
        "options": options_of(w.plan.recipe),
        "changes": [{"name": c.name, "fields": c.fields} for c in w.changes],
        "gives_up": w.gives_up,
        "s_max": w.s_max,
        "fits": w.plan.fits,
        "seq_len": w.plan.seq_len,
        "peak_bytes": w.plan.peak_bytes,
        "cpu_ram_bytes": w.plan.host_bytes,
        "host_bytes": w.plan.host_bytes,
        "step_seconds": w.plan.step_seconds,
        "expected_seconds": w.plan.expected_seconds,
        "tokens_per_second": w.plan.tokens_per_second,
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


def shapes_document(rows: Sequence[Shape], m: Model, batch: int, seq_len: int) -> dict[str, Any]:
    return document("shapes", model=model(m), batch=batch, seq_len=seq_len, shapes=[shape(row) for row in rows])


def max_seq(longest: LongestFinding) -> dict[str, Any]:
    return document(
        "max-seq",
        model=model(longest.model),
        card=card(longest.card),
        provenance=longest.provenance,
        budget_bytes=longest.card.budget_bytes,
        results=[answer(a) for a in longest.answers],
        best=longest.best.strategy,
        other_allocator={"allocator": other_allocator(longest.card).allocator, "s_max": longest.other_s_max},
        binding=[entry(e) for e in longest.best.plan.binding_entries()],
        ways_to_fit=[way(w) for w in longest.to_fit],
        smallest_card=smallest(longest.smallest),
        notes=[*longest.model.notes, *longest.notes],
    )


def ways_of_gpus(m: Model, c: Card, compared: Compared, provenance: str, notes: Sequence[str]) -> dict[str, Any]:
    return document(
        "max-seq",
        model=model(m),
        card=card(c),
        provenance=provenance,
        budget_bytes=c.budget_bytes,
        ways=[{"way": way.name, "options": options_of(a.plan.recipe), **answer(a)} for way, a in compared.answers],
        left_out=[{"why": why, "ways": list(names)} for why, names in compared.left_out.items()],
        notes=[*m.notes, *notes],
    )


def smallest(g: Gpu | None) -> dict[str, Any] | None:
    """The smallest card on which it fits as it is."""
    return {"gpu": g.name, "usable_bytes": g.usable_bytes} if g is not None else None


def max_seq_by_trace(longest: TracedLongest) -> dict[str, Any]:
    best = longest.best
    return document(
        "max-seq",
        "trace",
        model=model(longest.model),
        card=card(longest.card),
        provenance=longest.provenance,
        budget_bytes=longest.card.budget_bytes,
        versions=longest.versions,
        results=[{**answer(f.answer), "calibration": None, "traces": f.traces} for f in longest.results],
        best=best.answer.strategy,
        alive=[a._asdict() for a in best.trace.alive(best.trace.peak.event)],
        ways_to_fit=[way(w) for w in longest.to_fit],
        smallest_card=smallest(longest.smallest),
        notes=[*longest.model.notes, *longest.notes],
    )


def plan_document(finding: LengthFinding, peaks: Sequence[InstantPeak]) -> dict[str, Any]:
    """The detailed plan with its instants, and of every strategy that was asked for whether it fits."""
    p = finding.plan
    strategies = [
        {"strategy": each, "s_max": finding.reaches[each], **brief(its)} for each, its in finding.plans.items()
    ]
    return document(
        "plan",
        model=model(p.model),
        card=card(p.card),
        provenance=finding.provenance,
        strategy=finding.name,
        **brief(p),
        instants=[instant(i) for i in peaks],
        s_max=finding.reach,
        strategies=strategies,
        ways_to_fit=[way(w) for w in finding.to_fit],
        furthest=way(finding.beyond) if finding.beyond is not None else None,
        smallest_card=smallest(finding.smallest),
        fits_from_gpus=finding.fewest_gpus,
        advice=list(finding.advice),
        notes=[*p.model.notes, *finding.notes],
    )


def plans_document(finding: LengthsFinding) -> dict[str, Any]:
    """Of every length and strategy whether it fits."""
    p = finding.lengths[0].plan
    lengths = [
        {
            "seq_len": each.plan.seq_len,
            "fits": each.plan.fits,
            "strategy": each.name,
            "strategies": [
                {"strategy": name, "s_max": each.reaches[name], **brief(its)} for name, its in each.plans.items()
            ],
        }
        for each in finding.lengths
    ]
    notes = [*p.model.notes, *finding.notes]
    about = {"model": model(p.model), "card": card(p.card), "provenance": finding.provenance}
    return document("plan", **about, fits=finding.all_fit, lengths=lengths, notes=notes)


def theorem_document(m: Model, c: Card, view: TheView, provenance: str, notes: Sequence[str]) -> dict[str, Any]:
    return document(
        "theorem",
        model=model(m),
        card=card(c),
        provenance=provenance,
        coefficients=coefficients(view.coefficients),
        seq_len=view.seq_len,
        formulas=[row(r) for r in view.rows],
        differences=list(view.differences),
        step_model=[
            {"strategy": a.strategy, "s_max": a.s_max, "calibration": calibrated(a.plan.calibration)}
            for a in view.answers
        ],
        notes=list(notes),
    )


def plot_document(m: Model, c: Card, curves: Sequence[Curve], out: Path, notes: Sequence[str]) -> dict[str, Any]:
    return document(
        "plot",
        model=model(m),
        card=card(c),
        budget_bytes=c.budget_bytes,
        file=str(out),
        curves=[{**curve.as_data(), "calibration": calibrated(curve.calibration)} for curve in curves],
        notes=list(notes),
    )


def trace_document(v: TraceView, command: str = "trace", others: Sequence[TraceView] = ()) -> dict[str, Any]:
    """Of a trace; `others`: traces of other strategies at the same length."""
    formula, judged = {i.name: i.bytes for i in v.formula}, not v.card.unlimited
    return document(
        command,
        "trace",
        model=model(v.model),
        card=card(v.card) if judged else None,
        provenance=v.provenance,
        strategy=v.strategy,
        versions=v.versions,
        seq_len=v.trace.seq_len,
        recipe=fields(v.trace.recipe),
        mlp_chunks=v.plan.chunks.mlp,
        loss_chunks=v.plan.chunks.loss,
        fits=v.fits if judged else None,
        peak_bytes=v.trace.peak.bytes,
        budget_bytes=v.card.budget_bytes if judged else None,
        instant=v.trace.peak.instant,
        cpu_ram_bytes=v.trace.host_peak,
        host_bytes=v.trace.host_peak,
        instants=[
            {"name": p.instant, "bytes": p.bytes, "formula_bytes": formula.get(p.instant)} for p in v.trace.peaks
        ],
        alive=[a._asdict() for a in v.trace.alive(v.trace.peak.event)],
        allocator={"expandable_segments": usage(v.expandable), "default": usage(v.usual)} if judged else None,
        differences=[{**row._asdict(), "difference": row.difference} for row in v.differences if row.difference],
        strategies=[
            {"strategy": each.strategy, "fits": each.fits if judged else None, "peak_bytes": each.trace.peak.bytes}
            for each in (*others, v)
        ],
        units={"all": v.trace.units, "run": list(v.trace.kept)},
        notes=[*v.model.notes, *v.notes],
    )
