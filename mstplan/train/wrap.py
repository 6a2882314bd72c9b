"""`minisequence(model)`: a transformers model, in place, with its MLPs and its loss in chunks; `minisequence.undo(model)`.

What is put in the way of a module's `forward` is a method bound to that module, and what it has to know stands on the
module: a deep copy of a model runs on its own weights.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from functools import partial, wraps
from types import MethodType
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ModelError, RecipeError, did_you_mean, quoted
from ..plan.layout import chunk_tokens
from ..step.recipe import Recipe, strategy
from ..step.steps import segment_length
from .checkpoint import Checkpoints
from .chunks import ChunkCounts
from .lazy import LazyTensor
from .locate import LayerMlp, find_mlps, find_parts
from .loss import LazyLogits
from .mlp import MlpIntermediate, MlpOutput, check_tokenwise, materialize, output_is_read
from .runtime import RUNTIME, Runtime

LOG = logging.getLogger("mstplan")
AnyModel = TypeVar("AnyModel", bound=nn.Module)
Checkpoint = Literal["none", "layer", "sqrt"] | int


class _Settings:
    """What a wrapped model and its modules know."""

    def __init__(self, recipe: Recipe, counts: ChunkCounts, checkpoints: Checkpoints | None, runtime: Runtime):
        self.counts, self.checkpoints, self.runtime = counts, checkpoints, runtime
        self.warned = False
        self.mlps, self.loss = recipe.mlp_chunks != 1, recipe.loss_chunks != 1


class Minisequence:
    """`minisequence(model, ...)` wraps, `minisequence.undo(model)` unwraps. runtime: what the wrapped models run on."""

    def __init__(self, runtime: Runtime = RUNTIME):
        self.runtime = runtime

    def __call__(
        self,
        model: AnyModel,
        *,
        mlp_chunks: int | None = None,
        loss_chunks: int | None = None,
        checkpoint: Checkpoint = "layer",
        offload: bool = False,
        **unknown: NoReturn,
    ) -> AnyModel:
        """Train `model` with its MLPs and its LM head and loss over pieces of the sequence, in place.

        mlp_chunks, loss_chunks: how many pieces; None: as many as the planner recommends for model, card and length.
        checkpoint: "none", "layer", "sqrt" (every sqrt(L) layers) or a number of layers. offload: the checkpoints' inputs
        wait for backward in pinned CPU RAM. The defaults are the planner's strategy `mst`; with offload, `mst-offload`.

        Parameters, state_dict keys, saving, generation and evaluation stay as they are. In training with labels the loss
        comes back and the full logits never exist (`logits` is None). Raises ModelError naming what was not found in the
        model, RecipeError for settings that make no sense; the model is as it was then.
        """
        _refuse(unknown)
        recipe = _read_recipe(mlp_chunks, loss_chunks, checkpoint, offload)
        parts = find_parts(model)
        inner = parts.model
        if hasattr(inner, "_mstplan"):
            raise ModelError(
                f"{type(inner).__name__} runs in mini-sequences already.\nCall minisequence.undo(model) first."
            )
        mlps = find_mlps(parts) if recipe.mlp_chunks != 1 else []
        counts = ChunkCounts(inner.config, recipe, inner)
        if checkpoint != "none" and not inner.supports_gradient_checkpointing:
            raise ModelError(f"{type(inner).__name__} does not support gradient checkpointing.\nSet checkpoint='none'.")
        every = segment_length(recipe, len(parts.layers))
        checkpoints = Checkpoints(inner, parts.layers, every, offload, self.runtime) if every else None
        settings = _Settings(recipe, counts, checkpoints, self.runtime)
        for layer, mlp in mlps:
            _chunk_mlp(layer, mlp, settings)
        inner._mstplan = settings
        _patch_forward(inner, _model_forward)
        LOG.info("minisequence: %s", self.describe(model))
        return model

    def describe(self, model: nn.Module) -> str:
        """Say in a line what `minisequence` did to a model: chunks, checkpoints, offload."""
        for module in model.modules():
            settings = module.__dict__.get("_mstplan")
            if isinstance(settings, _Settings) and isinstance(module, PreTrainedModel):
                return f"{type(module).__name__}: {settings.counts.describe_recipe()}"
        return f"{type(model).__name__} is not wrapped"

    def undo(self, model: AnyModel) -> AnyModel:
        """The model as it was before `minisequence`; nothing happens to one that was not wrapped."""
        for module in model.modules():
            settings = module.__dict__.pop("_mstplan", None)
            if (
                isinstance(settings, _Settings)
                and isinstance(module, PreTrainedModel)
                and settings.checkpoints is not None
            ):
                settings.checkpoints.undo()
            if "_mstplan_whole" in module.__dict__:
                _restore_forward(module)
            for key in [k for k, hook in module._forward_hooks.items() if hook is _note_output_use]:
                del module._forward_hooks[key]
            for name in ("_mstplan_mlps", "_mstplan_read", "_mstplan_nodes", "_mstplan_beside"):
                module.__dict__.pop(name, None)
        return model


minisequence = Minisequence()


SETTINGS = ("mlp_chunks", "loss_chunks", "checkpoint", "offload")


def _refuse(unknown: Iterable[str]) -> None:
    """Raises RecipeError for the first of settings that there are not, with the nearest names."""
    for name in unknown:
        raise RecipeError(
            f"minisequence has no setting {quoted(name)}.{did_you_mean(name, SETTINGS)}\nKnown: {', '.join(SETTINGS)}."
        )


def _read_recipe(mlp_chunks: int | None, loss_chunks: int | None, checkpoint: Checkpoint, offload: bool) -> Recipe:
    for name, value in (("mlp_chunks", mlp_chunks), ("loss_chunks", loss_chunks)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RecipeError(f"{name} must be a whole number from 1, or None for the recommended one, not {value!r}.")
    if isinstance(checkpoint, bool) or (
        checkpoint not in ("none", "layer", "sqrt") and not (isinstance(checkpoint, int) and checkpoint >= 1)
    ):
        raise RecipeError(
            f"checkpoint must be 'none', 'layer', 'sqrt' or a number of layers from 1, not {checkpoint!r}."
        )
    if not isinstance(offload, bool):
        raise RecipeError(f"offload must be True or False, not {offload!r}.")
    if offload and checkpoint == "none":
        raise RecipeError("offload needs checkpointing, or there are no layer inputs to move.\nSet checkpoint='layer'.")
    return strategy(
        "mst",
        checkpoint=checkpoint,
        offload_layer_inputs=offload,
        mlp_chunks="auto" if mlp_chunks is None else mlp_chunks,
        loss_chunks="auto" if loss_chunks is None else loss_chunks,
    )


# ---- in the way of a module's forward ---------------------------------------------------------------------------------


def _patch_forward(module: nn.Module, function: Callable[..., Any]) -> None:
    """Let `function(module, ...)` run for module.forward, under the signature of the latter."""
    module._mstplan_whole = module.__dict__.get("forward")  # type: ignore[assignment]

    @wraps(type(module).forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # which accelerate's unwrap_model would follow past us
    module.forward = MethodType(forward, module)


def _restore_forward(module: Any) -> None:
    forward_before = module.__dict__.pop("_mstplan_whole")
    del module.forward
    if forward_before is not None:
        module.forward = forward_before


def _plain_forward(module: Any) -> Callable[..., Any]:
    """The forward that the module would run had it not been patched."""
    return module._mstplan_whole or partial(type(module).forward, module)


# ---- MLP ----------------------------------------------------------------------------------------------------------------


def _chunk_mlp(layer: Any, mlp: LayerMlp, settings: _Settings) -> None:
    mlp.first._mstplan = settings  # type: ignore[assignment]
    mlp.first._mstplan_read = None  # type: ignore[assignment]
    _patch_forward(mlp.first, _mlp_forward if mlp.down is None else _up_forward)
    for module in (*mlp.followers, *([mlp.down] if mlp.down is not None else [])):
        if "_mstplan_whole" not in module.__dict__:
            _patch_forward(module, _following_forward if module is not mlp.down else _down_forward)
    if mlp.down is not None and "_mstplan_whole" not in layer.__dict__:
        _patch_forward(layer, _run_uncompiled)
    if "_mstplan_mlps" not in layer.__dict__:
        layer._mstplan_mlps = ()
        layer.register_forward_hook(_note_output_use)
    layer._mstplan_mlps += (mlp.first,)


def _mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """An MLP: its output is made as soon as something reads it, in chunks. Compiled code gets it at once, and does not look in."""
    return (
        _materialized_mlp(self, *args, **kwargs) if torch.compiler.is_compiling() else _lazy_mlp(self, *args, **kwargs)
    )


@torch.compiler.disable
def _materialized_mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
    return materialize(_lazy_mlp(self, *args, **kwargs))


def _lazy_mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not args:  # hidden states by name
        args = (kwargs.pop(next(iter(kwargs))),)
    x, args = materialize(args[0]), args[1:]
    rows = _chunk_rows(self, x, *args, *kwargs.values())
    if rows is None:
        return _plain_forward(self)(x, *args, **kwargs)
    plain = _plain_forward(self)
    return _mlp_output(self, x, lambda piece: plain(piece, *args, **kwargs), (self,), rows)


@torch.compiler.disable  # what lies between the two matrices is no tensor that compiled code could hand on
def _run_uncompiled(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _plain_forward(self)(*args, **kwargs)


def _up_forward(self: Any, x: torch.Tensor) -> Any:
    """The first matrix of an MLP that is no module: what it gives is not made before the second one."""
    x = materialize(x)
    rows = _chunk_rows(self, x)
    if rows is None:
        return _plain_forward(self)(x)
    return MlpIntermediate(x, _plain_forward(self), (self,), rows, self._mstplan.runtime)


def _down_forward(self: Any, x: Any) -> Any:
    plain = _plain_forward(self)
    if not isinstance(x, MlpIntermediate):
        return plain(x)
    return _mlp_output(x.modules[0], x.source, x.record_step(plain, self).run, (*x.modules, self), x.rows, x.random)


def _following_forward(self: Any, x: Any) -> Any:
    """A norm, dropout or activation: of what is not made yet it makes something that is not made yet."""
    plain = _plain_forward(self)
    return x.record_step(plain, self) if isinstance(x, LazyTensor) else plain(x)


def _chunk_rows(mlp: Any, x: torch.Tensor, *others: Any) -> int | None:
    """Tokens to a chunk of hidden states (b, s, d) or (s, d); None: do not chunk."""
    if (
        not (torch.is_grad_enabled() or mlp.training)
        or not torch.is_tensor(x)
        or x.dim() not in (2, 3)
        or x.shape[-2] == 1
    ):
        return None
    if any(torch.is_tensor(other) or isinstance(other, LazyTensor) for other in others):
        raise ModelError(
            f"cannot run {type(mlp).__name__} in chunks: it is given more tensors than hidden states.\nSet mlp_chunks=1."
        )
    chunks = mlp._mstplan.counts.chunks_for(x).mlp
    return chunk_tokens(x.shape[-2], chunks) * (x.shape[:-1].numel() // x.shape[-2]) if chunks > 1 else None


def _mlp_output(
    mlp: Any, x: torch.Tensor, run: Callable[..., Any], modules: tuple[nn.Module, ...], rows: int, random: bool = False
) -> Any:
    out = MlpOutput(x, run, modules, rows, mlp._mstplan.runtime, random)
    out.nodes, out.dropped_counts = [], mlp.__dict__.setdefault("_mstplan_beside", [0])
    checkpoints = mlp._mstplan.checkpoints
    out.skip = lambda: mlp._mstplan_read is False and checkpoints is not None and checkpoints.discards_output
    if mlp._mstplan_read is None:
        check_tokenwise(run, x, modules)
        mlp._mstplan_nodes = out.nodes
    return out


def _note_output_use(layer: Any, _inputs: Any, output: Any) -> Any:
    """After a layer: is its MLP's output read by anything whose backward wants the values?"""
    output = materialize(output)
    hidden = output[0] if isinstance(output, tuple) else output
    for mlp in layer._mstplan_mlps:
        nodes = mlp.__dict__.pop("_mstplan_nodes", [])
        if nodes and torch.is_tensor(hidden):
            mlp._mstplan_read = any(output_is_read(node, hidden) for node in nodes)
    return output


# ---- LM head and loss ---------------------------------------------------------------------------------------------------


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In training with labels: the head hands on lazy logits, which cross entropy makes chunk by chunk."""
    settings, plain = self._mstplan, _plain_forward(self)
    arguments = {**dict(zip(inspect.signature(plain).parameters, args, strict=False)), **kwargs} if args else kwargs
    _refuse_router_losses(self, settings, arguments)
    chunked = settings.loss and self.training and arguments.get("labels") is not None
    if settings.loss and self.training and torch.is_grad_enabled() and not chunked:
        _warn_of_whole_logits(self, settings, arguments)
    head = self.get_output_embeddings() if chunked else None
    used: list[bool] = []
    head_forward = head.__dict__.get("forward") if head is not None else None
    if head is not None:
        head.forward = _lazy_head(head, settings, arguments.get("num_items_in_batch"), used)
    try:
        out = plain(*args, **kwargs)
        if head is not None and not used:
            raise ModelError(
                f"{type(self).__name__} computes its loss past its LM head (get_output_embeddings()).\nSet loss_chunks=1."
            )
    finally:
        if head is not None:
            _set_forward(head, head_forward)
        if settings.checkpoints is not None:
            settings.checkpoints.abandon_segment()
    return _drop_lazy(out)


def _warn_of_whole_logits(model: Any, settings: _Settings, arguments: dict[str, Any]) -> None:
    """A training step without labels. Trainer still gives the number of tokens when it means to compute the loss itself."""
    if arguments.get("num_items_in_batch") is not None:
        raise ModelError(
            f"{type(model).__name__} is asked for logits, for a loss that the trainer computes itself (label smoothing, compute_loss_func): "
            "that cannot run in chunks.\nSet loss_chunks=1, or leave label_smoothing_factor and compute_loss_func out."
        )
    if not settings.warned:
        settings.warned = True
        warnings.warn(
            "minisequence: a training step without labels makes the logits of all its tokens; loss_chunks had no effect.",
            stacklevel=3,
        )


def _lazy_head(head: nn.Module, settings: _Settings, divisor: Any, used: list[bool]) -> Callable[..., Any]:
    """The head's forward for one step; it notes in `used` that it ran."""
    plain = head.forward

    @wraps(plain)
    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        used.append(True)
        chunks = settings.counts.chunks_for(hidden).loss
        if chunks == 1:
            return plain(hidden, *args, **kwargs)
        rows = chunk_tokens(hidden.shape[-2], chunks) * (hidden.shape[:-1].numel() // hidden.shape[-2])
        logits = LazyLogits(hidden, lambda piece: plain(piece, *args, **kwargs), (head,), rows, settings.runtime)
        logits.divisor = divisor
        return logits

    return forward


def _set_forward(module: Any, forward: Any) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _drop_lazy(out: Any) -> Any:
    """The model's output without the logits that were never made."""
    if isinstance(out, tuple):
        return tuple(value for value in out if not isinstance(value, LazyTensor))
    if any(isinstance(value, LazyTensor) for value in out.values()):
        return type(out)(**{name: value for name, value in out.items() if not isinstance(value, LazyTensor)})
    return out


def _refuse_router_losses(model: Any, settings: _Settings, arguments: dict[str, Any]) -> None:
    wants_scores = arguments.get("output_router_logits")
    wants_scores = getattr(model.config, "output_router_logits", False) if wants_scores is None else wants_scores
    if wants_scores and settings.mlps and torch.is_grad_enabled():
        raise ModelError(
            f"{type(model).__name__}: output_router_logits wants the router's scores of all tokens, which chunks do not keep."
            "\nSet mlp_chunks=1, or output_router_logits=False to train without the auxiliary loss."
        )
