"""Where data lies: the files that ship with mstplan (models, cards, calibrations, published figures), and those it makes."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import OutputError

_package = Path(__file__).resolve().parent
# A wheel carries them inside the package; a checkout keeps them in the folder `profiles/` beside it.
ROOT = _package / "profiles" if (_package / "profiles").is_dir() else _package.parent / "profiles"


def user_folder() -> Path:
    """Folder that mstplan keeps for its user: $MSTPLAN_HOME, else mstplan in $XDG_CACHE_HOME, else ~/.cache/mstplan. Raises OutputError for
    a user who has no home."""
    folder = os.environ.get("MSTPLAN_HOME")
    if folder:
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mstplan"
    except RuntimeError:  # no HOME, and no such user
        raise OutputError("there is no home folder to keep files in.\nSet MSTPLAN_HOME to a folder.") from None
