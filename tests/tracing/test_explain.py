"""Formula and trace side by side: rows add up to both, and a tensor that one side lacks is named."""

from __future__ import annotations

from mstplan.plan import solve
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.recipe import strategy
from mstplan.step.steps import Entry
from mstplan.tracing.explain import compare, name_of
from mstplan.tracing.trace import Alive
from mstplan.units import GIB

from .tiny import TINY, step_of

CARD = card(memory=8 * GIB)


def sides(seq_len: int = 8192):
    recipe = strategy("checkpoint")
    plan = solve.plan_at(read_config(TINY, "tiny"), recipe, CARD, seq_len)
    trace = step_of(recipe, seq_len).with_workspace(CARD.gpu.workspaces_bytes)
    entries = next(i.entries for i in plan.instants() if i.name == trace.peak.instant)
    return entries, trace.alive(trace.peak.event)


def test_rows_add_up_to_both_sides():
    entries, alive = sides()
    rows = compare(entries, alive)
    assert sum(row.formula_bytes for row in rows) == sum(e.bytes for e in entries)
    assert sum(row.trace_bytes for row in rows) == sum(a.bytes for a in alive)
    assert sum(row.difference for row in rows) == sum(e.bytes for e in entries) - sum(a.bytes for a in alive)


def test_the_two_agree_tensor_by_tensor():
    differing = [row for row in compare(*sides()) if abs(row.difference) > 2**20]
    assert not differing, differing


def test_a_tensor_left_out_is_named():
    entries, alive = sides()
    largest = next(e for e in entries if "log-softmax" in e.name)
    rows = compare([e for e in entries if e is not largest], alive)
    assert rows[0].difference == -largest.bytes
    assert any("_log_softmax" in name for name in rows[0].trace)


def test_names_are_short():
    assert name_of(Alive("MLP", "model.layers.*.mlp.up_proj", "mm", (1, 2), "bfloat16", 1, 4)) == "mlp.up_proj: mm"
    assert name_of(Alive("loss", "", "_log_softmax", (1, 2), "float32", 1, 8)) == "_log_softmax"
    assert compare([Entry("logits", "(b, s, V)", "bfloat16", 1, 512)], [])[0].formula == ("logits (b, s, V)",)
