"""No test reads or writes what the user has; processes that tests start run on one thread, as the tests do."""

from __future__ import annotations

import os
import tempfile

import pytest

_folder = tempfile.TemporaryDirectory(prefix="mstplan-tests-")
os.environ["MSTPLAN_HOME"] = _folder.name
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """What a test kept in a folder of its own (calibrations, a card's constants) is not remembered after it."""
    if os.environ["MSTPLAN_HOME"] != _folder.name:
        from mstplan.plan import calibration, hardware, solve

        for remembered in (calibration.of_model, solve._calibrated, hardware.gpus):
            remembered.cache_clear()
