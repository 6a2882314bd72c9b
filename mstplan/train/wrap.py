"""`minisequence(model)`: a transformers model, in place, with its MLPs and its loss in chunks; `minisequence.undo(model)`."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from ..errors import ModelError, RecipeError, did_you_mean, quoted
from ..plan.layout import chunk_tokens
from ..step.recipe import EVERY_NTH, Recipe, strategy
from ..units import SHORTEST
from .checkpoint import Checkpoints
from .choosing import choose
from .chunks import ChunkCounts
from .fused import LigerKernels, liger_is_at_hand
from .host_attention import Graphs
from .layers import layer_in_pieces, tokenwise_in_pieces
from .lazy import LazyTensor
from .locate import LayerMlp, ModelParts, find_mlps, find_parts
from .loss import LazyLogits
from .mixing import watch_attention, without_cache
from .mlp import MlpIntermediate, MlpOutput, check_tokenwise, materialize, output_is_read
from .patching import patch_forward, plain_forward, restore_forward
from .rehearsal import Rehearsed, patch_parts, rehearse
from .runtime import RUNTIME, Runtime
from .ulysses import Sharing, can_share, group_of, share_attention, share_no_more
from .zero import check_not_begun, has_shards, mark_leaf, unmark_leaf

LOG = logging.getLogger("mstplan")
AnyModel = TypeVar("AnyModel", bound=nn.Module)
Checkpoint = Literal["none", "layer", "reentrant", "sqrt", "selective"] | str | int


class _Settings:
    """What a wrapped model and its modules know."""

    def __init__(
        self,
        recipe: Recipe,
        counts: ChunkCounts,
        checkpoints: Checkpoints | None,
        runtime: Runtime,
        awaiting: _Awaiting | None,
    ):
        self.counts, self.checkpoints, self.runtime, self.awaiting = counts, checkpoints, runtime, awaiting
        self.warned = False
        self.liger: LigerKernels | None = None
        self.sharing: Sharing | None = None  # of sequences, by several ranks
        self.layers = 0
        self.graphs = Graphs() if recipe.attention_on_host else None
        self.mlps, self.loss = recipe.mlp_chunks != 1, recipe.loss_chunks != 1


class _Awaiting:
    """What a model knows whose strategy is chosen when a training step shows how long its sequences are."""

    def __init__(self, minisequence: Minisequence):
        self.minisequence = minisequence
        self.batch, self.tokens = 0, 0  # for which a strategy was chosen

    def comes_larger(self, model: Any, arguments: dict[str, Any]) -> tuple[int, int] | None:
        """The batch and the tokens to choose for, where a training step has more of either than before."""
        ids = arguments.get("input_ids")
        ids = arguments.get("inputs_embeds") if ids is None else ids
        if not (model.training and torch.is_grad_enabled() and torch.is_tensor(ids)):
            return None
        batch, tokens = ids.shape[:2]
        larger = batch > self.batch or tokens > self.tokens
        return (max(batch, self.batch), max(tokens, self.tokens)) if larger else None

    def choose(self, model: Any, batch: int, tokens: int) -> None:
        """Wrap the model for such batches, in place of what it was wrapped for."""
        device = model.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        recipe = choose(model, batch, max(tokens, SHORTEST), autocast)
        self.batch, self.tokens = batch, tokens
        self.minisequence.undo(model)
        self.minisequence._wrap_over(model, recipe, None, self)


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
        layer_in_chunks: bool = False,
        attention_groups: int | None = None,
        attention_on_host: bool = False,
        kernels: Literal["torch", "liger"] | None = None,
        plan: Literal["auto"] | Recipe | None = None,
        sequence_parallel: ProcessGroup | DeviceMesh | int | None = None,
        **unknown: NoReturn,
    ) -> AnyModel:
        """Train `model` with its MLPs and its LM head and loss over pieces of the sequence, in place.

        mlp_chunks, loss_chunks: how many pieces; None: as many as the planner recommends for model, card and length.
        checkpoint: "none", "layer", "sqrt" (every sqrt(L) layers), a number of layers, "selective" (every layer, but attention is not
        run again), "every-2" (every second layer) or "reentrant" (every layer in torch's older way, which holds more). offload: the
        checkpoints' inputs wait for backward in pinned CPU RAM. The defaults are the planner's strategy `mst`; with offload, `mst-offload`.
        layer_in_chunks: all of a layer but attention runs in the chunks (`mst-layer`). attention_groups: of heads, over which attention then
        runs one after the other; attention_on_host: queries, keys, values and attention's results wait in pinned CPU RAM, and are on the
        device for one group at a time.
        kernels: "liger" puts Liger's norms, rotary embedding and SwiGLU or GeGLU in place of the model's own; None: on a GPU, where
        liger-kernel is installed and knows the family; "torch": the model's own.
        plan, in place of all of these: a recipe of the planner's, whose strategy is followed; or "auto": of the strategies that fit the
        first batch of a training step, and each longer one, the fastest.
        sequence_parallel: the ranks that share each sequence (Ulysses), a process group, a device mesh, or how many next to each other; of a
        batch the model is then given this rank's `part`.

        Parameters, state_dict keys, saving, generation and evaluation stay as they are. In training with labels the loss
        comes back and the full logits never exist (`logits` is None). Raises ModelError naming what was not found in the
        model, RecipeError for settings that make no sense; the model is as it was then.
        """
        _refuse(unknown)
        settings = (mlp_chunks, loss_chunks, checkpoint, offload, layer_in_chunks, attention_groups, attention_on_host)
        if plan is None:
            recipe = _read_recipe(*settings)
            group = group_of(sequence_parallel) if sequence_parallel is not None else None
            return self._wrap_over(model, recipe, kernels, group=group)
        if (*settings, kernels) != (None, None, "layer", False, False, None, False, None):
            raise RecipeError("plan says all that the other settings say.\nLeave them out, or plan.")
        if isinstance(plan, Recipe):
            return self.follow(model, plan, sequence_parallel)
        if plan != "auto":
            raise RecipeError(f"plan must be 'auto' or a Recipe, not {quoted(str(plan))}.")
        if sequence_parallel is not None:
            raise RecipeError(
                "plan='auto' chooses for one GPU, and each would choose for itself.\nWith sequence_parallel say which strategy."
            )
        inner = self._check_unwrapped(model).model
        inner._mstplan = _Awaiting(self)
        patch_forward(inner, _first_forward)
        return model

    def follow(self, model: AnyModel, recipe: Recipe, sequence_parallel: Any = None) -> AnyModel:
        """Train the model by the strategy of a recipe, in place: its checkpoints, chunks, and layer inputs in CPU RAM, its sequences over
        several GPUs, those of sequence_parallel, if given, else those next to each other. Raises RecipeError for one that asks for what others do."""
        for asked, what in (
            (recipe.mlp_chunks != 1 and not recipe.mlp_recompute, "MLP chunks that are not recomputed"),
            (not recipe.loss_in_chunks and recipe.loss != "transformers", f"the loss {recipe.loss}"),
            (recipe.offload == "saved-tensors", "saved tensors in CPU RAM"),
            (recipe.checkpoint == "children", "checkpoints of what layers call"),
        ):
            if asked:
                raise RecipeError(
                    f"minisequence does not see to {what}.\nTake it out of the recipe, and use what brings it beside minisequence."
                )
        ranks = recipe.sequence_parallel
        group = None
        if ranks > 1 or sequence_parallel is not None:
            group = group_of(ranks if sequence_parallel is None else sequence_parallel)
            if group.size() != ranks:
                raise RecipeError(
                    f"the recipe shares sequences over {ranks} GPUs, sequence_parallel over {group.size()}.\nLeave sequence_parallel out."
                )
        return self._wrap_over(model, recipe, recipe.kernels, group=group)

    def _wrap_over(
        self,
        model: AnyModel,
        recipe: Recipe,
        kernels: str | None,
        awaiting: _Awaiting | None = None,
        group: ProcessGroup | None = None,
    ) -> AnyModel:
        """`wrap` of the model with these kernels; None: Liger's where they are at hand."""
        if kernels not in (None, "torch", "liger"):
            raise RecipeError(
                f"kernels must be 'torch', 'liger', or None for Liger's where they are at hand, not {kernels!r}."
            )
        inner = self._check_unwrapped(model).model
        if kernels == "torch" or (kernels is None and not liger_is_at_hand(inner)):
            return self.wrap(model, recipe.changed(kernels="torch"), awaiting, group)
        liger = LigerKernels(inner)
        try:
            self.wrap(model, recipe.changed(kernels="liger"), awaiting, group)
        except BaseException:
            liger.take_out(inner)
            raise
        inner._mstplan.liger = liger  # type: ignore[union-attr]
        return model

    def _check_unwrapped(self, model: nn.Module) -> ModelParts:
        parts = find_parts(model)
        if hasattr(parts.model, "_mstplan"):
            raise ModelError(
                f"{type(parts.model).__name__} runs in mini-sequences already.\nCall minisequence.undo(model) first."
            )
        return parts

    def wrap(
        self,
        model: AnyModel,
        recipe: Recipe,
        awaiting: _Awaiting | None = None,
        group: ProcessGroup | None = None,
    ) -> AnyModel:
        """Train the model with a recipe's checkpoints and chunks, whatever else it says, in place. group: the ranks that share sequences."""
        parts = self._check_unwrapped(model)
        inner = parts.model
        check_not_begun(inner)
        in_layers = recipe.layer_in_chunks and recipe.mlp_chunks != 1
        rehearsed = _rehearse(inner, parts.layers, recipe, group) if in_layers else None
        mlps = _mlps_of(parts, rehearsed) if recipe.mlp_chunks != 1 else []
        counts = ChunkCounts(inner.config, recipe, inner)
        if recipe.checkpoints_layers and not inner.supports_gradient_checkpointing:
            raise ModelError(f"{type(inner).__name__} does not support gradient checkpointing.\nSet checkpoint='none'.")
        sharing = share_attention(inner, group) if group is not None else None
        checkpoints = Checkpoints(inner, parts.layers, recipe, self.runtime) if recipe.checkpoints_layers else None
        settings = _Settings(recipe, counts, checkpoints, self.runtime, awaiting)
        settings.sharing, settings.layers = sharing, len(parts.layers)
        for layer, mlp in mlps:
            _chunk_mlp(layer, mlp, settings)
        if rehearsed is not None:
            _chunk_layers(rehearsed, settings)
        inner._mstplan = settings
        patch_forward(inner, _model_forward)
        LOG.info("minisequence: %s", self.describe(model))
        return model

    def describe(self, model: nn.Module) -> str:
        """Say in a line what `minisequence` did to a model: chunks, checkpoints, offload."""
        for module in model.modules():
            settings = module.__dict__.get("_mstplan")
            if isinstance(settings, _Settings) and isinstance(module, PreTrainedModel):
                shared = settings.sharing
                over = f", sequences over {shared.group.size()} GPUs" if shared is not None else ""
                return f"{type(module).__name__}: {settings.counts.describe_recipe()}{over}"
            if isinstance(settings, _Awaiting):
                return f"{type(module).__name__}: a strategy will be chosen in the first training step"
        return f"{type(model).__name__} is not wrapped"

    def part(self, model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a batch of whole sequences what a model is given whose sequences this rank shares with others: its part of ids, labels and position
        ids (b, S), and of the labels shifted, (b, s) each. S is padded to a multiple of the ranks. Raises ModelError for padding on the left, and for a
        model that was not wrapped with sequence_parallel."""
        for module in model.modules():
            settings = module.__dict__.get("_mstplan")
            if isinstance(settings, _Settings) and settings.sharing is not None:
                return settings.sharing.part(batch)
        raise ModelError(
            f"{type(model).__name__} shares no sequences with other GPUs.\nCall minisequence(model, sequence_parallel=...) first."
        )

    def undo(self, model: AnyModel) -> AnyModel:
        """The model as it was before `minisequence`; nothing happens to one that was not wrapped."""
        share_no_more(model)
        liger: list[tuple[LigerKernels, PreTrainedModel]] = []
        for module in model.modules():
            settings = module.__dict__.pop("_mstplan", None)
            unmark_leaf(module)
            if isinstance(settings, _Settings) and isinstance(module, PreTrainedModel):
                if settings.checkpoints is not None:
                    settings.checkpoints.undo()
                if settings.liger is not None:
                    liger.append((settings.liger, module))
            if "_mstplan_whole" in module.__dict__:
                restore_forward(module)
            for key in [k for k, hook in module._forward_hooks.items() if hook is _note_output_use]:
                del module._forward_hooks[key]
            for name in (
                "_mstplan_mlps",
                "_mstplan_read",
                "_mstplan_nodes",
                "_mstplan_beside",
                "_mstplan_parts",
                "_mstplan_mixer",
            ):
                module.__dict__.pop(name, None)
        for kernels, module in liger:
            kernels.take_out(module)
        return model


minisequence = Minisequence()


SETTINGS = (
    *("mlp_chunks", "loss_chunks", "checkpoint", "offload", "layer_in_chunks", "attention_groups"),
    *("attention_on_host", "kernels", "plan", "sequence_parallel"),
)


def _refuse(unknown: Iterable[str]) -> None:
    """Raises RecipeError for the first of settings that there are not, with the nearest names."""
    for name in unknown:
        raise RecipeError(
            f"minisequence has no setting {quoted(name)}.{did_you_mean(name, SETTINGS)}\nKnown: {', '.join(SETTINGS)}."
        )


def _read_recipe(
    mlp_chunks: int | None,
    loss_chunks: int | None,
    checkpoint: Checkpoint,
    offload: bool,
    layer_in_chunks: bool,
    attention_groups: int | None,
    attention_on_host: bool,
) -> Recipe:
    numbers = {"mlp_chunks": mlp_chunks, "loss_chunks": loss_chunks, "attention_groups": attention_groups}
    for name, value in numbers.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RecipeError(f"{name} must be a whole number from 1, or None for the recommended one, not {value!r}.")
    if not _is_checkpoint(checkpoint):
        raise RecipeError(
            "checkpoint must be 'none', 'layer', 'reentrant', 'sqrt', 'selective', 'every-n' ('every-2') or a number of layers from 1, "
            f"not {checkpoint!r}."
        )
    for name, value in (
        ("offload", offload),
        ("layer_in_chunks", layer_in_chunks),
        ("attention_on_host", attention_on_host),
    ):
        if not isinstance(value, bool):
            raise RecipeError(f"{name} must be True or False, not {value!r}.")
    if offload and checkpoint == "none":
        raise RecipeError("offload needs checkpointing, or there are no layer inputs to move.\nSet checkpoint='layer'.")
    return strategy(
        "mst-layer" if layer_in_chunks else "mst",
        checkpoint=checkpoint,
        offload="layer-inputs" if offload else "none",
        attention_on_host=attention_on_host,
        **{name: value for name, value in numbers.items() if value is not None},
    )


def _is_checkpoint(value: object) -> bool:
    if isinstance(value, str):
        return (
            value in ("none", "layer", "reentrant", "sqrt", "selective") or re.fullmatch(EVERY_NTH, value) is not None
        )
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


# ---- MLP ----------------------------------------------------------------------------------------------------------------


def _chunk_mlp(layer: Any, mlp: LayerMlp, settings: _Settings) -> None:
    mlp.first._mstplan = settings  # type: ignore[assignment]
    mark_leaf(mlp.first)
    mlp.first._mstplan_read = None  # type: ignore[assignment]
    patch_forward(mlp.first, _mlp_forward if mlp.down is None else _up_forward)
    for module in (*mlp.followers, *([mlp.down] if mlp.down is not None else [])):
        if "_mstplan_whole" not in module.__dict__:
            patch_forward(module, _following_forward if module is not mlp.down else _down_forward)
    if mlp.down is not None and "_mstplan_whole" not in layer.__dict__:
        patch_forward(layer, _run_uncompiled)
    if "_mstplan_mlps" not in layer.__dict__:
        layer._mstplan_mlps = ()
        layer.register_forward_hook(_note_output_use)
    layer._mstplan_mlps += (mlp.first,)


def _mlp_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """An MLP: its output is made as soon as something reads it, in chunks. Compiled code gets it at once, and does not look in; so do ZeRO-3's
    hooks, which wait for tensors."""
    at_once = torch.compiler.is_compiling() or has_shards(self)
    return _materialized_mlp(self, *args, **kwargs) if at_once else _lazy_mlp(self, *args, **kwargs)


@torch.compiler.disable
def _materialized_mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
    return materialize(_lazy_mlp(self, *args, **kwargs))


def _lazy_mlp(self: Any, *args: Any, **kwargs: Any) -> Any:
    if not args:  # hidden states by name
        args = (kwargs.pop(next(iter(kwargs))),)
    x, args = materialize(args[0]), args[1:]
    rows = _chunk_rows(self, x, *args, *kwargs.values())
    if rows is None:
        return plain_forward(self)(x, *args, **kwargs)
    plain = plain_forward(self)
    return _mlp_output(self, x, lambda piece: plain(piece, *args, **kwargs), (self,), rows)


@torch.compiler.disable  # what lies between the two matrices is no tensor that compiled code could hand on
def _run_uncompiled(self: Any, *args: Any, **kwargs: Any) -> Any:
    return plain_forward(self)(*args, **kwargs)


def _up_forward(self: Any, x: torch.Tensor) -> Any:
    """The first matrix of an MLP that is no module: what it gives is not made before the second one."""
    x = materialize(x)
    rows = _chunk_rows(self, x)
    if rows is None:
        return plain_forward(self)(x)
    return MlpIntermediate(x, plain_forward(self), (self,), rows, self._mstplan.runtime)


def _down_forward(self: Any, x: Any) -> Any:
    plain = plain_forward(self)
    if not isinstance(x, MlpIntermediate):
        return plain(x)
    return _mlp_output(x.modules[0], x.source, x.record_step(plain, self).run, (*x.modules, self), x.rows, x.random)


def _following_forward(self: Any, x: Any) -> Any:
    """A norm, dropout or activation: of what is not made yet it makes something that is not made yet."""
    plain = plain_forward(self)
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
        nodes = mlp.__dict__.pop("_mstplan_nodes", None)
        if nodes is not None and torch.is_tensor(hidden) and hidden.requires_grad:
            # no nodes: made in a reentrant checkpoint, which runs all of the layer again
            mlp._mstplan_read = not nodes or any(output_is_read(node, hidden) for node in nodes)
    return output


# ---- layers ---------------------------------------------------------------------------------------------------------------


def _rehearse(model: PreTrainedModel, layers: list[nn.Module], recipe: Recipe, group: ProcessGroup | None) -> Rehearsed:
    """How the layers run in pieces. Raises ModelError, also for heads that do not come in so many groups."""
    if has_shards(model):
        raise ModelError(
            f"{type(model).__name__} was built in shards (deepspeed.zero.Init), on which its layers cannot be rehearsed."
            "\nUse the strategy mst, or build the model before its trainer's arguments are made."
        )
    watch_attention()
    rehearsed = rehearse(model, layers)
    attending = [parts for parts in rehearsed.layers if parts.calls_attention]
    for parts in attending or rehearsed.layers:
        if (
            recipe.attention_groups != "auto"
            and recipe.attention_groups > 1
            and parts.kv_heads % recipe.attention_groups
        ):
            raise ModelError(
                f"{type(parts.layer).__name__} has {parts.kv_heads} heads of keys, which make no {recipe.attention_groups} groups."
            )
        n = recipe.attention_groups
        if group is not None and n != "auto" and not can_share(parts.heads // n, parts.kv_heads // n, group.size()):
            raise ModelError(
                f"{type(parts.layer).__name__} has {parts.heads} heads of queries and {parts.kv_heads} of keys, which {group.size()} GPUs cannot "
                f"share in {n} groups.\nLeave attention_groups out."
            )
        if recipe.attention_on_host and any(True for _ in parts.mixer.parameters(recurse=False)):
            raise ModelError(
                f"{type(parts.mixer).__name__} has weights within attention itself, whose gradients are not made from CPU RAM."
                "\nLeave attention_on_host out."
            )
    if recipe.attention_on_host and not attending:
        raise ModelError(
            f"{type(model).__name__} has no attention that transformers' interface knows.\nLeave attention_on_host out."
        )
    return rehearsed


def _mlps_of(parts: ModelParts, rehearsed: Rehearsed | None) -> list[tuple[nn.Module, LayerMlp]]:
    """MLPs of the layers that do not run in pieces themselves."""
    if rehearsed is None:
        return find_mlps(parts)
    others = [layer for layer in parts.layers if layer in rehearsed.refused]
    inside = {m for each in rehearsed.layers for m in each.layer.modules()}
    mlps = [(layer, mlp) for each in others for layer, mlp in find_mlps(parts, [each]) if mlp.first not in inside]
    return [(layer, mlp._replace(followers=tuple(m for m in mlp.followers if m not in inside))) for layer, mlp in mlps]


def _chunk_layers(rehearsed: Rehearsed, settings: _Settings) -> None:
    for parts in rehearsed.layers:
        layer: Any = parts.layer
        layer._mstplan, layer._mstplan_parts = settings, parts
        mark_leaf(layer)
        patch_parts(parts)
        patch_forward(layer, _layer_forward)
    for module in rehearsed.tail:
        module._mstplan = settings  # type: ignore[assignment]
        patch_forward(module, _tail_forward)


@torch.compiler.disable
def _layer_forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """A layer whose attention runs whole and whose other parts run in pieces."""
    checkpoints = self._mstplan.checkpoints
    if checkpoints is None or checkpoints.is_running or not (self.training and self.gradient_checkpointing):
        return _run_layer(self, x, *args, **kwargs)
    return self._gradient_checkpointing_func(partial(_run_layer, self, **without_cache(kwargs)), x, *args)


def _run_layer(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    settings, parts, rows = self._mstplan, self._mstplan_parts, _rows_of_each(self, x)
    if rows is None:
        return parts.run(x, (args, kwargs))
    checkpoints = settings.checkpoints
    skip = checkpoints is not None and checkpoints.discards_output
    if settings.graphs is not None and checkpoints is not None:
        settings.graphs.begin_layer(checkpoints.is_running, again=checkpoints.recomputing is not None)
    groups = settings.counts.chunks_for(x).groups
    if settings.sharing is not None:
        groups = settings.sharing.groups_of_heads(groups, parts.heads, parts.kv_heads)
    return layer_in_pieces(parts, rows, groups, settings.graphs, settings.runtime, skip, x, (args, kwargs))


@torch.compiler.disable
def _tail_forward(self: Any, x: torch.Tensor) -> Any:
    """A norm between the last layer and the LM head."""
    rows = _rows_of_each(self, x)
    if rows is None:
        return plain_forward(self)(x)
    plain = plain_forward(self)
    return tokenwise_in_pieces(self, plain, rows, self._mstplan.runtime, x)


def _rows_of_each(module: Any, x: torch.Tensor) -> int | None:
    """Tokens of each sequence to a piece of hidden states (b, s, d); None: in one go."""
    if not (torch.is_grad_enabled() or module.training) or x.dim() != 3 or x.shape[1] == 1:
        return None
    chunks = module._mstplan.counts.chunks_for(x).mlp
    return chunk_tokens(x.shape[1], chunks) if chunks > 1 else None


# ---- LM head and loss ---------------------------------------------------------------------------------------------------


def _named(plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(inspect.signature(plain).parameters, args, strict=False)), **kwargs} if args else kwargs


def _first_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Of a model whose strategy is still to be chosen."""
    larger = self._mstplan.comes_larger(self, _named(plain_forward(self), args, kwargs))
    if larger is None:
        return plain_forward(self)(*args, **kwargs)
    self._mstplan.choose(self, *larger)
    return self.forward(*args, **kwargs)


def _model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A model whose sequences other ranks may share."""
    settings = self._mstplan
    if settings.sharing is None:
        return _run_model(self, *args, **kwargs)
    with settings.sharing.run(self, settings.layers, _named(plain_forward(self), args, kwargs)) as more:
        return _run_model(self, *args, **{**kwargs, **more})


def _run_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    """In training with labels: the head hands on lazy logits, which cross entropy makes chunk by chunk."""
    settings, plain = self._mstplan, plain_forward(self)
    arguments = _named(plain, args, kwargs)
    if settings.awaiting is not None and (larger := settings.awaiting.comes_larger(self, arguments)) is not None:
        settings.awaiting.choose(self, *larger)
        return self.forward(*args, **kwargs)
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
