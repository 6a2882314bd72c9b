"""The step model: one training step as instants, each a sum of tensors, in closed form over batch, length and chunks.

A step is forward, loss, backward and optimizer step. `Step` lays a model's layers out on a tape as the recipe asks
(checkpointed, chunked, offloaded), replays it (`tape.py`), and keeps for every named instant the moments that can be its
largest: vectors over batch, tokens, chunk tokens and their squares. Peaks and S_max are read off those vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import copy
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

from .cuda import flash_rows
from .layers import HIDDEN, MlpChunks, Numerics, Writer, layer, rotary_dtype
from .model import LayerKind, Model
from .optimizers import optimizer_memory
from .recipe import Recipe
from .sharding import into_groups, shards_of
from .tape import (
    BASIS,
    ZERO,
    Alive,
    Label,
    Moment,
    Op,
    Part,
    Rules,
    Tape,
    Tensor,
    Vector,
    Weight,
    add,
    backward,
    forward,
    step_weights,
    sums_of,
    undominated,
)

END_OF_FORWARD = "end of forward"
LOSS = "loss"
LOSS_BACKWARD = "backward of the loss"
LAST_LAYER = "backward of the last layer"
MIDDLE_LAYER = "backward of a layer between"
FIRST_LAYER = "backward of the first layer"
EMBEDDING = "backward of the embedding"
OPTIMIZER = "optimizer step"
CALIBRATED = "calibration less formula"
WORKSPACES = "cuBLAS workspaces"
INSTANTS = (END_OF_FORWARD, LOSS, LOSS_BACKWARD, LAST_LAYER, MIDDLE_LAYER, FIRST_LAYER, EMBEDDING, OPTIMIZER)


class Layout(NamedTuple):
    """The part of a recipe that decides a step's structure; lengths, batch and chunk counts are filled in later."""

    recipe: Recipe  # with batch and chunk counts normalised
    several_mlp_chunks: bool
    several_loss_chunks: bool
    masked: bool  # sliding-window layers carry an explicit mask
    padded: bool = False  # whose rows are padded (cuda.BIAS_ROWS)


class Entry(NamedTuple):
    """One tensor, or several of one kind, alive at an instant."""

    name: str
    shape: str  # symbolic, such as "(b, s, I)"
    dtype: str
    copies: int
    bytes: int  # of all copies


class Instant(NamedTuple):
    name: str
    bytes: int
    operation: str  # the moment within the instant at which it is largest
    entries: tuple[Entry, ...]  # largest first; they add up to `bytes`


class Chunks(NamedTuple):
    """Numbers of pieces of the sequence, for the MLP and for LM head and loss."""

    mlp: int
    loss: int


class Sizes(NamedTuple):
    """What a vector is evaluated at. Counts of sequences and tokens."""

    batch: int
    seq_len: int
    mlp_chunk_tokens: int
    loss_chunk_tokens: int

    @property
    def units(self) -> tuple[int, ...]:
        b, s = self.batch, self.seq_len
        return (1, b * s, b * self.mlp_chunk_tokens, b * self.loss_chunk_tokens, b * s * s, s * s, s, b * flash_rows(s))


def evaluate(vector: Vector, units: tuple[int, ...]) -> int:
    return sum(map(int.__mul__, vector, units))


class Step:
    """One training step of `model` under `layout` on a card whose cuBLAS workspaces take so many bytes."""

    def __init__(self, model: Model, layout: Layout, workspace: int):
        self.model, self.layout, self.workspace = model, layout, workspace
        self.tape = build(model, layout)
        self.weights = step_weights(self.tape)
        self.parameters = sum(w.numel * n for w, n in self.weights)
        held = shards_of(self.weights, layout.recipe.gpus)
        self.optimizer = optimizer_memory(layout.recipe, held)
        self.held = sum(w.numel * n for w, n in held)  # parameters on one card: all, or its share
        self.moments = {name: undominated(moments) for name, moments in self._moments(self.rules()).items()}
        self.is_calibrated = False

    def calibrated(self, moments: Mapping[str, Iterable[Vector]]) -> Step:
        """The same with moments of its instants as they were found, without cuBLAS' workspaces, in place of the formula's, which
        stay where none were. Instants that the formula leaves out, for they lie between others, stay out."""
        held = (self.workspace,) + (0,) * (len(BASIS) - 1)
        other = copy(self)
        other.is_calibrated = True
        found = {
            name: tuple(Moment(add(v, held), CALIBRATED, ()) for v in moments[name])
            for name in self.moments
            if name in moments
        }
        other.moments = {**self.moments, **found}
        return other

    # ---- replay -----------------------------------------------------------------------------------------------------

    def rules(self, **changes: bool) -> Rules:
        recipe = self.layout.recipe
        gradients = "kept" if recipe.accumulation == 1 else "added"
        if recipe.optimizer_in_backward or recipe.weights_on_host:
            gradients = "used"
        if recipe.sharded:  # whole ones stay until they are scattered
            gradients = "kept"
        return Rules(gradients, recipe.used_dtype, recipe.autocast, self.optimizer.per_weight, **changes)

    def _moments(self, rules: Rules) -> dict[str, list[Moment]]:
        """Every moment of the step by the instant it belongs to, with all that is alive."""
        found: dict[str, list[Moment]] = {}

        def note(moments: Iterable[Moment], alive: Alive, instant_of: Callable[[str], str]) -> None:
            base = total(alive)
            for live, at, inside in moments:
                moment = Moment(add(base, live), at, (*alive, *inside) if rules.detail else ())
                found.setdefault(instant_of(at), []).append(moment)

        resident = labels([*self._resident(), *self._batch()])
        ahead = forward(self.tape, rules, keep=True, prune=False)
        waiting = labels(self._in_transfer())
        note([m for m in ahead.moments if _forward_instant(m.at) == END_OF_FORWARD], resident, _forward_instant)
        note([m for m in ahead.moments if _forward_instant(m.at) == LOSS], resident + waiting, _forward_instant)
        let_go = tuple((label, -count) for label, count in ahead.cached)  # autocast's cache, at the end of forward
        assert self.tape.output is not None
        seed = labels([self.tape.grad(self.tape.output)])
        left = add(ahead.net, total(let_go + seed))
        behind = backward(self.tape, rules, prune=False)
        moments = [Moment(add(left, m.live), m.at, (*ahead.alive, *let_go, *seed, *m.alive)) for m in behind.moments]
        first = [
            m for m in moments if _backward_instant(m.at) in (FIRST_LAYER, EMBEDDING)
        ]  # nothing is left to fetch then
        note(first, resident, _backward_instant)
        note([m for m in moments if m not in first], resident + waiting, _backward_instant)
        if not (self.layout.recipe.optimizer_in_backward or self.layout.recipe.weights_on_host):
            step_only = labels([*self._gradients(always_alive=False), *_tensors(self.optimizer.temporaries)])
            note([Moment(ZERO, "step", ())], resident + step_only, lambda _: OPTIMIZER)
        return found

    # ---- what is alive besides the tape's tensors ---------------------------------------------------------------------

    def _resident(self) -> list[Tensor]:
        """Weights, optimizer states, cuBLAS' workspaces, and gradients where they outlive a backward pass."""
        recipe, dtype = self.layout.recipe, self.layout.recipe.weight_dtype
        size = recipe.weight_bytes * (self._gathered() if recipe.weights_on_host else self.held)
        name = "weights gathered from the host" if recipe.weights_on_host else "weights"
        tensors = [constant(name, dtype, size), constant(WORKSPACES, "uint8", self.workspace)]
        tensors += _tensors(self.optimizer.states)
        return tensors + self._gradients(always_alive=True)

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
        return [constant("gradients", recipe.weight_dtype, recipe.weight_bytes * self.held)]

    def _batch(self) -> list[Tensor]:
        new = self.tape.new
        return [new("token ids", "b s", "int64"), new("labels", "b s", "int64")]

    def _in_transfer(self) -> list[Tensor]:
        """The last layer's input, which stays, or in backward the one fetched back ahead of its use (mstplan/train/offload.py)."""
        if not self.layout.recipe.offload_layer_inputs:
            return []
        return [self.tape.new("layer input in transfer", "b s d", self.tape.ops[0].makes[0].dtype)]

    def constants(self) -> tuple[Entry, ...]:
        """Weights, gradients and optimizer states: W_mem of the theorem."""
        tensors = [t for t in self._resident() if t.name != WORKSPACES]
        if not self.layout.recipe.optimizer_in_backward:
            tensors += self._gradients(always_alive=False)
        return shown(labels(tensors), (1,) + (0,) * (len(BASIS) - 1))

    def detailed(self) -> dict[str, list[Moment]]:
        """Every moment by instant, with the tensors alive."""
        return self._moments(self.rules(detail=True))

    # ---- reading off --------------------------------------------------------------------------------------------------

    def largest(self, sizes: Sizes) -> tuple[str, int]:
        """The binding instant and its bytes."""
        units = sizes.units
        best_name, best = "", -1
        for name, moments in self.moments.items():
            for moment in moments:
                value = evaluate(moment.live, units)
                if value > best:
                    best_name, best = name, value
        return best_name, best

    def instants(self, sizes: Sizes) -> tuple[Instant, ...]:
        """Every instant at its largest moment, in the order of a step, with the tensors alive."""
        found = self.detailed()
        units = sizes.units
        result = []
        for name in INSTANTS:
            moments = found.get(name)
            if moments:
                top = max(moments, key=lambda m: evaluate(m.live, units))
                size, entries = evaluate(top.live, units), shown(top.alive, units)
                if self.is_calibrated and name in self.moments:
                    told = max(evaluate(m.live, units) for m in self.moments[name])
                    off = (Entry(CALIBRATED, "", "", 1, told - size),) if told != size else ()
                    entries = tuple(sorted((*entries, *off), key=lambda entry: -entry.bytes))
                    size = told
                result.append(Instant(name, size, _operation(top.at), entries))
        return tuple(result)


def labels(tensors: Iterable[Tensor]) -> Alive:
    return tuple((t.label, 1) for t in tensors)


def total(alive: Alive) -> Vector:
    vector = [0] * len(BASIS)
    for label, count in alive:
        vector[label.basis] += label.bytes * count
    return tuple(vector)


def constant(name: str, dtype: str, size: int) -> Tensor:
    """A tensor, or a group of them, of a fixed number of bytes."""
    return Tensor(name, "", dtype, 0, size)


def _tensors(rows: Iterable[tuple[str, str, int]]) -> list[Tensor]:
    return [constant(name, dtype, size) for name, dtype, size in rows if size]


def _forward_instant(at: str) -> str:
    return END_OF_FORWARD if at.startswith(("layer", "embedding", "position", "mask")) else LOSS


def _backward_instant(at: str) -> str:
    for prefix, name in (("layer, first", FIRST_LAYER), ("layer, last", LAST_LAYER), ("layer", MIDDLE_LAYER)):
        if at.startswith(prefix):
            return name
    of_embedding = (
        "backward of embedding",
        "add gradients of embed",
        "optimizer step of embed",
        "optimizer step of position",
    )
    return EMBEDDING if at.startswith(of_embedding) else LOSS_BACKWARD


def _operation(at: str) -> str:
    return at.split(": ", 1)[-1] if at.startswith("layer") else at


def bytes_of(entries: Iterable[Entry]) -> int:
    return sum(entry.bytes for entry in entries)


def shown(alive: Iterable[tuple[Label, int]], units: tuple[int, ...]) -> tuple[Entry, ...]:
    """Tensors as entries, alike ones together, largest first."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for label, count in alive:
        name, shape = label.name, label.shape
        if name.startswith("gradient of ") and label.basis == 0:
            name, shape = "gradients", ""
        group = groups.setdefault((name, shape, label.dtype), [0, 0])
        group[0] += count
        group[1] += count * label.bytes * units[label.basis]
    _without_negatives(groups)
    entries = [
        Entry(n, f"({', '.join(s.split())})" if s else "", d, c, size)
        for (n, s, d), (c, size) in groups.items()
        if size
    ]
    return tuple(sorted(entries, key=lambda e: -e.bytes))


def _without_negatives(groups: dict[tuple[str, str, str], list[int]]) -> None:
    """Of tensors kept by every piece of a sequence, those of the running piece go first: whole ones less a piece each, (b, s, I) and
    -1 x (b, c, I), are what the other pieces keep, (b, s-c, I)."""
    for (name, shape, dtype), (count, size) in [(key, tuple(group)) for key, group in groups.items() if group[0] < 0]:
        whole = groups[name, shape.replace("c", "s", 1), dtype]
        each = whole[1] // whole[0]
        del groups[name, shape, dtype]
        groups[name, shape.replace("c", "s-c", 1), dtype] = [-count, size - count * each]
        whole[0], whole[1] = whole[0] + count, whole[1] + count * each


# ---- laying a step out on a tape ------------------------------------------------------------------------------------


def build(model: Model, layout: Layout) -> Tape:
    """The whole step: embedding, layers, final norm, head and loss."""
    recipe = layout.recipe
    numerics = Numerics(
        weights=recipe.used_dtype,
        autocast=recipe.autocast,
        attention=attention_kernel(model, recipe),
        masked=layout.masked,
        padded=layout.padded,
    )
    w = Writer(model, numerics)
    table = w.weight("embed_tokens.weight", model.vocab, model.hidden)
    hidden, held = _embedding(w, table)
    shared = _shared(w, held[0], layout)
    several = layout.several_mlp_chunks  # of one chunk the runtime makes nothing
    chunks = MlpChunks(several, several and recipe.mlp_recompute)
    layers = {kind: Given(layer(model, kind, numerics, chunks), shared[kind]) for kind in set(model.layer_kinds)}
    hidden = _layers(w.tape, hidden, [layers[kind] for kind in model.layer_kinds], recipe)
    hidden = w.norm(hidden, "final norm")
    w.hold(*held, *(tensor for tensors in shared.values() for tensor in tensors))  # until the model's forward returns
    _head(w, hidden, table, layout)
    if recipe.sharded:
        into_groups(w.tape, recipe)
    return w.tape


def attention_kernel(model: Model, recipe: Recipe) -> str:
    """Where transformers has no sdpa for the model (soft-capping, sinks), flash stands for it; eager in fp32, as flash
    computes in 16 bits only."""
    if recipe.attention != "sdpa" or model.has_sdpa:
        return recipe.attention
    return "eager" if recipe.precision == "fp32" else "flash"


def _embedding(w: Writer, table: Weight) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The first hidden states, and what the model's code still holds beside them: position ids first."""
    model, tape = w.model, w.tape
    ids = tape.new("position ids", "s", "int64")
    looked_up = w.new("embeddings" if model.scaled_embedding or model.learned_positions else HIDDEN, "d", w.wide)
    tape.op("embedding", [], looked_up, weights=(table,))
    tape.ops[-1].joins = table if model.tied else None
    hidden, held = looked_up, [looked_up]
    if model.scaled_embedding:
        hidden = w.pointwise("embedding scale", looked_up, w.new(HIDDEN, "d", w.wide))
        held = [hidden]
    tape.op("position ids", [], ids)
    if model.learned_positions:
        positions = tape.new("position embeddings", "s d", w.wide)
        rows = w.weight("position embeddings.weight", model.learned_positions, model.hidden)
        tape.op("embedding of positions", [ids], positions, keeps=(ids,), weights=(rows,))
        y = w.new(HIDDEN, "d", w.wide)
        grads = ((hidden, None), (positions, tape.grad(positions)))
        hidden = tape.op("embedding add", [hidden, positions], y, grads=grads)
        held.append(positions)
    if model.dropout:
        dropped = w.dropout(hidden, model.dropout)
        dropped.name = HIDDEN
        tape.ops[-1].name = "embedding dropout"
        hidden = dropped
    tape.output = hidden
    return hidden, (ids, *held)


def _shared(w: Writer, ids: Tensor, layout: Layout) -> dict[LayerKind, tuple[Tensor, ...]]:
    """What the layers of each kind are given beside hidden states: position ids, cos and sin, a mask."""
    kinds = dict.fromkeys(w.model.layer_kinds)
    sliding = {kind: kind.window is not None for kind in kinds}
    several = w.model.model_type.startswith("gemma3")  # local and global frequencies
    rotary = {of: _rotary_tables(w, layout) for of in dict.fromkeys(sliding[kind] and several for kind in kinds)}
    masks = {of: _mask(w, of, layout) for of in dict.fromkeys(sliding.values())}
    return {kind: (ids, *rotary[sliding[kind] and several], *masks[sliding[kind]]) for kind in kinds}


def _rotary_tables(w: Writer, layout: Layout) -> tuple[Tensor, ...]:
    a, model = w.model.attention, w.model
    width = a.latent.rope_dim if a.latent else a.rotary_dim
    if not width:
        return ()
    tables: tuple[Tensor, ...]
    if model.model_type == "deepseek_v2":
        tables = (w.tape.new("complex rotation of positions", f"s {width // 2}", "complex64"),)
    else:
        width = width // 2 if model.model_type == "gpt_oss" else width
        dtype = rotary_dtype(model, layout.recipe.used_dtype)
        tables = tuple(w.tape.new(f"{name} of positions", f"s {width}", dtype) for name in ("cos", "sin"))
    w.tape.op("positions", [], *tables)
    return tables


def _mask(w: Writer, sliding: bool, layout: Layout) -> tuple[Tensor, ...]:
    """An explicit attention mask: made once in forward, for all layers of a kind."""
    if layout.recipe.attention == "eager":
        mask = w.tape.new("causal mask", "b s s", layout.recipe.used_dtype)
    elif sliding and layout.masked:
        mask = w.tape.new("sliding-window mask", "s s", "bool")
    else:
        return ()
    w.tape.op("mask", [], mask)
    return (mask,)


class Given(NamedTuple):
    """A layer, or several, and what it is given beside hidden states."""

    tape: Tape
    arguments: tuple[Tensor, ...]

    def kept(self, recompute: bool) -> tuple[Tensor, ...]:
        """For backward: a checkpoint keeps all of it, else cos and sin are kept by the products with them."""
        return tuple(t for t in self.arguments if recompute or t.name.endswith("of positions"))


def _layers(tape: Tape, hidden: Tensor, layers: list[Given], recipe: Recipe) -> Tensor:
    every = segment_length(recipe, len(layers))
    if every == 0:
        return _chain(tape, hidden, layers, recompute=False, offload=False, what="layer")
    if every == 1:
        return _chain(tape, hidden, layers, recompute=True, offload=recipe.offload_layer_inputs, what="layer")
    segments: list[Given] = []
    made: dict[tuple[int, ...], Given] = {}
    for start in range(0, len(layers), every):
        inside = layers[start : start + every]
        key = tuple(id(layer.tape) for layer in inside)
        if key not in made:
            segment = Tape(tape.dims)
            segment.source = segment.new(HIDDEN, "b s d", hidden.dtype)
            _chain(
                segment,
                segment.source,
                [Given(layer.tape, ()) for layer in inside],
                recompute=False,
                offload=False,
                what="layer of the segment",
            )
            made[key] = Given(segment, tuple(dict.fromkeys(t for layer in inside for t in layer.arguments)))
        segments.append(made[key])
    return _chain(tape, hidden, segments, recompute=True, offload=recipe.offload_layer_inputs, what="layer")


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
    """How many layer inputs a checkpointed step keeps: one a checkpoint."""
    return -(-layers // segment_length(recipe, layers)) if recipe.checkpoint != "none" else 0


def _chain(tape: Tape, hidden: Tensor, layers: list[Given], *, recompute: bool, offload: bool, what: str) -> Tensor:
    count, tapes = len(layers), [id(layer.tape) for layer in layers]
    for i, (inner, _) in enumerate(layers):
        place = "first" if i == 0 else "last" if i == count - 1 else str(i)
        out = tape.new(HIDDEN, "b s d", hidden.dtype)
        interior = any(_lies_between(tapes, i, period) for period in range(1, _LONGEST_PERIOD + 1))
        part = Part(inner, recompute=recompute, offload=offload)
        tape.ops.append(
            Op(f"{what}, {place}", (hidden,), (out,), part=part, interior=interior, arguments=layers[i].kept(recompute))
        )
        hidden = tape.output = out
    return hidden


_LONGEST_PERIOD = 8
"""Layers after which kinds of layers are taken to repeat."""


def _lies_between(tapes: list[int], i: int, period: int) -> bool:
    """Does a layer need neither more than one that is a period before it nor than the one a period after it? What is alive beside it grows
    or shrinks by the same from one to the next where the layers on both sides are the same. The first layer and the last are instants of
    their own, and what a kind of layers is given goes with the first of them."""
    before, after = i - period, i + period
    if before < 1 or after > len(tapes) - 2 or tapes[before:i] != tapes[i:after] or tapes[i] != tapes[after]:
        return False
    return period == 1 or (tapes[before - 1] == tapes[i - 1] and set(tapes[before:i]) <= set(tapes[: before + 1]))


def _head(w: Writer, hidden: Tensor, table: Weight, layout: Layout) -> None:
    """LM head and loss; with the chunked loss as a part of its own."""
    model, tape, recipe = w.model, w.tape, layout.recipe
    weight = table if model.tied else w.weight("lm_head.weight", model.vocab, model.hidden)
    labels = tape.new("shifted labels", "b s", "int64")
    if recipe.loss != "chunked" or not layout.several_loss_chunks:
        _loss(w, hidden, weight, "transformers" if recipe.loss == "chunked" else recipe.loss, labels)
        head = next(op for op in tape.ops if op.name == "lm_head")
        head.defers = model.tied
        next(op for op in tape.ops if op.name == "embedding").joins_view = not head.cast
        return
    inner = Writer(model, w.numerics, "b k")
    _loss(inner, inner.source(hidden.name, hidden.dtype), weight, "transformers")
    tape.op("shift labels", [], labels)
    loss = tape.new("loss", "", "float32")
    part = Part(inner.tape, chunked=True, sums=sums_of(inner.tape), in_forward=True)
    tape.ops.append(Op("loss chunk", (hidden,), (loss,), part=part, defers=model.tied, holds=(labels,)))
    tape.output = loss


def _loss(w: Writer, hidden: Tensor, weight: Weight, loss: str, *labels: Tensor) -> None:
    """lm_head, soft-capping, and ForCausalLMLoss (transformers loss/loss_utils.py), which makes `labels`."""
    tape, model = w.tape, w.model
    logits = w.linear(hidden, w.new("logits", "V"), "lm_head", weight=weight)
    if model.logit_softcap:
        logits = w.pointwise("divide logits", logits, w.new("logits / cap", "V"))
        tanh = w.new("tanh of logits", "V")
        logits = w.pointwise("tanh of logits", logits, tanh, tanh)
        logits = w.pointwise("multiply logits", logits, w.new("capped logits", "V"))
    wide = w.cast(logits, "float32", "logits, fp32")
    tape.ops[-1].holds += (hidden,)
    if labels:
        tape.op("shift labels", [], *labels)
    if loss == "transformers<4.45":
        shifted = w.new("shifted logits, fp32", "V", "float32")
        tape.op("shift logits", [wide], shifted, keeps=(wide,), grads=((wide, tape.grad(wide)),))
        wide, held = shifted, (wide, hidden)
    else:
        held = (logits, hidden)  # variables of the model's forward
    log_probs = w.new("log-softmax of logits", "V", "float32")
    tape.op("log-softmax", [wide], log_probs, keeps=(log_probs,), grads=((wide, tape.grad(wide)),), holds=held)
    loss_value = tape.new("loss", "", "float32")
    tape.op(
        "negative log-likelihood",
        [log_probs, *labels],
        loss_value,
        keeps=(log_probs, *labels),
        grads=((log_probs, tape.grad(log_probs)),),
        holds=(*held, wide),
    )


def _op_weights(op: Op) -> tuple[Weight, ...]:
    return (
        tuple(weight for weight, n in step_weights(op.part.tape) for _ in range(n))
        if op.part is not None
        else op.weights
    )


@lru_cache(maxsize=1024)
def step(model: Model, layout: Layout, workspace: int) -> Step:
    return Step(model, layout, workspace)
