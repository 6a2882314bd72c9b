"""The step model: one training step as instants, each a sum of tensors, in closed form over batch, length and chunks.

A step is forward, loss, backward and optimizer step. `Step` lays a model's layers out on a tape as the recipe asks
(checkpointed, chunked, offloaded), replays it (`tape.py`), and keeps for every named instant the moments that can be its
largest: vectors over batch, tokens, chunk tokens and their squares. Peaks and S_max are read off those vectors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import copy
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from operator import itemgetter
from typing import NamedTuple

from ..errors import RecipeError, did_you_mean, quoted
from ..spec.families import family_of
from ..spec.families.base import LAYER
from ..spec.model import LayerKind, Mamba2, Model
from ..spec.platform import AMPERE, Platform
from . import expert_parallel, ring, tensor_parallel, ulysses
from .adapters import DOWN, MAGNITUDE, MATRICES, WORDS, Adapters
from .altup import check_recipe as check_altup
from .altup import into_streams, out_of_streams
from .autograd import record_step
from .clipping import clipping
from .cuda import CUBLASLT_WORKSPACE, flash_rows, pinned_bytes
from .expert_adapters import check_recipe, list_linears, list_parameters
from .fsdp import (
    card_weights,
    check_beside_autocast,
    flat_shards,
    groups_of,
    into_groups,
    reduced_dtype,
    shard_of,
    shards_of,
    stepped,
)
from .indexer import check_recipe as check_indexer
from .instants import Instant, Stage
from .kernels import KERNELS, NO_SDPA, chosen, runs_sdpa
from .kernels.base import AttentionCall, Kernel
from .layers import HIDDEN, PER_LAYER, MlpChunks, Numerics, Writer, layer, norm_in_chunks, rotary_dtype, without_bytes
from .losses import LOSSES
from .mixers import check_recipe as check_mixers
from .optimizers import bytes_to_step, optimizer_memory
from .optimizers.base import Held, summed
from .recipe import CHUNK_FIELDS, STRATEGIES, Recipe
from .ring import Ring, ranks_that_differ
from .roles import Purpose, Role, State
from .saved_tensors import Offloaded, offload_saved
from .selection import TOWERS, Named, Selection, WeightKind
from .storage import Stored, in_sum, scales_of
from .tape import (
    BASIS,
    ITEMSIZE,
    MIXER_CHUNKS,
    MOST_CHOSEN,
    ZERO,
    Alive,
    Joined,
    Label,
    Moment,
    Op,
    Part,
    Rules,
    Tape,
    TapeWriter,
    Tensor,
    Vector,
    Weight,
    WeightWorkspace,
    add,
    backward,
    finish_reducing,
    forward,
    grad_of,
    input_lingers,
    step_weights,
    sums_of,
    tensor_of,
    undominated,
    weight_gradient,
)
from .towers import (
    cast_inputs,
    check_images,
    check_reached,
    images_of_batch,
    modules_of_towers,
    numbers_of_patches,
    see,
)
from .towers.base import Images, Seen
from .workspaces import IDS_PER_PARTIAL_SUM, SortedLookups, Spans
from .zero import Zero, check_dtypes, weights_in_order
from .zero3 import Record, Visit, Zero3, check_calls

CALIBRATED = "calibration less formula"
POSITION_IDS = "position ids"
WORKSPACES, LT_WORKSPACES = "cuBLAS workspaces", "cuBLASLt workspaces"
GRADIENT_BUCKETS = "DDP's buckets of gradients"


Note = Callable[[Iterable[tuple[Instant, Moment]], Alive], None]
"""What writes down moments of a step by their instant, with all that is alive beside them."""


class Layout(NamedTuple):
    """The part of a recipe that decides a step's structure; lengths, batch and chunk counts are filled in later."""

    recipe: Recipe  # with batch and chunk counts normalised
    several_mlp_chunks: bool
    several_loss_chunks: bool
    masked: bool  # sliding-window layers carry an explicit mask, or all layers that of packed samples
    padded: bool = False  # whose rows are padded (cuda.BIAS_ROWS)
    spans: Spans | None = None  # that the tokens lie in; None: workspaces that depend on them are left out
    platform: Platform = AMPERE  # by which sdpa chooses its kernels
    groups: int = 1  # of heads, over which attention runs one after the other
    several_rows: bool = False  # sequences, where that makes copies: a layer in pieces, heads that products broadcast
    alternative: int = 0  # which of the ranks that may hold most, where several may
    masks_all: bool = False  # images make all layers' masks explicit

    def masks(self, kind: LayerKind) -> bool:
        """Whether layers of a kind carry an explicit mask."""
        return self.masked and (self.recipe.packing > 1 or self.masks_all or kind.asks_mask)


class Copies(NamedTuple):
    """Tensors of the same size."""

    copies: int
    bytes: int  # of all


class Entry(NamedTuple):
    """One tensor, or several of one kind, alive at an instant.

    role: what it is for, which tells it from others of its size. sizes: of tensors that are alike but for their size, how many
    have which.
    """

    name: str
    shape: str  # symbolic, such as "(b, s, I)"
    dtype: str
    copies: int
    bytes: int  # of all copies
    role: Purpose | None = None
    sizes: tuple[Copies, ...] = ()


class InstantPeak(NamedTuple):
    name: Instant
    bytes: int
    operation: str  # the moment within the instant at which it is largest
    entries: tuple[Entry, ...]  # largest first; they add up to `bytes`


class Chunks(NamedTuple):
    """Numbers of pieces of the sequence, for the MLP and for LM head and loss; and groups of heads, for attention."""

    mlp: int
    loss: int
    groups: int = 1

    def put_into(self, recipe: Recipe) -> Recipe:
        """The recipe with these numbers."""
        return recipe.changed(**dict(zip(CHUNK_FIELDS, self, strict=True)))


class Sizes(NamedTuple):
    """Sizes at which a vector is evaluated. Counts of sequences and of the tokens that a card has of each; ranks: cards that share a
    sequence, each of which attends to all of it with its part of the heads; ring: the same of cards to which all of it comes round;
    norm_sharers: cards that norm a part of it each."""

    batch: int
    seq_len: int
    mlp_chunk_tokens: int
    loss_chunk_tokens: int
    ranks: int = 1
    ring: int = 1
    norm_sharers: int = 1

    @property
    def units(self) -> tuple[int, ...]:
        b, s, whole = self.batch, self.seq_len, self.seq_len * self.ranks
        in_chunks = b * self.mlp_chunk_tokens, b * self.loss_chunk_tokens
        x, y, z = (-(-s // tokens) for tokens in MIXER_CHUNKS.values())
        in_mixers = (b * x, b * y, b * z, b * (y + 1), b * (z + 1), b * (y + 1) ** 2, b * (z + 1) ** 2)
        chosen = b * s * min(s, MOST_CHOSEN)
        tens = b * s // IDS_PER_PARTIAL_SUM
        scores = b * s * whole * self.ring, whole * whole  # of all heads, a card has those of its own; of none
        return (
            1,
            b * s,
            *in_chunks,
            *scores,
            s,
            b * flash_rows(whole),
            tens,
            b,
            *in_mixers,
            chosen,
            b * -(-s // self.norm_sharers),
        )


def evaluate(vector: Vector, units: tuple[int, ...]) -> int:
    return sum(map(int.__mul__, vector, units))


class Step:
    """One training step of `model` under `layout` on a card whose cuBLAS workspaces take so many bytes."""

    def __init__(self, model: Model, layout: Layout, workspace: int):
        self.model, self.layout, self.workspace = model, layout, workspace
        self.tape = tape_of(model, layout)
        last = layout.alternative + 1 == len(ranks_that_differ(layout.recipe.context_parallel))
        self.other = None if last else Step(model, layout._replace(alternative=layout.alternative + 1), workspace)
        saved = offload_saved(self.tape) if layout.recipe.offload == "saved-tensors" else Offloaded(self.tape, ())
        self.replayed, self.on_host = saved  # the tape as it is replayed, and saved tensors in CPU RAM
        self.weights = step_weights(self.tape.ops)
        self.parameters = sum(w.numel * n for w, n in self.weights)
        self.card_weights = card_weights(self.tape, self.weights, layout.recipe)
        laid_out = layout.recipe.weights_on_host or layout.recipe.images  # with images they are on the tape
        self.towers = [] if laid_out else tower_weights(model, layout.recipe)
        self.zero = self._partitions()
        self.trained_on_card = [(w, n) for w, n in self.card_weights if w.trained]
        if self.zero is not None:  # of which each optimizer steps a part, in fp32
            self.trained_on_card = [(stepped, 1) for stepped in self.zero.steps]
        steps = stepped(self.tape) if layout.recipe.flat else self.trained_on_card
        optimizer = optimizer_memory(layout.recipe, steps)
        self.rows_to_step = tensor_parallel.rows_to_step(layout.recipe, steps)
        self.optimizer = optimizer._replace(temporaries=(*optimizer.temporaries, *self.rows_to_step))
        self.clipping = () if self.zero is not None else clipping(layout.recipe, steps)
        self.card_parameters = sum(
            w.numel * n for w, n in self.card_weights
        )  # parameters on one card: all, or its share
        self.trained_card_parameters = sum(w.numel * n for w, n in self.trained_on_card)
        self.trained = sum(w.numel * n for w, n in self.weights if w.trained)
        self.moments = {name: undominated(moments) for name, moments in self._moments().items()}
        self.is_calibrated = False

    def calibrated(self, moments: Mapping[str, Iterable[Vector]]) -> Step:
        """Step with moments of its instants as they were found, without workspaces, in place of the formula's, which stay where none
        were, and those with a kernel's workspace in any case. Instants that the formula leaves out, for they lie between others, stay out."""
        workspace = (self.workspaces_bytes,) + (0,) * (len(BASIS) - 1)
        other = copy(self)
        other.is_calibrated = True
        calibrated_moments = {
            name: (
                *(Moment(add(v, workspace), CALIBRATED, ()) for v in moments[name]),
                *(moment for moment in formula_moments if moment.has_workspace),
            )
            for name, formula_moments in self.moments.items()
            if name in moments
        }
        other.moments = {**self.moments, **calibrated_moments}
        return other

    def _partitions(self) -> Zero | Zero3 | None:
        recipe = self.layout.recipe
        if not recipe.zero_stage:
            return None
        segments = segment_length(recipe, self.model.layers) > 1
        weights = weights_in_order(self.tape, segments, modules_of_towers(self.model))
        if recipe.zero_stage == 3:
            check_calls(self.model, self.layout.several_mlp_chunks)
        check_dtypes(weights, recipe)
        if recipe.zero_stage < 3:
            return Zero(recipe, [weight for weight in weights if weight.trained], self.model.hidden)
        zero = Zero3(recipe, weights, self.model.hidden)
        zero.learn(self._visits(zero))
        return zero

    def _visits(self, zero: Zero3) -> list[Visit]:
        """Calls of modules in a micro-batch."""
        record = Record()
        rules = Rules("reduced", reducer=zero.reducer(True, True), visitor=record)
        forward(self.replayed, rules, keep=True)
        backward(self.replayed, rules)
        finish_reducing(rules)
        return record.visits

    # ---- replay -----------------------------------------------------------------------------------------------------

    def rules(self, *, number: int | None = None, **changes: bool) -> Rules:
        """Rules of a replay. number: of the micro-batch, from 0; None: the last."""
        recipe = self.layout.recipe
        last = recipe.accumulation - 1
        number = last if number is None else number
        gradients = "added" if number else "kept"
        if recipe.optimizer_in_backward or (recipe.weights_on_host and not recipe.sharded):
            gradients = "used"
        whole = ""
        if recipe.keeps_whole_gradients:
            whole = "last" if number == last else "between" if number else "first"
        in_groups = recipe.sharded and not recipe.adapters_are_whole
        if in_groups and (recipe.flat or not (whole and recipe.reduced_dtype == recipe.used_dtype)):
            gradients = "kept"  # until a group's backward is over
        reducer = visitor = None
        if self.zero is not None:
            gradients, reducer = "reduced", self.zero.reducer(number == 0, number == last)
            visitor = self.zero.visitor(reducer)
        spans = self.layout.spans
        stepping = bytes_to_step(recipe) if recipe.optimizer_in_backward else None
        return Rules(
            gradients,
            recipe.used_dtype,
            recipe.runs_autocast,
            stepping,
            spans=spans,
            whole=whole,
            selective=recipe.checkpoint == "selective",
            reducer=reducer,
            visitor=visitor,
            **changes,
        )

    def micro_batches(self) -> list[int | None]:
        """Numbers of the micro-batches that differ in what is alive at their largest moments; None: the last. What finds no gradients yet
        holds no more than what finds all."""
        recipe = self.layout.recipe
        if recipe.zero_stage >= 2 and recipe.optimizer_on_host and recipe.accumulation > 1:
            return [0, None]  # the last lets go of what those before keep, and makes norms
        return [min(1, recipe.accumulation - 2), None] if recipe.keeps_whole_gradients else [None]

    def _moments(self, **changes: bool) -> dict[Instant, list[Moment]]:
        """Moments of the step by the instant they belong to, with all that is alive. changes: as of `rules`."""
        by_instant: dict[Instant, list[Moment]] = {}
        for number in self.micro_batches():
            self._add_moments(by_instant, self.rules(number=number, **changes))
        if self.other is not None:
            for instant, moments in self.other._moments(**changes).items():
                by_instant[instant] += moments
        return by_instant

    def _add_moments(self, by_instant: dict[Instant, list[Moment]], rules: Rules) -> None:
        """Add moments of a micro-batch, and those of the optimizer's step after the last."""

        def note(moments: Iterable[tuple[Instant, Moment]], alive: Alive) -> None:
            base = sum_bytes(alive)
            for instant, moment in moments:
                listed = (*alive, *moment.alive) if rules.detail else ()
                by_instant.setdefault(instant, []).append(moment._replace(live=add(base, moment.live), alive=listed))

        whole = self.whole_gradients() if rules.whole in ("between", "last") else ()
        resident = (*labels([*self._resident(), *self.batch()]), *whole)
        ahead = forward(self.replayed, rules, keep=True, prune=False)
        waiting = labels([self.tape.in_transfer] if self.tape.in_transfer is not None else [])
        ahead_at = [(m.stage.forward, m) for m in ahead.moments if m.stage is not None]
        note([row for row in ahead_at if row[0] is Instant.END_OF_FORWARD], resident)
        note([row for row in ahead_at if row[0] is Instant.LOSS], resident + waiting)
        let_go = tuple((tensor.label, -1) for tensor in ahead.cached)  # autocast's cache, at the end of forward
        seed = labels([grad_of(self.tape.output)])
        forward_end = add(ahead.net, sum_bytes(let_go + seed))
        behind = backward(self.replayed, rules, prune=False)
        behind_at = [
            (
                m.stage.backward,
                m._replace(live=add(forward_end, m.live), alive=(*ahead.alive, *let_go, *seed, *m.alive)),
            )
            for m in behind.moments
            if m.stage is not None
        ]
        note(behind_at, resident)
        if self.zero is not None:
            backward_end = add(forward_end, behind.net)
            over = (*ahead.alive, *let_go, *seed, *behind.alive)
            after = finish_reducing(rules).moments
            at_end = [m._replace(live=add(backward_end, m.live), alive=(*over, *m.alive)) for m in after]
            note([(Instant.EMBEDDING, moment) for moment in at_end], resident)
            self._add_step_of_partition(note)
        elif self.steps_at_end and rules.whole in ("", "last"):
            ready = labels([*self._resident(), *self.batch()]) + labels(self._gradients(always_alive=False))
            for operation, made in (("clip", self.clipping), ("step", self.optimizer.temporaries)):
                if made or operation == "step":
                    note([(Instant.OPTIMIZER, Moment(ZERO, operation, ()))], ready + labels(temporaries(made)))

    def _add_step_of_partition(self, note: Note) -> None:
        """Add moments of ZeRO's optimizer step."""
        assert self.zero is not None
        away = self.zero.away()
        ready = labels([*(each for each in self.stays() if each not in away), *self.states(), *self.batch()])
        for operation, made in self.zero.step_moments():
            note([(Instant.OPTIMIZER, Moment(ZERO, operation, ()))], ready + labels(made))

    def whole_gradients(self) -> Alive:
        """Gradients of all weights that stay on a card between micro-batches, not in shards."""
        if not self.layout.recipe.keeps_whole_gradients:
            return ()
        trained = [(weight, n) for weight, n in self.weights if weight.trained]
        recipe = self.layout.recipe
        if recipe.flat:
            flats = (group.flat for group in groups_of(self.tape) if group.gradients)
            return tuple((flat.gradient.label, 1) for flat in flats if flat is not None)
        return tuple((weight_gradient(weight, reduced_dtype(weight, recipe)).label, n) for weight, n in trained)

    # ---- what is alive besides the tape's tensors ---------------------------------------------------------------------

    def _resident(self) -> list[Tensor]:
        """Weights, optimizer states, cuBLAS' workspaces, and gradients where they outlive a backward pass."""
        return [*self.stays(), *self.states(), *self.gradients_between()]

    def stays(self) -> list[Tensor]:
        """What is there before the first step: weights, and cuBLAS' workspaces."""
        recipe, dtype = self.layout.recipe, self.layout.recipe.weight_dtype
        stored: tuple[Stored, ...]
        if recipe.zero_stage:
            frozen = [(w, n) for w, n in self.card_weights if not w.trained]
            stored = in_sum(frozen, dtype) if recipe.zero_stage < 3 else scales_of(frozen, dtype)
        elif recipe.weights_on_host and recipe.sharded:
            stored = scales_of(self.card_weights, dtype)
        elif recipe.weights_on_host:
            stored = (Stored("weights gathered from the host", dtype, recipe.weight_bytes * self._gathered()),)
        else:
            stored = in_sum(self.card_weights, dtype)
            stored += scales_of(self.weights, dtype) if recipe.flat else ()
        stored += in_sum(self.originals(), dtype)
        libraries = (WORKSPACES, self.workspace), (LT_WORKSPACES, self.workspaces_bytes - self.workspace)
        stored += self._buffers()
        workspaces = [constant(library, "uint8", taken, Role.WORKSPACE) for library, taken in libraries if taken]
        return [
            *(self.zero.stays() if self.zero is not None else ()),
            *(constant(*each, Role.WEIGHT) for each in stored),
            *self._towers(),
            *self._gradient_buckets(),
            *workspaces,
        ]

    def _towers(self) -> list[Tensor]:
        """Weights of towers, which wait: nothing comes to them in a step on text alone."""
        return [
            constant(f"{stored.name} of {kind}", stored.dtype, stored.bytes, Role.TOWER)
            for kind, weights in self.towers
            for stored in in_sum(weights, self.layout.recipe.weight_dtype)
        ]

    def _buffers(self) -> tuple[Stored, ...]:
        model, dtype = self.model, self.layout.recipe.weight_dtype
        scaled = model.mixer if isinstance(model.mixer, Mamba2) and model.mixer.scaled else None
        multipliers = model.layers * scaled.projected if scaled is not None else 0  # Falcon-H1's mup_vector
        tables = (
            Stored("multipliers of what Mamba-2 is given", dtype, ITEMSIZE[dtype] * multipliers),
            Stored("causality of positions", "bool", model.causality**2),
            Stored("sinusoids of positions", "float32", 4 * model.sinusoids * model.layers),
            Stored("numbers of patches", "int64", numbers_of_patches(model, self.layout.recipe)),
        )
        return tuple(table for table in tables if table.bytes)

    def _gradient_buckets(self) -> list[Tensor]:
        """DDP's copy of all gradients, which it makes at once (torch/csrc/distributed/c10d/reducer.cpp, initialize_buckets)."""
        return self._as_trained(GRADIENT_BUCKETS, Role.REDUCED) if self.layout.recipe.has_gradient_buckets else []

    def _as_trained(self, name: str, role: Role) -> list[Tensor]:
        """Tensors, by dtype, that are together of the size of the weights that this card trains."""
        sums = in_sum(self.trained_on_card, self.layout.recipe.weight_dtype)
        return [constant(name, each.dtype, each.bytes, role) for each in sums]

    def originals(self) -> list[tuple[Weight, int]]:
        """Weights of the modules of which peft trains a copy (modules_to_save)."""
        if not self.layout.recipe.lora_modules_to_save:
            return []
        saved = [(w, n) for w, n in self.card_weights if w.trained and not w.is_adapter]
        tables = [each for each in saved if each[0].kinds & TABLES]
        if self.model.tied and tables:  # one original of both; a use that is not saved has it
            saved.remove(tables[0])
        return saved

    @property
    def workspaces_bytes(self) -> int:
        """Bytes of cuBLAS' workspaces, and of cuBLASLt's, which come with products that add a bias: for the thread of the forward pass,
        and for that of the backward pass where it runs such a product again. None where cuBLAS has none."""
        handles = sum(map(bool, (adds_bias(self.tape), adds_bias(self.tape, again=True))))
        return self.workspace + (CUBLASLT_WORKSPACE * handles if self.workspace else 0)

    def states(self) -> list[Tensor]:
        """The optimizer's, which its first step makes."""
        return [constant(s.name, s.dtype, s.bytes, State(s.torch_keys)) for s in self.optimizer.states if s.bytes]

    def card_weights_in_order(self) -> list[Weight]:
        """Weights on one card as the model's code makes them: all, or its share of each."""
        if self.layout.recipe.flat:
            return flat_shards(self.tape)
        outside: dict[Weight, None] = {}
        weights: list[Weight] = []
        for op in self.tape.ops:
            is_layer = op.is_layer or op.is_tower_layer
            own = list(_op_weights(op)) if is_layer else [w for w in _op_weights(op) if w not in outside]
            weights += own if is_layer else dict.fromkeys(own)
            outside.update(dict.fromkeys(() if is_layer else own))
        return [shard_of(weight, self.layout.recipe) for weight in weights]

    def _gathered(self) -> int:
        """Parameters on the device at once when weights live on the host: the largest unit and the one fetched ahead."""

        def units(op: Op) -> list[int]:
            inner = op.part.tape.ops if op.part is not None else ()
            if any(i.part is not None and not i.part.chunked for i in inner):  # a segment: its layers are the units
                return [n for i in inner for n in units(i)]
            return [sum(weight.numel for weight in _op_weights(op))]

        outer = [0] + [n for op in self.tape.ops if op.part is None or op.part.in_forward for n in units(op)]
        layers = [0] + [n for op in self.tape.ops if op.part is not None and not op.part.in_forward for n in units(op)]
        return max(outer) + 2 * max(layers)

    def gradients_between(self) -> list[Tensor]:
        """Gradients that stay from one micro-batch to the next, as the optimizer has them."""
        return self._gradients(always_alive=True)

    def _gradients(self, always_alive: bool) -> list[Tensor]:
        recipe = self.layout.recipe
        if always_alive != recipe.finds_gradients or recipe.weights_on_host:
            return []
        if self.zero is not None:
            return self.zero.gradients(between=always_alive)
        gradients = self._as_trained("gradients", Role.WEIGHT_GRADIENT)
        more = tensor_parallel.gradient_beyond(self.weights, recipe) * recipe.weight_bytes
        whole = constant("gradient of the embedding's other rows", recipe.weight_dtype, more, Role.WEIGHT_GRADIENT)
        return [*gradients, whole] if more else gradients

    @property
    def steps_at_end(self) -> bool:
        """Whether the optimizer steps all weights, on the device, when backward is done."""
        return not (self.layout.recipe.optimizer_in_backward or self.layout.recipe.weights_on_host)

    def batch(self) -> list[Tensor]:
        recipe = self.layout.recipe
        names: tuple[str, ...] = ("token ids", "labels", *((POSITION_IDS,) if recipe.gives_positions else ()))
        shape = "b s"
        if recipe.context_parallel > 1:  # each has the memory of whole sequences (mstplan/train/ring.py)
            names, shape = (*names, "shifted labels", "attention mask"), f"b s {recipe.context_parallel}"
        shapes = {POSITION_IDS: "s"} if recipe.sequence_parallel_norms else {}  # of all rows
        tensors = [tensor_of(self.tape.dims, name, shapes.get(name, shape), "int64", role=Role.BATCH) for name in names]
        return [*tensors, *images_of_batch(self.model, recipe)]

    def constants(self) -> tuple[Entry, ...]:
        """Weights, gradients and optimizer states: W_mem of the theorem."""
        tensors = [t for t in self._resident() if t.role is not Role.WORKSPACE]
        if not self.layout.recipe.optimizer_in_backward:
            tensors += self._gradients(always_alive=False)
        return shown(labels(tensors), (1,) + (0,) * (len(BASIS) - 1))

    def detailed(self) -> dict[Instant, list[Moment]]:
        """Moments by instant, with the tensors alive."""
        return self._moments(detail=True)

    def saved_on_host(self, sizes: Sizes) -> int:
        """Bytes of CPU RAM that saved tensors take at the end of forward."""
        units = sizes.units
        return sum(pinned_bytes(tensor.bytes * units[tensor.basis]) for tensor in self.on_host)

    def attention_on_host(self, sizes: Sizes) -> int:
        """Bytes of CPU RAM that attention of one layer takes: queries, keys, values, results and their gradients, all groups of heads."""
        return max(max(bytes_on_host(layer, sizes)) for layer in set(self.layer_tapes))

    @property
    def layer_tapes(self) -> list[Tape]:
        return [op.part.tape for op in self.tape.ops if op.part is not None and op.is_layer]

    # ---- reading off --------------------------------------------------------------------------------------------------

    def largest(self, sizes: Sizes) -> tuple[Instant, int]:
        """The binding instant and its bytes."""
        units = sizes.units
        best_name, best = Instant.OPTIMIZER, -1
        for name, moments in self.moments.items():
            for moment in moments:
                value = evaluate(moment.live, units)
                if value > best:
                    best_name, best = name, value
        return best_name, best

    def instants(self, sizes: Sizes) -> tuple[InstantPeak, ...]:
        """Instants in the order of a step, each at its largest moment with the tensors alive."""
        by_instant = self.detailed()
        units = sizes.units
        result = []
        for name in Instant:
            moments = by_instant.get(name)
            if moments:
                top = max(moments, key=lambda m: evaluate(m.live, units))
                size, entries = evaluate(top.live, units), shown(top.alive, units)
                if self.is_calibrated and name in self.moments:
                    calibrated_size = max(evaluate(m.live, units) for m in self.moments[name])
                    correction = (
                        (Entry(CALIBRATED, "", "", 1, calibrated_size - size, Role.CALIBRATION),)
                        if calibrated_size != size
                        else ()
                    )
                    entries = tuple(sorted((*entries, *correction), key=lambda entry: -entry.bytes))
                    size = calibrated_size
                result.append(InstantPeak(name, size, top.operation, entries))
        return tuple(result)


def tower_weights(model: Model, recipe: Recipe) -> list[tuple[str, list[tuple[Weight, int]]]]:
    """Weights of the model's towers on one card, by what people call the tower."""
    quantised = "" if recipe.quantize == "none" else recipe.quantize
    names = {"projector": "the projector"}
    return [
        (
            names.get(tower.kind, f"the {tower.kind} tower"),
            shards_of(
                [
                    (
                        Weight(
                            "",
                            weight.shape,
                            trained=False,
                            quantised=quantised if weight.linear else "",
                            double_quantised=recipe.double_quantize,
                            packed_in=recipe.packed_in,
                        ),
                        weight.copies,
                    )
                    for weight in tower.weights
                ],
                recipe,
            ),
        )
        for tower in model.towers
    ]


def adds_bias(tape: Tape, again: bool = False) -> bool:
    """Whether one of its products adds a bias. again: in a part that is run again in backward, as those that are recorded are."""

    def in_part(part: Part) -> bool:
        if again and part.recompute and not part.records:
            return False
        return adds_bias(part.tape, again and not part.recompute)

    return any((op.adds_bias and not again) or (op.part is not None and in_part(op.part)) for op in tape.ops)


def labels(tensors: Iterable[Tensor]) -> Alive:
    return tuple((t.label, 1) for t in tensors)


def sum_bytes(alive: Alive) -> Vector:
    vector = [0] * len(BASIS)
    for label, count in alive:
        vector[label.basis] += label.bytes * count
    return tuple(vector)


def constant(name: str, dtype: str, size: int, role: Purpose) -> Tensor:
    """A tensor, or a group of them, of a fixed number of bytes."""
    return Tensor(name, "", dtype, 0, size, role=role)


def temporaries(made: Iterable[Held]) -> list[Tensor]:
    """What is there while gradients are clipped, or while the optimizer steps all weights."""
    return [constant(held.name, held.dtype, held.bytes, Role.UPDATE) for held in summed(made)]


def bytes_on_host(layer: Tape, sizes: Sizes) -> tuple[int, int]:
    """Bytes of CPU RAM that a layer's attention takes, of all groups of heads: when it has run, and when backward comes to it, with the gradients
    of its results."""
    ran = _bytes_at(sizes, (tensor for op in layer.ops for tensor in op.on_host))
    gone = _bytes_at(sizes, (tensor for op in layer.ops for tensor in op.leaves_host))
    gradients = _bytes_at(sizes, (op.on_host[0] for op in layer.ops if op.on_host and op.part is None))
    return ran, ran - gone + gradients


def _bytes_at(sizes: Sizes, tensors: Iterable[Tensor]) -> int:
    units = sizes.units
    return sum(tensor.bytes * units[tensor.basis] for tensor in tensors)


def bytes_of(entries: Iterable[Entry]) -> int:
    return sum(entry.bytes for entry in entries)


class _Alike(NamedTuple):
    """What tensors have in common that are counted together. each: bytes of one, per unit of its basis; 0: of any size."""

    name: str
    shape: str
    dtype: str
    role: Purpose | None
    each: int = 0


def shown(alive: Iterable[tuple[Label, int]], units: tuple[int, ...]) -> tuple[Entry, ...]:
    """Tensors as entries, alike ones together, largest first."""
    by_size: dict[_Alike, list[int]] = {}
    groups: dict[_Alike, list[int]] = {}
    for label, count in alive:
        alike = _Alike(label.name, label.shape, label.dtype, label.role, label.bytes)
        if label.role is Role.WEIGHT_GRADIENT:
            alike = _Alike("gradients", "", label.dtype, label.role)
        _count(by_size, alike, count, count * label.bytes * units[label.basis])
    for alike, (count, size) in by_size.items():
        _count(groups, alike._replace(each=0), count, size)
    _without_negatives(by_size)
    _without_negatives(groups)
    sizes: dict[_Alike, list[Copies]] = {}
    for alike, (count, size) in by_size.items():
        sizes.setdefault(alike._replace(each=0), []).append(Copies(count, size))
    entries = [_entry(alike, Copies(*sums), sizes[alike]) for alike, sums in groups.items() if sums[1]]
    return tuple(sorted(entries, key=lambda e: -e.bytes))


def _count(groups: dict[_Alike, list[int]], alike: _Alike, copies: int, size: int) -> None:
    group = groups.setdefault(alike, [0, 0])
    group[0] += copies
    group[1] += size


def _entry(alike: _Alike, sums: Copies, sizes: Sequence[Copies]) -> Entry:
    shape = f"({', '.join(alike.shape.split())})" if alike.shape else ""
    several = () if sizes == [sums] else tuple(each for each in sizes if each.bytes)
    return Entry(alike.name, shape, alike.dtype, *sums, alike.role, several)


def _without_negatives(groups: dict[_Alike, list[int]]) -> None:
    """Of tensors kept by every piece of a sequence, those of the running piece go first: whole ones less a piece each, (b, s, I) and
    -1 x (b, c, I), are what the other pieces keep, (b, s-c, I)."""
    for key, (count, size) in [(key, tuple(group)) for key, group in groups.items() if group[0] < 0]:
        whole = groups[key._replace(shape=key.shape.replace("c", "s", 1))]
        each = whole[1] // whole[0]
        del groups[key]
        groups[key._replace(shape=key.shape.replace("c", "s-c", 1))] = [-count, size - count * each]
        whole[0], whole[1] = whole[0] + count, whole[1] + count * each


# ---- laying a step out on a tape ------------------------------------------------------------------------------------


def tape_of(model: Model, layout: Layout) -> Tape:
    """The whole step, the same one for all spans."""
    return _tape_without_spans(model, layout._replace(spans=None))


@lru_cache(maxsize=256)
def _tape_without_spans(model: Model, layout: Layout) -> Tape:
    return build(model, layout)


def build(model: Model, layout: Layout, frozen: Frozen | None = None) -> Tape:
    """The whole step: embedding, layers, final norm, head and loss. frozen: in place of what the recipe freezes."""
    recipe = layout.recipe
    model = with_copies(model, recipe)
    tensor_parallel.check(model, recipe)
    expert_parallel.check(model, recipe)
    model = tensor_parallel.of_a_rank(model, recipe)
    check_mixers(model, recipe, layout.several_mlp_chunks)
    check_indexer(model, recipe)
    check_altup(model, recipe)
    _check_layers(model, recipe)
    adapters = adapters_of(recipe, model)
    if adapters is not None and adapters.parameters:
        check_recipe(model, recipe, layout.several_mlp_chunks)
    if recipe.checkpoint == "children" and model.dropout and model.model_type != "gpt2":
        raise RecipeError(
            f"{model.name} has dropout between what its layers call, which is not planned with --checkpoint children.\nUse --checkpoint layer."
        )
    numerics = Numerics(
        weights=recipe.used_dtype,
        autocast=recipe.runs_autocast,
        attention=attention_kernel(model, recipe),
        masked=layout.masked,
        samples=recipe.packing,
        masks_all=layout.masks_all,
        padded=layout.padded,
        several_rows=layout.several_rows,
        platform=layout.platform,
        adapters=adapters,
        quantised="" if recipe.quantize == "none" else recipe.quantize,
        double_quantised=recipe.double_quantize,
        packed_in=recipe.packed_in,
        checkpointed=recipe.quantize == "int8" and recipe.checkpoint != "none",
        kernels=recipe.kernels,
        ranks=recipe.sequence_parallel,
        ring=ring_of(layout),
        splits=recipe.tensor_parallel,
        norm_sharers=recipe.norm_sharers,
        loss_parallel=recipe.loss_parallel,
        spread=recipe.expert_parallel,
        imbalance=recipe.expert_imbalance,
        policy=recipe.gathers_in_bf16,
        in_deepspeeds_linear=recipe.zero_stage == 3,
    )
    if recipe.runs_beside_autocast:
        check_beside_autocast(model, recipe)
    if recipe.flat and model.towers:
        raise RecipeError(
            f"fsdp1 is not planned beside towers, which {model.name} has.\nUse --sharding fsdp, or --assume no-towers."
        )
    ulysses.check(model, recipe.sequence_parallel, layout.masked, layout.groups, recipe.gpus)
    ring.check(model, recipe, layout.platform)
    loss = LOSSES[recipe.loss]
    in_pieces = recipe.loss_in_chunks and layout.several_loss_chunks
    check_towers(model, recipe)
    frozen = frozen or frozen_names(model, training_of(model, recipe), adapters, recipe.images)
    w = Writer(model, numerics, stage=Stage.EMBEDDING, frozen=frozen.outside)
    kinds = (WeightKind.EMBEDDINGS, WeightKind.HEAD) if model.tied else (WeightKind.EMBEDDINGS,)
    table = w.weight("embed_tokens", model.vocab, model.hidden, kinds=kinds)
    around = [w.tape.call() for _ in range(2 if adapters is not None else 0)]  # peft's classes
    with ExitStack() as wrapped, w.tape.call() as external:  # of the class with a head, of the model in it
        for call in around:
            wrapped.enter_context(call)
        with w.tape.call():
            with w.tape.assign_role(Role.EMBEDDING):
                copied = numerics.autocast and numerics.weights != "bfloat16"
                # DeepSpeed's own linear makes no view (zero/linear.py)
                joins_view = loss.gradient_is_view and not in_pieces and not copied and recipe.zero_stage != 3
                images = None
                if recipe.images and model.vision is not None:
                    images = Images(w, model.vision, recipe, frozen.towers, layout.several_rows)
                hidden, variables, seen = _embedding(w, table, joins_view, recipe.gives_positions, images)
            per_layer = _per_layer_inputs(w, hidden)
            with w.tape.assign_role(Role.POSITIONS):
                shared = _shared(w, variables[0], layout)
            several = layout.several_mlp_chunks  # of one chunk the runtime makes nothing
            chunks = MlpChunks(
                several,
                several and recipe.mlp_recompute,
                several and recipe.layer_in_chunks,
                layout.groups,
                recipe.attention_on_host,
                recipe.checkpoint == "children",
            )
            calls: dict[tuple[LayerKind, Names], LayerCall] = {}
            for kind, names in set(zip(model.layer_kinds, frozen.layers, strict=True)):
                given, tables = shared[kind]
                kept = given if chunks.layer or chunks.children else tables
                calls[kind, names] = LayerCall(layer(model, kind, numerics, chunks, names), given, kept, kind)
            rows = [calls[key] for key in zip(model.layer_kinds, frozen.layers, strict=True)]
            streams: tuple[Tensor, ...] = ()
            if model.altup is not None:
                hidden, streams = into_streams(w, hidden, model.altup)
            with w.tape.assign_role(Role.LAYER_INPUT):
                hidden, returned, lent = _layers(w.tape, hidden, rows, recipe, per_layer)
            w.tape.stage = Stage.LOSS
            with w.tape.assign_role(Role.NORM):
                if model.altup is not None:
                    hidden, streams = out_of_streams(w, hidden, model.altup, streams)
                hidden = norm_in_chunks(w, hidden, "final norm") if chunks.layer else w.norm(hidden, "final norm")
            w.hold(
                *variables,
                *seen.held,
                *per_layer,
                *streams,
                *lent,
                *returned,
                *(tensor for arguments, _ in shared.values() for tensor in arguments),
            )  # until the model's forward returns
        below = any(weight.trained for op in w.tape.ops for weight in _op_weights(op))
        loss.check(recipe, model.model_type, head_alone=not (below or recipe.input_gradients))
        external.extend(_head(w, hidden, table, layout, in_pieces))
        w.hold(*seen.returned)
    tape = record_step(w.tape.build_tape(), seen.embedded if recipe.input_gradients else None)
    if recipe.checkpoint == "reentrant" and any(op.is_layer and _trains_alone(op.part) for op in tape.ops):
        raise RecipeError(
            "reentrant checkpoints train no layer whose input wants no gradient, as it is here where embeddings are frozen.\n"
            "Add input_gradients (--input-gradients), as transformers and peft do."
        )
    tape = with_escapes(tape)
    if (
        chunks.layer or recipe.checkpoint == "reentrant"
    ):  # nodes of pieces, or of layers, hold on to what these are given
        held = dict.fromkeys((*(tensor for row in rows for tensor in row.arguments), *per_layer))
        tape = replace(tape, held=tuple(held))
    if inputs := [op.reads[0] for op in tape.ops if op.fetches]:
        moved, first = (
            tensor_of(tape.dims, "layer input in transfer", each.shape, each.dtype, role=Role.LAYER_INPUT)
            for each in (inputs[-1], inputs[0])
        )
        tape = replace(tape, in_transfer=moved, first_in_transfer=first if first.dtype != moved.dtype else None)
    return into_groups(tape, recipe) if recipe.sharded else tape


def ring_of(layout: Layout) -> Ring | None:
    """The ring of a recipe's ranks, and the rank that is laid out."""
    recipe = layout.recipe
    if recipe.context_parallel == 1:
        return None
    rank = ranks_that_differ(recipe.context_parallel)[layout.alternative]
    return Ring(recipe.context_parallel, recipe.rotate_method == "allgather", rank)


def _trains_alone(part: Part | None) -> bool:
    """Whether a part's weights get gradients and its input none."""
    return part is not None and bool(part.trained) and not part.wanted


def with_escapes(tape: Tape) -> Tape:
    """The tape, with what nodes of its layers hold by themselves: it comes with each layer, and goes when backward is through."""
    escaped: dict[Op, tuple[Tensor, ...]] = {}
    for op in tape.ops:
        reentrant = op.part is not None and op.part.reentrant
        if op.part is not None and op.part.records and not reentrant and (tensors := _escapes(op.part.tape)):
            escaped[op] = tuple(
                Tensor(f"{t.name}, held by its product", t.shape, t.dtype, t.basis, t.bytes, role=t.role)
                for t in tensors
            )
    if not escaped:
        return tape
    first = next(iter(escaped))
    ops = []
    for op in tape.ops:
        makes = (*op.makes, *escaped.get(op, ()))
        part = op.part
        if op is first and part is not None:
            part = replace(part, arguments=(*part.arguments, *(t for tensors in escaped.values() for t in tensors)))
        ops.append(replace(op, makes=makes, part=part))
    return replace(tape, ops=tuple(ops))


def _escapes(tape: Tape) -> tuple[Tensor, ...]:
    return tuple(dict.fromkeys(tensor.storage for op in tape.ops for tensor in op.escapes))


Names = frozenset[str]


def adapters_of(recipe: Recipe, model: Model) -> Adapters | None:
    """Adapters of a model's step. Raises RecipeError for targets that peft refuses."""
    if not recipe.lora_rank:
        return None
    dtype = "bfloat16" if recipe.uses_adapters_in_bf16 else "float32"
    parameters = list_parameters(model, recipe.lora_targets, recipe.lora_rank)
    plain = recipe.lora_rank, recipe.lora_targets, recipe.lora_dropout, recipe.dora, dtype
    inputs = "float32" if recipe.runs_beside_autocast else ""
    return Adapters(*plain, parameters, list_linears(model), inputs, quantised_inputs=not inputs)


def training_of(model: Model, recipe: Recipe) -> Selection:
    """Which weights a recipe trains, of a step on text alone those of the text part: with adapters those and the modules that are saved,
    where it says no more. Of images that the trace alone answers nothing is told."""
    said = Selection() if recipe.images and model.vision is None else Selection(recipe.train, recipe.freeze)
    said = said if recipe.images else said.of_text()
    if not recipe.lora_rank:
        return said
    own = (*MATRICES, MAGNITUDE) if recipe.dora else MATRICES
    return Selection(said.train or (*own, *recipe.lora_modules_to_save), said.freeze)


TABLES = frozenset({WeightKind.EMBEDDINGS, WeightKind.HEAD})


def with_copies(model: Model, recipe: Recipe) -> Model:
    """The model, with head and embeddings untied where peft trains a copy of either: the other keeps the original. Raises RecipeError."""
    if not recipe.lora_modules_to_save:
        return model
    check_saved(model, recipe)
    if not model.tied:
        return model
    saved = Selection(recipe.lora_modules_to_save)
    copies = any(saved.trains(weight) for weight in named_weights(model) if weight.kinds & TABLES)
    return model._replace(tied=False) if copies else model


def check_saved(model: Model, recipe: Recipe) -> None:
    """Check that what peft is to copy are modules of the model, called by their names. Raises RecipeError."""
    parts = {part for weight in named_weights(model) for name in weight.names for part in name.split(".")}
    for name in recipe.lora_modules_to_save:
        if name in tuple(WeightKind) or not set(name.split(".")) <= parts:
            tables = sorted(family_of(model.model_type).weight_names[use] for use in ("embed_tokens", "lm_head"))
            raise RecipeError(
                f"--lora-modules-to-save {quoted(name)} is no module of {model.name}.{did_you_mean(name, sorted(parts))}\n"
                f"Write names of modules, such as {', '.join(table.rsplit('.', 1)[-1] for table in tables)}."
            )


class Frozen(NamedTuple):
    """Names of the weights that a recipe does not train: outside of layers, and within each layer; of towers whole ones."""

    outside: Names
    layers: tuple[Names, ...]
    towers: Names = frozenset()


def check_towers(model: Model, recipe: Recipe) -> None:
    """Check that images are counted, and that the towers that a recipe names are the model's. Raises RecipeError."""
    check_images(model, recipe)
    kinds = {tower.kind for tower in model.towers}
    for option in ("train", "freeze"):
        for word in getattr(recipe, option):
            if word in TOWERS and str(word) not in kinds:
                raise RecipeError(
                    f"--{option} {word}: {model.name} has no weights of that kind, or they are not counted.\n"
                    + (f"It has: {', '.join(sorted(kinds))}." if kinds else "Leave it out.")
                )


def _none_frozen(model: Model) -> Frozen:
    return Frozen(frozenset(), (frozenset(),) * model.layers)


@lru_cache(maxsize=256)
def frozen_names(model: Model, selection: Selection, adapters: Adapters | None = None, images: int = 0) -> Frozen:
    """Names of the weights that a selection freezes; images: in each sequence. Raises RecipeError for one that makes no sense for the model."""
    if not selection:
        return _none_frozen(model)
    prefixes = [family_of(model.model_type).weight_names[LAYER].format(n) for n in range(model.layers)]
    weights = named_weights(model, adapters)
    towers = named_in_towers(model) if images else ()
    in_whole = [_in_whole(weight) for weight in weights] if images else weights
    if adapters is not None:
        _check_adapters(model, adapters, selection, weights)
    selection.check([*in_whole, *towers], model.name)
    names = [w.names[0] for w, known_as in zip(weights, in_whole, strict=True) if not selection.trains(known_as)]
    inside = [frozenset(n.removeprefix(prefix) for n in names if n.startswith(prefix)) for prefix in prefixes]
    outside = frozenset(n for n in names if not n.startswith(tuple(prefixes)))
    return Frozen(outside, tuple(inside), frozenset(w.names[0] for w in towers if not selection.trains(w)))


def _in_whole(weight: Named) -> Named:
    """A weight of the text part, by its names in the whole that the part is of."""
    return weight._replace(names=tuple(re.sub(r"^model\.", "model.language_model.", name) for name in weight.names))


@lru_cache(maxsize=64)
def named_in_towers(model: Model) -> tuple[Named, ...]:
    """Weights of a model's towers, as transformers calls them."""
    if model.vision is None:
        return ()
    w = Writer(model, Numerics(), stage=Stage.EMBEDDING)
    images = Images(w, model.vision, STRATEGIES["standard"].model_copy(update={"images": 1}), frozenset(), False)
    see(images, w.hidden())
    return tuple(images.named)


def _check_adapters(model: Model, adapters: Adapters, selection: Selection, weights: Sequence[Named]) -> None:
    """Check that every target gets an adapter and that some adapter is trained. Raises RecipeError."""
    adapted = [weight for weight in weights if weight.names[0].endswith(DOWN)]
    modules = [(weight.names[0].removesuffix(DOWN), kind) for weight in adapted for kind in weight.kinds]
    for target in adapters.targets:
        if target.rsplit(".", 1)[-1] in adapters.as_parameters:
            found = bool(adapters.parameters)
        else:
            found = any(adapters._replace(targets=(target,)).targets_module(*module) for module in modules)
        if not found:
            raise RecipeError(_no_target(model, target))
    own = (weight for weight in weights if any(f".{matrix}." in weight.names[0] for matrix in MATRICES))
    if not any(map(selection.trains, own)):
        raise RecipeError(
            "--train and --freeze leave no adapter to train.\n"
            "Modules trained whole beside adapters: --lora-modules-to-save lm_head; no adapters: --lora 0."
        )


def _no_target(model: Model, target: str) -> str:
    tables = [family_of(model.model_type).weight_names[use].rsplit(".", 1)[-1] for use in ("embed_tokens", "lm_head")]
    statement = f"--lora-targets {quoted(target)} matches no linear layer of {model.name}."
    if target in tables:
        return f"{statement}\nTrain it whole beside adapters: --lora-modules-to-save {target}."
    linear = {WeightKind.ATTENTION} if model.experts is not None else {WeightKind.ATTENTION, WeightKind.MLP}
    paths = [weight.names[0].split(".") for weight in named_weights(model) if weight.kinds & linear]
    modules = list(dict.fromkeys((*(path[-2] for path in paths if path[-1] == "weight"), *list_linears(model))))
    near = did_you_mean(target, [*modules, *WORDS])
    return f"{statement}{near}\nWrite {', '.join(WORDS)}, or names of modules: {','.join(modules)}."


@lru_cache(maxsize=64)
def named_weights(model: Model, adapters: Adapters | None = None) -> tuple[Named, ...]:
    """Weights of a model, as transformers calls them; adapters' as peft does."""
    names, number = family_of(model.model_type).weight_names, 0
    weights: dict[str, Named] = {}
    recipe = STRATEGIES["standard"]
    if adapters is not None:
        chosen = {"lora_rank": adapters.rank, "lora_targets": adapters.targets, "dora": adapters.dora}
        recipe = recipe.model_copy(update=chosen)
    for op in build(model, Layout(recipe, False, False, False), _none_frozen(model)).ops:
        prefix = names[LAYER].format(number) if op.is_layer else ""
        number += op.is_layer
        for weight in dict.fromkeys(_op_weights(op)):
            aliases = (f"{names['lm_head']}.weight",) if WeightKind.HEAD in weight.kinds and model.tied else ()
            weights[prefix + weight.name] = Named((prefix + weight.name, *aliases), weight.kinds)
    return tuple(weights.values())


def embeddings_are_frozen(model: Model, recipe: Recipe) -> bool:
    """Whether no gradient is wanted of what the layers are given."""
    selection = training_of(model, recipe)
    tables = [weight for weight in named_weights(with_copies(model, recipe)) if WeightKind.EMBEDDINGS in weight.kinds]
    return not any(map(selection.trains, map(_in_whole, tables) if recipe.images else tables))


def attention_kernel(model: Model, recipe: Recipe) -> str:
    """Attention that a recipe comes to: where transformers has no sdpa for the model (soft-capping, sinks), flash; eager in fp32, as
    flash computes in 16 bits only."""
    if model.own_flash and recipe.attention == NO_SDPA:
        raise RecipeError(
            f"{model.name} has flash attention of its own, which is not counted.\nUse --attention sdpa or eager."
        )
    if model.eager_only:
        return "eager"
    if not runs_sdpa(recipe.attention) or model.has_sdpa:
        return recipe.attention
    return "eager" if recipe.runs_in_fp32 else NO_SDPA


def kernels_of(model: Model, layout: Layout) -> tuple[Kernel, ...]:
    """Attention kernels that a step runs, each once: of layers without an explicit mask, and of those with one."""
    recipe = layout.recipe
    attention = attention_kernel(model, recipe)
    layers = dict.fromkeys((layout.masks(kind), model.of_kind(kind).attention) for kind in model.layer_kinds)
    calls = [
        AttentionCall.from_attention(own, recipe.compute_dtype, masked, layout.platform)
        for masked, own in sorted(layers, key=itemgetter(0))
    ]
    return tuple(dict.fromkeys(chosen(attention, asked) for asked in calls))


def _embedding(
    w: Writer, table: Weight, joins_view: bool, packed: bool, images: Images | None
) -> tuple[Tensor, tuple[Tensor, ...], Seen]:
    """The first hidden states, what the model's code still holds beside them: position ids, what the embedding gave; and what comes of images.
    joins_view: the gradient that a tied head made of the table is a view. packed: position ids come with the batch."""
    model, tape = w.model, w.tape
    places = w.t if w.code.counts_positions else w.places
    with tape.assign_role(Role.POSITIONS):
        ids = tape.new("alibi", "b H s", w.wide) if model.alibi else tape.new(POSITION_IDS, places, "int64")
    changed = model.scaled_embedding or model.learned_positions or model.embedding_norm
    own = w.numerics.weights
    looked_up = w.new("embeddings", "d", own) if changed or w.numerics.norm_sharers > 1 else w.hidden(own)
    joins = Joined(table, joins_view) if model.tied else None
    if images is not None:
        cast_inputs(images)
    workspace = WeightWorkspace(table, SortedLookups(model.vocab, model.hidden), "bs")
    with tape.call(passes_on=False):  # of numbers of tokens
        tape.op("embedding", [], looked_up, weights=(table,), workspaces=(workspace,), joins=joins)
    if w.numerics.splits > 1:
        looked_up = tensor_parallel.summed(w, looked_up, w.hidden())
    hidden, variables = looked_up, [looked_up]
    if model.scaled_embedding:
        hidden = w.pointwise("embedding scale", looked_up, w.hidden())
        variables = [hidden]
    outside = w.code.scales_logits  # its module gives embeddings before they are multiplied
    seen = Seen(looked_up if outside else hidden, hidden)
    if images is not None:
        seen = see(images, hidden)
        check_reached(images, images.recipe)
        hidden, variables = seen.hidden, [seen.hidden]
    if w.code.counts_positions:
        ones = tape.new("ones for tokens", places, "float32")
        tape.op("ones for tokens", [], ones)
        variables.append(ones)
    if model.embedding_norm:
        with tape.assign_role(Role.LAYER_INPUT):
            hidden = w.norm(looked_up, "embedding norm")
    if model.alibi:
        wide = tape.new("alibi, fp32", "H s", "float32"), tape.new("alibi, repeated", "b H s", "float32")
        tape.op("alibi", [], ids, temps=wide)
    elif not packed:
        tape.op(POSITION_IDS, [], ids)
    if model.learned_positions:
        positions = tape.new("position embeddings", f"{places} d", w.wide)
        sizes = model.learned_positions, model.hidden
        rows = w.weight("position embeddings", *sizes, kinds=(WeightKind.EMBEDDINGS,))
        # the workspace of one row's gradient is smaller than that of the table of token ids, and is gone before that comes
        looked_at, lookups = ids, tuple[WeightWorkspace, ...]()
        if w.code.counts_positions:
            looked_at = tape.op("rows of positions", [ids], tape.new("rows of positions", places, "int64"))
            lookups = (WeightWorkspace(rows, SortedLookups(*sizes), "bs"),)
        tape.op(
            "embedding of positions", [looked_at], positions, keeps=(looked_at,), weights=(rows,), workspaces=lookups
        )
        y = w.hidden()
        grads = ((hidden, None), (positions, None if w.code.counts_positions else tape.grad(positions)))
        hidden = tape.op("embedding add", [hidden, positions], y, grads=grads)
        variables.append(positions)
    dropout = model.dropout if model.embedding_dropout is None else model.embedding_dropout
    if dropout:
        with tape.assign_role(Role.LAYER_INPUT):
            hidden = w.dropout(hidden, dropout, HIDDEN, operation="embedding dropout")
    return hidden, (ids, *variables), seen


def _per_layer_inputs(w: Writer, hidden: Tensor) -> tuple[Tensor, ...]:
    """What is embedded for each layer, (b, s, layers, width): rows of a table of their own and a product of the embeddings, normalised, added
    (models/gemma4/modeling_gemma4.py, get_per_layer_inputs and project_per_layer_inputs)."""
    model, tape, sizes = w.model, w.tape, w.model.per_layer
    if sizes is None:
        return ()
    shape, outer = f"{model.layers} {sizes.width}", model.layers * sizes.width
    with tape.assign_role(Role.EMBEDDING):
        table = w.weight("embed_tokens_per_layer", sizes.vocab, outer, kinds=(WeightKind.EMBEDDINGS,))
        rows = w.new("per-layer embeddings", shape, w.wide)
        workspace = WeightWorkspace(table, SortedLookups(sizes.vocab, outer), "bs")
        tape.op("per-layer embedding", [], rows, weights=(table,), workspaces=(workspace,))
        rows = w.pointwise("scale per-layer embeddings", rows, w.new("per-layer embeddings, scaled", shape, w.wide))
        product = w.linear(hidden, w.new("per-layer projection", shape), "per_layer_model_projection", kind=None)
        name = "per-layer projection, scaled"
        scaled = tape.view(product, name, product.shape) if model.altup else w.new(name, shape, product.dtype)
        w.pointwise("scale projection", product, scaled)
        normed = w.norm(scaled, "per-layer inputs' norm")
        both = w.new("per-layer inputs", shape, normed.dtype)
        w.add(normed, rows, both, "add per-layer inputs")
    with tape.assign_role(Role.LAYER_INPUT):
        inputs = w.pointwise("scale per-layer inputs", both, w.new(PER_LAYER, shape, both.dtype))
    w.hold(normed, rows)
    return (inputs,)


def _shared(w: Writer, ids: Tensor, layout: Layout) -> dict[LayerKind, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Tensors that the layers of each kind are given beside hidden states: position ids, cos and sin, a mask; and of these what products keep: cos
    and sin."""
    kinds = dict.fromkeys(w.model.layer_kinds)
    if w.model.idle_window is not None:
        kinds[LayerKind(w.model.idle_window)] = None
    sliding = {kind: kind.window is not None for kind in kinds}
    attends = {kind: kind.attends for kind in kinds}
    asking = {(kind.window is not None, kind.causal_mask): kind for kind in kinds}
    masks = {asked: _mask(w, kind, layout) for asked, kind in asking.items()}
    local = {kind: sliding[kind] and w.code.local_rotary for kind in kinds}
    first = {is_local: kind for kind, is_local in reversed(local.items())}
    rotary = {is_local: _rotary_tables(w, w.model.of_kind(first[is_local]), layout) for is_local in reversed(first)}
    tables = {kind: rotary[local[kind]] for kind in kinds}
    turned = {kind: kind.rotary and attends[kind] and not w.code.interleaved_tables for kind in kinds}
    kept_tables = {kind: tables[kind] if turned[kind] else () for kind in kinds}
    given_masks = {kind: masks[kind.window is not None, kind.causal_mask] if attends[kind] else () for kind in kinds}
    positions = () if w.code.withholds_ids else (ids,)
    return {kind: ((*positions, *tables[kind], *given_masks[kind]), kept_tables[kind]) for kind in kinds}


def _rotary_tables(w: Writer, model: Model, layout: Layout) -> tuple[Tensor, ...]:
    """cos and sin of positions, in the order of transformers' rotary embeddings, which compute in fp32 and hold it all until the end."""
    a = model.attention
    width = a.latent.rope_dim if a.latent else a.rotary_dim
    if not width or w.code.rotary == "every two":  # of which each layer has its own
        return ()
    with w.tape.call(in_backward=False):
        return _cos_and_sin(w, model, layout, width)


def _cos_and_sin(w: Writer, model: Model, layout: Layout, width: int) -> tuple[Tensor, ...]:
    positions = w.tape.op("positions to fp32", [], w.tape.new("positions, fp32", w.places, "float32"))
    angles = _for_positions(w, "rotary angles", width // 2, "float32", positions)
    if w.code.rotary == "complex":
        length = _for_positions(w, "lengths of rotations", width // 2, "float32", angles)
        rotation = _for_positions(w, "rotations", width // 2, "complex64", length, angles)
        return (_for_positions(w, "complex rotation of positions", width // 2, "complex64", rotation, holds=(angles,)),)
    held: tuple[Tensor, ...] = (angles,)
    if not w.code.half_tables:
        angles = _for_positions(w, "rotary angles, twice", width, "float32", angles)
        held = (*held, angles)
    width = width // 2 if w.code.half_tables else width
    dtype = rotary_dtype(model, layout.recipe.used_dtype)
    names = "cos of positions", "sin of positions"
    for name in names:
        unscaled = _for_positions(w, f"{name}, unscaled", width, "float32", angles)
        wide = name if dtype == "float32" else f"{name}, fp32"
        held = (*held, _for_positions(w, wide, width, "float32", unscaled, holds=held))
    tables = held[-2:]
    if dtype == "float32":
        return tables
    return tuple(
        _for_positions(w, name, width, dtype, table, holds=held) for name, table in zip(names, tables, strict=True)
    )


def _for_positions(
    w: Writer, name: str, width: int, dtype: str, *inputs: Tensor, holds: tuple[Tensor, ...] = ()
) -> Tensor:
    places = w.t if w.code.turns_by_row else w.places
    return w.tape.op(name, list(inputs), w.tape.new(name, f"{places} {width}", dtype), holds=holds)


def _mask(w: Writer, kind: LayerKind, layout: Layout) -> tuple[Tensor, ...]:
    """An explicit attention mask: made once in forward, for all layers of a kind."""
    parts: tuple[Tensor, ...] = ()
    attention = attention_kernel(w.model, layout.recipe)
    if not runs_sdpa(attention) and KERNELS[attention].makes_causal_mask:
        mask = w.tape.new("causal mask", "b s s", layout.recipe.used_dtype)
    elif layout.masked and layout.recipe.packing > 1:
        mask = w.tape.new("mask of packed samples", "b s s", "bool")
    elif layout.masked and layout.masks_all:
        mask = w.tape.new("mask of text and images", "b s s", "bool")
        parts = (mask,) * 2
    elif kind.causal_mask and runs_sdpa(attention):
        mask = w.tape.new("causal mask", "s s", "bool")
    elif kind.window is not None and layout.masked:
        mask = w.tape.new("sliding-window mask", "s s", "bool")
        parts = (w.tape.new("window, and causality", "s s", "bool"),) * 2  # of which it is made
    else:
        return ()
    w.tape.op("mask", [], mask, temps=parts)
    return (mask,)


class LayerCall(NamedTuple):
    """A layer, or several, and what it is given beside hidden states: all of it, and what it keeps of it without a checkpoint."""

    tape: Tape
    arguments: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]
    kind: LayerKind = LayerKind()  # of a single layer

    def list_kept(self, recompute: bool) -> tuple[Tensor, ...]:
        """Tensors kept for backward: a checkpoint keeps all of it, as do pieces, else the products with cos and sin keep these."""
        return self.arguments if recompute else self.tables


def _layers(
    tape: TapeWriter, hidden: Tensor, layers: list[LayerCall], recipe: Recipe, per_layer: tuple[Tensor, ...]
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    every, offload = segment_length(recipe, len(layers)), recipe.offload_layer_inputs
    if every < 2:
        starts, reentrant = checkpointed_layers(recipe, len(layers)), recipe.checkpoint == "reentrant"
        if reentrant:  # the graph of a layer that is run again goes when its own backward is over
            holding = {id(layer.tape): replace(layer.tape, held=_escapes(layer.tape)) for layer in layers}
            layers = [layer._replace(tape=holding[id(layer.tape)]) for layer in layers]
        return _chain(tape, hidden, layers, starts, offload, per_layer, reentrant)
    segment_calls: dict[tuple[int, ...], LayerCall] = {}
    groups = [layers[start : start + every] for start in range(0, len(layers), every)]
    for inside in groups:
        key = tuple(id(layer.tape) for layer in inside)
        if key not in segment_calls:
            segment_calls[key] = _segment(tape.dims, inside, per_layer)
    segments = [segment_calls[tuple(id(layer.tape) for layer in inside)] for inside in groups]
    return _chain(tape, hidden, segments, range(len(segments)), offload, per_layer)


def _segment(dims: dict[str, int], layers: list[LayerCall], per_layer: tuple[Tensor, ...]) -> LayerCall:
    """Several layers that are checkpointed together."""
    segment = TapeWriter(dims)
    segment.role = Role.LAYER_INPUT
    first = layers[0].tape.sources[0]
    segment.sources.append(segment.new(HIDDEN, first.shape, first.dtype))
    own = tuple(segment.new(tensor.name, tensor.shape, tensor.dtype) for tensor in per_layer)
    segment.sources += own
    calls = [LayerCall(layer.tape, (), ()) for layer in layers]
    _chain(segment, segment.sources[0], calls, (), per_layer=own)
    arguments = tuple(dict.fromkeys(tensor for layer in layers for tensor in layer.arguments))
    return LayerCall(replace(segment.build_tape(), returned=layers[-1].tape.returned), arguments, ())


def segment_length(recipe: Recipe, layers: int) -> int:
    """Layers per checkpoint; 0: no checkpointing. sqrt: the nearest whole number to sqrt(layers)."""
    if not recipe.checkpoints_layers:
        return 0
    if recipe.checkpoint in ("layer", "reentrant", "selective") or every_nth(recipe) is not None:
        return 1
    if recipe.checkpoint == "sqrt":
        low = isqrt(layers)
        return max(1, low + (layers - low * low > low))
    return min(int(recipe.checkpoint), layers)


def every_nth(recipe: Recipe) -> int | None:
    """n where each n-th layer is checkpointed, from the first, and the others are not; else None."""
    how = str(recipe.checkpoint)
    return int(how.removeprefix("every-")) if how.startswith("every-") else None


def checkpointed_layers(recipe: Recipe, layers: int) -> range:
    """Numbers of the layers that checkpoints begin with."""
    return range(
        0, layers if recipe.checkpoints_layers else 0, every_nth(recipe) or segment_length(recipe, layers) or 1
    )


def stored_inputs(recipe: Recipe, layers: int) -> int:
    """Number of layer inputs that a checkpointed step keeps: one a checkpoint."""
    return len(checkpointed_layers(recipe, layers))


def _chain(
    tape: TapeWriter,
    hidden: Tensor,
    layers: list[LayerCall],
    checkpointed: Container[int],
    offload: bool = False,
    per_layer: tuple[Tensor, ...] = (),
    reentrant: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Layers, or segments of them, one after the other: those of the step are stages of it, those of a segment are not. checkpointed:
    the numbers of those that are, reentrant or not; offload: the inputs of these go to CPU RAM. per_layer: of which each takes its part. Returns hidden states,
    what the last layer returned beside them, and keys and values that layers lent."""
    count = len(layers)
    leaving: tuple[Tensor, ...] = ()  # to CPU RAM: it is let go when the next one does, reentrant when that was run
    returned: tuple[Tensor, ...] = ()  # by the layer before, beside hidden states
    lent: dict[bool, tuple[Tensor, ...]] = {}  # keys and values, by whether their layers have a window
    for i, call in enumerate(layers):
        own = tuple(_taken(tape, tensor, call.tape.sources[1]) for tensor in per_layer)
        stage = Stage.of_layer(i, count) if tape.stage is not None else None
        place = "first" if i == 0 else "last" if i == count - 1 else str(i)
        name = f"layer, {place}" if stage is not None else f"layer of the segment, {place}"
        out = tape.new(HIDDEN, call.tape.output.shape, call.tape.output.dtype)
        recompute = i in checkpointed
        borrowed = lent[call.kind.window is not None] if call.kind.keys == "borrows" else ()
        made = tuple(tensor_of(call.tape.dims, t.name, t.shape, t.dtype, role=t.role) for t in call.tape.outputs[1:])
        # every checkpoint holds the dict that these are in
        arguments = call.list_kept(recompute) + (tuple(t for pair in lent.values() for t in pair) if recompute else ())
        part = Part(
            call.tape, recompute=recompute, reentrant=reentrant, offload=offload and recompute, arguments=arguments
        )
        if made and recompute:  # keys that are run again keep cos and sin
            own_input = (hidden,) if input_lingers(call.tape) and not part.offload else ()
            part = replace(part, lingering=(*call.tables, *own_input))
        before, leaving = leaving, (hidden,) if part.offload else leaving
        held = (*returned, *(before if reentrant else () if recompute else leaving))
        # where nothing is run again, backward keeps it anyway
        returned = tuple(tape.new(t.name, t.shape, t.dtype) for t in call.tape.returned) if recompute else ()
        reads, makes = (hidden, *own, *borrowed), (out, *made, *returned)
        with tape.call():
            tape.add(Op(name, reads, makes, part=part, stage=stage, holds=held))
        if made:
            lent[call.kind.window is not None] = made
        if stage is not None:
            tape.stage = stage
        hidden = out
    return hidden, returned, tuple(tensor for pair in lent.values() for tensor in pair)


def _check_layers(model: Model, recipe: Recipe) -> None:
    """Check that a step of layers that differ in heads, share keys and values, have inputs of their own, or end with a number of their own,
    is counted. Raises RecipeError."""
    saved, fp32_weights = recipe.offload == "saved-tensors", recipe.used_dtype != "bfloat16"
    precision = f"--precision {recipe.precision}"
    several_gpus = {"sharding": recipe.sharded, "sequences over several GPUs": recipe.sequence_parallel > 1}
    refused: dict[str, dict[str, bool]] = {}
    if any(kind.attention is not None for kind in model.layer_kinds):
        refused["differ in heads"] = {"sequences over several GPUs": recipe.sequence_parallel > 1}
    if any(kind.keys for kind in model.layer_kinds):
        refused["share keys and values"] = {
            "layers in pieces": recipe.layer_in_chunks,
            f"--checkpoint {recipe.checkpoint}": recipe.checkpoint not in ("none", "layer"),
            "--offload saved-tensors": saved,
            precision: fp32_weights,
            **several_gpus,
        }
    autocast = fp32_weights and recipe.runs_autocast
    if model.experts is not None and model.experts.beside_mlp:
        refused["have experts beside the MLP"] = {precision: autocast}
    if model.per_layer is not None:
        refused["have inputs of their own"] = {
            "--offload saved-tensors": saved,
            "--attention eager without --checkpoint": recipe.attention == "eager" and recipe.checkpoint == "none",
            precision: autocast,
            **several_gpus,
        }
    if family_of(model.model_type).code.scales_output:
        refused["are scaled"] = {
            "--offload saved-tensors without --checkpoint layer": saved and recipe.checkpoint != "layer"
        }
    for what, options in refused.items():
        if option := next((option for option, asked in options.items() if asked), None):
            raise RecipeError(
                f"layers of {model.name} {what}, which the formula does not count with {option}.\n"
                "Leave that out, or ask for --rung trace."
            )


def _taken(tape: TapeWriter, per_layer: Tensor, source: Tensor) -> Tensor:
    """A layer's part of what is embedded for each, as its tape takes it; segments take all. It is taken before the layer, at the stage of
    what ran last, and its gradient lies in zeros of the whole."""
    if source.shape == per_layer.shape:
        return per_layer
    own = tape.view(per_layer, source.name, source.shape)
    return tape.op("take the layer's own input", [per_layer], own, grads=((per_layer, tape.grad(per_layer)),))


def _head(w: Writer, hidden: Tensor, table: Weight, layout: Layout, in_pieces: bool) -> tuple[Weight, ...]:
    """LM head and loss; with the chunked loss as a part of its own. Gives the weights that the class with a head reads without a call of their module."""
    model, tape, recipe = w.model, w.tape, layout.recipe
    rows = model.vocab // recipe.tensor_parallel
    weight = table if model.tied else w.weight("lm_head", rows, model.hidden, kinds=(WeightKind.HEAD,))
    labels = tensor_of(tape.dims, "shifted labels", "b s", "int64", role=Role.BATCH)
    if recipe.sharers > 1:  # they come shifted, from whole sequences
        labels = without_bytes(labels)
    if not in_pieces:
        _loss(w, hidden, weight, recipe.loss, labels, defers=model.tied)
        return (weight,) if LOSSES[recipe.loss].is_fused else ()
    variable = hidden
    if model.wide_residual:  # before the head is called
        with tape.assign_role(Role.LOSS):
            hidden = w.cast(hidden, w.numerics.weights, "hidden states, narrowed")
    inner = Writer(model, w.numerics, "b k", frozen=w.frozen)
    _loss(inner, inner.source(hidden.name, hidden.dtype, hidden.role), weight, recipe.loss)
    tape.op("shift labels", [], labels)
    loss = tensor_of(tape.dims, "loss", "", "float32", role=Role.LOSS)
    inner_tape = inner.tape.build_tape()
    part = Part(inner_tape, chunked=True, sums=sums_of(inner_tape), in_forward=True)
    stage, defers = tape.stage, model.tied
    holds = (labels, variable) if variable is not hidden else (labels,)
    with tape.call(gathers_itself=True, weights=(weight,)):
        tape.add(Op("loss chunk", (hidden,), (loss,), part=part, defers=defers, holds=holds, stage=stage))
    return ()


def _loss(w: Writer, hidden: Tensor, head: Weight, loss: str, *labels: Tensor, defers: bool = False) -> None:
    with w.tape.assign_role(Role.LOSS):
        LOSSES[loss].lay_out(w, hidden, head, labels, defers)


def _op_weights(op: Op) -> tuple[Weight, ...]:
    return (
        tuple(weight for weight, n in step_weights(op.part.tape.ops) for _ in range(n))
        if op.part is not None
        else op.weights
    )


@lru_cache(maxsize=1024)
def step(model: Model, layout: Layout, workspace: int) -> Step:
    return Step(model, layout, workspace)
