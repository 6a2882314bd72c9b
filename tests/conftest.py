"""No test reads or writes what the user has; processes that tests start run on one thread, as the tests do."""

from __future__ import annotations

import gc
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "mstplan",
    derandomize=True,  # the same examples in every run
    deadline=None,  # nothing fails because the machine is slow
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("mstplan")

_folder = tempfile.TemporaryDirectory(prefix="mstplan-tests-")
os.environ["MSTPLAN_HOME"] = _folder.name
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST_FIRST = (
    "tracing/test_survey.py",
    "step/test_against_torch.py",
    "tracing/test_adapters.py",
    "tracing/test_fsdp.py",
    "tracing/test_against_cpu.py",
    "checking/test_rungs.py",
    "checking/test_archive.py",
    "test_notebooks.py",
    "tracing/test_extend.py",
    "step/test_adapters.py",
    "measuring/test_sweep.py",
    "measuring/test_ranks.py",
    "plan/test_solve.py",
    "cli/test_measuring.py",
    "spec/test_survey.py",
    "train/test_adapters.py",
    "step/test_steps.py",
    "plan/test_ways.py",
    "measuring/test_worker.py",
    "tracing/test_mixers.py",
    "tracing/test_expert_parallel.py",
    "tracing/test_tensor_parallel.py",
    "tracing/test_ranks_with_images.py",
    "train/test_expert_ranks.py",
    "train/test_distributed_images.py",
    "tracing/test_fsdp1_adapters.py",
    "tracing/test_fsdp_in_part.py",
    "tracing/test_fsdp1.py",
    "tracing/test_ulysses.py",
    "tracing/test_ring.py",
    "tracing/test_ddp.py",
    "cli/test_planning.py",
    "step/test_events.py",
)
"""Files that take 20 seconds or more, of two workers that take a file each: the last one to begin must not be one of these."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    first = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    assert all(path.is_file() for path in first), "LONGEST_FIRST names a file that is not there"
    items.sort(key=lambda item: first.get(item.path, len(first)))


_files: list[Path] = []


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What is there before a file's first test stays: the libraries, and what earlier files keep. The collector need not walk all of it
    again, as it did each time that a trainer or a tracer called it; that took half of the time of some files."""
    if item.path not in _files:
        _files.append(item.path)
        gc.collect()
        gc.freeze()
