"""Functions of torch and transformers that a trace replaces: they are there, come back, and are missed when they are gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import mstplan
from mstplan.errors import VersionError
from mstplan.step.recipe import Recipe
from mstplan.tracing import patches
from mstplan.tracing.cuda_stand_ins import as_on_cuda
from mstplan.tracing.fsdp import record_fsdp
from mstplan.tracing.patches import ATTENTION, DROPOUT, GATHER_BUFFER, GATHER_INPUTS, PACKED_SEQUENCES, TARGETS, patched
from mstplan.tracing.recorder import Recorder
from mstplan.tracing.tracer import trace

from .tiny import TINY

GONE = replace(DROPOUT, name="frobnicate")


def now() -> list[object]:
    """What stands in each place, and whether its owner has it of its own."""
    places = [(target.owner(), target.name.split(".")[-1]) for target in TARGETS]
    return [(getattr(owner, name), name in vars(owner)) for owner, name in places if owner is not None]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_is_there_unless_the_release_is_older(target):
    owner = target.owner()
    installed = patches._release(patches.metadata.version(target.package))
    assert owner is not None or installed < target.since
    assert patches._release(target.read_in) >= (target.since or (0, 0))


@pytest.mark.parametrize("context", [as_on_cuda, record_fsdp])
def test_all_come_back_after_an_error_too(context):
    before = now()
    with context(Recorder({}, 0)):
        assert now() != before
    assert now() == before
    with pytest.raises(ZeroDivisionError), context(Recorder({}, 0)):
        _ = 1 / 0
    assert now() == before


def test_all_come_back_when_one_cannot_be_made():
    before = now()
    new = {ATTENTION: lambda plain: len, GATHER_BUFFER: lambda plain: 1 / 0}
    with pytest.raises(ZeroDivisionError), patched(new):
        pass
    assert now() == before


@pytest.mark.parametrize(
    ("target", "named"),
    [
        (GONE, "torch.nn.functional.frobnicate"),
        (replace(DROPOUT, module="torch.nowhere"), "torch.nowhere.dropout"),
        (replace(GATHER_BUFFER, name="Nobody.allocate"), "_fsdp_collectives.Nobody.allocate"),
        (replace(GONE, since=(2, 0)), "torch.nn.functional.frobnicate"),
    ],
)
def test_one_that_is_gone_is_named_and_nothing_is_replaced(target, named, monkeypatch):
    monkeypatch.setattr(patches.metadata, "version", lambda package: "2.99.1+cpu")
    before = now()
    with pytest.raises(VersionError) as caught, patched({ATTENTION: lambda plain: len, target: lambda plain: len}):
        pass
    first, second = str(caught.value).splitlines()
    assert first.startswith("torch 2.99.1+cpu has no ") and f"{named}, which" in first
    assert "torch 2.13.0" in second
    assert now() == before


def test_one_that_older_releases_have_not_is_left_out_there(monkeypatch):
    before = now()
    monkeypatch.setattr(patches.metadata, "version", lambda package: "2.9.0")
    with patched({ATTENTION: lambda plain: len, replace(GONE, since=(2, 10)): lambda plain: len}):
        assert ATTENTION.owner().scaled_dot_product_attention is len
    assert now() == before


def test_a_trace_does_not_go_on_without(monkeypatch):
    monkeypatch.delattr(PACKED_SEQUENCES.owner(), PACKED_SEQUENCES.name)
    with pytest.raises(VersionError, match="find_packed_sequence_indices"):
        trace(TINY, Recipe(), 32)


def test_a_trace_of_one_card_asks_nothing_of_fsdp(monkeypatch):
    monkeypatch.delattr(GATHER_INPUTS.owner(), GATHER_INPUTS.name)
    assert trace(TINY, Recipe(), 32).peaks
    with pytest.raises(VersionError, match="_get_param_all_gather_inputs"):
        trace(TINY, Recipe(gpus=2, sharding="fsdp"), 32)


def test_nothing_else_replaces_functions():
    """`unittest.mock` is for tests."""
    package = Path(mstplan.__file__).parent
    told = {path.relative_to(package): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    assert len(told) > 50
    assert [path for path, text in told.items() if "unittest" in text or "mock" in text] == []
