"""No test reads or writes what the user has; processes that tests start run on one thread, as the tests do."""

from __future__ import annotations

import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="mstplan-tests-")
os.environ["MSTPLAN_HOME"] = _folder.name
os.environ.setdefault("OMP_NUM_THREADS", "1")
