"""The step model: one training step as instants, each a sum of tensors, in closed form over batch, length and chunks.

A step is forward, loss, backward and optimizer step. `Step` lays a model's layers out on a tape as the recipe asks
(checkpointed, chunked, offloaded), replays it (`tape.py`), and keeps for every named instant the moments that can be its
largest: vectors over batch, tokens, chunk tokens and their squares. Peaks and S_max are read off those vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from ..spec.families import family_of
from ..spec.families.base import LAYER
from ..spec.model import LayerKind, Model
from ..spec.platform import AMPERE, Platform
from .autograd import record_step
from .cuda import CUBLASLT_WORKSPACE, flash_rows
from .fsdp import into_groups, shards_of
from .instants import Instant, Stage
from .kernels import KERNELS, NO_SDPA, chosen, runs_sdpa
from .kernels.base import AttentionCall, Kernel
from .layers import HIDDEN, MlpChunks, Numerics, Writer, layer, rotary_dtype
from .losses import LOSSES
from .optimizers import optimizer_memory
from .recipe import STRATEGIES, Recipe
from .roles import Purpose, Role, State
from .selection import Named, Selection, WeightKind
from .tape import (
    BASIS,
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
    forward,
    grad_of,
    step_weights,
    sums_of,
    tensor_of,
    undominated,
)
from .workspaces import IDS_PER_PARTIAL_SUM, SortedLookups, Spans

CALIBRATED = "calibration less formula"
WORKSPACES, LT_WORKSPACES = "cuBLAS workspaces", "cuBLASLt workspaces"


class Layout(NamedTuple):
    """The part of a recipe that decides a step's structure; lengths, batch and chunk counts are filled in later."""

    recipe: Recipe  # with batch and chunk counts normalised
    several_mlp_chunks: bool
    several_loss_chunks: bool
    masked: bool  # sliding-window layers carry an explicit mask
    padded: bool = False  # whose rows are padded (cuda.BIAS_ROWS)
    spans: Spans | None = None  # that the tokens lie in; None: workspaces that depend on them are left out
    platform: Platform = AMPERE  # by which sdpa chooses its kernels


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
    """Numbers of pieces of the sequence, for the MLP and for LM head and loss."""

    mlp: int
    loss: int


class Sizes(NamedTuple):
    """Sizes at which a vector is evaluated. Counts of sequences and tokens."""

    batch: int
    seq_len: int
    mlp_chunk_tokens: int
    loss_chunk_tokens: int

    @property
    def units(self) -> tuple[int, ...]:
        b, s = self.batch, self.seq_len
        in_chunks = b * self.mlp_chunk_tokens, b * self.loss_chunk_tokens
        return (1, b * s, *in_chunks, b * s * s, s * s, s, b * flash_rows(s), b * s // IDS_PER_PARTIAL_SUM)


def evaluate(vector: Vector, units: tuple[int, ...]) -> int:
    return sum(map(int.__mul__, vector, units))


class Step:
    """One training step of `model` under `layout` on a card whose cuBLAS workspaces take so many bytes."""

    def __init__(self, model: Model, layout: Layout, workspace: int):
        self.model, self.layout, self.workspace = model, layout, workspace
        self.tape = tape_of(model, layout)
        self.weights = step_weights(self.tape.ops)
        self.parameters = sum(w.numel * n for w, n in self.weights)
        card_weights = shards_of(self.weights, layout.recipe.gpus)
        trained = [(w, n) for w, n in card_weights if w.trained]
        self.optimizer = optimizer_memory(layout.recipe, trained)
        self.card_parameters = sum(w.numel * n for w, n in card_weights)  # parameters on one card: all, or its share
        self.trained_card_parameters = sum(w.numel * n for w, n in trained)
        self.trained = sum(w.numel * n for w, n in self.weights if w.trained)
        self.moments = {name: undominated(moments) for name, moments in self._moments(self.rules()).items()}
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

    # ---- replay -----------------------------------------------------------------------------------------------------

    def rules(self, *, first: bool = False, **changes: bool) -> Rules:
        """Rules of a replay. first: of the first of several micro-batches, which finds no gradients."""
        recipe = self.layout.recipe
        gradients = "kept" if recipe.accumulation == 1 or first else "added"
        if recipe.optimizer_in_backward or recipe.weights_on_host:
            gradients = "used"
        if recipe.sharded:  # whole ones stay until they are scattered
            gradients = "kept"
        spans = self.layout.spans
        return Rules(gradients, recipe.used_dtype, recipe.autocast, self.optimizer.per_weight, spans=spans, **changes)

    def _moments(self, rules: Rules) -> dict[Instant, list[Moment]]:
        """Moments of the step by the instant they belong to, with all that is alive."""
        by_instant: dict[Instant, list[Moment]] = {}

        def note(moments: Iterable[tuple[Instant, Moment]], alive: Alive) -> None:
            base = sum_bytes(alive)
            for instant, moment in moments:
                listed = (*alive, *moment.alive) if rules.detail else ()
                by_instant.setdefault(instant, []).append(moment._replace(live=add(base, moment.live), alive=listed))

        resident = labels([*self._resident(), *self.batch()])
        ahead = forward(self.tape, rules, keep=True, prune=False)
        waiting = labels([self.tape.in_transfer] if self.tape.in_transfer is not None else [])
        ahead_at = [(m.stage.forward, m) for m in ahead.moments if m.stage is not None]
        note([row for row in ahead_at if row[0] is Instant.END_OF_FORWARD], resident)
        note([row for row in ahead_at if row[0] is Instant.LOSS], resident + waiting)
        let_go = tuple((tensor.label, -1) for tensor in ahead.cached)  # autocast's cache, at the end of forward
        seed = labels([grad_of(self.tape.output)])
        forward_end = add(ahead.net, sum_bytes(let_go + seed))
        behind = backward(self.tape, rules, prune=False)
        behind_at = [
            (
                m.stage.backward,
                m._replace(live=add(forward_end, m.live), alive=(*ahead.alive, *let_go, *seed, *m.alive)),
            )
            for m in behind.moments
            if m.stage is not None
        ]
        note(behind_at, resident)
        if self.steps_at_end:
            step_only = labels([*self._gradients(always_alive=False), *self.temporaries()])
            note([(Instant.OPTIMIZER, Moment(ZERO, "step", ()))], resident + step_only)
        return by_instant

    # ---- what is alive besides the tape's tensors ---------------------------------------------------------------------

    def _resident(self) -> list[Tensor]:
        """Weights, optimizer states, cuBLAS' workspaces, and gradients where they outlive a backward pass."""
        return [*self.stays(), *self.states(), *self._gradients(always_alive=True)]

    def stays(self) -> list[Tensor]:
        """What is there before the first step: weights, and cuBLAS' workspaces."""
        recipe, dtype = self.layout.recipe, self.layout.recipe.weight_dtype
        size = recipe.weight_bytes * (self._gathered() if recipe.weights_on_host else self.card_parameters)
        name = "weights gathered from the host" if recipe.weights_on_host else "weights"
        libraries = (WORKSPACES, self.workspace), (LT_WORKSPACES, self.workspaces_bytes - self.workspace)
        workspaces = [constant(library, "uint8", taken, Role.WORKSPACE) for library, taken in libraries if taken]
        return [constant(name, dtype, size, Role.WEIGHT), *workspaces]

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
        outside: dict[Weight, None] = {}
        weights: list[Weight] = []
        for op in self.tape.ops:
            own = list(_op_weights(op)) if op.is_layer else [w for w in _op_weights(op) if w not in outside]
            weights += own if op.is_layer else dict.fromkeys(own)
            outside.update(dict.fromkeys(() if op.is_layer else own))
        return [weight for weight, _ in shards_of([(weight, 1) for weight in weights], self.layout.recipe.gpus)]

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

    def _gradients(self, always_alive: bool) -> list[Tensor]:
        recipe = self.layout.recipe
        if always_alive != (recipe.accumulation > 1) or recipe.weights_on_host:
            return []
        return [
            constant(
                "gradients",
                recipe.weight_dtype,
                recipe.weight_bytes * self.trained_card_parameters,
                Role.WEIGHT_GRADIENT,
            )
        ]

    @property
    def steps_at_end(self) -> bool:
        """Whether the optimizer steps all weights, on the device, when backward is done."""
        return not (self.layout.recipe.optimizer_in_backward or self.layout.recipe.weights_on_host)

    def temporaries(self) -> list[Tensor]:
        """The optimizer's, while it steps all weights."""
        return [constant(t.name, t.dtype, t.bytes, Role.UPDATE) for t in self.optimizer.temporaries if t.bytes]

    def batch(self) -> list[Tensor]:
        return [tensor_of(self.tape.dims, name, "b s", "int64", role=Role.BATCH) for name in ("token ids", "labels")]

    def constants(self) -> tuple[Entry, ...]:
        """Weights, gradients and optimizer states: W_mem of the theorem."""
        tensors = [t for t in self._resident() if t.role is not Role.WORKSPACE]
        if not self.layout.recipe.optimizer_in_backward:
            tensors += self._gradients(always_alive=False)
        return shown(labels(tensors), (1,) + (0,) * (len(BASIS) - 1))

    def detailed(self) -> dict[Instant, list[Moment]]:
        """Moments by instant, with the tensors alive."""
        return self._moments(self.rules(detail=True))

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


def adds_bias(tape: Tape, again: bool = False) -> bool:
    """Whether one of its products adds a bias. again: in a part that is run again in backward."""
    return any(
        (op.adds_bias and not again)
        or (op.part is not None and adds_bias(op.part.tape, again and not op.part.recompute))
        for op in tape.ops
    )


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


def build(model: Model, layout: Layout) -> Tape:
    """The whole step: embedding, layers, final norm, head and loss."""
    recipe = layout.recipe
    numerics = Numerics(
        weights=recipe.used_dtype,
        autocast=recipe.autocast,
        attention=attention_kernel(model, recipe),
        masked=layout.masked,
        padded=layout.padded,
        platform=layout.platform,
    )
    in_pieces = recipe.loss_in_chunks and layout.several_loss_chunks
    frozen = frozen_names(model, Selection(recipe.train, recipe.freeze))
    w = Writer(model, numerics, stage=Stage.EMBEDDING, frozen=frozen.outside)
    kinds = (WeightKind.EMBEDDINGS, WeightKind.HEAD) if model.tied else (WeightKind.EMBEDDINGS,)
    table = w.weight("embed_tokens", model.vocab, model.hidden, kinds=kinds)
    with w.tape.assign_role(Role.EMBEDDING):
        hidden, variables = _embedding(w, table, joins_view=not in_pieces and not numerics.autocast)
    with w.tape.assign_role(Role.POSITIONS):
        shared = _shared(w, variables[0], layout)
    several = layout.several_mlp_chunks  # of one chunk the runtime makes nothing
    chunks = MlpChunks(several, several and recipe.mlp_recompute)
    calls: dict[tuple[LayerKind, Names], LayerCall] = {}
    for kind, names in set(zip(model.layer_kinds, frozen.layers, strict=True)):
        calls[kind, names] = LayerCall(layer(model, kind, numerics, chunks, names), *shared[kind])
    rows = [calls[key] for key in zip(model.layer_kinds, frozen.layers, strict=True)]
    with w.tape.assign_role(Role.LAYER_INPUT):
        hidden = _layers(w.tape, hidden, rows, recipe)
    w.tape.stage = Stage.LOSS
    with w.tape.assign_role(Role.NORM):
        hidden = w.norm(hidden, "final norm")
    w.hold(
        *variables, *(tensor for arguments, _ in shared.values() for tensor in arguments)
    )  # until the model's forward returns
    _head(w, hidden, table, layout, in_pieces)
    tape = record_step(w.tape.build_tape(), variables[1] if recipe.input_gradients else None)
    if any(op.fetches for op in tape.ops):
        moved = tensor_of(tape.dims, "layer input in transfer", "b s d", hidden.dtype, role=Role.LAYER_INPUT)
        tape = replace(tape, in_transfer=moved)
    return into_groups(tape, recipe) if recipe.sharded else tape


Names = frozenset[str]


class Frozen(NamedTuple):
    """Names of the weights that a recipe does not train: outside of layers, and within each layer."""

    outside: Names
    layers: tuple[Names, ...]


@lru_cache(maxsize=256)
def frozen_names(model: Model, selection: Selection) -> Frozen:
    """Names of the weights that a selection freezes. Raises RecipeError for one that makes no sense for the model."""
    if not selection:
        return Frozen(frozenset(), (frozenset(),) * model.layers)
    prefixes = [family_of(model.model_type).weight_names[LAYER].format(n) for n in range(model.layers)]
    weights = named_weights(model)
    selection.check(weights, model.name)
    names = [weight.names[0] for weight in weights if not selection.trains(weight)]
    inside = [frozenset(n.removeprefix(prefix) for n in names if n.startswith(prefix)) for prefix in prefixes]
    return Frozen(frozenset(n for n in names if not n.startswith(tuple(prefixes))), tuple(inside))


@lru_cache(maxsize=64)
def named_weights(model: Model) -> tuple[Named, ...]:
    """Weights of a model, as transformers calls them."""
    names, number = family_of(model.model_type).weight_names, 0
    weights: dict[str, Named] = {}
    for op in build(model, Layout(STRATEGIES["standard"], False, False, False)).ops:
        prefix = names[LAYER].format(number) if op.is_layer else ""
        number += op.is_layer
        for weight in dict.fromkeys(_op_weights(op)):
            aliases = (f"{names['lm_head']}.weight",) if WeightKind.HEAD in weight.kinds and model.tied else ()
            weights[prefix + weight.name] = Named((prefix + weight.name, *aliases), weight.kinds)
    return tuple(weights.values())


def embeddings_are_frozen(model: Model, recipe: Recipe) -> bool:
    """Whether no gradient is wanted of what the layers are given."""
    selection = Selection(recipe.train, recipe.freeze)
    tables = [weight for weight in named_weights(model) if WeightKind.EMBEDDINGS in weight.kinds]
    return not any(map(selection.trains, tables))


def attention_kernel(model: Model, recipe: Recipe) -> str:
    """Attention that a recipe comes to: where transformers has no sdpa for the model (soft-capping, sinks), flash; eager in fp32, as
    flash computes in 16 bits only."""
    if not runs_sdpa(recipe.attention) or model.has_sdpa:
        return recipe.attention
    return "eager" if recipe.precision == "fp32" else NO_SDPA


def kernels_of(model: Model, layout: Layout) -> tuple[Kernel, ...]:
    """Attention kernels that a step runs, each once: of layers without an explicit mask, and of those with one."""
    recipe = layout.recipe
    attention = attention_kernel(model, recipe)
    masks = {layout.masked and kind.window is not None for kind in model.layer_kinds}
    dtype = "float32" if recipe.precision == "fp32" else "bfloat16"
    calls = [AttentionCall.from_attention(model.attention, dtype, masked, layout.platform) for masked in sorted(masks)]
    return tuple(dict.fromkeys(chosen(attention, asked) for asked in calls))


def _embedding(w: Writer, table: Weight, joins_view: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first hidden states, and what the model's code still holds beside them: position ids, what the embedding gave. joins_view: the gradient that a tied
    head made of the table is a view."""
    model, tape = w.model, w.tape
    with tape.assign_role(Role.POSITIONS):
        ids = tape.new("position ids", "s", "int64")
    changed = model.scaled_embedding or model.learned_positions
    looked_up = w.new("embeddings", "d", w.wide) if changed else w.hidden()
    joins = Joined(table, joins_view) if model.tied else None
    workspace = WeightWorkspace(table, SortedLookups(model.vocab, model.hidden), "bs")
    tape.op("embedding", [], looked_up, weights=(table,), workspaces=(workspace,), joins=joins)
    hidden, variables = looked_up, [looked_up]
    if model.scaled_embedding:
        hidden = w.pointwise("embedding scale", looked_up, w.hidden())
        variables = [hidden]
    tape.op("position ids", [], ids)
    if model.learned_positions:
        positions = tape.new("position embeddings", "s d", w.wide)
        sizes = model.learned_positions, model.hidden
        rows = w.weight("position embeddings", *sizes, kinds=(WeightKind.EMBEDDINGS,))
        # its gradient's workspace is smaller than that of the table of token ids, and is gone before that comes
        tape.op("embedding of positions", [ids], positions, keeps=(ids,), weights=(rows,))
        y = w.hidden()
        grads = ((hidden, None), (positions, tape.grad(positions)))
        hidden = tape.op("embedding add", [hidden, positions], y, grads=grads)
        variables.append(positions)
    if model.dropout:
        with tape.assign_role(Role.LAYER_INPUT):
            hidden = w.dropout(hidden, model.dropout, HIDDEN, operation="embedding dropout")
    return hidden, (ids, *variables)


def _shared(w: Writer, ids: Tensor, layout: Layout) -> dict[LayerKind, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Tensors that the layers of each kind are given beside hidden states: position ids, cos and sin, a mask; and of these what products keep: cos
    and sin."""
    kinds = dict.fromkeys(w.model.layer_kinds)
    sliding = {kind: kind.window is not None for kind in kinds}
    several = w.code.local_rotary
    rotary = {
        is_sliding: _rotary_tables(w, layout)
        for is_sliding in dict.fromkeys(sliding[kind] and several for kind in kinds)
    }
    masks = {is_sliding: _mask(w, is_sliding, layout) for is_sliding in dict.fromkeys(sliding.values())}
    tables = {kind: rotary[sliding[kind] and several] for kind in kinds}
    kept_tables = {kind: () if w.code.interleaved_tables else tables[kind] for kind in kinds}
    return {kind: ((ids, *tables[kind], *masks[sliding[kind]]), kept_tables[kind]) for kind in kinds}


def _rotary_tables(w: Writer, layout: Layout) -> tuple[Tensor, ...]:
    a, model = w.model.attention, w.model
    width = a.latent.rope_dim if a.latent else a.rotary_dim
    if not width:
        return ()
    tables: tuple[Tensor, ...]
    if w.code.rotary == "complex":
        tables = (w.tape.new("complex rotation of positions", f"s {width // 2}", "complex64"),)
    else:
        width = width // 2 if w.code.half_tables else width
        dtype = rotary_dtype(model, layout.recipe.used_dtype)
        tables = tuple(w.tape.new(f"{name} of positions", f"s {width}", dtype) for name in ("cos", "sin"))
    w.tape.op("positions", [], *tables)
    return tables


def _mask(w: Writer, sliding: bool, layout: Layout) -> tuple[Tensor, ...]:
    """An explicit attention mask: made once in forward, for all layers of a kind."""
    if not runs_sdpa(layout.recipe.attention) and KERNELS[layout.recipe.attention].makes_causal_mask:
        mask = w.tape.new("causal mask", "b s s", layout.recipe.used_dtype)
    elif sliding and layout.masked:
        mask = w.tape.new("sliding-window mask", "s s", "bool")
    else:
        return ()
    w.tape.op("mask", [], mask)
    return (mask,)


class LayerCall(NamedTuple):
    """A layer, or several, and what it is given beside hidden states: all of it, and the tables of cos and sin."""

    tape: Tape
    arguments: tuple[Tensor, ...]
    tables: tuple[Tensor, ...]

    def list_kept(self, recompute: bool) -> tuple[Tensor, ...]:
        """Tensors kept for backward: a checkpoint keeps all of it, else cos and sin are kept by the products with them."""
        return self.arguments if recompute else self.tables


def _layers(tape: TapeWriter, hidden: Tensor, layers: list[LayerCall], recipe: Recipe) -> Tensor:
    every = segment_length(recipe, len(layers))
    if every == 0:
        return _chain(tape, hidden, layers, recompute=False, offload=False)
    if every == 1:
        return _chain(tape, hidden, layers, recompute=True, offload=recipe.offload_layer_inputs)
    segment_calls: dict[tuple[int, ...], LayerCall] = {}
    groups = [layers[start : start + every] for start in range(0, len(layers), every)]
    for inside in groups:
        key = tuple(id(layer.tape) for layer in inside)
        if key not in segment_calls:
            segment_calls[key] = _segment(tape.dims, hidden.dtype, inside)
    segments = [segment_calls[tuple(id(layer.tape) for layer in inside)] for inside in groups]
    return _chain(tape, hidden, segments, recompute=True, offload=recipe.offload_layer_inputs)


def _segment(dims: dict[str, int], dtype: str, layers: list[LayerCall]) -> LayerCall:
    """Several layers that are checkpointed together."""
    segment = TapeWriter(dims)
    segment.role = Role.LAYER_INPUT
    segment.source = segment.new(HIDDEN, "b s d", dtype)
    _chain(segment, segment.source, [LayerCall(layer.tape, (), ()) for layer in layers], recompute=False, offload=False)
    arguments = tuple(dict.fromkeys(tensor for layer in layers for tensor in layer.arguments))
    return LayerCall(segment.build_tape(), arguments, ())


def segment_length(recipe: Recipe, layers: int) -> int:
    """Layers per checkpoint; 0: no checkpointing. sqrt: the nearest whole number to sqrt(layers)."""
    if recipe.checkpoint == "none":
        return 0
    if recipe.checkpoint == "layer":
        return 1
    if recipe.checkpoint == "sqrt":
        low = isqrt(layers)
        return max(1, low + (layers - low * low > low))
    return min(int(recipe.checkpoint), layers)


def stored_inputs(recipe: Recipe, layers: int) -> int:
    """Number of layer inputs that a checkpointed step keeps: one a checkpoint."""
    return -(-layers // segment_length(recipe, layers)) if recipe.checkpoint != "none" else 0


def _chain(tape: TapeWriter, hidden: Tensor, layers: list[LayerCall], *, recompute: bool, offload: bool) -> Tensor:
    """Layers, or segments of them, one after the other: those of the step are stages of it, those of a segment are not."""
    count = len(layers)
    for i, call in enumerate(layers):
        stage = Stage.of_layer(i, count) if tape.stage is not None else None
        place = "first" if i == 0 else "last" if i == count - 1 else str(i)
        name = f"layer, {place}" if stage is not None else f"layer of the segment, {place}"
        out = tape.new(HIDDEN, "b s d", hidden.dtype)
        part = Part(call.tape, recompute=recompute, offload=offload, arguments=call.list_kept(recompute))
        tape.add(Op(name, (hidden,), (out,), part=part, stage=stage))
        hidden = out
    return hidden


def _head(w: Writer, hidden: Tensor, table: Weight, layout: Layout, in_pieces: bool) -> None:
    """LM head and loss; with the chunked loss as a part of its own."""
    model, tape, recipe = w.model, w.tape, layout.recipe
    weight = table if model.tied else w.weight("lm_head", model.vocab, model.hidden, kinds=(WeightKind.HEAD,))
    labels = tensor_of(tape.dims, "shifted labels", "b s", "int64", role=Role.BATCH)
    if not in_pieces:
        _loss(w, hidden, weight, recipe.loss, labels, defers=model.tied)
        return
    inner = Writer(model, w.numerics, "b k", frozen=w.frozen)
    _loss(inner, inner.source(hidden.name, hidden.dtype, hidden.role), weight, recipe.loss)
    tape.op("shift labels", [], labels)
    loss = tensor_of(tape.dims, "loss", "", "float32", role=Role.LOSS)
    inner_tape = inner.tape.build_tape()
    part = Part(inner_tape, chunked=True, sums=sums_of(inner_tape), in_forward=True)
    stage, defers = tape.stage, model.tied
    tape.add(Op("loss chunk", (hidden,), (loss,), part=part, defers=defers, holds=(labels,), stage=stage))


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
