"""The snapshot file: torch's own readers take it, and what they read adds up to what the allocator says."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import pickletools
import random
import re
from typing import Any

import pytest
from torch.cuda import _memory_viz as viz

from mstplan.step.allocator import Allocator
from mstplan.tracing.snapshot import snapshot, to_pickle
from mstplan.units import MIB

# Opcodes that unpickleData in torch/utils/viz/MemoryViz.js reads; it throws on any other.
READ_BY_THE_VIEWER = {
    "APPEND",
    "APPENDS",
    "BINFLOAT",
    "BINGET",
    "BININT",
    "BININT1",
    "BININT2",
    "BINPUT",
    "BINUNICODE",
    "DICT",
    "EMPTY_DICT",
    "EMPTY_LIST",
    "EMPTY_TUPLE",
    "FRAME",
    "LIST",
    "LONG1",
    "LONG_BINGET",
    "LONG_BINPUT",
    "MARK",
    "MEMOIZE",
    "NEWFALSE",
    "NEWTRUE",
    "NONE",
    "PROTO",
    "SETITEM",
    "SETITEMS",
    "SHORT_BINUNICODE",
    "STOP",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
}

BOTH = pytest.mark.parametrize("expandable", [False, True])


def frames_of(key: int) -> list[str]:
    return [f"model.layers.{key % 4}.mlp", "aten.mm.default", f"({key}, 64)"]


def made_up(events: int = 1500) -> list[tuple[int, int, int]]:
    """As a step: sizes of all kinds, freed mostly last in first out; some stay."""
    chance, alive, done = random.Random(7), [], []
    for key in range(events):
        size = chance.choice([0, chance.randrange(4096), chance.randrange(4 * MIB), chance.randrange(60 * MIB)])
        done.append((key, size, 1))
        alive.append((key, size))
        while alive and chance.random() < 0.49:
            key_of, size_of = alive.pop(chance.randrange(-3, 0) if len(alive) > 3 else -1)
            done.append((key_of, size_of, -1))
    return done


def followed(events: list[tuple[int, int, int]], expandable: bool) -> Allocator:
    allocator = Allocator(expandable)
    for key, size, sign in events:
        if sign > 0:
            allocator.allocate(key, size)
        else:
            allocator.free(key)
    return allocator


def embedded(html: str) -> dict[str, Any]:
    """What a page of torch's has in it for the viewer."""
    found = re.search(r"const local_files = (\[.*\])", html)
    assert found is not None
    return pickle.loads(base64.b64decode(json.loads(found[1])[0]["base64"]))


def peak(document: dict[str, Any], up: str, down: str) -> int:
    """The viewer's timeline: `up` entries add their size, `down` entries take it off."""
    total = most = 0
    for entry in document["device_traces"][0]:
        total += entry["size"] * ((entry["action"] == up) - (entry["action"] == down))
        most = max(most, total)
    return most


def peak_of(events: list[tuple[int, int, int]]) -> int:
    total = most = 0
    for _, size, sign in events:
        total += sign * size
        most = max(most, total)
    return most


@BOTH
def test_torchs_readers_take_it_and_agree(expandable):
    events = made_up()
    allocator, document = followed(events, expandable), snapshot(events, frames_of, expandable)
    wanted = sum(size * sign for _, size, sign in events)
    summary = viz.segsum(document)  # it checks itself that all blocks add up to their segments
    assert f"total_reserved: {viz.Bytes(allocator.reserved)}\n" in summary
    assert f"total_allocated: {viz.Bytes(wanted)}\n" in summary
    told = viz.trace(document)
    assert told.startswith("Device 0 ---") and told.count("del ") == sum(
        sign < 0 and size > 0 for _, size, sign in events
    )
    assert told.count(" = cudaMalloc(") == (0 if expandable else len(allocator.segments()))
    for reader in (viz.memory, viz.segments):
        lines = reader(document, format_flamegraph=str.splitlines)
        assert sum(int(line.rpartition(" ")[2]) for line in lines) == allocator.reserved
        assert any("mstplan:0:aten.mm.default;mstplan:0:model.layers.1.mlp" in line for line in lines)


@BOTH
@pytest.mark.parametrize("plot", [viz.trace_plot, viz.segment_plot])
def test_what_the_viewer_draws_adds_up(plot, expandable):
    events = made_up()
    allocator, document = followed(events, expandable), snapshot(events, frames_of, expandable)
    shown = embedded(plot(document))
    assert shown == document
    assert peak(shown, "alloc", "free_completed") == peak_of(events) <= allocator.peak_allocated
    if expandable:
        assert peak(shown, "segment_map", "segment_unmap") == allocator.peak_reserved
    else:
        assert peak(shown, "segment_alloc", "segment_free") == allocator.peak_reserved


@BOTH
def test_the_trace_played_backwards_empties_the_card(expandable):
    """As the viewer's history of the allocator does it, from the segments at the end."""
    document = snapshot(made_up(), frames_of, expandable)
    blocks = {
        block["address"]: block["requested_size"]
        for segment in document["segments"]
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    pages = {
        address: segment["segment_type"]
        for segment in document["segments"]
        for address in range(segment["address"], segment["address"] + segment["total_size"], 2 * MIB)
    }
    for entry in reversed(document["device_traces"][0]):
        if entry["action"] == "alloc":
            assert blocks.pop(entry["addr"]) == entry["size"]
        elif entry["action"] == "free_completed":
            assert entry["addr"] // (2 * MIB) * 2 * MIB in pages
            assert blocks.setdefault(entry["addr"], entry["size"]) == entry["size"]
        elif entry["action"] in ("segment_alloc", "segment_map"):
            for address in range(entry["addr"], entry["addr"] + entry["size"], 2 * MIB):
                del pages[address]
    assert not blocks and not pages


def test_entries_carry_their_frames_in_order():
    document = snapshot([(0, 512, 1), (1, 30 * MIB, 1), (0, 512, -1)], frames_of, expandable=False)
    entries = document["device_traces"][0]
    assert [(e["action"], e["size"], e["time_us"]) for e in entries] == [
        ("segment_alloc", 2 * MIB, 0),
        ("alloc", 512, 0),
        ("segment_alloc", 30 * MIB, 1),
        ("alloc", 30 * MIB, 1),
        ("free_requested", 512, 2),
        ("free_completed", 512, 2),
    ]
    assert [[frame["name"] for frame in e["frames"]] for e in entries] == [frames_of(key) for key in (0, 0, 1, 1, 0, 0)]
    small, large = document["segments"]
    assert (small["segment_type"], small["allocated_size"], small["blocks"][0]["state"]) == ("small", 0, "inactive")
    assert (large["segment_type"], large["allocated_size"], large["blocks"][0]["frames"]) == (
        "large",
        30 * MIB,
        entries[3]["frames"],
    )
    assert small["frames"] == entries[0]["frames"] and large["frames"] == entries[2]["frames"]


def test_only_what_stays_is_left_without_pairs():
    events = made_up()
    document = viz.filter_alloc_free_pairs(copy.deepcopy(snapshot(events, frames_of, expandable=True)))
    left = [entry["size"] for entry in document["device_traces"][0] if entry["action"] == "alloc"]
    gone = {key for key, _, sign in events if sign < 0}
    assert left == [size for key, size, sign in events if sign > 0 and size and key not in gone]


@BOTH
def test_it_ends_where_memory_does(expandable):
    events = [(0, 20 * MIB, 1), (1, 20 * MIB, 1), (0, 20 * MIB, -1), (2, 30 * MIB, 1), (3, 1, 1)]
    document = snapshot(events, frames_of, expandable, limit=40 * MIB)
    freed, full = document["device_traces"][0][-2:]
    assert freed["action"] == ("segment_unmap" if expandable else "segment_free")
    assert (full["action"], full["device_free"], full["size"]) == ("oom", 20 * MIB, 30 * MIB) and "addr" not in full
    assert "raise OutOfMemoryError # 30.0MiB requested, 20.0MiB free in CUDA\n" in viz.trace(document)
    assert [segment["total_size"] for segment in document["segments"]] == [20 * MIB]


@BOTH
def test_the_file_has_only_what_the_viewer_reads(expandable):
    document = snapshot(
        [*made_up(), (10**6, 3 * 2**31, 1)], lambda key: ["a" * 300, "é"], expandable
    )  # long names, sizes beyond 32 bits
    data = to_pickle(document)
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(data)]
    assert opcodes[0] == ("PROTO", 4)
    assert {name for name, _ in opcodes} <= READ_BY_THE_VIEWER
    assert all(-(2**53) < argument < 2**53 for name, argument in opcodes if name == "LONG1")  # JavaScript's numbers
    assert pickle.loads(data) == document


def test_equal_frames_are_written_once():
    events = [(key, 1024, 1) for key in range(2000)]
    data = to_pickle(
        snapshot(events, lambda key: ["model.layers.0.mlp.down_proj", "aten.mm.default"], expandable=False)
    )
    assert data.count(b"down_proj") == 1


def test_nothing_happened():
    document = snapshot([], frames_of, expandable=True)
    assert document["segments"] == [] and document["device_traces"] == [[]]
    viz.segsum(document), viz.trace(document), viz.trace_plot(document)
