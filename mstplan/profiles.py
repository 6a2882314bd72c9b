"""Where data lies: the files that ship with mstplan (models, cards, calibrations, published figures), and those it makes."""

from __future__ import annotations

import os
from pathlib import Path

_package = Path(__file__).resolve().parent
# A wheel carries them inside the package; a checkout keeps them in the folder `profiles/` beside it.
ROOT = _package / "profiles" if (_package / "profiles").is_dir() else _package.parent / "profiles"


def user_folder() -> Path:
    """What mstplan keeps for its user: $MSTPLAN_HOME, else mstplan in $XDG_CACHE_HOME, else ~/.cache/mstplan."""
    named = os.environ.get("MSTPLAN_HOME")
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mstplan"
