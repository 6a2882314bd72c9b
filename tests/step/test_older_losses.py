"""Losses of older transformers beside the current one: how many copies of the logits each has at its largest."""

from __future__ import annotations

from mstplan.plan.layout import layout_of, step_sizes
from mstplan.spec.catalog import load_model
from mstplan.step.instants import Instant
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, step

MODEL, TOKENS = load_model("llama3.2-1b"), 2048
LOGITS = MODEL.vocab * TOKENS  # entries


def peaks(loss: str) -> dict[Instant, int]:
    """Bytes at each instant, with layers checkpointed so that the loss outweighs them."""
    recipe, chunks = Recipe(checkpoint="layer", loss=loss), Chunks(1, 1)
    sizes = step_sizes(recipe, TOKENS, chunks)
    return {peak.name: peak.bytes for peak in step(MODEL, layout_of(MODEL, recipe, chunks, TOKENS), 0).instants(sizes)}


def test_before_449_logits_have_one_more_copy_in_forward_alone() -> None:
    """from source: transformers 4.48.3, loss/loss_utils.py."""
    now, then = peaks("transformers"), peaks("transformers<4.49")
    assert then[Instant.LOSS] - now[Instant.LOSS] == 4 * LOGITS
    assert then[Instant.LOSS_BACKWARD] == now[Instant.LOSS_BACKWARD]


def test_before_445_the_copy_stays_for_backward() -> None:
    now, then = peaks("transformers"), peaks("transformers<4.45")
    assert then[Instant.LOSS_BACKWARD] - now[Instant.LOSS_BACKWARD] == 4 * LOGITS
