"""Where the data files that ship with mstplan lie: models, cards, published figures."""

from __future__ import annotations

from pathlib import Path

_package = Path(__file__).resolve().parent
# A wheel carries them inside the package; a checkout keeps them in the folder `profiles/` beside it.
ROOT = _package / "profiles" if (_package / "profiles").is_dir() else _package.parent / "profiles"
