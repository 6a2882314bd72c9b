"""Keeps from people who plan, trace or measure what packages say to those who write training scripts with them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging

_WARNING = r"(transformers|peft|bitsandbytes)(\.|$)"
"""Modules whose warnings nobody need heed who hands in a recipe: of interfaces that go away, of adapters beside tied weights, of layouts."""


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Silence transformers, peft and bitsandbytes, but for their errors."""
    bitsandbytes = logging.getLogger("bitsandbytes")
    before, level = transformers_logging.get_verbosity(), bitsandbytes.level
    transformers_logging.set_verbosity_error()
    bitsandbytes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_WARNING)
            yield
    finally:
        bitsandbytes.setLevel(level)
        transformers_logging.set_verbosity(before)


@contextmanager
def quiet_attempts() -> Iterator[None]:
    """Silence what torch logs, with its traceback, of an operation on fake tensors that fails: where attempts may fail, that is no news."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
