"""The step of a recipe at a length: its structure, its sizes, and the lengths of batches that need most."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice

from ..kept import KeptFile
from ..spec.hardware import Card
from ..spec.model import Model
from ..spec.platform import AMPERE, Platform
from ..step.cuda import BIAS_ROWS
from ..step.kernels import runs_sdpa
from ..step.recipe import Recipe
from ..step.steps import Chunks, Layout, Sizes, Step, kernels_of, step, tape_of
from ..step.tape import BASIS, workspace_starts
from ..step.towers import masks_text
from ..step.workspaces import Span, Spans, span_at
from . import calibration
from .calibration import Calibration


def chunk_tokens(seq_len: int, chunks: int) -> int:
    return -(-seq_len // chunks)


def window_of(model: Model, recipe: Recipe) -> int | None:
    """The length from which sdpa needs explicit masks; None: never."""
    if not runs_sdpa(recipe.attention) or not model.has_sdpa:
        return None
    if recipe.packing > 1 or masks_text(model, recipe):
        return 1
    windows = {kind.window for kind in model.layer_kinds if kind.window is not None}
    if any(kind.causal_mask for kind in model.layer_kinds):
        windows.add(1)
    if model.idle_window is not None:
        windows.add(model.idle_window)
    return min(windows) if windows else None


@lru_cache(maxsize=256)
def bare_recipe(recipe: Recipe) -> Recipe:
    """The recipe without what only sizes depend on, so that steps are shared."""
    return recipe.model_copy(
        update={
            "batch": 1,
            "mlp_chunks": 1,
            "loss_chunks": 1,
            "attention_groups": 1,
            "accumulation": min(3 if recipe.keeps_whole_gradients else 2, recipe.accumulation),
            "pad_to": 1,
            "packing": recipe.samples_in_row,
            "padding_free": False,
        }
    )


def layout_of(model: Model, recipe: Recipe, chunks: Chunks, seq_len: int, platform: Platform = AMPERE) -> Layout:
    """The structure of the step at `seq_len` tokens, where `platform` decides which attention kernels sdpa runs."""
    window = window_of(model, recipe)
    masked = window is not None and seq_len >= window
    layout = layout_of_no_length(model, recipe, chunks, platform, masked, seq_len % BIAS_ROWS != 0)
    return in_spans(model, layout, step_sizes(recipe, seq_len, chunks))


def layout_of_no_length(
    model: Model, recipe: Recipe, chunks: Chunks, platform: Platform, masked: bool = False, is_odd: bool = False
) -> Layout:
    """The structure without the spans that depend on the length. is_odd: a mask's rows do not begin at multiples of BIAS_ROWS."""
    layout = Layout(
        bare_recipe(recipe),
        chunks.mlp > 1,
        chunks.loss > 1,
        masked,
        platform=platform,
        groups=chunks.groups,
        masks_all=masks_text(model, recipe),
        several_rows=recipe.rows > 1
        and (
            recipe.layer_in_chunks
            or recipe.sharers > 1
            or recipe.norm_sharers > 1
            or copies_rows(model)
            or recipe.images == 1
        ),
    )
    return layout._replace(padded=is_odd and pads_masks(model, layout))


def pieces_that_there_are(model: Model, recipe: Recipe) -> Recipe:
    """The recipe, which leaves pieces of an MLP to us only where a layer has one."""
    return recipe if model.feeds_forward or recipe.mlp_chunks != "auto" else recipe.changed(mlp_chunks=1)


def check_counted(model: Model, recipe: Recipe) -> None:
    """Raise RecipeError where the formula does not count a model with a recipe, whatever the length."""
    recipe = pieces_that_there_are(model, recipe)
    several = (1 if given == 1 else 2 for given in (recipe.mlp_chunks, recipe.loss_chunks))
    step(model, layout_of_no_length(model, recipe, Chunks(*several), AMPERE), 0)


def copies_rows(model: Model) -> bool:
    """Whether attention's products take copies of what several sequences share or have each of its own."""
    a = model.attention
    return a.keys == "broadcast" or model.alibi or (a.latent is not None and a.latent.indexer is not None)


def pads_masks(model: Model, layout: Layout) -> bool:
    """Whether an explicit mask is copied into one with padded rows where its rows do not begin at multiples of BIAS_ROWS."""
    return layout.masked and any(kernel.pads_masks for kernel in kernels_of(model, layout))


def in_spans(model: Model, layout: Layout, sizes: Sizes) -> Layout:
    """The layout, in the spans that the tokens lie in."""
    starts, units = _workspace_starts(model, layout), dict(zip(BASIS, sizes.units, strict=True))
    spans = {name: span_at(starts.get(name, ()), units[name]) for name in ("bs", "bc", "bk", "bq")}
    return layout._replace(spans=Spans(**spans, b=Span(sizes.batch, sizes.batch)))


@lru_cache(maxsize=256)
def _workspace_starts(model: Model, layout: Layout) -> dict[str, set[int]]:
    """By kind of tokens, the numbers from which workspaces grow in another way."""
    return workspace_starts(tape_of(model, layout))


def span_starts(model: Model, layout: Layout, batch: int, chunks: Chunks) -> list[int]:
    """Lengths from which a step lies in other spans, from 0."""
    # what depends on the number of sequences has one span
    pieces = {"bs": 1, "bc": chunks.mlp, "bk": chunks.loss, "bq": layout.recipe.norm_sharers}
    starts = _workspace_starts(model, layout)
    return sorted(
        {0, *(n * (-(-each // batch) - 1) + 1 for name, n in pieces.items() for each in starts.get(name, ()))}
    )


def step_of(model: Model, recipe: Recipe, card: Card, chunks: Chunks, seq_len: int) -> Step:
    return calibrated_step(model, layout_of(model, recipe, chunks, seq_len, card.platform), card.gpu.workspaces_bytes)


def step_of_no_length(model: Model, recipe: Recipe, card: Card) -> Step:
    """Step in one piece, without the workspaces that depend on the length, nor explicit masks."""
    layout = layout_of_no_length(model, recipe, Chunks(1, 1), card.platform)
    return calibrated_step(model, layout, card.gpu.workspaces_bytes)


def calibrated_step(model: Model, layout: Layout, workspace: int) -> Step:
    """The formula's step, or what a calibration has in its place."""
    if calibration.are_set_aside():
        return step(model, layout, workspace)
    return _cached_step(model, layout, workspace, calibration.find_own_file(model))


@lru_cache(maxsize=1024)
def _cached_step(model: Model, layout: Layout, workspace: int, _own: KeptFile | None) -> Step:
    """Step for one state of the user's file of calibrations."""
    replacement = _find_calibration(model, layout)
    formula = step(model, layout, workspace)
    return formula if replacement is None else formula.calibrated(replacement.moments)


def calibration_at(
    model: Model, recipe: Recipe, seq_len: int, chunks: Chunks, platform: Platform = AMPERE
) -> Calibration | None:
    """The calibration that the answer at this length stands on; None: the formula."""
    return _find_calibration(model, layout_of(model, recipe, chunks, seq_len, platform))


def _find_calibration(model: Model, layout: Layout) -> Calibration | None:
    """Calibrations are of lengths without padding."""
    if layout.padded:
        return None
    kernels = tuple(kernel.name for kernel in kernels_of(model, layout))
    return calibration.find_calibration(
        model, layout.recipe, layout.several_mlp_chunks, layout.several_loss_chunks, layout.masked, kernels
    )


def step_sizes(recipe: Recipe, seq_len: int, chunks: Chunks) -> Sizes:
    return row_sizes(recipe, recipe.row_tokens(seq_len), chunks)


def row_sizes(recipe: Recipe, tokens: int, chunks: Chunks) -> Sizes:
    """Sizes of a step whose rows have so many tokens on a card."""
    in_chunks = chunk_tokens(tokens, chunks.mlp), chunk_tokens(tokens, chunks.loss)
    return Sizes(
        recipe.rows, tokens, *in_chunks, recipe.sequence_parallel, recipe.context_parallel, recipe.norm_sharers
    )


def hardest_lengths(model: Model, recipe: Recipe, seq_len: int) -> tuple[int, ...]:
    """Lengths of which one needs more than every other up to `seq_len`: that one as it is run; beyond a window, the nearest shorter one
    whose mask has to be padded where this one's has not, or the other way round, and the longest that needs no mask."""
    run_tokens, window, multiple = recipe.padded(seq_len), window_of(model, recipe), recipe.multiple
    if window is None or run_tokens < window:
        return (run_tokens,)
    shorter = (
        n
        for n in range(run_tokens - multiple, max(window, run_tokens - BIAS_ROWS * multiple) - 1, -multiple)
        if (n % BIAS_ROWS != 0) != (run_tokens % BIAS_ROWS != 0)
    )
    last_unmasked = (window - 1) // multiple * multiple
    return (run_tokens, *islice(shorter, 1), *([last_unmasked] if last_unmasked else []))


def cap_chunks(chunks: Chunks, seq_len: int) -> Chunks:
    """No more pieces than tokens."""
    return chunks._replace(mlp=min(chunks.mlp, seq_len), loss=min(chunks.loss, seq_len))
