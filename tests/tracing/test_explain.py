"""Formula and trace side by side: rows add up to both, and a tensor that one side lacks is named."""

from __future__ import annotations

from itertools import permutations

import pytest

from mstplan.plan import solve
from mstplan.spec.catalog import load_model
from mstplan.spec.config import read_config
from mstplan.spec.hardware import card
from mstplan.step.optimizers import OPTIMIZERS
from mstplan.step.recipe import strategy
from mstplan.step.roles import Role, State
from mstplan.step.steps import Copies, Entry
from mstplan.step.tape import Weight
from mstplan.tracing.explain import compare, name_of
from mstplan.tracing.recording import Category
from mstplan.tracing.trace import Alive
from mstplan.units import GIB, MIB

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


# ---- tensors of the same size, for different purposes -----------------------------------------------------------------

SIZE = 4 * MIB


def formula(role, name="its name"):
    return Entry(name, "", "bfloat16", 1, SIZE, role)


def traced(category, made_by="made by", *, resident=False):
    return Alive(category, "", made_by, (), "bfloat16", 1, SIZE, resident)


FIRST, SECOND = State(("exp_avg",)), State(("exp_avg_sq",))
PAIRS = {
    "weight": (Role.WEIGHT, traced(Category.WEIGHTS, resident=True)),
    "gradient that stays": (Role.WEIGHT_GRADIENT, traced(Category.GRADIENTS, resident=True)),
    "gradient": (Role.WEIGHT_GRADIENT, traced(Category.GRADIENTS)),
    "first moment": (FIRST, traced(Category.STATES, "exp_avg", resident=True)),
    "second moment": (SECOND, traced(Category.STATES, "exp_avg_sq", resident=True)),
    "temporary of the optimizer": (Role.UPDATE, traced(Category.STATES, "_foreach_sqrt")),
    "temporary called as a state": (Role.UPDATE, traced(Category.STATES, "exp_avg")),
    "workspace": (Role.WORKSPACE, traced(Category.WORKSPACE, resident=True)),
    "workspace of attention": (Role.ATTENTION, traced(Category.WORKSPACE)),
    "gathered weight": (Role.GATHERED, traced(Category.WEIGHTS)),
    "layer input": (Role.LAYER_INPUT, traced(Category.INPUTS)),
    "norm": (Role.NORM, traced(Category.NORMS)),
    "attention": (Role.ATTENTION, traced(Category.ATTENTION)),
    "MLP": (Role.MLP, traced(Category.MLP)),
    "loss": (Role.LOSS, traced(Category.LOSS)),
    "embedding": (Role.EMBEDDING, traced(Category.OTHER)),
}
"""A role of the formula, and what the trace has for it."""


@pytest.mark.parametrize("what", PAIRS)
def test_a_tensor_is_matched_with_one_of_its_purpose(what):
    """All there are, of one size: each has a row with its like, whatever it is called."""
    role, alive = PAIRS[what]
    others = {State(("momentum",)), *(r for r, _ in PAIRS.values())} - {role}
    others -= {Role.GATHERED} if role is Role.WEIGHT else set()
    rows = compare([formula(other) for other in others] + [formula(role, "mine")], [alive])
    matched = next(row for row in rows if row.trace)
    assert matched.formula == ("mine",) and matched.difference == 0
    assert sum(row.formula_copies for row in rows) == len(others) + 1


KEEPERS = ("weight", "gradient", "first moment", "second moment", "temporary of the optimizer", "workspace", "MLP")


@pytest.mark.parametrize(("mine", "theirs"), list(permutations(KEEPERS, 2)))
def test_tensors_for_different_purposes_are_never_matched(mine, theirs):
    """A first moment is no gradient, though their sizes are the same."""
    rows = compare([formula(PAIRS[mine][0])], [PAIRS[theirs][1]])
    assert sorted(row.difference for row in rows) == [-SIZE, SIZE]


def test_an_optimizers_keys_are_those_of_its_file():
    """Every state of every optimizer has keys, and no two the same."""
    for optimizer in OPTIMIZERS.values():
        weights = [(Weight("w", (64, 8192)), 1), (Weight("norm", (64,)), 1)]
        states = optimizer.memory(strategy("mst"), weights).states
        keys = [key for keys in {state.torch_keys for state in states} for key in keys]
        assert len(keys) == len(set(keys)) and all(s.torch_keys for s in states)


def test_a_state_without_a_key_is_compared_with_states():
    rows = compare([formula(State())], [traced(Category.STATES, "momentum", resident=True)])
    assert [row.difference for row in rows] == [0]


def test_alike_tensors_of_two_parts_are_told_apart():
    """Where both sides have as many in each part, a part has a row of its own."""
    rows = compare(
        [formula(Role.MLP, "up"), formula(Role.ATTENTION, "Q")], [traced(Category.ATTENTION, "q"), traced(Category.MLP)]
    )
    assert {(row.formula, row.trace) for row in rows} == {(("up",), ("made by",)), (("Q",), ("q",))}


def test_a_tensor_at_a_border_is_one_that_both_have():
    """The copy of a norm's output that attention reads is of either."""
    rows = compare([formula(Role.NORM)], [traced(Category.ATTENTION)])
    assert [(row.formula_copies, row.trace_copies, row.difference) for row in rows] == [(1, 1, 0)]


def test_tensors_that_only_their_size_tells_apart_are_matched_by_it():
    sizes = (Copies(1, SIZE), Copies(2, 4 * SIZE))
    entry = Entry("MLP gate", "(b, s, I)", "bfloat16", 3, 5 * SIZE, Role.MLP, sizes)
    large = traced(Category.MLP)._replace(copies=2, bytes=4 * SIZE)
    assert [row.difference for row in compare([entry], [traced(Category.MLP), large])] == [0, 0]
    shared = load_model("deepseek-v2-lite")  # whose first layer's MLP is wider than its shared experts
    found = [e for i in solve.plan_at(shared, strategy("standard"), card("h100"), 1024).instants() for e in i.entries]
    several = [e for e in found if e.sizes]
    assert several and all(sum(s.bytes for s in e.sizes) == e.bytes for e in several)
