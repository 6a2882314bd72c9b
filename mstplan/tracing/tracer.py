"""The trace: transformers' own model code and mstplan's own training step run on fake tensors, seen allocation by allocation.

Few layers are run, and few chunks; `extend.py` writes the whole step down from them. The optimizer's step is run over all
weights of the whole model. What a card does otherwise than a CPU stands in `cuda_stand_ins.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from math import prod
from operator import or_
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import InputError, ModelError, one_line
from ..spec.config import NO_TOWERS, describes_towers, waiting
from ..spec.model import Model
from ..spec.platform import AMPERE, Platform
from ..spec.published import as_transformers_has_it
from ..step.instants import Pass
from ..step.kernels import NO_SDPA, SDPA, runs_sdpa
from ..step.meshes import by_mesh
from ..step.optimizers import OPTIMIZERS
from ..step.recipe import Recipe
from ..step.ring import ranks_that_differ
from ..step.runnable import check_runnable
from ..step.saved_tensors import IN_FLIGHT
from ..step.selection import Kinds
from ..step.steps import checkpointed_layers, every_nth, segment_length
from ..step.tensor_parallel import cuts_rows
from ..step.towers import check_idle, image_notes
from ..train import locate
from ..train.checkpoint import segments_of
from ..train.images import image_batch, image_of
from ..train.quiet import quiet_packages
from ..train.selecting import kinds_in
from ..train.stand_in import stand_in
from ..train.step import (
    TrainingStep,
    build_model,
    build_towers,
    clip_gradients,
    make_states,
    read_settings,
    to_step,
    weights_to_train,
)
from ..train.text_part import is_part, model_class, tower_tensors, towers_in, towers_of
from .cpu import KernelBuffers
from .cuda_stand_ins import as_on_cuda, clipping_on_cuda, on_fake_tensors
from .cuda_workspaces import KernelWorkspaces
from .expert_parallel import routed_evenly, shapes_apart, spread_experts
from .extend import Unlike, layers_to_run, make_row
from .fake_runtime import FEW_CHUNKS, FakeCardRuntime, FakeRuntime
from .fsdp import clip_flat, first_of_ranks, flat_pieces, flat_shapes, record_fsdp, shape_on_rank, shard_model
from .fused_losses import NoPackages, StandInPackages
from .kernels import STAND_INS
from .kernels.flash import FLASH
from .liger_stand_ins import liger_kernels
from .optimizers import make_fake_optimizer
from .quantised import on_fake_weights
from .recorder import ModuleLabel, Recorder, checkpoints_of
from .recording import Category, Recording
from .ring import ring_without_ranks
from .tensor_parallel import (
    has_whole_gradient,
    shapes_on_a_rank,
    split_over_ranks,
    splits_without_ranks,
    whole_gradient,
)
from .trace import State, Trace, Weight
from .values import UnknownValues, note_tokens

Sizes = tuple[tuple[tuple[int, ...], torch.dtype, Kinds, tuple[bool, bool]], ...]
Names = frozenset[str]
_OF_UPDATE = (
    "precision",
    "optimizer",
    "adamw_kernel",
    "fp32_embedding_states",
    "optimizer_in_backward",
    "max_grad_norm",
)
"""Fields of a recipe that the optimizer's step depends on, for given weights."""
_MICRO_BATCHES = 3
"""Micro-batches that are run where whole gradients stay from one to the next: the first, one that finds them, and the last, which scatters them."""
_REACH = {"none": 1, "layer-inputs": 2, "saved-tensors": IN_FLIGHT + 1}
"""How many layers further than its own a tensor's life may go: an input on its way to the host is let go later."""
OWN_FAILURE = "makes no training step of token ids and labels alone"


def trace(
    config: Mapping[str, Any],
    recipe: Recipe,
    seq_len: int,
    *,
    on: str = "cuda",
    workspace: int = 0,
    platform: Platform = AMPERE,
    whole: bool = False,
    code_from: str | None = None,
    towers: bool = True,
) -> Trace:
    """Trace one training step, after the first, of the model that `config` (a config.json) describes.

    on: "cuda", or "cpu" for what the same step allocates there. workspace: bytes that cuBLAS holds on the card. platform: its, by
    which sdpa chooses its attention kernels. whole: run every layer and every chunk. code_from: the folder or Hugging Face id of
    a model whose own code may be run. towers: count those of a model of several parts; in a step without images they wait.
    Raises ModelError for a model that transformers or the runtime cannot serve, RecipeError for a recipe that no step can follow.
    """
    settings = read_settings(config, code_from, whole=bool(recipe.images))
    found = trace_settings(
        settings,
        recipe,
        seq_len,
        on=on,
        workspace=workspace,
        platform=platform,
        whole=whole,
        remote_code=code_from is not None,
    )
    if recipe.images or recipe.weights_on_host or not towers or not describes_towers(config):
        return found
    return replace(found, weights=(*found.weights, *_waiting_weights(config, recipe, code_from)))


def _waiting_weights(config: Mapping[str, Any], recipe: Recipe, code_from: str | None) -> Iterator[Weight]:
    """Weights and buffers of towers in a step on text alone: no gradient comes to them, so that they have no states either."""
    whole = build_towers(config, recipe, code_from)
    for name, tensor in tower_tensors(whole).items():
        shape = shape_on_rank(tensor, recipe) if tensor.dim() else ()
        yield Weight(name, shape, _dtype_name(tensor.dtype), prod(shape) * tensor.element_size(), False)


def trace_settings(
    settings: PreTrainedConfig,
    recipe: Recipe,
    seq_len: int,
    *,
    on: str = "cuda",
    workspace: int = 0,
    platform: Platform = AMPERE,
    whole: bool = False,
    remote_code: bool = False,
) -> Trace:
    """`trace` of transformers' own description of a model, which stays as it is."""
    check_runnable(recipe)
    if recipe.images:
        image_batch(settings, recipe, seq_len)  # what is wrong with them is said before anything is built
    with on_fake_weights(recipe.quantize != "none"):
        found = [
            _trace_settings(settings, recipe, seq_len, on, workspace, platform, whole, remote_code, rank)
            for rank in ranks_that_differ(recipe.context_parallel)
        ]
    return max(found, key=lambda each: max(each.live)) if len(found) > 1 else found[0]


def _trace_settings(
    settings: PreTrainedConfig,
    recipe: Recipe,
    seq_len: int,
    on: str,
    workspace: int,
    platform: Platform,
    whole: bool,
    remote_code: bool,
    rank: int,
) -> Trace:
    full = whole_model(settings, recipe, on, remote_code)
    layers = locate.find_parts(full).layers
    every, starts = segment_length(recipe, len(layers)) or 1, checkpointed_layers(recipe, len(layers))
    kinds = _layer_kinds(full, layers, recipe)
    if every_nth(recipe) is not None:
        kinds = [(kind, n in starts) for n, kind in enumerate(kinds)]
    sizes, weights = _sizes(full, recipe), _describe_weights(full, recipe)
    reach = _REACH[recipe.offload]
    numbers = {kind: n for n, kind in enumerate(dict.fromkeys(kinds))}
    names = _names_of(full, layers)
    all_layers = list(range(len(kinds)))
    differs = recipe.finds_gradients or recipe.optimizer_in_backward  # the first micro-batch, the first step

    def trace_layers(model: PreTrainedModel, layer_numbers: list[int]) -> Trace:
        def record(model: PreTrainedModel, first: bool = False) -> tuple[Recording, Names]:
            return _record_layers(model, recipe, seq_len, layer_numbers, starts, on, whole, platform, first, rank)

        short, found_idle = record(model)
        idle = _idle_in_all(found_idle, names, kinds, layer_numbers)
        if recipe.images:
            check_idle(sorted(idle), recipe)
        stepped = Recipe(**{name: getattr(recipe, name) for name in _OF_UPDATE})
        rows = _rows_to_step(model, recipe, dict(sizes))
        update, states = _record_update(
            tuple(size for name, size in sizes if name not in idle), stepped, on, recipe.flat, rows
        )
        if recipe.optimizer_on_host:
            update = Recording()
        return Trace(
            recipe,
            seq_len,
            on,
            workspace,
            tuple(w._replace(trained=False) if w.name in idle else w for w in weights),
            states,
            tuple(numbers[k] for k in kinds),
            tuple(layer_numbers),
            every,
            reach,
            short,
            update,
            record(whole_model(settings, recipe, on, remote_code), first=True)[0] if differs else None,
        )

    layer_numbers = (
        all_layers
        if whole or recipe.keeps_whole_gradients or recipe.hooks_inputs
        else layers_to_run(make_row(kinds, every, reach))
    )
    try:
        step_trace = trace_layers(full, layer_numbers)
        step_trace.write_down()
    except (Unlike, ModelError):
        if layer_numbers == all_layers:
            raise
        step_trace = trace_layers(whole_model(settings, recipe, on, remote_code), all_layers)
    return step_trace


def whole_model(settings: PreTrainedConfig, recipe: Recipe, on: str, remote_code: bool) -> PreTrainedModel:
    """The model without any memory."""
    attention = attention_of(recipe, settings, on)
    try:
        return build_model(settings, recipe, attention, "meta", remote_code)
    except ModelError:
        if attention != FLASH:
            raise
    full = build_model(settings, recipe, "eager", "meta", remote_code)  # its code knows no attention functions by name
    if recipe.attention == "flash":
        raise ModelError(
            f"{type(full).__name__} has flash attention of its own, which cannot be traced.\nUse --attention sdpa or eager."
        )
    return full


def stand_in_for(
    config: Mapping[str, Any], name: str, why: str, code_from: str | None = None, towers: bool = True
) -> Model:
    """What stands in for the description of a model that the formula does not know; why: its refusal, in a line. towers: count those of
    a model of several parts. Raises ModelError for a model that transformers cannot serve."""
    full = whole_model(read_settings(config, code_from), Recipe(), "cuda", code_from is not None)
    model = stand_in(full, name, why)
    described = str(as_transformers_has_it(config).get("model_type"))
    if not is_part(full, described):
        return model
    if not towers:
        return model._replace(notes=(*model.notes, NO_TOWERS))
    parts = towers_in(build_towers(config, Recipe(), code_from))
    assert model.stand_in is not None
    whole = model.stand_in._replace(parameters=model.stand_in.parameters + sum(part.parameters for part in parts))
    notes = (*model.notes, waiting(parts)) if parts else model.notes
    return model._replace(stand_in=whole, towers=parts, notes=notes)


def with_images(model: Model, config: Mapping[str, Any], recipe: Recipe, code_from: str | None = None) -> Model:
    """A stand-in for steps whose sequences have the recipe's images, and what is said of them. Raises RecipeError for a model that
    mstplan does not know how to give images, or images that it cannot have."""
    image = image_of(read_settings(config, code_from, whole=True), recipe)
    taken = recipe.images * image.tokens
    notes = [note for note in model.notes if note != waiting(model.towers)]
    assert model.stand_in is not None
    notes += image_notes(recipe, image.tokens, image.pixels)
    return model._replace(stand_in=model.stand_in._replace(shortest=taken + 1), notes=tuple(notes))


def attention_of(recipe: Recipe, settings: PreTrainedConfig, on: str) -> str:
    """attn_implementation for a recipe's attention. A model for which transformers has no sdpa runs flash attention on a
    card where it can (16 bits), else eager."""
    kind = model_class(settings)
    if runs_sdpa(recipe.attention):
        return (
            SDPA if getattr(kind, "_supports_sdpa", True) else STAND_INS[NO_SDPA].implementation_for(recipe, kind, on)
        )
    return STAND_INS[recipe.attention].implementation_for(recipe, kind, on)


def _record_layers(
    full: PreTrainedModel,
    recipe: Recipe,
    seq_len: int,
    layer_numbers: list[int],
    starts: range,
    on: str,
    whole: bool,
    platform: Platform,
    first: bool,
    rank: int,
) -> tuple[Recording, Names]:
    """Forward and backward of a step with the layers of these numbers, where checkpoints begin as in the whole. starts: there, their first
    layers. Beside it the trained weights that no gradient comes to: what runs without autograd, and of towers what images do not go
    through, as the last layers of one of which an earlier one's output is taken."""
    model = _keep_layers(full, locate.find_parts(full).layers, layer_numbers)
    with first_of_ranks(recipe, rank) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        if mesh is not None and recipe.tensor_parallel > 1:
            split_over_ranks(model, recipe, mesh)
        if recipe.expert_parallel > 1:
            spread_experts(model, recipe)
        elif mesh is not None and recipe.sharded:
            shard_model(model, recipe, mesh)
        begin = [n for n, i in enumerate(layer_numbers) if i in starts]
        trained = {w: name for name, w in model.named_parameters() if w.requires_grad}
        reached: set[torch.Tensor] = set()
        hooks = [weight.register_post_accumulate_grad_hook(reached.add) for weight in trained]
        recording = record_passes(model, recipe, seq_len, begin, on, None if whole else FEW_CHUNKS, platform, first)
        for hook in hooks:
            hook.remove()
        return recording, frozenset(name for weight, name in trained.items() if weight not in reached)


def _names_of(model: PreTrainedModel, layers: list[nn.Module]) -> list[str]:
    """What the names of each layer's weights begin with."""
    names = {module: f"{name}." for name, module in model.named_modules()}
    return [names[layer] for layer in layers]


def _idle_in_all(idle: Names, names: list[str], kinds: list[Hashable], layer_numbers: list[int]) -> Names:
    """Weights of all layers that no gradient comes to, of those in the layers that were run, which stand in for others of their kind. names:
    what those of each layer begin with. Raises Unlike where layers of a kind differ."""
    found: dict[Hashable, Names] = {}
    for name, number in zip(names, layer_numbers, strict=False):
        own = frozenset(each.removeprefix(name) for each in idle if each.startswith(name))
        if found.setdefault(kinds[number], own) != own:
            raise Unlike
    outside = frozenset(each for each in idle if not each.startswith(tuple(names)))
    inside = (f"{name}{each}" for name, kind in zip(names, kinds, strict=True) for each in found.get(kind, ()))
    return outside.union(inside)


def _make_fake(model: PreTrainedModel) -> None:
    """Give a model's weights storage. Modules that shared one share it again, as they do beside a copy of one that peft trains:
    `tie_weights` would tie them to the copy."""
    places: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            places.setdefault(weight, []).append((module, name))
    model.to_empty(device="cpu")
    for (first, name), *others in places.values():
        for module, other_name in others:
            setattr(module, other_name, getattr(first, name))


def record_passes(
    model: PreTrainedModel,
    recipe: Recipe,
    seq_len: int,
    starts: list[int],
    on: str,
    most_chunks: int | None = None,
    platform: Platform = AMPERE,
    first: bool = False,
) -> Recording:
    """Forward and backward of a step of a model that is there. starts: the layers that checkpoints begin with. most_chunks: of a
    sequence, to be run; None: all. first: gradients of earlier micro-batches, states of an optimizer in backward are not there yet."""
    units = len(locate.find_parts(model).layers)
    recorder = Recorder(_label_modules(model), units)
    runtime = FakeCardRuntime(recorder, most_chunks, platform) if on == "cuda" else FakeRuntime(most_chunks)
    attention = "flash" if model.config._attn_implementation == FLASH else recipe.attention
    samples = recipe.samples_in_row
    device = as_on_cuda(recorder, attention, platform, samples) if on == "cuda" else on_fake_tensors(samples)
    liger = liger_kernels(model) if recipe.kernels == "liger" and on == "cuda" else nullcontext()
    ring = ring_without_ranks() if recipe.context_parallel > 1 else nullcontext()
    splits = splits_without_ranks() if recipe.tensor_parallel > 1 else nullcontext()
    routing = routed_evenly(recipe) if recipe.expert_parallel > 1 else nullcontext()
    with device, liger, ring, splits, routing:
        bare = {"optimizer": "sgd", "fp32_embedding_states": False}
        bare_recipe = recipe if recipe.optimizer_in_backward else recipe.changed(**bare)
        packages = StandInPackages() if on == "cuda" else NoPackages()
        step = TrainingStep(model, bare_recipe, seq_len, runtime, packages)
        if isinstance(step.replica, FullyShardedDataParallel):
            _label_wrappers(recorder, step.replica)
        if (checkpoints := checkpoints_of(model)) is not None:
            checkpoints.segments = segments_of(recipe, starts, units)
        if not first:
            make_states(step.backward_optimizers)
        if recipe.finds_gradients and not first:
            _make_gradients(model, recipe)
        recorder.add_residents(_resident_tensors(model, step.backward_optimizers))
        kernel_buffers = KernelBuffers(recorder) if on == "cpu" else KernelWorkspaces(recorder)
        fsdp = record_fsdp(recorder, recipe.weights_on_host, recipe.flat) if recipe.sharded else nullcontext()
        with _name_failures(model), quiet_packages(), fsdp, recorder, kernel_buffers, recorder.watch_modules(model):
            recorder.begin_pass(Pass.FORWARD)
            step.renew_batch()
            if recipe.images:
                _give_images(step, seq_len)
            else:
                note_tokens(step.tokens)
            passes = min(recipe.accumulation, _MICRO_BATCHES) if recipe.keeps_whole_gradients else 1
            for n in range(passes):
                recorder.begin_pass(Pass.FORWARD)
                with step.offloading, step.ring, step.split_loss, step.reduced_later(n + 1 < passes):
                    loss = step.forward()
                    recorder.begin_pass(Pass.BACKWARD)
                    loss.backward()
                    loss = loss.detach()
                del loss
            recorder.begin_pass(Pass.OPTIMIZER)
        if first:
            on_host = OPTIMIZERS[recipe.optimizer].keys_on_host(recipe) if on == "cuda" else ()
            for name, state in _optimizer_states(step.backward_optimizers):
                recorder.set_category(state, Category.STATES, host=name in on_host)
    return recorder.close()


def _make_gradients(model: PreTrainedModel, recipe: Recipe) -> None:
    """Give weights that are trained gradients, in shards those of the micro-batches before; views of FSDP1's are given views of these."""
    handles = [handle for each in FullyShardedDataParallel.fsdp_modules(model) if (handle := each._handle) is not None]
    if not any(handle._use_orig_params for handle in handles):
        for weight in weights_to_train(model):
            weight.grad = (
                whole_gradient(weight) if has_whole_gradient(model, weight, recipe) else torch.empty_like(weight)
            )
        return
    for handle in handles:
        if handle.flat_param.requires_grad:
            handle.flat_param.grad = torch.empty_like(handle.flat_param)
            handle._use_sharded_grad_views()


def _label_wrappers(recorder: Recorder, wrapped: nn.Module) -> None:
    """Have what wraps a layer under FSDP1 be at the layer's place."""
    for wrapper in wrapped.modules():
        if isinstance(wrapper, FullyShardedDataParallel) and (label := recorder.labels.get(wrapper.module)) is not None:
            recorder.labels = {**recorder.labels, wrapper: label._replace(is_layer=False)}


def _give_images(step: TrainingStep, seq_len: int) -> None:
    """Let the step have images made anew, and tokens and sizes of images that have values: how many patches a model's code
    makes of an image depends on them."""
    with unset_fake_temporarily():
        ids, numbers, _ = image_batch(step.model.config, step.recipe, seq_len)
    step.tokens = ids.clone()
    step.images = {name: tensor.clone() for name, tensor in {**step.images, **numbers}.items()}


@contextmanager
def _name_failures(model: PreTrainedModel) -> Iterator[None]:
    """What a model's code cannot do on token ids without values is said with the model's name."""
    name = type(model).__name__.removeprefix("FSDP")  # fully_shard's class of it
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True  # it writes whole stacks
    try:
        yield
    except InputError:
        raise
    except UnknownValues as e:
        asker = f"{type(model.get_submodule(e.module)).__name__} ({e.module})" if e.module else name
        raise ModelError(
            f"{name} needs the values of tensors in {e.operation} of {asker}, and a trace has none: they come of its weights or "
            "of which tokens there are.\nPlan it with the formula rung, or measure it on a GPU: mstplan measure."
        ) from None
    except Exception as e:
        raise ModelError(f"{name} {OWN_FAILURE}: {type(e).__name__}: {one_line(e, 200)}") from e
    finally:
        log.disabled = before


def _layer_kinds(model: PreTrainedModel, layers: list[nn.Module], recipe: Recipe) -> list[Hashable]:
    """What tells a layer from another: its modules' types and sizes, what is trained in it and before it, what the
    configuration lists for each layer, and whether features of images are added behind it."""
    settings = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}.values()
    values = [
        v for config in settings for v in vars(config).values() if isinstance(v, list | tuple) and len(v) == len(layers)
    ]
    numbers = _own_number_attributes(layers)
    signatures = [
        (_layer_signature(layer, numbers), tuple(repr(v[i]) for v in values)) for i, layer in enumerate(layers)
    ]
    vision = getattr(model.config, "vision_config", None)
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or ()) if recipe.images else 0
    takes_features = [n < deep for n in range(len(layers))]
    return list(zip(signatures, _inputs_with_gradients(model, layers, recipe), takes_features, strict=True))


def _inputs_with_gradients(model: PreTrainedModel, layers: list[nn.Module], recipe: Recipe) -> list[bool]:
    """Of each layer, whether something before it is trained, so that its input gets a gradient."""
    inside = {module for layer in layers for module in layer.modules()}
    before: list[nn.Module] = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside]
    if recipe.images:
        before += towers_of(model).values()
    trained_in = [any(w.requires_grad for w in module.parameters()) for module in (nn.ModuleList(before), *layers)]
    return list(accumulate(trained_in, or_))[:-1]


def _own_number_attributes(layers: list[nn.Module]) -> set[tuple[str, str]]:
    """(module, attribute) that hold but a layer's own number."""
    attributes = {
        (path, k, v == i)
        for i, layer in enumerate(layers)
        for path, m in layer.named_modules()
        for k, v in vars(m).items()
        if type(v) is int
    }
    return {(path, k) for path, k, is_number in attributes if is_number and (path, k, False) not in attributes}


def _layer_signature(layer: nn.Module, numbers: set[tuple[str, str]]) -> Hashable:
    def module_signature(path: str, module: nn.Module) -> Hashable:
        values = {
            k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None) and not k.startswith("_")
        }
        values = {
            k: v != 0 if isinstance(v, float) else v for k, v in values.items()
        }  # is there a dropout? which one, does not matter
        scalars = sorted((k, repr(v)) for k, v in values.items() if (path, k) not in numbers and k != "layer_idx")
        sizes = tuple((tuple(weight.shape), weight.requires_grad) for weight in module.parameters(recurse=False))
        return path, type(module).__name__, tuple(scalars), sizes

    return tuple(module_signature(path, module) for path, module in layer.named_modules())


def _describe_weights(model: PreTrainedModel, recipe: Recipe) -> tuple[Weight, ...]:
    """Parameters and buffers; of sharded ones this card's share."""
    parameters = [
        (name, shape, dtype, trained, recipe.weights_on_host, has_whole_gradient(model, weight, recipe))
        for name, shape, dtype, trained, weight in _parameters_on_rank(model, recipe)
    ]
    buffers = [(name, tuple(t.shape), t.dtype, t.requires_grad, False, False) for name, t in model.named_buffers()]
    others = recipe.tensor_parallel - 1
    return tuple(
        Weight(name, shape, _dtype_name(dtype), size, trained, on_host, size * others if whole else 0)
        for name, shape, dtype, trained, on_host, whole in parameters + buffers
        for size in (prod(shape) * dtype.itemsize,)
    )


def _parameters_on_rank(
    model: PreTrainedModel, recipe: Recipe
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, bool, nn.Parameter | None]]:
    """(name, this card's shape, dtype, whether it is trained, the weight) of parameters; FSDP1's flat ones are many weights each."""
    if recipe.flat:
        yield from ((*flat, None) for flat in flat_shapes(model, recipe))
        return
    split, experts = shapes_on_a_rank(model, recipe), shapes_apart(model, recipe)
    for name, weight in model.named_parameters():
        shape = experts.get(name) or shape_on_rank(weight, recipe, split.get(name))
        yield name, shape, weight.dtype, weight.requires_grad, weight


def _keep_layers(model: PreTrainedModel, layers: list[nn.Module], layer_numbers: list[int]) -> PreTrainedModel:
    """The model with these of its layers only, and its configuration to match. Raises Unlike where layers are in no one list."""
    if len(layer_numbers) == len(layers):
        return model
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and [*child] == layers:
                setattr(module, name, nn.ModuleList([layers[i] for i in layer_numbers]))
                for settings in {id(c): c for c in (model.config, getattr(module, "config", model.config))}.values():
                    _shorten_settings(settings, len(layers), layer_numbers)
                return model
    raise Unlike


def _shorten_settings(settings: Any, count: int, layer_numbers: list[int]) -> None:
    for name, value in list(vars(settings).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(settings, name, [value[i] for i in layer_numbers])
    overrides = getattr(vars(settings).get("_heterogeneity_spec"), "per_layer_overrides", {})
    renumbered = {n: overrides[i] for n, i in enumerate(layer_numbers) if i in overrides}
    overrides.clear()
    overrides.update(renumbered)
    with suppress(NotImplementedError):  # of an encoder and a decoder
        settings.num_hidden_layers = len(layer_numbers)


def _label_modules(model: PreTrainedModel) -> dict[nn.Module, ModuleLabel]:
    """What is known of each module: its path, category and unit."""
    parts = locate.find_parts(model)
    try:
        mlps = {
            part
            for _, mlp in locate.find_mlps(parts)
            for top in (mlp.first, mlp.down)
            if top is not None
            for part in top.modules()
        }
    except ModelError:
        mlps = set()
    units: dict[nn.Module, set[int]] = {}
    for n, layer in enumerate(parts.layers):
        for part in layer.modules():
            units.setdefault(part, set()).add(n)
    head = set(parts.head.modules())
    mixing = {
        part
        for layer in parts.layers
        for child in layer.modules()
        if child is not layer and locate.mixes_tokens(child)
        for part in child.modules()
    }
    layers = set(parts.layers)
    labels: dict[nn.Module, ModuleLabel] = {}
    for path, module in model.named_modules():
        layer_units = units.get(module, set())
        category = (
            Category.MLP
            if module in mlps
            else Category.ATTENTION
            if module in mixing and layer_units
            else Category.NORMS
            if layer_units
            else Category.LOSS
            if module in head
            else Category.NORMS
            if "Norm" in type(module).__name__
            else Category.OTHER
        )
        unit = min(layer_units) if len(layer_units) == 1 else None  # what several share is of the one that runs it
        labels[module] = ModuleLabel(path, category, unit, module in layers)
    return labels


def _resident_tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """Weights, buffers, gradients and the optimizers' states that are there now."""
    tensors = [*model.parameters(), *model.buffers(), *(w.grad for w in model.parameters() if w.grad is not None)]
    return tensors + [t for _, t in _optimizer_states(optimizers)]


def _optimizer_states(optimizers: list[torch.optim.Optimizer]) -> list[tuple[str, torch.Tensor]]:
    """By name. What several weights share is listed once."""
    named = [
        (name, t) for o in optimizers for state in o.state.values() for name, t in state.items() if torch.is_tensor(t)
    ]
    return list({id(t): (name, t) for name, t in named}.values())


def _sizes(
    model: PreTrainedModel, recipe: Recipe
) -> list[tuple[str, tuple[tuple[int, ...], torch.dtype, Kinds, tuple[bool, bool]]]]:
    """Of the weights that are trained, by name, in shards; their kinds, where the optimizer asks for them; whether they are on a mesh of their own."""
    if recipe.use_orig_params:
        pieces = flat_pieces(model, recipe)
        return [
            (name, (shape, dtype, frozenset(), (False, False))) for name, shape, dtype, trained in pieces if trained
        ]
    asks, kinds_of = OPTIMIZERS[recipe.optimizer].asks_kinds(recipe), kinds_in(model)
    apart, split = shapes_apart(model, recipe), shapes_on_a_rank(model, recipe)
    return [
        (
            name,
            (
                shape,
                dtype,
                kinds_of(weight) if asks and weight is not None else frozenset(),
                (name in apart, name in split and not recipe.sequence_parallel_norms),  # else norms are on theirs
            ),
        )
        for name, shape, dtype, trained, weight in _parameters_on_rank(model, recipe)
        if trained
    ]


def _rows_to_step(model: PreTrainedModel, recipe: Recipe, sizes: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a rank's rows of the embedding's whole gradient, where torch's fused AdamW has them cut (mstplan/step/tensor_parallel.py)."""
    if not cuts_rows(recipe):
        return ()
    table = model.get_input_embeddings().weight
    shape: tuple[int, ...] = next(sizes[name][0] for name, weight in model.named_parameters() if weight is table)
    return shape


@lru_cache(maxsize=16)
def _record_update(
    sizes: Sizes, recipe: Recipe, on: str, flat: bool, rows: tuple[int, ...] = ()
) -> tuple[Recording, tuple[State, ...]]:
    """What clipping and the optimizer's step make and let go of, over weights of these sizes, once it has its states; and the states. flat: they are
    FSDP1's. rows: shape of what is cut of a gradient meanwhile.

    The first step is run, and what it leaves behind are the states. On meta tensors, which take a fraction of fake ones' time;
    fused kernels know no meta tensors, and step one by one over CPU's.
    """
    fused, apart = OPTIMIZERS[recipe.optimizer].is_fused(recipe), recipe.optimizer_in_backward
    recorder = Recorder({}, 0)
    with FakeTensorMode() if fused else nullcontext(), clipping_on_cuda(recorder) if on == "cuda" else nullcontext():
        weights = [
            nn.Parameter(torch.empty(shape, dtype=dtype, device="cpu" if fused else "meta"))
            for shape, dtype, *_ in sizes
        ]
        kinds = {weight: kinds for weight, (_, _, kinds, _) in zip(weights, sizes, strict=True)}
        meshes = {weight: mesh for weight, (*_, mesh) in zip(weights, sizes, strict=True)}
        groups = by_mesh(weights, meshes.__getitem__)
        make = make_fake_optimizer(recipe, kinds.__getitem__)
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        optimizers = [make([weight]) for weight in weights] if apart else [make(to_step(groups))]
        recorder.add_residents(t for w in weights for t in (w, w.grad) if t is not None)
        with recorder:
            recorder.begin_pass(Pass.OPTIMIZER)
            if recipe.max_grad_norm is not None:
                if flat:
                    clip_flat(weights, recipe.max_grad_norm)
                else:
                    clip_gradients(groups, recipe.max_grad_norm)
            cut = torch.empty(rows, dtype=weights[0].dtype, device=weights[0].device) if rows else None
            for each in optimizers:
                each.step()
            del cut
        states = tuple(
            State(name, _dtype_name(t.dtype), t.numel() * t.element_size()) for name, t in _optimizer_states(optimizers)
        )
        state_indices = {recorder.storage_index(t) for _, t in _optimizer_states(optimizers)}
    recording = recorder.close().without(state_indices)
    for storage in recording.storages:
        storage.category = Category.STATES
    return (Recording() if apart else recording), states


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
