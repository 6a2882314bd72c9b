"""A step's allocations as the file that PyTorch's memory viewer opens (https://pytorch.org/memory_viz).

The format is that of torch.cuda.memory._dump_snapshot. from source: THCPModule_memorySnapshot in torch/csrc/cuda/Module.cpp
writes it; torch/cuda/_memory_viz.py, torch/utils/viz/MemoryViz.js and process_alloc_data.js read it. Nothing here needs torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import OutputError, quoted
from ..step.allocator import Allocator, Segment

PICKLE_PROTOCOL = 4
"""from source: MemoryViz.js reads 2 to 4 and no other; Python 3.14 would write 5."""

Frames = list[dict[str, Any]]

_POOL = (0, 0)  # torch's number for memory that is in no private pool


def check_output(path: Path) -> None:
    """Raises OutputError where the name asks for JSON, which the viewer does not open."""
    if path.suffix.lower() == ".json":
        raise OutputError(f"--snapshot writes a pickle, no JSON: {quoted(path.name)}.\nEnd the name in .pickle.")


def snapshot(
    events: Iterable[tuple[int, int, int]],
    frames_of: Callable[[int], Sequence[str]],
    expandable: bool,
    limit: int | None = None,
) -> dict[str, Any]:
    """The document for `events`: (key, bytes, +1 allocated or -1 released), in order.

    `frames_of(key)` are the lines that the viewer shows where a stack would stand, such as module, operation and shape; torch
    lists the innermost first. On a card of `limit` bytes the document ends where memory does, with torch's entry for that.
    """
    tape = _TraceEntries(frames_of)
    allocator = Allocator(expandable, limit, tape.add_entry)
    for time, (key, size, sign) in enumerate(events):
        tape.begin_event(time, key)
        if sign < 0:
            allocator.free(key)
            tape.forget_frames(key)
        elif allocator.allocate(key, size) is not None:
            break
    return {
        "segments": [_segment(segment, tape) for segment in allocator.segments()],
        "device_traces": [tape.entries],
        "allocator_settings": {
            "PYTORCH_CUDA_ALLOC_CONF": f"expandable_segments:{expandable}",
            "max_split_size": -1,  # none
            "garbage_collection_threshold": 0.0,
            "expandable_segments": expandable,
        },
        "external_annotations": [],
    }


def to_pickle(document: dict[str, Any]) -> bytes:
    """The file's content."""
    return pickle.dumps(document, protocol=PICKLE_PROTOCOL)


class _TraceEntries:
    """Trace entries, each with the time and the frames of the event it belongs to."""

    def __init__(self, frames_of: Callable[[int], Sequence[str]]) -> None:
        self.entries: list[dict[str, Any]] = []
        self.segment_frames: dict[int, Frames] = {}  # by address
        self._frames_of = frames_of
        self._frames: dict[int, Frames] = {}  # of what is allocated, by key
        self._shared: dict[tuple[str, ...], Frames] = {}  # equal lists are one: pickle writes it once
        self._time, self._key = 0, 0

    def begin_event(self, time: int, key: int) -> None:
        """Let what is added from now on belong to this event."""
        self._time, self._key = time, key

    def frames_for_key(self, key: int) -> Frames:
        if key not in self._frames:
            names = tuple(self._frames_of(key))
            self._frames[key] = self._shared.setdefault(names, [_frame(name) for name in names])
        return self._frames[key]

    def forget_frames(self, key: int) -> None:
        self._frames.pop(key, None)

    def add_entry(self, action: str, address: int, size: int) -> None:
        """An Allocator's `watch`."""
        frames = self.frames_for_key(self._key)
        if action in ("segment_alloc", "segment_map"):
            self.segment_frames[address] = frames
        self.entries.append(
            {
                "action": action,
                "device_free" if action == "oom" else "addr": address,
                "size": size,
                "stream": 0,
                "time_us": self._time,  # the event's place in the order: there is no clock
                "pool_id": _POOL,
                "frames": frames,
            }
        )


def _frame(name: str) -> dict[str, Any]:
    return {"filename": "mstplan", "line": 0, "name": name}  # shown as mstplan:0:name


def _segment(segment: Segment, tape: _TraceEntries) -> dict[str, Any]:
    live = [block for block in segment.blocks if block.key is not None]
    used = sum(block.size for block in live)
    return {
        "device": 0,
        "address": segment.address,
        "total_size": segment.size,
        "allocated_size": used,
        "active_size": used,  # more only where another stream still uses what is freed
        "requested_size": sum(block.requested for block in live),
        "stream": 0,
        "segment_type": "small" if segment.small else "large",
        "segment_pool_id": _POOL,
        "is_expandable": segment.expandable,
        "frames": tape.segment_frames.get(segment.address, []),
        "blocks": [
            {
                "address": block.address,
                "size": block.size,
                "requested_size": block.requested,
                "state": "inactive" if block.key is None else "active_allocated",
                "frames": [] if block.key is None else tape.frames_for_key(block.key),
            }
            for block in segment.blocks
        ],
    }
