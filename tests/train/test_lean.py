"""Lean: in both passes the MLP's intermediates and the logits exist for one chunk at a time, and layer inputs on the host leave
no more than two of them on the device. Shown by what torch really allocates on the CPU."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan.errors import RecipeError
from mstplan.measuring.allocations import Allocations, KeepSize, record_allocations
from mstplan.train import minisequence, offload
from mstplan.train.runtime import Runtime

from .double import float64
from .families import SMALL, small_batch, small_model
from .test_exact import assert_equal, step

BATCH, TOKENS, HIDDEN = 2, 512, 48
WIDTH, VOCABULARY = 1009, 3001  # primes: no other tensor has a multiple of as many numbers
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 12, "query_pre_attn_scalar": 12},
    "gpt2": {"n_embd": HIDDEN, "n_head": 4, "n_positions": TOKENS},
    "opt": {"word_embed_proj_dim": HIDDEN},
    "mixtral": {"num_local_experts": 4},
}
# Tensors as wide as the MLP that one run of it has at once, in forward (without a graph) and in backward. Gated: gate or its
# activation, up, product; then these four kept, and the gradients of the product and of one factor. gpt2's GELU of many
# operations: 4 and 7. opt: before and after ReLU, and one gradient.
HELD = {"llama": (3, 6), "gemma2": (3, 6), "gpt2": (4, 7), "opt": (2, 3)}
# As wide as the vocabulary: logits, their log softmax, the gradient of one of them; gemma2 caps its logits.
HELD_LOGITS = {"llama": 3, "gemma2": 4, "gpt2": 3, "opt": 3, "mixtral": 3}
CHUNKS = (4, 16)


# ---- what a step allocates --------------------------------------------------------------------------------------------


def build(
    family: str, width: int = WIDTH, vocabulary: int = VOCABULARY, layers: int = 2, dtype: torch.dtype = torch.float32
) -> nn.Module:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": width,
        "ffn_dim": width,
        "n_inner": width,
        "vocab_size": vocabulary,
    }
    more = {"max_position_embeddings": TOKENS, "num_hidden_layers": layers, "n_layer": layers, "use_cache": False}
    config = AutoConfig.for_model(family, **{**SMALL, **sizes, **more, **FAMILIES[family]})
    for name in ("dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, name, 0.0)
    torch.manual_seed(0)
    attention = "eager" if family == "gemma2" else "sdpa"  # it supports nothing else
    return (
        AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation="eager")
        .to(dtype)
        .train()
    )


def tokens_for(model: nn.Module, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (BATCH, tokens), generator=torch.Generator().manual_seed(1))


def recorded(model: nn.Module, tokens: int = TOKENS) -> Allocations:
    """One step."""
    ids = tokens_for(model, tokens)
    model.zero_grad()

    def train(mark: Any) -> None:
        mark("forward")
        loss = model(input_ids=ids, labels=ids).loss
        mark("backward")
        loss.backward()

    return record_allocations(train)


def in_chunks(model: nn.Module, chunks: int, **settings: Any) -> Allocations:
    """One step in mini-sequences; not the first, which also tries out a few tokens and leaves Python's caches filled."""
    minisequence(model, mlp_chunks=chunks, loss_chunks=chunks, **settings)
    recorded(model)
    found = recorded(model)
    minisequence.undo(model)
    return found


def checkpointed(model: nn.Module, tokens: int = TOKENS) -> Allocations:
    """One step of the plain model under transformers' own checkpointing, which stays on."""
    switch_on = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    switch_on({"use_reentrant": False})
    return recorded(model, tokens)


def wide(model: nn.Module, width: int) -> KeepSize:
    """Is this the size of activations of so many numbers a token (and not of a weight, of one expert's, or of their sums)?"""
    unit = width * next(model.parameters()).itemsize
    weights = {w.numel() * size for p in model.parameters() for w in (p, p[0]) for size in (p.itemsize, 4)}
    return lambda size: size % unit == 0 and size not in weights


def bytes_of(model: nn.Module, width: int, tokens: int = TOKENS) -> int:
    return BATCH * tokens * width * next(model.parameters()).itemsize


@pytest.mark.parametrize("checkpoint", ["none", "layer"])
@pytest.mark.parametrize("family", HELD)
def test_intermediates_exist_for_one_chunk_at_a_time(family, checkpoint):
    model = build(family)
    kinds = {WIDTH: wide(model, WIDTH), VOCABULARY: wide(model, VOCABULARY)}
    assert {bytes_of(model, width) for width in kinds} <= recorded(model).sizes()
    for chunks in CHUNKS:
        found = in_chunks(model, chunks, checkpoint=checkpoint)
        for width, kind in kinds.items():
            assert {s for s in found.sizes() if kind(s)} == {bytes_of(model, width, TOKENS // chunks)}
        held = [found.peak(phase, kinds[WIDTH]) for phase in ("forward", "backward")]
        assert held == [n * bytes_of(model, WIDTH, TOKENS // chunks) for n in HELD[family]]
        assert found.peak(keep=kinds[VOCABULARY]) == HELD_LOGITS[family] * bytes_of(model, VOCABULARY, TOKENS // chunks)


@pytest.mark.parametrize("family", HELD)
def test_a_chunk_holds_what_a_plain_sequence_of_its_length_holds(family):
    """What HELD says of a chunk is what the plain model needs."""
    model, tokens = build(family), TOKENS // 4
    plain = checkpointed(model, tokens)
    held = [plain.peak(phase, wide(model, WIDTH)) for phase in ("forward", "backward")]
    assert held == [n * bytes_of(model, WIDTH, tokens) for n in HELD[family]]
    assert plain.peak(keep=wide(model, VOCABULARY)) == HELD_LOGITS[family] * bytes_of(model, VOCABULARY, tokens)


def test_experts_too():
    """What their chunks hold depends on the routing: as much as the plain experts do, run on the same tokens."""
    model = build("mixtral")
    kind, logits = wide(model, WIDTH), wide(model, VOCABULARY)
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach()))
        for layer in model.model.layers
    ]
    plain = recorded(model)
    for hook in hooks:
        hook.remove()
    for chunks in CHUNKS:
        found, chunk = in_chunks(model, chunks, checkpoint="layer"), bytes_of(model, WIDTH, TOKENS // chunks)
        assert max(filter(kind, found.sizes())) <= 2 * chunk < max(filter(kind, plain.sizes()))  # gate and up in one
        pieces = [
            (layer.mlp, piece)
            for layer, x in zip(model.model.layers, inputs, strict=True)
            for piece in pieces_of(x, chunks)
        ]
        assert found.peak("forward", kind) == one_by_one(pieces, graph=False).peak(keep=kind)
        assert found.peak("backward", kind) == one_by_one(pieces, graph=True).peak(keep=kind)
        assert found.peak(keep=logits) == HELD_LOGITS["mixtral"] * bytes_of(model, VOCABULARY, TOKENS // chunks)


def pieces_of(x: torch.Tensor, chunks: int) -> tuple[torch.Tensor, ...]:
    return x.flatten(0, -2).split(BATCH * TOKENS // chunks)


def one_by_one(pieces: list[tuple[nn.Module, torch.Tensor]], graph: bool) -> Allocations:
    """Plain MLPs, each on a few tokens (n, d), and their gradients where they make a graph."""

    def run(_mark: Any) -> None:
        for mlp, piece in pieces:
            with torch.set_grad_enabled(graph):
                out = mlp(piece.unsqueeze(0))
                if graph:
                    torch.autograd.grad(out, list(mlp.parameters()), torch.ones_like(out), allow_unused=True)
                del out

    return record_allocations(run)


def test_in_bfloat16_too():
    """The gradients' products run in fp32, which takes copies in fp32 on a CPU; on a GPU it does not."""
    model = build("llama", dtype=torch.bfloat16)
    for chunks in CHUNKS:
        found = in_chunks(model, chunks, checkpoint="layer")
        chunk = bytes_of(model, WIDTH, TOKENS // chunks)
        assert {s for s in found.sizes() if wide(model, WIDTH)(s)} == {chunk, 2 * chunk}
        assert max(s for s in found.sizes() if wide(model, VOCABULARY)(s)) == 2 * bytes_of(
            model, VOCABULARY, TOKENS // chunks
        )  # in fp32


def test_under_autocast_too():
    """Casts of the weights included: they are given back chunk by chunk."""
    model = build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        plain, model = checkpointed(model), build("llama")
        found = [in_chunks(model, chunks, checkpoint="layer") for chunks in CHUNKS]
    kind = wide(model.to(torch.bfloat16), WIDTH)
    assert plain.peak(keep=kind) == 4 * found[0].peak(keep=kind) == 16 * found[1].peak(keep=kind)
    assert plain.peak() > found[0].peak() > found[1].peak()


def test_weights_have_one_sum_and_no_gradients_of_chunks():
    model = build("llama", layers=1)
    found = in_chunks(model, 4, checkpoint="layer")
    assert found.peak("backward", lambda size: size == 4 * WIDTH * HIDDEN) == 3 * 4 * WIDTH * HIDDEN  # gate, up, down
    assert found.peak("forward", lambda size: size == 4 * VOCABULARY * HIDDEN) == 4 * VOCABULARY * HIDDEN


def test_the_first_step_is_as_lean():
    model = build("llama")
    minisequence(model, mlp_chunks=4, loss_chunks=4)
    found = recorded(model)
    assert not {bytes_of(model, WIDTH), bytes_of(model, VOCABULARY)} & found.sizes()


def test_the_count_notices():
    """Two chunks at a time, and a tensor that outlives its chunk."""
    model = build("llama")
    kind, chunk = wide(model, WIDTH), bytes_of(model, WIDTH, TOKENS // 4)
    assert in_chunks(model, 2, checkpoint="layer").peak("backward", kind) == 2 * HELD["llama"][1] * chunk
    kept: list[torch.Tensor] = []
    act = model.model.layers[1].mlp.act_fn
    act.register_forward_hook(lambda _module, _inputs, out: kept.append(out.detach()))
    assert in_chunks(model, 4, checkpoint="layer").peak("backward", kind) > HELD["llama"][1] * chunk


# ---- the peak of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["MLP", "loss"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_peak_falls_as_intermediates_do(family, what):
    """Where intermediates decide the peak, M chunks save 1 - 1/M of them, less what the sums of the weights' gradients take."""
    model = build(family, vocabulary=61) if what == "MLP" else build(family, width=83)
    whole = (
        HELD[family][1] * bytes_of(model, WIDTH) if what == "MLP" else HELD_LOGITS[family] * bytes_of(model, VOCABULARY)
    )
    peaks = {chunks: in_chunks(model, chunks, checkpoint="layer").peak() for chunks in CHUNKS}
    peaks[1] = checkpointed(model).peak()
    for chunks in CHUNKS:
        assert peaks[1] - peaks[chunks] >= 0.9 * (1 - 1 / chunks) * whole
    between = (peaks[4] - peaks[16]) / (1 / 4 - 1 / 16)  # the same step but for the chunks' size
    assert between == pytest.approx(whole, rel=0.02)


# ---- what waits for backward ------------------------------------------------------------------------------------------


def kept_for_backward(model: nn.Module) -> Counter[int]:
    """How many blocks of which size are alive when the forward pass is over."""
    ids = tokens_for(model)
    count: Counter[int] = Counter()
    for event in record_allocations(lambda _mark: model(input_ids=ids, labels=ids).loss).events:
        count[abs(event.bytes)] += 1 if event.bytes > 0 else -1
    return +count


@pytest.mark.parametrize("family", HELD)
def test_a_checkpointed_layer_keeps_its_input_alone(family):
    kept = {}
    for layers in (2, 4):
        model = build(family, layers=layers)
        hidden = bytes_of(model, HIDDEN)
        plain = kept_for_backward(model)
        minisequence(model, mlp_chunks=4, loss_chunks=4, checkpoint="layer")
        recorded(model)
        kept[layers] = kept_for_backward(model)
        assert (
            plain[bytes_of(model, WIDTH)] > 0 and plain[hidden] > 5 * layers
        )  # the count notices what is not checkpointed
        assert not any(wide(model, width)(size) for width in (WIDTH, VOCABULARY) for size in kept[layers])
    assert (
        kept[4][hidden] - kept[2][hidden] == 2 and kept[2][hidden] <= 2 + 3
    )  # the final norm's input, what it keeps, d_hidden
    grown = {size: n - kept[2][size] for size, n in kept[4].items() if n != kept[2][size] and size > hidden / 32}
    assert grown == {hidden: 2}


# ---- layer inputs on the host -----------------------------------------------------------------------------------------


class Inputs:
    """Storages of layer inputs, on the device and on the host, by identity while they live. most: on the device, ever."""

    def __init__(self) -> None:
        self.device: set[int] = set()
        self.host: set[int] = set()
        self.most = 0

    def see(self, tensor: torch.Tensor, where: set[int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in where:
            where.add(storage._cdata)
            weakref.finalize(storage, where.discard, storage._cdata)
        self.most = max(self.most, len(self.device))


@contextmanager
def watched() -> Iterator[Inputs]:
    """Sees every tensor that goes into a `HostCopy` or comes out of it. (On the CPU host and device are one.)"""
    inputs, copy, empty_on_host = Inputs(), offload.HostCopy, Runtime.empty_on_host
    init, fetch, take = copy.__init__, copy.fetch, copy.take

    def watched_init(self: Any, tensor: torch.Tensor, *more: Any) -> None:
        inputs.see(tensor, inputs.device)
        init(self, tensor, *more)

    def watched_fetch(self: Any) -> None:
        fetch(self)
        if self.fetched is not None:
            inputs.see(self.fetched, inputs.device)

    def watched_take(self: Any) -> torch.Tensor:
        taken = take(self)
        inputs.see(taken, inputs.device)
        return taken

    def watched_host(self: Runtime, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        made = empty_on_host(self, like, pinned)
        inputs.see(made, inputs.host)
        return made

    methods = {"__init__": watched_init, "fetch": watched_fetch, "take": watched_take}
    with patch.multiple(copy, **methods), patch.object(Runtime, "empty_on_host", watched_host):
        yield inputs


def deep(family: str = "gpt2", layers: int = 8) -> nn.Module:
    return small_model(family, num_hidden_layers=layers, n_layer=layers)


def offloaded(every: Any = "layer", loss_chunks: int = 4, family: str = "gpt2") -> nn.Module:
    return minisequence(deep(family), mlp_chunks=3, loss_chunks=loss_chunks, checkpoint=every, offload=True)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_two_layer_inputs_on_the_device(every):
    model, (ids, labels) = offloaded(every), small_batch(2, 13)
    for _ in range(3):  # micro-batches
        with watched() as inputs, float64():
            loss = model(input_ids=ids, labels=labels).loss
            assert inputs.most <= 2 and len(inputs.device) == 1 and len(inputs.host) == -(-8 // every)
            inputs.most = 0
            loss.backward()
            assert inputs.most == 2 and not inputs.device and not inputs.host


def test_models_that_hold_their_embeddings_have_one_more_in_forward():
    """transformers' LlamaModel.forward has its `inputs_embeds`, the first layer's input, in a variable until it returns."""
    model, (ids, labels) = offloaded(family="llama"), small_batch(2, 13)
    with watched() as inputs, float64():
        loss = model(input_ids=ids, labels=labels).loss
        assert inputs.most == 3 and len(inputs.device) == 1
        inputs.most = 0
        loss.backward()
    assert inputs.most == 2


def test_the_watch_notices_a_copy_that_stays():
    model, (ids, labels) = offloaded(), small_batch(2, 13)
    with patch.object(offload.HostCopy, "release", lambda self: None), watched() as inputs:
        loss = model(input_ids=ids, labels=labels).loss
        assert inputs.most == len(inputs.device) == 8
        loss.backward()


def test_a_loss_that_waits_for_another_leaves_one_input_on_the_device():
    """The last layer's input never left: backward wants it first. So does that of each forward pass before backward."""
    model, (ids, labels) = offloaded(), small_batch(2, 13)
    with float64():
        wanted = step(model, ids, labels)
        with watched() as inputs:
            model.zero_grad()
            losses = [model(input_ids=ids, labels=labels).loss for _ in range(2)]
            assert inputs.most == 3 and len(inputs.device) == 2 and len(inputs.host) == 16
            sum(losses).backward()
    assert not inputs.device and not inputs.host
    assert_equal((wanted[0], {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}), wanted)


@pytest.mark.parametrize("every", [1, 2])
def test_after_an_error_in_forward(every):
    model, (ids, labels) = offloaded(every), small_batch(2, 13)
    wanted = step(deep(), ids, labels)
    layer = model.transformer.h[3]
    hook = layer.mlp.c_proj.register_forward_hook(fail)
    with watched() as inputs:
        with pytest.raises(MemoryError):
            model(input_ids=ids, labels=labels)
        assert not inputs.device and not inputs.host
        hook.remove()
        assert_equal(step(model, ids, labels), wanted)
    assert inputs.most == 2


def test_after_an_error_in_backward():
    """As when a layer's recomputation runs out of memory."""
    model, (ids, labels) = offloaded(), small_batch(2, 13)
    wanted = step(deep(), ids, labels)
    with watched() as inputs:
        break_off(model, ids, labels)
        assert not inputs.device and not inputs.host
        assert_equal(step(model, ids, labels), wanted)
    assert inputs.most == 2


def break_off(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> None:
    """A step that fails in the middle of backward."""
    loss = model(input_ids=ids, labels=labels).loss
    hook = model.transformer.h[3].ln_2.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        loss.backward()
    hook.remove()


def fail(*_: Any) -> None:
    raise MemoryError


def test_backward_twice():
    model, (ids, labels) = offloaded(loss_chunks=1), small_batch(2, 13)
    wanted = step(deep(), ids, labels)
    with watched() as inputs, float64():
        loss = model(input_ids=ids, labels=labels).loss
        for _ in range(2):
            loss.backward(retain_graph=True)
            assert inputs.most == 2 and not inputs.device and len(inputs.host) == 8
        assert_equal((loss.item(), {n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}), wanted)
        del loss
    assert not inputs.host


# ---- the side stream --------------------------------------------------------------------------------------------------


class Streams:
    """A compute stream that runs at once, and a side stream that runs as late as it may: when the compute stream waits for its
    event. Both write down what they are asked for; there is no way to let the CPU wait. `lost`: copies whose source or target
    had been given back by the time they were made."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.lost: list[str] = []
        self.queue: list[tuple[str, Any]] = []  # what the side stream has not done yet
        self.hosts: dict[int, int] = {}  # storages on the host and their number
        self.pinned: list[bool] = []
        self.inside = False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def wait_stream(self, other: Any) -> None:
        assert other is self  # both streams are this object: what records is the side, what waits the compute stream
        self.log.append("side waits")

    def record_event(self) -> str:
        assert self.inside
        self.queue.append((event := f"{self.queue[-1][0]} done", None))
        return event

    def wait_event(self, event: str) -> None:
        assert not self.inside
        self.log.append(f"wait: {event}")
        if event in [name for name, _ in self.queue]:
            self.run(event)

    def run(self, last: str = "") -> None:
        """The side stream's work up to an event, or all of it."""
        while self.queue:
            name, job = self.queue.pop(0)
            if job is not None and not job():
                self.lost.append(name)
            if name == last:
                return

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        host = next((t for t in (target, source) if t.untyped_storage()._cdata in self.hosts), None)
        if host is None:
            return COPY(target, source)
        name = f"{'out' if host is target else 'in'} {self.hosts[host.untyped_storage()._cdata]}"
        assert self.inside and non_blocking
        target.fill_(float("nan"))
        ends = [weak(target), weak(source)]
        self.log.append(name)
        self.queue.append(
            (name, lambda: all(end() is not None for end in ends) and COPY(ends[0](), ends[1]()) is not None)
        )
        return target

    def empty_on_host(self, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        made = torch.empty_like(like)
        self.hosts[made.untyped_storage()._cdata] = len(self.pinned)
        self.pinned.append(pinned)
        return made


COPY = torch.Tensor.copy_


def weak(tensor: torch.Tensor) -> Any:
    """The tensor, while its memory is not given back."""
    storage, place = weakref.ref(tensor.untyped_storage()), (tensor.storage_offset(), tensor.shape, tensor.stride())
    empty = torch.empty(0, dtype=tensor.dtype)
    return lambda: empty.set_(storage(), *place) if storage() is not None else None


@contextmanager
def streams() -> Iterator[Streams]:
    fake = Streams()

    def copy(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return fake.copy(target, source, non_blocking)

    with (
        patch.object(offload.HostCopies, "_side_stream", lambda _self, _device: fake),
        patch.object(Runtime, "empty_on_host", lambda _self, like, pinned: fake.empty_on_host(like, pinned)),
        patch.object(torch.accelerator, "current_stream", lambda _device=None: fake),
        patch.object(torch.accelerator, "synchronize", fail),
        patch.object(torch.Tensor, "copy_", copy),
    ):
        yield fake


def test_copies_go_to_the_side_stream_and_come_back_one_layer_ahead():
    model, (ids, labels) = deep(layers=3), small_batch(2, 13)
    wanted = step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=4, offload=True)
    with streams() as fake, float64():
        for index, layer in enumerate(model.transformer.h):
            layer.ln_1.register_forward_pre_hook(lambda _, inputs, index=index: fake.log.append(f"layer {index}"))
        loss = model(input_ids=ids, labels=labels).loss
        assert fake.log == [
            "side waits",
            "out 0",
            "layer 0",
            "side waits",
            "out 1",
            "wait: out 0 done",
            "layer 1",
            "side waits",
            "out 2",
            "wait: out 1 done",
            "layer 2",
        ]
        fake.log.clear()
        model.zero_grad()
        loss.backward()
        assert fake.log == [
            "wait: out 2 done",
            "side waits",
            "in 1",
            "layer 2",
            "wait: in 1 done",
            "side waits",
            "in 0",
            "layer 1",
            "wait: in 0 done",
            "layer 0",
        ]
        assert_equal((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), wanted)
    assert all(fake.pinned) and not fake.queue and not fake.lost


@pytest.mark.parametrize("every", [1, 3])
def test_copies_may_be_as_late_as_they_like(every):
    """Nothing is read before its copy is made, and no memory given back that a copy still needs."""
    model, (ids, labels) = offloaded(every), small_batch(2, 13)
    wanted = step(deep(), ids, labels)
    with streams() as fake:
        for _ in range(2):
            assert_equal(step(model, ids, labels), wanted)
            fake.run()
    assert not fake.lost


def test_a_copy_that_nobody_takes():
    """After an error in backward, and where backward ends at an upper layer."""
    ids, labels = small_batch(2, 13)
    for use in (break_off, only_above):
        with streams() as fake:
            use(offloaded(), ids, labels)
            fake.run()
        assert not fake.lost


def only_above(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> None:
    torch.autograd.grad(model(input_ids=ids, labels=labels).loss, [model.transformer.h[5].mlp.c_fc.weight])


def test_pinned_memory_is_allocated_once_and_gives_way_to_longer_sequences():
    model = offloaded()
    with streams() as fake:
        for tokens, made in ((13, 8), (13, 8), (9, 8), (17, 16)):
            ids, labels = small_batch(2, tokens)
            wanted = step(deep(), ids, labels)
            assert_equal(step(model, ids, labels), wanted)
            fake.run()
            assert len(fake.pinned) == made and len(model._mstplan.checkpoints.host_copies.rooms._free) == 8
    assert not fake.lost


def test_a_host_without_room_is_told_of_before_the_first_layer():
    model, (ids, labels) = offloaded(), small_batch(2, 13)
    ran: list[Any] = []
    hook = model.transformer.h[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    with (
        patch.object(Runtime, "free_on_host", lambda _self: 40_000),
        pytest.raises(RecipeError, match=r"8 layer inputs of .* do not fit in CPU RAM") as refused,
    ):
        model(input_ids=ids, labels=labels)
    assert not ran and str(refused.value).endswith("or leave offload out.")
    hook.remove()
    with patch.object(Runtime, "free_on_host", lambda _self: None):  # nobody knows
        assert_equal(step(model, ids, labels), step(deep(), ids, labels))


def test_late_copies_are_noticed():
    """Without waiting for them, layers get what was not copied yet."""
    model, (ids, labels) = offloaded(), small_batch(2, 13)
    with streams() as fake, patch.object(offload.HostCopy, "_wait", lambda self: None):
        assert step(model, ids, labels)[1]["transformer.h.3.mlp.c_fc.weight"].isnan().any()
        fake.run()
    assert fake.lost
