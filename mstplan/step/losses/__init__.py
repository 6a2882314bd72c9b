"""Losses, a file each: what LM head and loss make and keep, and how a real step computes them.

Recipes, the command line's help, refusals, the formula and the step that is traced and measured read `LOSSES`.
"""

from __future__ import annotations

from .base import Loss
from .cce import Cce
from .chunked import Chunked
from .liger import Liger
from .transformers import Transformers
from .transformers_before_445 import TransformersBefore445
from .transformers_before_449 import TransformersBefore449
from .trl import Trl

LOSSES: dict[str, Loss] = {
    each.name: each
    for each in (
        Transformers(),
        TransformersBefore449(),
        TransformersBefore445(),
        Chunked(),
        Liger(),
        Cce(),
        Trl(),
    )
}
"""By the name that recipes have for them."""
