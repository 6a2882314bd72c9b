"""What a tape says is said by types: its names are for people alone, and once written it changes no more."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import FrozenInstanceError, replace
from weakref import ref

import pytest

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_model
from mstplan.step import steps
from mstplan.step.instants import Instant, Stage
from mstplan.step.recipe import STRATEGIES
from mstplan.step.roles import Role
from mstplan.step.steps import Chunks, Step, evaluate
from mstplan.step.tape import (
    _REPLAYS,
    ForGradients,
    Group,
    Joined,
    Op,
    Part,
    Rules,
    Tape,
    TapeWriter,
    Tensor,
    Weight,
    forward,
)
from mstplan.tracing.explain import compare
from mstplan.tracing.recording import Category
from mstplan.tracing.trace import Alive

MODELS = ("gpt2", "llama3.2-1b", "gemma3-1b", "olmo2-7b", "gpt-oss-20b", "deepseek-v2-lite")
RECIPES = {
    "standard": STRATEGIES["standard"],
    "mixed, accumulation": STRATEGIES["checkpoint-sqrt"].changed(precision="mixed", accumulation=2),
    "in backward": STRATEGIES["mst"].changed(optimizer_in_backward=True),
    "fsdp": STRATEGIES["mst-offload"].changed(sharding="fsdp", gpus=4),
    "zero1": STRATEGIES["mst-offload"].changed(sharding="zero1", gpus=4, accumulation=2),
    "zero2": STRATEGIES["mst-offload"].changed(sharding="zero2", gpus=4),
}


class _Renamed:
    """A copy of a step's tape in which every weight, tensor and operation has another name: a number."""

    def __init__(self) -> None:
        self.known: dict[object, object] = {}

    def __call__(self, thing):
        if thing is None or thing in self.known:
            return self.known.get(thing)
        number = f"{len(self.known)}"
        if isinstance(thing, Weight):
            copy = replace(thing, name=number)
        elif isinstance(thing, Tensor):
            of = self(thing.storage) if thing.storage is not thing else None
            copy = Tensor(
                number, thing.shape, thing.dtype, thing.basis, thing.bytes, of, role=thing.role, cached=thing.cached
            )
        elif isinstance(thing, Tape | Op | Part | Group):
            copy = self._fields(thing, number)
        else:
            return thing
        self.known[thing] = copy
        return copy

    def _fields(self, thing, number):
        values = {name: self._value(value) for name, value in vars(thing).items()}
        return type(thing)(**{**values, **({"name": number} if isinstance(thing, Op) else {})})

    def _value(self, value):
        if isinstance(value, ForGradients | Joined):
            return type(value)(*map(self._value, value))
        if isinstance(value, tuple):
            return tuple(map(self._value, value))
        return self(value) if isinstance(value, Weight | Tensor | Tape | Op | Part | Group) else value


WORKSPACE = 3 << 20


def _for_what(entries):
    """Copies and bytes by role, dtype and size of one."""
    found = Counter()
    for entry in entries:
        for copies, size in entry.sizes or [(entry.copies, entry.bytes)]:
            found[entry.role, entry.dtype, size // copies] += copies
    return found


def _as_traced(entries):
    """Alive tensors of a trace, one for every few entries."""
    for entry in entries[::2]:
        category = Category.MLP if entry.role is Role.MLP else Category.NORMS
        yield Alive(category, "", "made", (), entry.dtype, entry.copies, entry.bytes)


def _rows(entries, alive):
    return Counter(row[2:] for row in compare(entries, alive))


@pytest.mark.parametrize("what", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_names_move_no_byte(name, what, monkeypatch):
    """Weights, tensors and operations with other names: every instant has the same bytes, in tensors of the same roles, and the
    same rows beside a trace."""
    model, recipe, chunks = load_model(name), RECIPES[what], Chunks(1, 1)
    if recipe.loss == "chunked":
        chunks = Chunks(4, 8)
    layout, where = layout_of(model, recipe, chunks, 4096), step_sizes(recipe, 4096, chunks)
    build = steps.build
    plain = Step(model, layout, WORKSPACE).instants(where)
    before = {i.name: i.bytes for i in plain}
    monkeypatch.setattr(steps, "tape_of", lambda *of: _Renamed()(build(*of)))
    step = Step(model, layout, WORKSPACE)
    assert {name.isdigit() for name in (op.name for op in step.tape.ops)} == {True}
    renamed = step.instants(where)
    assert {i.name: i.bytes for i in renamed} == before
    for one, other in zip(plain, renamed, strict=True):
        assert sum(e.bytes for e in other.entries) == one.bytes
        assert _for_what(other.entries) == _for_what(one.entries)
        traced = [alive for i in plain for alive in _as_traced(i.entries)]
        assert _rows(other.entries, traced) == _rows(one.entries, traced)
    peaks = {n: max(evaluate(m.live, where.units) for m in moments) for n, moments in step.moments.items()}
    assert all(before[instant] >= peak for instant, peak in peaks.items()) and max(before.values()) == max(
        peaks.values()
    )


def test_a_written_tape_changes_no_more():
    tape = steps.build(load_model("gpt2"), layout_of(load_model("gpt2"), STRATEGIES["mst"], Chunks(2, 2), 1024))
    for thing, field in ((tape, "ops"), (tape.ops[0], "name"), (next(o.part for o in tape.ops if o.part), "tape")):
        with pytest.raises(FrozenInstanceError):
            setattr(thing, field, ())
    with pytest.raises(AttributeError):
        tape.ops.append(tape.ops[0])
    with pytest.raises(TypeError):
        tape.ops[0] = tape.ops[1]
    with pytest.raises(TypeError):
        tape.dims["d"] = 1
    assert not any(isinstance(value, list | dict | set) for op in tape.ops for value in vars(op).values())


def test_a_tape_does_not_hold_what_was_found_of_it():
    """What replays found lives with them, as long as the tape does."""
    tape = steps.build(load_model("gpt2"), layout_of(load_model("gpt2"), STRATEGIES["mst"], Chunks(2, 2), 1024))
    before = dict(vars(tape))
    forward(tape, Rules(), keep=True)
    assert vars(tape) == before and tape in _REPLAYS
    found, there = len(_REPLAYS), ref(tape)
    del tape, before
    gc.collect()
    assert there() is None and len(_REPLAYS) < found


def test_what_was_written_does_not_change_with_its_writer():
    writer = TapeWriter({"d": 8})
    writer.op("make", [], writer.new("x", "b s d", "bfloat16"))
    tape = writer.build_tape()
    writer.dims["d"] = 9
    writer.op("make more", [], writer.new("y", "b s d", "bfloat16"))
    assert (len(tape.ops), tape.dims["d"]) == (1, 8)


def test_what_is_made_in_a_part_has_its_role():
    writer = TapeWriter({"d": 8})
    with writer.assign_role(Role.MLP):
        inside = writer.new("x", "b s d", "bfloat16")
        with writer.assign_role(Role.LOSS):
            deeper = writer.new("z", "b s d", "bfloat16")
    outside = writer.new("y", "b s d", "bfloat16")
    assert [tensor.role for tensor in (inside, deeper, outside)] == [Role.MLP, Role.LOSS, None]


def test_instants_are_their_words():
    assert [str(i) for i in Instant] == [i.value for i in Instant] and repr(Instant.LOSS) == "'loss'"
    assert Instant("loss") is Instant.LOSS and Instant.LOSS == "loss" and {"loss": 1}[Instant.LOSS] == 1
    assert [Stage.of_layer(i, 3).backward for i in range(3)] == [
        Instant.FIRST_LAYER,
        Instant.MIDDLE_LAYER,
        Instant.LAST_LAYER,
    ]
    assert Stage.of_layer(0, 1) is Stage.FIRST_LAYER
