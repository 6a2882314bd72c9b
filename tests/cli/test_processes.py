"""What runs in several processes gives what one process gives, in order, and ends with it."""

from __future__ import annotations

import multiprocessing

import pytest

from mstplan.cli.processes import in_processes


def test_results_come_in_the_order_of_what_was_asked():
    words = ["eight", "four", "", "two"]
    with in_processes("counting", words) as map_each:
        assert list(map_each(len, words)) == [5, 4, 0, 3]
    assert multiprocessing.active_children() == []


def test_an_error_in_a_process_is_raised_here_and_ends_them_all():
    with pytest.raises(ValueError, match="invalid literal"), in_processes("reading", ["1", "one"]) as map_each:
        list(map_each(int, ["1", "one"]))
    assert multiprocessing.active_children() == []
