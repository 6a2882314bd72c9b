"""One training step of transformers' own model code on fake tensors, with every live byte counted.

Fake tensors have shapes and storages but no memory, so a step of any length runs on any machine. A dispatch mode sees
every operation; a storage counts from the operation that makes it until Python lets go of its last tensor.

Two things differ from a step on a GPU, and both are made up for here. Fused attention kernels choose other paths on fake
CPU tensors (an explicit mask, repeated keys and values), so a stand-in allocates what FlashAttention-2 does. And
autograd adds gradients out of place under any dispatch mode, so the step model is asked for that (`in_place=False`).
"""

from __future__ import annotations

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mstplan import profiles
from mstplan.plan.layout import step_sizes
from mstplan.spec.config import read_config
from mstplan.spec.model import Model
from mstplan.step.cuda import efficient_accumulates, efficient_workspace
from mstplan.step.recipe import Recipe
from mstplan.step.steps import Chunks, Layout, Step, evaluate, segment_length
from mstplan.tracing.optimizers import make_fake_optimizer
from mstplan.train.runtime import Runtime
from mstplan.train.selecting import kinds_in
from mstplan.train.step import step_in_backward
from mstplan.train.wrap import Minisequence

STAND_IN = "fused_stand_in"  # transformers looks for a library behind any name with "flash" in it
FORWARD, BACKWARD, STEP = PHASES = ("forward", "backward", "optimizer")


class FlashStandIn(torch.autograd.Function):
    """Allocates what FlashAttention-2's forward and backward do (flash_api.cpp: mha_fwd, mha_bwd); computes nothing."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)  # its strides too
        log_sum_exp = q.new_empty(*q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, out, _ = ctx.saved_tensors
        _copies = [x.transpose(1, 2).contiguous() for x in (grads[0], out)]  # (attention_backward.cu)
        batch, heads, tokens, size = q.shape
        rows = -(-tokens // 128) * 128
        padded = -(-size // 32) * 32 if size <= 192 else 256
        made = tuple(torch.empty_like(x) for x in (q, k, v))
        workspace = [q.new_empty(batch, heads, rows, dtype=torch.float32)]
        workspace.append(q.new_empty(batch, rows, heads, padded, dtype=torch.float32))
        if k.shape[1] != heads:  # gradients of keys and values are summed over the query heads that share them
            workspace += [q.new_empty(batch, tokens, heads, width) for width in (size, v.shape[-1])]
        return made


class EfficientStandIn(torch.autograd.Function):
    """Allocates what the memory-efficient kernel does (attention.cu, attention_backward.cu)."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, tokens, size = q.shape
        out = q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)
        if efficient_accumulates(size, v.shape[-1], q.itemsize):
            _sums = torch.empty_like(out, dtype=torch.float32)
        log_sum_exp = q.new_empty(batch, heads, -(-tokens // 32) * 32, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, *_ = ctx.saved_tensors
        batch, heads, tokens, size = q.shape
        made = tuple(torch.empty_like(x) for x in (q, k, v))
        _rows = q.new_empty(batch, heads, tokens, dtype=torch.float32)
        space = efficient_workspace(size, v.shape[-1], q.itemsize).bytes(batch * heads, tokens)
        _workspace = q.new_empty(space, dtype=torch.uint8)
        return made


def _attend(_module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _mask: object, **_: object) -> tuple:
    if torch.is_autocast_enabled("cpu"):  # as autocast does for scaled_dot_product_attention
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    flash = q.dtype != torch.float32 and q.shape[-1] == v.shape[-1]
    return (FlashStandIn if flash else EfficientStandIn).apply(q, k, v).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(STAND_IN, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(STAND_IN, lambda *_args, **_kwargs: None)


@dataclass
class Peak:
    bytes: int = 0
    op: str = ""
    alive: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # bytes by (operation, shape, dtype)


class Watch(TorchDispatchMode):
    """Counts the bytes of live storages, and keeps the largest count of each phase."""

    def __init__(self, list_alive: bool = False):
        super().__init__()
        self.live = 0
        self.phase = ""
        self.peaks: dict[str, Peak] = {}
        self._sizes: dict[int, int] = {}
        self._made_by: dict[int, tuple[str, str, str]] = {}
        self._list_alive = list_alive
        self._on_host: set[int] = set()

    def empty_on_host(self, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        """Stands in for the runtime's: on fake tensors host and device are one, but only the device is counted."""
        made = torch.empty_like(like)
        storage = made.untyped_storage()
        self._forget(storage._cdata)
        self._on_host.add(storage._cdata)
        weakref.finalize(storage, self._on_host.discard, storage._cdata)
        return made

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor):
                self._see(value, str(func))
        if func.overloadpacket is torch.ops.aten._softmax_backward_data:  # (SoftMax.cu: gradient x output)
            product = torch.empty_like(args[1])
            self._see(product, "gradient x output")
        peak = self.peaks.setdefault(self.phase, Peak())
        if self.live > peak.bytes:
            self.peaks[self.phase] = Peak(self.live, str(func), self._alive() if self._list_alive else Counter())
        return out

    def _see(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes or key in self._on_host or not storage.nbytes():
            return
        self._sizes[key] = storage.nbytes()
        self._made_by[key] = (op, str(tuple(tensor.shape)), str(tensor.dtype))
        self.live += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._made_by.pop(key, None)

    def _alive(self) -> Counter[tuple[str, str, str]]:
        found: Counter[tuple[str, str, str]] = Counter()
        for key, size in self._sizes.items():
            found[self._made_by[key]] += size
        return found


class OnCard(Runtime):
    """What minisequence runs on: a device that adds products to fp32, and a host whose memory is not counted."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def adds_to_fp32(self, device_type: str) -> bool:
        return True

    def add_product(self, total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """In place, so that nothing is allocated after the first; not all torch can run that on fake tensors in 16 bits."""
        in_place = total is not None and a.dtype.itemsize == 2
        return total if in_place else super().add_product(total, a, b)

    def empty_on_host(self, like: torch.Tensor, pinned: bool) -> torch.Tensor:
        return self.watch.empty_on_host(like, pinned)


# ---- the model ------------------------------------------------------------------------------------------------------


def cut(name: str, layers: int, **changes: object) -> dict[str, Any]:
    """A shipped config.json with few layers, of every kind the model has."""
    config: dict[str, Any] = json.loads((profiles.ROOT / "models" / f"{name}.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    for key in ("num_hidden_layers", "n_layer", "max_window_layers"):
        if key in config:
            config[key] = layers
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:layers]
    for key in ("resid_pdrop", "attn_pdrop", "embd_pdrop", "attention_dropout"):
        if key in config or (name == "gpt2" and key.endswith("_pdrop")):
            config[key] = 0.0  # dropout on a CPU keeps another mask than on a GPU
    return {**config, **changes}


SMALL_VOCABULARY = {"vocab_size": 1024, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 1}


class Segment(nn.Module):
    """Several layers under one checkpoint."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: torch.Tensor, **others: Any) -> torch.Tensor:
        def run(x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x, **others)
            return x

        result: torch.Tensor = checkpoint(run, hidden, use_reentrant=False)
        return result


def _in_segments(net: Any, every: int) -> None:
    base = net.base_model
    field_name = "h" if hasattr(base, "h") else "layers"
    layers = list(getattr(base, field_name))
    groups = [Segment(layers[i : i + every]) for i in range(0, len(layers), every)]
    setattr(base, field_name, nn.ModuleList(groups))
    net.config.num_hidden_layers = len(groups)


def _build(config: dict[str, Any], recipe: Recipe, trains: Callable[[str], bool], watch: Watch) -> nn.Module:
    settings = AutoConfig.for_model(**config)
    settings.use_cache = False
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    attention = "eager" if recipe.attention == "eager" else STAND_IN
    net: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=attention).train()
    for name, weight in net.named_parameters():
        weight.requires_grad_(trains(name))
    if recipe.input_gradients:
        net.enable_input_require_grads()  # type: ignore[operator]
    every = segment_length(recipe, settings.num_hidden_layers)
    if recipe.loss == "chunked":
        Minisequence(OnCard(watch))(
            net,
            mlp_chunks=recipe.mlp_chunks,
            loss_chunks=recipe.loss_chunks,
            checkpoint=recipe.checkpoint,
            offload=recipe.offload_layer_inputs,
        )
    elif every == 1:
        net.activation_checkpointing_enable()  # type: ignore[operator]
    elif every > 1:
        _in_segments(net, every)
    return net


# ---- the step -------------------------------------------------------------------------------------------------------


@contextmanager
def watching(list_alive: bool = False) -> Iterator[Watch]:
    watch = Watch(list_alive)
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch


def run_step(
    config: dict[str, Any],
    recipe: Recipe,
    seq_len: int,
    list_alive: bool = False,
    trains: Callable[[str], bool] = lambda _name: True,
) -> dict[str, Peak]:
    """The peak of each phase of a step after the first, by which time the optimizer has its states. trains: by a weight's name."""
    with watching(list_alive) as watch:
        net = _build(config, recipe, trains, watch)
        optimizer = None
        if recipe.optimizer_in_backward:
            step_in_backward(net, make_fake_optimizer(recipe, kinds_in(net)))
        else:
            optimizer = make_fake_optimizer(recipe, kinds_in(net))([w for w in net.parameters() if w.requires_grad])
        ids, targets = (torch.randint(0, config["vocab_size"], (recipe.batch, seq_len)) for _ in range(2))
        for _ in range(2):
            watch.peaks = {}
            for _ in range(recipe.accumulation):
                watch.phase = FORWARD
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.precision == "mixed"):
                    loss = net(input_ids=ids, labels=targets).loss
                watch.phase = BACKWARD
                loss.backward()
                del loss
            watch.phase = STEP
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        return watch.peaks


# ---- the step model's word on the same --------------------------------------------------------------------------------


def model_of(config: dict[str, Any]) -> Model:
    return read_config(config, str(config["model_type"]))


def planned(config: dict[str, Any], recipe: Recipe, seq_len: int) -> dict[str, int]:
    """The step model's peak of each phase."""
    chunks = Chunks(recipe.mlp_chunks, recipe.loss_chunks)
    step = Step(model_of(config), Layout(recipe, chunks.mlp > 1, chunks.loss > 1, False), workspace=0)
    units = step_sizes(recipe, seq_len, chunks).units
    peaks: dict[str, int] = {}
    for instant, moments in step._moments(in_place=False).items():
        phase = instant.phase
        peaks[phase] = max(peaks.get(phase, 0), *(evaluate(moment.live, units) for moment in moments))
    return peaks
