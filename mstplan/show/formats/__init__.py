"""Output formats, a file each: how a report is written. --format, its help and its refusals read `FORMATS`."""

from __future__ import annotations

from .as_csv import Csv
from .as_json import Json
from .as_markdown import Markdown
from .as_text import Text
from .base import Format

FORMATS: dict[str, Format] = {each.name: each for each in (Text(), Json(), Markdown(), Csv())}
"""By the name that --format has for them."""
