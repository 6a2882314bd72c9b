"""Results files with several writers: whoever is refused touches nothing, and whoever was let in loses nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mstplan import MeasurementError
from mstplan.measuring.measurement import Measurement, appending, check_appendable, read_results

from ..measuring.measured import case, measured
from ..processes import environment

NO_FILE, EMPTY, HALF, FEW_BYTES, RESULTS, RESULTS_AND_HALF = (
    "none",
    "empty",
    "half a line",
    "few bytes",
    "results",
    "results and half a line",
)
KINDS = (NO_FILE, EMPTY, HALF, FEW_BYTES, RESULTS, RESULTS_AND_HALF)
WRITERS = 3
Append = Callable[[Measurement], None]


def of(seq_len: int) -> Measurement:
    return measured(case(seq_len=seq_len), {"loss": 5})


def make(path: Path, kind: str) -> list[int]:
    """A results file of that kind; the lengths that it has results of."""
    line = json.dumps(of(1).as_data(), separators=(",", ":")) + "\n"
    content = {
        NO_FILE: None,
        EMPTY: "",
        HALF: line[:60],
        FEW_BYTES: line[:3],
        RESULTS: line,
        RESULTS_AND_HALF: line + line[:60],
    }[kind]
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_text(content)
    return [1] if content is not None and line in content else []


def as_it_is(path: Path) -> tuple[int, bytes] | None:
    return (path.stat().st_ino, path.read_bytes()) if path.exists() else None


def lengths(path: Path) -> list[int]:
    return [m.case.seq_len for m in read_results(path).measurements] if path.exists() else []


ACTION = st.tuples(
    st.sampled_from(["open", "open", "append", "append", "close", "remove", "replace"]), st.integers(0, WRITERS - 1)
)


class Writers:
    """Some writers of one file, and what must hold whatever they do. Locks are of what was opened, so that those of one process
    exclude each other as those of several do."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.there, self.count, self.disturbed = path, make(path, kind), 1, False
        self.inside: dict[
            int, tuple[AbstractContextManager[Append], Append, int]
        ] = {}  # with the inode that each has locked

    def check(self) -> None:
        assert lengths(self.path) == self.there
        assert self.disturbed or len(self.inside) <= 1
        assert len({inode for _, _, inode in self.inside.values()}) == len(self.inside)

    def someone_has_it(self) -> bool:
        return self.path.exists() and self.path.stat().st_ino in {inode for _, _, inode in self.inside.values()}

    def open(self, n: int) -> None:
        before, refused = as_it_is(self.path), self.someone_has_it()
        if n in self.inside:
            return
        writer = appending(self.path)
        if refused:
            with pytest.raises(MeasurementError, match="another mstplan is writing"):
                writer.__enter__()
            assert as_it_is(self.path) == before
        else:
            self.inside[n] = (writer, writer.__enter__(), self.path.stat().st_ino)

    def append(self, n: int) -> None:
        if n not in self.inside:
            return
        writer, append, inode = self.inside[n]
        before, mine = as_it_is(self.path), self.path.exists() and self.path.stat().st_ino == inode
        self.count += 1
        if not mine and self.someone_has_it():
            with pytest.raises(MeasurementError, match="another mstplan is writing"):
                append(of(self.count))
            assert as_it_is(self.path) == before
        else:
            append(of(self.count))
            self.there.append(self.count)
            self.inside[n] = (writer, append, self.path.stat().st_ino)

    def close(self, n: int) -> None:
        if n not in self.inside:
            return
        before, (writer, _, inode) = as_it_is(self.path), self.inside.pop(n)
        writer.__exit__(None, None, None)
        goes = before is not None and before == (inode, b"")
        assert as_it_is(self.path) == (None if goes else before)

    def remove(self, _n: int) -> None:
        self.path.unlink(missing_ok=True)
        self.there, self.disturbed = [], True

    def replace(self, _n: int) -> None:
        """As editors save."""
        if self.path.exists():
            other = self.path.with_suffix(".new")
            other.write_bytes(self.path.read_bytes())
            other.replace(self.path)
            self.disturbed = True


@settings(max_examples=300)
@given(kind=st.sampled_from(KINDS), actions=st.lists(ACTION, max_size=14))
def test_in_every_order(tmp_path_factory: pytest.TempPathFactory, kind: str, actions: list[tuple[str, int]]) -> None:
    writers = Writers(tmp_path_factory.getbasetemp() / "orders.jsonl", kind)
    for action, n in actions:
        getattr(writers, action)(n)
        writers.check()
    for n in list(writers.inside):
        writers.close(n)
        writers.check()


# ---- real processes -----------------------------------------------------------------------------------------------------

TURNS = """
import json, sys
from dataclasses import replace
from pathlib import Path
from mstplan.errors import MeasurementError
from mstplan.measuring.measurement import Measurement, appending
path, m, first, turns, empty = Path(sys.argv[1]), Measurement.from_data(json.loads(sys.argv[2])), *map(int, sys.argv[3:])
for turn in range(turns):
    while True:
        try:
            with appending(path) as append:
                if turn % 2 == empty:
                    append(replace(m, case=replace(m.case, seq_len=first + turn)))
            break
        except MeasurementError as e:
            assert "another mstplan is writing" in str(e), e
"""


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_processes_that_come_and_go_at_once(tmp_path: Path) -> None:
    """Every other turn writes nothing, so that the file goes again and again between another's opening and locking."""
    path, one, turns = tmp_path / "r.jsonl", json.dumps(of(1).as_data()), 200
    started = [start(TURNS, path, one, 1000 * (n + 1), turns, n % 2) for n in range(3)]
    said = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    expected = {1000 * (n + 1) + turn for n in range(3) for turn in range(turns) if turn % 2 == n % 2}
    found = read_results(path)
    assert sorted(m.case.seq_len for m in found.measurements) == sorted(expected) and not found.skipped


WAITS = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from mstplan.measuring.measurement import Measurement, appending
with ExitStack() as stack:
    into = [stack.enter_context(appending(Path(path))) for path in sys.argv[2:]]
    print("in", flush=True)
    sys.stdin.read()
    for append in into:
        append(Measurement.from_data(json.loads(sys.argv[1])))
"""


def test_a_refused_process_leaves_the_file_to_the_one_that_writes(tmp_path: Path) -> None:
    paths = [tmp_path / f"{kind}.jsonl" for kind in KINDS]
    there = [make(path, kind) for path, kind in zip(paths, KINDS, strict=True)]
    with start(WAITS, json.dumps(of(2).as_data()), *paths) as writes:
        assert writes.stdout is not None and writes.stdout.readline() == "in\n"
        before = [as_it_is(path) for path in paths]
        assert all(before)
        for path in paths:
            with pytest.raises(MeasurementError, match="another mstplan is writing"):
                check_appendable(path)
        assert [as_it_is(path) for path in paths] == before
        assert writes.communicate(timeout=60)[1] == "" and writes.returncode == 0
    assert [lengths(path) for path in paths] == [[*earlier, 2] for earlier in there]


def test_a_link_stays(tmp_path: Path) -> None:
    link, path = tmp_path / "link.jsonl", tmp_path / "r.jsonl"
    link.symlink_to(path)
    check_appendable(link)
    assert link.is_symlink() and not path.exists()
    with appending(link) as append:
        append(of(2))
    assert link.is_symlink() and lengths(path) == [2]
