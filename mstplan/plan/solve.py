"""Solving the step model: the longest sequence that fits, the chunks to use, and what a step needs besides the card."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from functools import cache, lru_cache
from math import gcd, isqrt
from typing import NamedTuple

from ..errors import RecipeError, UnitError
from ..spec.hardware import Card, Gpu
from ..spec.model import Model
from ..step import expected
from ..step.cuda import BIAS_ROWS
from ..step.fsdp import shards_on_host
from ..step.instants import Instant
from ..step.kernels.base import Kernel
from ..step.optimizers import host_states
from ..step.recipe import Recipe
from ..step.simulation import Usage
from ..step.steps import Chunks, Entry, InstantPeak, Layout, Sizes, Step, evaluate, kernels_of, stored_inputs
from ..step.tape import ITEMSIZE, MIXER_CHUNKS, MOST_CHOSEN, Vector
from ..step.timing import attention_copies, step_seconds
from ..step.towers import check_length, shortest_length
from ..step.ulysses import shares_groups
from ..step.workspaces import IDS_PER_PARTIAL_SUM, MULTIPROCESSORS
from ..units import LONGEST, SHORTEST, format_gib, format_tokens
from .allocation import longest_that_runs, usage_up_to
from .calibration import Calibration
from .layout import (
    calibrated_step,
    calibration_at,
    cap_chunks,
    chunk_tokens,
    hardest_lengths,
    in_spans,
    layout_of,
    layout_of_no_length,
    pieces_that_there_are,
    row_sizes,
    span_starts,
    step_of,
    step_sizes,
    window_of,
)

MIN_GAIN = 0.01
"""A larger number of chunks must lengthen S_max, or lower the peak, by more than this share to be recommended."""


class StepPeak(NamedTuple):
    """The most bytes of a step: at which instant, and in a batch of how many tokens."""

    bytes: int
    instant: Instant
    tokens: int


class ChunkTokens(NamedTuple):
    """Tokens of a sequence in a chunk of the MLP and of the loss."""

    mlp: int
    loss: int


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
    def chunk_tokens(self) -> ChunkTokens:
        """Tokens of a sequence, or of a GPU's part of it, as it is run, in a chunk."""
        run_tokens = self.recipe.local_tokens(self.recipe.padded(self.seq_len))
        return ChunkTokens(chunk_tokens(run_tokens, self.chunks.mlp), chunk_tokens(run_tokens, self.chunks.loss))

    @property
    def fits(self) -> bool:
        """Whether it runs on the card: the allocator finds room for it, and CPU RAM, where that is known, too."""
        return self.tensors_fit and self.fits_host and self.usage.runs

    @property
    def tensors_fit(self) -> bool:
        """Whether what is alive at once fits on the card, were there no holes between."""
        return self.peak_bytes <= self.budget_bytes

    @property
    def usage(self) -> Usage:
        """What the caching allocator holds of it, step after step."""
        return usage_up_to(self.model, self.recipe, self.card, self.seq_len, self.chunks)

    @property
    def fits_host(self) -> bool:
        return self.card.host_bytes is None or self.host_bytes_of_node <= self.card.host_bytes

    @property
    def host_bytes_of_node(self) -> int:
        """CPU RAM that all processes of a machine need."""
        return self.host_bytes * self.recipe.processes_per_node

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Attention kernels that run at the peak."""
        layout = layout_of(self.model, self.recipe, self.chunks, self.peak.tokens, self.card.platform)
        return kernels_of(self.model, layout)

    @property
    def calibration(self) -> Calibration | None:
        """Calibration that the peak stands on; None: the formula alone."""
        return calibration_at(self.model, self.recipe, self.peak.tokens, self.chunks, self.card.platform)

    @property
    def expected_seconds(self) -> float | None:
        """Seconds that the step is expected to take at the GPU's measured rates; None where they have not been measured."""
        return _expected_seconds(self)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained a second, of all sequences of the step, at the expected time."""
        seconds, recipe = self.expected_seconds, self.recipe
        return recipe.batch * recipe.accumulation * self.seq_len / seconds if seconds else None

    def exactly(self) -> Plan:
        """Plan for batches of just so many tokens, whatever shorter ones need."""
        tokens = self.recipe.padded(self.seq_len)
        instant, size = peak_at(self.model, self.recipe, self.card, tokens, self.chunks)
        return self._replace(peak=StepPeak(size, instant, tokens))

    def instants(self) -> tuple[InstantPeak, ...]:
        """Instants of the step, each with the tensors alive at its largest moment."""
        tokens = self.peak.tokens
        return step_of(self.model, self.recipe, self.card, self.chunks, tokens).instants(
            step_sizes(self.recipe, tokens, self.chunks)
        )

    def binding_entries(self) -> tuple[Entry, ...]:
        return next(i.entries for i in self.instants() if i.name == self.instant)


class Answer(NamedTuple):
    """S_max of one strategy: the longest sequence that runs. `plan` is the step at S_max; at the shortest when not even that fits (s_max 0)."""

    strategy: str
    s_max: int
    plan: Plan
    s_max_tensors: int | None = (
        None  # by formula: the longest whose tensors alone would fit, were there no holes between
    )

    def __repr__(self) -> str:
        p, longest = self.plan, f"s_max {format_tokens(self.s_max)}" if self.s_max else "nothing fits"
        return f"<Answer {self.strategy}: {p.model.name} on {p.card.label}, {longest}, {p.peak_in_words}>"

    @property
    def step_seconds(self) -> float | None:
        """Of one optimizer step at S_max, at the card's nominal rates; None where there is no such step, or nothing counts it."""
        return self.plan.step_seconds or None if self.s_max else None

    @property
    def expected_seconds(self) -> float | None:
        """The same at measured rates; None where they have not been measured."""
        return self.plan.expected_seconds if self.s_max else None

    @property
    def tokens_per_second(self) -> float | None:
        """At S_max."""
        return self.plan.tokens_per_second if self.s_max else None


# ---- S_max ------------------------------------------------------------------------------------------------------------


def longest_sequence(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """S_max in tokens for fixed chunks: it and every shorter length fit, and one more does not; 0 when not even the shortest fits."""
    return _trainable(model, recipe, _longest_within_budget(model, recipe, card, chunks))


def _trainable(model: Model, recipe: Recipe, tokens: int) -> int:
    """As many tokens as there are, 0 where that is less than a sequence has at least, which may have images."""
    return tokens if tokens >= shortest_length(model, recipe) else 0


def _longest_within_budget(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """The longest of the lengths that batches can have, up to which all fit in so many pieces. Where a sliding window asks for an explicit
    mask, lengths whose mask is padded need more than their neighbours: the first length of either kind that does not fit ends it."""
    if recipe.padding_free and recipe.batch > 1:
        one_row = recipe.changed(batch=1, packing=recipe.samples_in_row)
        return _longest_within_budget(model, one_row, card, chunks) // recipe.batch // recipe.multiple * recipe.multiple
    window, multiple, ranks = window_of(model, recipe), recipe.multiple, recipe.sharers

    def reach(masked: bool, padded: bool = False) -> int:
        layout = layout_of_no_length(model, recipe, chunks, card.platform, masked, padded)
        longest = min(LONGEST, ranks * _longest_of_layout(model, layout, recipe, card, chunks))
        return longest // multiple * multiple

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


USUAL_TOKENS = 16384
"""Of a batch: where the search for the spans of S_max begins."""


def _longest_of_layout(model: Model, layout: Layout, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """The longest part of a sequence that a card can have, of a layout whose spans are those of it. Bytes grow with it, from span to span too: the longest of a
    step that is laid out for one is beyond it, before it, or the answer."""
    starts = span_starts(model, layout, recipe.batch, chunks)
    index, fits, fails = bisect_right(starts, USUAL_TOKENS // recipe.batch) - 1, -1, len(starts)
    while fits + 1 < fails:
        here = in_spans(model, layout, row_sizes(recipe, starts[index], chunks))
        here_step = calibrated_step(model, here, card.gpu.workspaces_bytes)
        longest = _longest_of_step(here_step, recipe, chunks, card.budget_bytes)
        aim = bisect_right(starts, longest) - 1
        if aim == index:
            return longest
        if aim > index:
            fits, index = index, min(aim, fails - 1)
        else:
            fails, index = index, max(aim, fits + 1, 0)
    return starts[fails] - 1 if fails < len(starts) else LONGEST


def _longest_of_step(step: Step, recipe: Recipe, chunks: Chunks, budget: int) -> int:
    """Each moment's bytes are a s^2 + b s + const but for rounding up to chunks and to 128: dropping the rounding gives
    an upper bound in closed form, taking it at its most a lower one; the exact length between them is bisected."""
    vectors = [moment.live for moments in step.moments.values() for moment in moments]
    sizes = recipe.batch, recipe.sequence_parallel, recipe.norm_sharers, chunks
    high = min(_largest_root(_polynomial(v, *sizes, 0), budget) for v in vectors)
    low = min(_largest_root(_polynomial(v, *sizes, 1), budget) for v in vectors)
    low = max(0, min(low, high))

    def fits(seq_len: int) -> bool:
        units = row_sizes(recipe, seq_len, chunks).units
        return all(evaluate(v, units) <= budget for v in vectors)

    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _polynomial(
    vector: Vector, batch: int, ranks: int, norm_sharers: int, chunks: Chunks, rounding: int
) -> tuple[int, int, int, int]:
    """(a, b, c, d) with bytes = (a s^2 + b s + c) / d, over a common denominator d of the chunk counts, tens and cards that share out norms.

    rounding 0: chunks, parts that cards norm, 128-row blocks and tens of tokens are taken as small as rounding can make them, and no keys as
    chosen; 1: as large, and as many keys as can be.
    """
    const, bs, bc, bk, bss, ss, s, br, p, b, bx, by, bz, bu, bv, buu, bvv, bsw, bq = vector
    few, some, most = MIXER_CHUNKS.values()
    d = chunks.mlp * chunks.loss * IDS_PER_PARTIAL_SUM * most * most * norm_sharers
    over = 1 + rounding  # (s / tokens + over)^2 is what a square of chunks and one more is at least, or at most
    square = (bss * batch + ss * ranks) * ranks * d + (buu * d // some**2 + bvv * d // most**2) * batch
    linear = (bs + br * ranks) * batch * d + s * d + (bc * d // chunks.mlp + bk * d // chunks.loss) * batch
    linear += bq * batch * d // norm_sharers
    linear += p * batch * d // IDS_PER_PARTIAL_SUM
    linear += (bx * d // few + (by + bu + 2 * over * buu) * d // some + (bz + bv + 2 * over * bvv) * d // most) * batch
    linear += bsw * MOST_CHOSEN * rounding * batch * d
    begun = (bx + by + bz) * rounding + (bu + bv) * over + (buu + bvv) * over**2
    extra = ((br * 127 + bc + bk + bq) * rounding + begun) * batch * d - p * d * (1 - rounding)
    return square, linear, (const + b * batch) * d + extra, d


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


NO_PIECES = 2**62
"""Tokens that no piece has: of an MLP that no layer has."""


def smallest_chunks_tokens(model: Model, gpu: Gpu) -> tuple[int, int]:
    """Tokens an MLP chunk and a loss chunk need to stay compute-bound (experts: each gets its share of the rows)."""
    widths = []
    if model.mlp is not None:
        widths.append(compute_bound_tokens(gpu, model.hidden, model.mlp.width))
    if model.experts is not None:
        rows = compute_bound_tokens(gpu, model.hidden, model.experts.width)
        widths.append(-(-rows * model.experts.number // model.experts.per_token))
    return max(widths, default=NO_PIECES), compute_bound_tokens(gpu, model.hidden, model.vocab)


def fixed_chunks(recipe: Recipe, mlp: int = 1, loss: int = 1) -> Chunks:
    """The recipe's chunks, with `mlp` and `loss` where it leaves them to us."""
    return Chunks(
        mlp if recipe.mlp_chunks == "auto" else recipe.mlp_chunks,
        loss if recipe.loss_chunks == "auto" else recipe.loss_chunks,
        1 if recipe.attention_groups == "auto" else recipe.attention_groups,
    )


MOST_GROUPS = 8
"""Of heads: of what attention takes beside its inputs and outputs, more would spare less than an eighth."""


def groups_of_heads(model: Model, recipe: Recipe, seq_len: int) -> int:
    """The most groups of heads in which attention's kernel keeps a card busy: with four blocks of 128 queries for each multiprocessor of
    the largest card the last round of them is a small part of its time. One where layers may have an explicit mask: sdpa keeps a copy
    of it for each group, which is more than groups spare."""
    blocks = recipe.rows * model.attention.heads * -(-recipe.row_tokens(seq_len) // 128)
    return next(n for n in _groups(model, recipe) if n == 1 or blocks >= n * 4 * MULTIPROCESSORS)


def _groups(model: Model, recipe: Recipe) -> list[int]:
    """Numbers of groups that heads of keys and values come in, and the ranks of a sequence can share, largest first."""
    own = (model.of_kind(kind).attention.kv_heads for kind in model.layer_kinds)
    heads = 1 if window_of(model, recipe) is not None else max(1, gcd(*own))
    divisors = (n for n in range(min(MOST_GROUPS, heads), 1, -1) if heads % n == 0)
    ranks = recipe.sequence_parallel
    return [*(n for n in divisors if ranks == 1 or shares_groups(model.attention, n, ranks)), 1]


def _in_groups(recipe: Recipe, groups: int) -> Recipe:
    return recipe.model_copy(update={"attention_groups": groups})


def _power_below(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)


def recommend_chunks(model: Model, recipe: Recipe, card: Card) -> Chunks:
    """The smallest chunk counts (powers of two) beyond which S_max grows by less than `MIN_GAIN`, none so large that a
    chunk's matrix products stop being compute-bound on the card."""
    recipe = pieces_that_there_are(model, recipe)
    if recipe.attention_groups == "auto":
        for groups in _groups(model, recipe):
            chunks = recommend_chunks(model, _in_groups(recipe, groups), card)
            longest = longest_sequence(model, recipe, card, chunks)
            if groups == 1 or groups_of_heads(model, recipe, longest) >= groups:
                return chunks
    if not recipe.is_open:
        return fixed_chunks(recipe)

    @cache
    def reach(chunks: Chunks) -> int:
        return longest_sequence(model, recipe, card, chunks)

    min_chunk_tokens = smallest_chunks_tokens(model, card.gpu)

    def compute_bound(chunks: Chunks) -> bool:
        counts = zip((recipe.mlp_chunks, recipe.loss_chunks), chunks[:2], min_chunk_tokens, strict=True)
        return all(
            setting != "auto" or m == 1 or chunk_tokens(recipe.local_tokens(reach(chunks)), m) * recipe.batch >= tokens
            for setting, m, tokens in counts
        )

    limit = fixed_chunks(recipe, 1, 2)
    if not compute_bound(limit):
        limit = fixed_chunks(recipe)
    for _ in range(8):
        tokens = (
            recipe.local_tokens(max(reach(limit), recipe.padded(1))) * recipe.batch
        )  # no batch is shorter than what it is padded to
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
    fewest = _fewest_chunks(recipe, limit, lambda chunks: reach(chunks) >= least_s_max)
    # where pieces of one are fewer, which need sums in fp32, there may be room for more of the other
    gaining = (c for c in _doubled_chunks(recipe, fewest) if reach(c) * (1 - MIN_GAIN) > reach(fewest))
    return next(filter(compute_bound, gaining), fewest)


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
    recipe = pieces_that_there_are(model, recipe)
    if recipe.attention_groups == "auto":
        recipe = _in_groups(recipe, groups_of_heads(model, recipe, recipe.padded(seq_len)))
    if not recipe.is_open:
        return fixed_chunks(recipe)

    @cache
    def peak(chunks: Chunks) -> int:
        return peak_up_to(model, recipe, card, seq_len, chunks).bytes

    min_chunk_tokens = smallest_chunks_tokens(model, card.gpu)
    tokens = recipe.local_tokens(recipe.padded(seq_len)) * recipe.batch
    limit = fixed_chunks(
        recipe, _power_below(tokens // min_chunk_tokens[0]), _power_below(tokens // min_chunk_tokens[1])
    )
    highest_peak = min(peak(limit), peak(fixed_chunks(recipe))) * (1 + MIN_GAIN)
    return _fewest_chunks(recipe, limit, lambda chunks: peak(chunks) <= highest_peak)


# ---- answers ------------------------------------------------------------------------------------------------------------


def peak_at(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks) -> tuple[Instant, int]:
    """The binding instant and its bytes."""
    return step_of(model, recipe, card, chunks, seq_len).largest(step_sizes(recipe, seq_len, chunks))


def peak_up_to(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks) -> StepPeak:
    """The peak of the batch, among those of up to `seq_len` tokens, that needs most."""
    peaks = [
        (*peak_at(model, recipe, card, tokens, chunks), tokens) for tokens in hardest_lengths(model, recipe, seq_len)
    ]
    return max((StepPeak(size, instant, tokens) for instant, size, tokens in peaks), key=lambda peak: peak.bytes)


def choose_chunks(model: Model, recipe: Recipe, card: Card, seq_len: int) -> Chunks:
    """The chunks to use at one length: as few as that length asks for, or those of S_max where only they fit, or where a length beyond
    S_max would fit in more pieces than are recommended, so that a length fits exactly when it is at most S_max."""
    chunks_at_s_max, chunks_at_length = (
        recommend_chunks(model, recipe, card),
        recommend_chunks_at(model, recipe, card, seq_len),
    )
    tensors_fit = peak_up_to(model, recipe, card, seq_len, chunks_at_length).bytes <= card.budget_bytes
    if tensors_fit != (seq_len <= longest_sequence(model, recipe, card, chunks_at_s_max)):
        return chunks_at_s_max
    if not tensors_fit or chunks_at_length == chunks_at_s_max:
        return chunks_at_length
    runs = usage_up_to(
        model, recipe, card, seq_len, cap_chunks(chunks_at_length, recipe.local_tokens(recipe.padded(seq_len)))
    ).runs
    return chunks_at_length if runs else chunks_at_s_max


def plan_at(model: Model, recipe: Recipe, card: Card, seq_len: int, chunks: Chunks | None = None) -> Plan:
    """The step of `recipe` at `seq_len` tokens; chunks as given, as in the recipe, or as recommended.

    Raises UnitError for a length that is none, RecipeError for chunks that are none.
    """
    if not isinstance(seq_len, int) or isinstance(seq_len, bool) or not SHORTEST <= seq_len <= LONGEST:
        raise UnitError(
            f"seq_len must be a whole number of tokens between {SHORTEST} and {LONGEST:,}, not {seq_len!r}."
        )
    check_length(model, recipe, seq_len)
    if chunks is not None and not all(isinstance(m, int) and m >= 1 for m in chunks):
        raise RecipeError(f"chunks must be whole numbers from 1, not {tuple(chunks)!r}.")
    chosen = Chunks(*chunks) if chunks is not None else choose_chunks(model, recipe, card, seq_len)
    run_tokens = recipe.padded(seq_len)
    capped = cap_chunks(chosen, recipe.local_tokens(run_tokens))
    built_step, run_sizes = step_of(model, recipe, card, capped, run_tokens), step_sizes(recipe, run_tokens, capped)
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


@lru_cache(maxsize=256)
def _expected_seconds(plan: Plan) -> float | None:
    if not plan.card.named or plan.model.stand_in is not None:
        return None
    return expected.expected_seconds(*_timed(plan))


def why_no_time(plan: Plan) -> str:
    """What of the step was not measured on a GPU of which other rates were; empty: it has an expected time, or can have none."""
    if not plan.card.named or plan.model.stand_in is not None:
        return ""
    return expected.why_unmeasured(*_timed(plan)[:3])


def attention_copies_bytes(plan: Plan) -> int:
    """Bytes that cross between CPU RAM and GPU in a step for attention's sake."""
    if not plan.recipe.attention_on_host:
        return 0
    built_step, recipe, _, sizes, _ = _timed(plan)
    return recipe.accumulation * sum(attention_copies(built_step, sizes))


def _timed(plan: Plan) -> tuple[Step, Recipe, Gpu, Sizes, Chunks]:
    """The step as it is run."""
    model, recipe, gpu, chunks = plan.model, plan.recipe, plan.card.gpu, plan.chunks
    tokens = recipe.padded(plan.seq_len)
    return step_of(model, recipe, plan.card, chunks, tokens), recipe, gpu, step_sizes(recipe, tokens, chunks), chunks


def max_seq(model: Model, recipe: Recipe, card: Card, strategy: str = "custom") -> Answer:
    """The longest sequence that runs with `recipe` on `card`, and fits in CPU RAM where that is known."""
    s_max_tensors, chunks = max_seq_of_tensors(model, recipe, card)
    shortest = shortest_length(model, recipe)
    s_max = _trainable(model, recipe, longest_that_runs(model, recipe, card, chunks, s_max_tensors))
    if s_max_tensors and not s_max:  # in pieces that suit a short sequence one may run all the same
        chunks = recommend_chunks_at(model, recipe, card, shortest)
        fitting = min(s_max_tensors, longest_sequence(model, recipe, card, chunks))
        s_max = _trainable(model, recipe, longest_that_runs(model, recipe, card, chunks, fitting))
    return Answer(strategy, s_max, plan_at(model, recipe, card, max(shortest, s_max), chunks), s_max_tensors)


def max_seq_of_tensors(model: Model, recipe: Recipe, card: Card) -> tuple[int, Chunks]:
    """The longest sequence whose tensors fit, also in CPU RAM where that is known, and the chunks to use."""
    chunks = recommend_chunks(model, recipe, card)
    s_max = longest_sequence(model, recipe, card, chunks)
    if s_max and card.host_bytes is not None:
        s_max = _trainable(model, recipe, min(s_max, _longest_on_host(model, recipe, card, chunks)))
    return s_max, chunks


def _longest_on_host(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> int:
    """Tokens whose offloaded tensors CPU RAM holds: layer inputs grow by as much with every token, saved tensors in steps."""
    assert card.host_bytes is not None
    for_one = card.host_bytes // recipe.processes_per_node
    built_step = step_of(model, recipe, card, chunks, window_of(model, recipe) or 1)  # with masks, which are saved, too
    if recipe.offload == "saved-tensors":
        return _longest_saved(model, recipe, for_one, built_step)
    fixed = host_bytes(model, recipe, 0, built_step)
    ranks, multiple = recipe.sharers, recipe.multiple
    per_tokens = host_bytes(model, recipe, ranks, built_step) - fixed
    remaining = for_one - fixed
    if remaining < 0:
        return 0
    return remaining // per_tokens * ranks // multiple * multiple if per_tokens else LONGEST


def _longest_saved(model: Model, recipe: Recipe, budget: int, built_step: Step) -> int:
    low, high = 0, LONGEST // recipe.multiple
    while low < high:
        middle = (low + high + 1) // 2
        if host_bytes(model, recipe, middle * recipe.multiple, built_step) <= budget:
            low = middle
        else:
            high = middle - 1
    return low * recipe.multiple


def host_bytes(model: Model, recipe: Recipe, seq_len: int, built_step: Step) -> int:
    """Host memory of one process: offloaded layer inputs or saved tensors, attention's, optimizer states, weights. Pinned, so it cannot be
    swapped."""
    if built_step.zero is not None:
        total = built_step.zero.host_bytes() if recipe.optimizer_on_host else 0
    else:
        total = host_states(recipe, built_step.trained) if not recipe.sharded else 0
    if recipe.weights_on_host and built_step.zero is None:
        shards = shards_on_host(recipe, built_step.card_weights)
        total += shards if recipe.sharded else built_step.parameters * recipe.weight_bytes
    if recipe.offload == "saved-tensors":
        total += built_step.saved_on_host(step_sizes(recipe, seq_len, Chunks(1, 1)))
    if recipe.attention_on_host:
        total += built_step.attention_on_host(step_sizes(recipe, seq_len, Chunks(1, 1)))
    if recipe.offload_layer_inputs:
        stored = stored_inputs(recipe, model.layers)
        total += stored * recipe.batch * recipe.local_tokens(seq_len) * model.hidden * ITEMSIZE[recipe.used_dtype]
    return total
