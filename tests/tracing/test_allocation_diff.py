"""Two sequences of allocations, laid side by side."""

from __future__ import annotations

from random import Random

import pytest

from mstplan.tracing.allocation_diff import (
    EXTRA,
    KNOWN_ON_CPU,
    MISSING,
    Allocation,
    KnownBuffer,
    allocations_of_history,
    differences,
    unexplained,
)

SCRATCH = KnownBuffer("scratch", "a kernel's own", "a test", "scratch$")
LARGE = 1 << 20


def sequence(*entries: tuple[int, str]) -> list[Allocation]:
    return [Allocation(LARGE + size, name, inside=name.endswith("scratch")) for size, name in entries]


STEP = sequence((1, "a"), (2, "b"), (1, "c"), (3, "d"), (2, "e"), (1, "f"))


def told(found) -> list[tuple[str, int, str]]:
    return [(d.what, d.position, d.allocation.name) for d in found]


def test_equal_sequences_have_no_differences():
    assert differences(STEP, STEP) == []
    assert differences([], []) == []


@pytest.mark.parametrize("at", range(len(STEP)))
def test_one_that_only_one_sequence_has(at):
    """Every size but that of neighbours tells which one it is."""
    short = STEP[:at] + STEP[at + 1 :]
    assert told(differences(short, STEP)) == [(MISSING, at, STEP[at].name)]
    assert told(differences(STEP, short)) == [(EXTRA, at, STEP[at].name)]


def test_another_order_is_a_difference():
    swapped = [STEP[1], STEP[0], *STEP[2:]]
    assert len(differences(STEP, swapped)) == 2


def test_another_size_is_one_missing_and_one_extra():
    other = [*STEP[:3], STEP[3]._replace(bytes=LARGE + 4), *STEP[4:]]
    assert sorted(told(differences(STEP, other))) == [(EXTRA, 3, "d"), (MISSING, 3, "d")]


def test_small_ones_do_not_count():
    assert differences(STEP, [Allocation(LARGE, "small"), *STEP]) == []
    assert len(differences(STEP, [Allocation(LARGE, "small"), *STEP], above=LARGE - 1)) == 1


def test_sizes_in_blocks():
    real = [a._replace(bytes=-(-a.bytes // 512) * 512) for a in STEP]
    assert len(differences(STEP, real)) == 2 * len(STEP)
    assert differences(STEP, real, block=512) == []


def test_of_alike_allocations_the_explained_one_differs():
    """As it stands, any of three of a size may be the one too many: it is the one that there is an explanation for."""
    traced = sequence((1, "a"), (1, "b"), (2, "c"))
    real = sequence((1, "a"), (1, "b scratch"), (1, "b"), (2, "c"))
    (found,) = differences(traced, real, [SCRATCH])
    assert (found.allocation.name, found.known) == ("b scratch", SCRATCH)
    assert unexplained([found]) == []
    assert "b scratch, scratch" in str(found)


def test_no_difference_is_explained_where_there_is_none():
    both = sequence((1, "a"), (1, "b scratch"), (2, "c"))
    assert differences(both, both, [SCRATCH]) == []


def test_what_outlives_its_operation_is_no_scratch():
    real = [*STEP, Allocation(LARGE + 9, "scratch", inside=False)]
    assert len(unexplained(differences(STEP, real, [SCRATCH]))) == 1
    assert len(unexplained(differences(real, STEP, [SCRATCH]))) == 1
    assert unexplained(differences(STEP, real, [SCRATCH._replace(inside=False)])) == []


def test_the_fewest_unexplained_differences():
    """Against all ways to leave entries out, on short random sequences."""

    def fewest(ours: list[Allocation], theirs: list[Allocation]) -> tuple[int, int]:
        if not ours and not theirs:
            return 0, 0
        ways = []
        if ours and theirs and ours[0].bytes == theirs[0].bytes:
            ways.append(fewest(ours[1:], theirs[1:]))
        if ours:
            bad, good = fewest(ours[1:], theirs)
            ways.append((bad + 1, good))
        if theirs:
            bad, good = fewest(ours, theirs[1:])
            ways.append((bad, good + 1) if theirs[0].inside else (bad + 1, good))
        return min(ways)

    random = Random(1)
    for _ in range(200):
        ours = sequence(*[(random.randint(1, 3), "x") for _ in range(random.randint(0, 6))])
        theirs = sequence(
            *[(random.randint(1, 3), random.choice(["x", "scratch"])) for _ in range(random.randint(0, 6))]
        )
        found = differences(ours, theirs, [SCRATCH])
        bad = len(unexplained(found))
        assert (bad, len(found) - bad) == fewest(ours, theirs)
        left = [a for n, a in enumerate(ours) if (EXTRA, n) not in {(d.what, d.position) for d in found}]
        right = [a for n, a in enumerate(theirs) if (MISSING, n) not in {(d.what, d.position) for d in found}]
        assert [a.bytes for a in left] == [a.bytes for a in right]


def test_rows_of_cudas_history():
    rows = [
        ["segment_alloc", 20 << 20, 0, []],
        ["alloc", LARGE + 512, 0, ["nn.py:3:linear", "train.py:9:step"]],
        ["free_requested", LARGE + 512, 0, []],
        ["free_completed", LARGE + 512, 0, []],
        ["alloc", 512, 0, []],
    ]
    assert allocations_of_history(rows) == [
        Allocation(LARGE + 512, "train.py:9:step > nn.py:3:linear"),
        Allocation(512, ""),
    ]


def test_every_known_buffer_says_why_and_from_where():
    assert KNOWN_ON_CPU and all(known.why and known.source and known.pattern for known in KNOWN_ON_CPU)
