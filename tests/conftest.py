"""No test reads or writes what the user has."""

from __future__ import annotations

import os
import tempfile

_folder = tempfile.TemporaryDirectory(prefix="mstplan-tests-")
os.environ["MSTPLAN_HOME"] = _folder.name
