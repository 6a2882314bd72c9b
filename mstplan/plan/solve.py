"""Solving the step model: the longest sequence that fits, the chunks to use, and what a step needs besides the card."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import islice
from math import isqrt
from typing import NamedTuple

from ..errors import RecipeError, UnitError
from ..kept import KeptFile
from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..spec.platform import AMPERE, Platform
from ..step.cuda import BIAS_ROWS
from ..step.instants import Instant
from ..step.kernels import runs_sdpa
from ..step.kernels.base import Kernel
from ..step.optimizers import host_states
from ..step.recipe import Recipe
from ..step.steps import Chunks, Entry, InstantPeak, Layout, Sizes, Step, evaluate, kernels_of, step, stored_inputs
from ..step.tape import ITEMSIZE, Vector
from ..step.timing import step_seconds
from ..units import LONGEST, SHORTEST, format_gib, format_tokens, trainable_tokens
from . import calibration
from .calibration import Calibration

MIN_GAIN = 0.01
"""A larger number of chunks must lengthen S_max, or lower the peak, by more than this share to be recommended."""


def chunk_tokens(seq_len: int, chunks: int) -> int:
    return -(-seq_len // chunks)


class StepPeak(NamedTuple):
    """The most bytes of a step: at which instant, and in a batch of how many tokens."""

    bytes: int
    instant: Instant
    tokens: int


class Plan(NamedTuple):
    """A recipe on a card for batches of up to so many tokens. Bytes, tokens, seconds."""

    model: Model
    recipe: Recipe
    card: Card
    seq_len: int
    chunks: Chunks
    peak: StepPeak  # of the batch that needs most
    host_bytes: int
    step_seconds: float  # of one optimizer step, at the card's nominal rates: no real step is faster

    def __repr__(self) -> str:
        chunks = f", chunks {self.chunks.mlp} and {self.chunks.loss}" if self.in_chunks else ""
        fits = "fits" if self.fits else "does not fit"
        where = f"{self.model.name} on {self.card.label}, {format_tokens(self.seq_len)} tokens"
        return f"<Plan {where}: {fits}, {self.peak_in_words}{chunks}>"

    @property
    def peak_bytes(self) -> int:
        return self.peak.bytes

    @property
    def peak_in_words(self) -> str:
        """'peak 9.94 GiB of 78.58 GiB (loss)'"""
        return f"peak {format_gib(self.peak_bytes)} of {format_gib(self.budget_bytes)} ({self.instant})"

    @property
    def instant(self) -> Instant:
        """The binding one."""
        return self.peak.instant

    @property
    def budget_bytes(self) -> int:
        return self.card.budget_bytes

    @property
    def in_chunks(self) -> bool:
        """Whether the recipe runs the MLP or the loss in chunks, be it in one."""
        return self.recipe.loss_in_chunks or self.recipe.mlp_chunks != 1

    @property
    def chunk_tokens(self) -> Chunks:
        """Tokens of a sequence, as it is run, in a chunk of the MLP and of the loss."""
        run_tokens = self.recipe.padded(self.seq_len)
        return Chunks(chunk_tokens(run_tokens, self.chunks.mlp), chunk_tokens(run_tokens, self.chunks.loss))

    @property
    def fits(self) -> bool:
        """Whether it fits on the card, and in CPU RAM where that is known."""
        return self.peak_bytes <= self.budget_bytes and self.fits_host

    @property
    def fits_host(self) -> bool:
        return self.card.host_bytes is None or self.host_bytes <= self.card.host_bytes

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Attention kernels that run at the peak."""
        layout = layout_of(self.model, self.recipe, self.chunks, self.peak.tokens, self.card.platform)
        return kernels_of(self.model, layout)

    @property
    def calibration(self) -> Calibration | None:
        """Calibration that the peak stands on; None: the formula alone."""
        return calibration_at(self.model, self.recipe, self.peak.tokens, self.chunks, self.card.platform)

    def exactly(self) -> Plan:
        """Plan for batches of just so many tokens, whatever shorter ones need."""
        tokens = self.recipe.padded(self.seq_len)
        instant, size = peak_at(self.model, self.recipe, self.card, tokens, self.chunks)
        return self._replace(peak=StepPeak(size, instant, tokens))

    def instants(self) -> tuple[InstantPeak, ...]:
        """Instants of the step, each with the tensors alive at its largest moment."""
        tokens = self.peak.tokens
        return _step(self.model, self.recipe, self.card, self.chunks, tokens).instants(
            step_sizes(self.recipe, tokens, self.chunks)
        )

    def binding_entries(self) -> tuple[Entry, ...]:
        return next(i.entries for i in self.instants() if i.name == self.instant)


class Answer(NamedTuple):
    """S_max of one strategy. `plan` is the step at S_max; at `SHORTEST` tokens when even those do not fit (s_max 0)."""

    strategy: str
    s_max: int
    plan: Plan

    def __repr__(self) -> str:
        p, longest = self.plan, f"s_max {format_tokens(self.s_max)}" if self.s_max else "nothing fits"
        return f"<Answer {self.strategy}: {p.model.name} on {p.card.label}, {longest}, {p.peak_in_words}>"

    @property
    def step_seconds(self) -> float | None:
        """Of one optimizer step at S_max, at the card's nominal rates; None where there is no such step, or nothing counts it."""
        return self.plan.step_seconds or None if self.s_max else None


# ---- the step of a recipe -------------------------------------------------------------------------------------------


def window_of(model: Model, recipe: Recipe) -> int | None:
    """The length from which sdpa needs explicit masks; None: never."""
    if not runs_sdpa(recipe.attention) or not model.has_sdpa:
        return None
    windows = {kind.window for kind in model.layer_kinds if kind.window is not None}
    return min(windows) if windows else None


@lru_cache(maxsize=256)
def _bare_recipe(recipe: Recipe) -> Recipe:
    """The recipe without what only sizes depend on, so that steps are shared."""
    return recipe.model_copy(
        update={"batch": 1, "mlp_chunks": 1, "loss_chunks": 1, "accumulation": min(2, recipe.accumulation), "pad_to": 1}
    )


def layout_of(model: Model, recipe: Recipe, chunks: Chunks, seq_len: int, platform: Platform = AMPERE) -> Layout:
    """The structure of the step at `seq_len` tokens, where `platform` decides which attention kernels sdpa runs."""
    window = window_of(model, recipe)
    masked = window is not None and seq_len >= window
    layout = Layout(_bare_recipe(recipe), chunks.mlp > 1, chunks.loss > 1, masked, platform=platform)
    return layout._replace(padded=seq_len % BIAS_ROWS != 0 and pads_masks(model, layout))


def pads_masks(model: Model, layout: Layout) -> bool:
    """Whether an explicit mask is copied into one with padded rows where its rows do not begin at multiples of BIAS_ROWS."""
    return layout.masked and any(kernel.pads_masks for kernel in kernels_of(model, layout))


def _step(model: Model, recipe: Recipe, card: Card, chunks: Chunks, seq_len: int) -> Step:
    return _calibrated_step(model, layout_of(model, recipe, chunks, seq_len, card.platform), card.gpu.workspaces_bytes)


def _layout_step(
    model: Model, recipe: Recipe, card: Card, several_mlp: bool, several_loss: bool, masked: bool, padded: bool = False
) -> Step:
    layout = Layout(_bare_recipe(recipe), several_mlp, several_loss, masked, platform=card.platform)
    layout = layout._replace(padded=padded and pads_masks(model, layout))
    return _calibrated_step(model, layout, card.gpu.workspaces_bytes)


def _calibrated_step(model: Model, layout: Layout, workspace: int) -> Step:
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
    return Sizes(recipe.batch, seq_len, chunk_tokens(seq_len, chunks.mlp), chunk_tokens(seq_len, chunks.loss))


# ---- S_max ------------------------------------------------------------------------------------------------------------


def longest_sequence(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """S_max in tokens for fixed chunks: it and every shorter length fit, and one more does not; 0 when not even `SHORTEST` fits."""
    return trainable_tokens(_longest_within_budget(model, recipe, card, chunks))


def _longest_within_budget(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """The longest of the lengths that batches can have, up to which all fit in so many pieces. Where a sliding window asks for an explicit
    mask, lengths whose mask is padded need more than their neighbours: the first length of either kind that does not fit ends it."""
    window, multiple = window_of(model, recipe), recipe.pad_to

    def reach(masked: bool, padded: bool = False) -> int:
        layout_step = _layout_step(model, recipe, card, chunks.mlp > 1, chunks.loss > 1, masked, padded)
        return _longest_of_step(layout_step, recipe, chunks, card.budget_bytes) // multiple * multiple

    longest_unmasked = reach(masked=False)
    if window is None or longest_unmasked < (last_unmasked := (window - 1) // multiple * multiple):
        return longest_unmasked
    too_long = (
        _next_multiple(max(last_unmasked, reach(masked=True, padded=is_padded)), multiple, is_padded)
        for is_padded in (False, True)
    )
    return min(
        LONGEST // multiple * multiple, *(next_length - multiple for next_length in too_long if next_length is not None)
    )


def _next_multiple(length: int, multiple: int, is_padded: bool) -> int | None:
    """The next multiple of `multiple` whose mask is padded, or is not; None where no multiple is of that kind."""
    multiples = (length // multiple * multiple + n * multiple for n in range(1, BIAS_ROWS + 1))
    return next((n for n in multiples if (n % BIAS_ROWS != 0) == is_padded), None)


def _longest_of_step(step: Step, recipe: Recipe, chunks: Chunks, budget: int) -> int:
    """Each moment's bytes are a s^2 + b s + const but for rounding up to chunks and to 128: dropping the rounding gives
    an upper bound in closed form, taking it at its most a lower one; the exact length between them is bisected."""
    vectors = [moment.live for moments in step.moments.values() for moment in moments]
    high = min(_largest_root(_polynomial(v, recipe.batch, chunks, 0), budget) for v in vectors)
    low = min(_largest_root(_polynomial(v, recipe.batch, chunks, 1), budget) for v in vectors)
    low = max(0, min(low, high))

    def fits(seq_len: int) -> bool:
        units = step_sizes(recipe, seq_len, chunks).units
        return all(evaluate(v, units) <= budget for v in vectors)

    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _polynomial(vector: Vector, batch: int, chunks: Chunks, rounding: int) -> tuple[int, int, int, int]:
    """(a, b, c, d) with bytes = (a s^2 + b s + c) / d, over a common denominator d of the chunk counts.

    rounding 0: chunks and 128-row blocks are taken as exact shares; 1: as large as rounding up can make them.
    """
    const, bs, bc, bk, bss, ss, s, br = vector
    d = chunks.mlp * chunks.loss
    square = (bss * batch + ss) * d
    linear = (bs + br) * batch * d + s * d + bc * batch * chunks.loss + bk * batch * chunks.mlp
    extra = (br * 127 + bc + bk) * batch * d * rounding
    return square, linear, const * d + extra, d


def _largest_root(polynomial: tuple[int, int, int, int], budget: int) -> int:
    """The largest whole s >= 0 with a s^2 + b s + c <= budget * d; -1 when there is none."""
    a, b, c, d = polynomial
    remaining = budget * d - c
    if remaining < 0:
        return -1
    if a == 0:
        return min(LONGEST, remaining // b) if b > 0 else LONGEST
    return min(LONGEST, (isqrt(b * b + 4 * a * remaining) - b) // (2 * a))


# ---- chunks -------------------------------------------------------------------------------------------------------------


def compute_bound_tokens(gpu: Gpu, inner: int, outer: int) -> int:
    """Rows below which a (rows x inner) (inner x outer) product in bf16 is bound by memory bandwidth on this card.

    Roofline (Williams, Waterman, Patterson 2009): 2 r i o operations over 2 (r i + i o + r o) bytes reach the card's
    ridge point R = FLOP/s over bytes/s when r >= R i o / (i o - R (i + o)).
    """
    ridge = gpu.bf16_flops / gpu.memory_bandwidth
    margin = inner * outer - ridge * (inner + outer)
    return max(1, -(-int(ridge * inner * outer) // int(margin))) if margin >= 1 else inner * outer


def smallest_chunks_tokens(model: Model, gpu: Gpu) -> tuple[int, int]:
    """Tokens an MLP chunk and a loss chunk need to stay compute-bound (experts: each gets its share of the rows)."""
    widths = []
    if model.mlp is not None:
        widths.append(compute_bound_tokens(gpu, model.hidden, model.mlp.width))
    if model.experts is not None:
        rows = compute_bound_tokens(gpu, model.hidden, model.experts.width)
        widths.append(-(-rows * model.experts.number // model.experts.per_token))
    return max(widths), compute_bound_tokens(gpu, model.hidden, model.vocab)


def fixed_chunks(recipe: Recipe, mlp: int = 1, loss: int = 1) -> Chunks:
    """The recipe's chunks, with `mlp` and `loss` where it leaves them to us."""
    return Chunks(
        mlp if recipe.mlp_chunks == "auto" else recipe.mlp_chunks,
        loss if recipe.loss_chunks == "auto" else recipe.loss_chunks,
    )


def _power_below(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def recommend_chunks(model: Model, recipe: Recipe, card: Card) -> Chunks:
    """The smallest chunk counts (powers of two) beyond which S_max grows by less than `MIN_GAIN`, none so large that a
    chunk's matrix products stop being compute-bound on the card."""
    if "auto" not in (recipe.mlp_chunks, recipe.loss_chunks):
        return fixed_chunks(recipe)

    @cache
    def reach(chunks: Chunks) -> int:
        return longest_sequence(model, recipe, card, chunks)

    min_chunk_tokens = smallest_chunks_tokens(model, card.gpu)

    def compute_bound(chunks: Chunks) -> bool:
        counts = zip((recipe.mlp_chunks, recipe.loss_chunks), chunks, min_chunk_tokens, strict=True)
        return all(
            setting != "auto" or m == 1 or reach(chunks) * recipe.batch >= m * tokens for setting, m, tokens in counts
        )

    limit = fixed_chunks(recipe, 1, 2)
    if not compute_bound(limit):
        limit = fixed_chunks(recipe)
    for _ in range(8):
        tokens = max(reach(limit), recipe.padded(1)) * recipe.batch  # no batch is shorter than what it is padded to
        larger = fixed_chunks(
            recipe, _power_below(tokens // min_chunk_tokens[0]), _power_below(tokens // min_chunk_tokens[1])
        )
        if larger == limit or reach(larger) < reach(limit):
            break
        limit = larger
    while doubled := next(
        (c for c in _doubled_chunks(recipe, limit) if reach(c) > reach(limit) and compute_bound(c)), None
    ):
        limit = doubled
    least_s_max = reach(limit) * (1 - MIN_GAIN)
    return _fewest_chunks(recipe, limit, lambda chunks: reach(chunks) >= least_s_max)


def _doubled_chunks(recipe: Recipe, chunks: Chunks) -> list[Chunks]:
    """Twice the pieces for loss, MLP or both, where the recipe leaves them to us."""
    doubled = (fixed_chunks(recipe, chunks.mlp * m, chunks.loss * n) for m, n in ((1, 2), (2, 1), (2, 2)))
    return [each for each in doubled if each != chunks]


def _fewest_chunks(recipe: Recipe, limit: Chunks, is_good: Callable[[Chunks], bool]) -> Chunks:
    """The fewest chunks that are still good, first for the loss, then for the MLP; where the recipe leaves them to us."""
    if recipe.loss_chunks == "auto":
        limit = limit._replace(loss=_smallest_power(limit.loss, lambda m: is_good(limit._replace(loss=m))))
    if recipe.mlp_chunks == "auto":
        limit = limit._replace(mlp=_smallest_power(limit.mlp, lambda m: is_good(limit._replace(mlp=m))))
    return limit


def _smallest_power(limit: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest power of two up to limit for which enough(m) holds; it holds for limit, and from some power on."""
    if is_enough(1):
        return 1
    low, high = 0, limit.bit_length() - 1
    while low + 1 < high:
        middle = (low + high) // 2
        if is_enough(1 << middle):
            high = middle
        else:
            low = middle
    return 1 << high


def recommend_chunks_at(model: Model, recipe: Recipe, card: Card, seq_len: int) -> Chunks:
    """The smallest chunk counts whose peak at this length is within `MIN_GAIN` of the lowest, all chunks compute-bound."""
    if "auto" not in (recipe.mlp_chunks, recipe.loss_chunks):
        return fixed_chunks(recipe)

    @cache
    def peak(chunks: Chunks) -> int:
        return peak_up_to(model, recipe, card, seq_len, chunks).bytes

    min_chunk_tokens = smallest_chunks_tokens(model, card.gpu)
    tokens = recipe.padded(seq_len) * recipe.batch
    limit = fixed_chunks(
        recipe, _power_below(tokens // min_chunk_tokens[0]), _power_below(tokens // min_chunk_tokens[1])
    )
    highest_peak = min(peak(limit), peak(fixed_chunks(recipe))) * (1 + MIN_GAIN)
    return _fewest_chunks(recipe, limit, lambda chunks: peak(chunks) <= highest_peak)


def cap_chunks(chunks: Chunks, seq_len: int) -> Chunks:
    """No more pieces than tokens."""
    return Chunks(min(chunks.mlp, seq_len), min(chunks.loss, seq_len))


# ---- answers ------------------------------------------------------------------------------------------------------------


def peak_at(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks) -> tuple[Instant, int]:
    """The binding instant and its bytes."""
    return _step(model, recipe, card, chunks, seq_len).largest(step_sizes(recipe, seq_len, chunks))


def peak_up_to(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks) -> StepPeak:
    """The peak of the batch, among those of up to `seq_len` tokens, that needs most."""
    peaks = [
        (*peak_at(model, recipe, card, tokens, chunks), tokens) for tokens in hardest_lengths(model, recipe, seq_len)
    ]
    return max((StepPeak(size, instant, tokens) for instant, size, tokens in peaks), key=lambda peak: peak.bytes)


def hardest_lengths(model: Model, recipe: Recipe, seq_len: int) -> tuple[int, ...]:
    """Lengths of which one needs more than every other up to `seq_len`: that one as it is run; beyond a window, the nearest shorter one
    whose mask has to be padded where this one's has not, or the other way round, and the longest that needs no mask."""
    run_tokens, window, multiple = recipe.padded(seq_len), window_of(model, recipe), recipe.pad_to
    if window is None or run_tokens < window:
        return (run_tokens,)
    shorter = (
        n
        for n in range(run_tokens - multiple, max(window, run_tokens - BIAS_ROWS * multiple) - 1, -multiple)
        if (n % BIAS_ROWS != 0) != (run_tokens % BIAS_ROWS != 0)
    )
    last_unmasked = (window - 1) // multiple * multiple
    return (run_tokens, *islice(shorter, 1), *([last_unmasked] if last_unmasked else []))


def choose_chunks(model: Model, recipe: Recipe, card: Card, seq_len: int) -> Chunks:
    """The chunks to use at one length: as few as that length asks for, or those of S_max where only they fit, or where a length beyond
    S_max would fit in more pieces than are recommended, so that a length fits exactly when it is at most S_max."""
    chunks_at_s_max, chunks_at_length = (
        recommend_chunks(model, recipe, card),
        recommend_chunks_at(model, recipe, card, seq_len),
    )
    fits_at_length = peak_up_to(model, recipe, card, seq_len, chunks_at_length).bytes <= card.budget_bytes
    return (
        chunks_at_length
        if fits_at_length == (seq_len <= longest_sequence(model, recipe, card, chunks_at_s_max))
        else chunks_at_s_max
    )


def plan_at(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks | None = None) -> Plan:
    """The step of `recipe` at `seq_len` tokens; chunks as given, as in the recipe, or as recommended.

    Raises UnitError for a length that is none, RecipeError for chunks that are none.
    """
    if not isinstance(seq_len, int) or isinstance(seq_len, bool) or not SHORTEST <= seq_len <= LONGEST:
        raise UnitError(
            f"seq_len must be a whole number of tokens between {SHORTEST} and {LONGEST:,}, not {seq_len!r}."
        )
    if chunks is not None and not all(isinstance(m, int) and m >= 1 for m in chunks):
        raise RecipeError(f"chunks must be whole numbers from 1, not {tuple(chunks)!r}.")
    chosen = Chunks(*chunks) if chunks is not None else choose_chunks(model, recipe, card, seq_len)
    run_tokens = recipe.padded(seq_len)
    capped = cap_chunks(chosen, run_tokens)
    built_step, run_sizes = _step(model, recipe, card, capped, run_tokens), step_sizes(recipe, run_tokens, capped)
    host_size = host_bytes(model, recipe, run_tokens, built_step)
    peak = peak_up_to(model, recipe, card, seq_len, capped)
    return Plan(
        model,
        recipe,
        card,
        seq_len,
        capped,
        peak,
        host_size,
        step_seconds(built_step, recipe, card.gpu, run_sizes, capped),
    )


def max_seq(model: Model, recipe: Recipe, card: Card, strategy: str = "custom") -> Answer:
    """The longest sequence that fits with `recipe` on `card`, and in CPU RAM where that is known."""
    chunks = recommend_chunks(model, recipe, card)
    s_max = longest_sequence(model, recipe, card, chunks)
    plan = plan_at(model, recipe, card, max(SHORTEST, s_max), chunks)
    if s_max and not plan.fits_host:
        s_max = trainable_tokens(min(s_max, _longest_on_host(plan)))
        plan = plan_at(model, recipe, card, max(SHORTEST, s_max), chunks)
    return Answer(strategy, s_max, plan)


def _longest_on_host(plan: Plan) -> int:
    """Tokens whose offloaded tensors CPU RAM holds: they grow by as much with every token."""
    assert plan.card.host_bytes is not None
    built_step = _step(plan.model, plan.recipe, plan.card, plan.chunks, 1)
    fixed = host_bytes(plan.model, plan.recipe, 0, built_step)
    per_token = host_bytes(plan.model, plan.recipe, 1, built_step) - fixed
    remaining, multiple = plan.card.host_bytes - fixed, plan.recipe.pad_to
    return remaining // per_token // multiple * multiple if remaining >= 0 and per_token else 0


def host_bytes(model: Model, recipe: Recipe, seq_len: int, built_step: Step) -> int:
    """Host memory of one process: offloaded layer inputs, optimizer states, weights. Pinned, so it cannot be swapped."""
    total = host_states(recipe, built_step.trained)
    if recipe.weights_on_host:
        total += built_step.parameters * recipe.weight_bytes
    if recipe.offload_layer_inputs:
        stored = stored_inputs(recipe, model.layers)
        total += stored * recipe.batch * seq_len * model.hidden * ITEMSIZE[recipe.used_dtype]
    return total
