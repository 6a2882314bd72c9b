"""One training step of a transformers model as a recipe describes it: the same code on fake tensors, on the CPU and on CUDA.

Only the recorder around it differs. Passes follow the step model's instants: forward (with the loss), backward, optimizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import ModelError, one_line
from ..spec.config import TEXT_TYPES, WHOLE_TYPES, describes_towers, text_of
from ..spec.published import as_transformers_has_it
from ..step.instants import Pass
from ..step.losses import LOSSES
from ..step.meshes import by_mesh
from ..step.recipe import Recipe
from ..step.runnable import check_runnable
from ..step.selection import Selection
from .adapters import add_adapters, prepare_for_kbit
from .checkpoint import checkpoint_children
from .flat_shards import flat_shards
from .fused import PACKAGES, Packages
from .images import image_batch
from .locate import find_parts
from .quantise import quantise
from .quiet import quiet_packages
from .ring import ring_attention, with_room_for_all
from .runtime import RUNTIME, Runtime
from .selecting import freeze, kinds_in
from .text_part import from_settings, text_settings
from .ulysses import sequence_group, share_attention
from .wrap import Minisequence

if TYPE_CHECKING:
    from ..step.optimizers.base import Make

DTYPES = {"bf16": torch.bfloat16, "mixed": torch.float32, "fp32": torch.float32}

WITHOUT_TOWERS = "--assume no-towers plans its text part alone."

NO_HOST_MEMORY = "can't allocate memory"
"""What the RuntimeError of torch's allocator for CPUs says."""


def read_settings(config: Mapping[str, Any], code_from: str | None = None, whole: bool = False) -> PreTrainedConfig:
    """transformers' configuration object of a config.json; of a model of text and images that of its text part, where there is one,
    or with `whole` that of all. code_from: the folder or Hugging Face id that it lies in, when the code that lies there may be run. Raises ModelError when
    transformers has no code for it."""
    kind = one_line(config.get("model_type"))
    if code_from is not None and "auto_map" in config:
        return _read_or_refuse(lambda: AutoConfig.from_pretrained(code_from, trust_remote_code=True), kind)
    config = as_transformers_has_it(config)
    if (known := WHOLE_TYPES.get(one_line(config.get("model_type")))) is not None:
        config = {**config, "model_type": known}
    if one_line(config.get("model_type")) not in CONFIG_MAPPING:
        config = as_transformers_has_it(text_of(config))
    kind = one_line(config.get("model_type"))
    kind = kind if kind in CONFIG_MAPPING else TEXT_TYPES.get(kind, kind)
    fields = {name: value for name, value in config.items() if name not in ("model_type", "quantization_config")}
    if kind not in CONFIG_MAPPING:
        way_out = (
            "--trust-remote-code runs the code that comes with it."
            if "auto_map" in config
            else "A newer one may have it."
        )
        raise ModelError(
            f"transformers {transformers.__version__} has no code for this model (model_type {kind}).\n{way_out}"
        )
    described = _read_or_refuse(lambda: AutoConfig.for_model(kind, **_decode_floats(fields)), kind)
    return described if whole else text_settings(described)


def _decode_floats(value: Any) -> Any:
    """Numbers that JSON has not, as transformers writes them."""
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {name: _decode_floats(each) for name, each in value.items()}
    return [_decode_floats(each) for each in value] if isinstance(value, list) else value


def _read_or_refuse(read: Callable[[], PreTrainedConfig], kind: str) -> PreTrainedConfig:
    try:
        with quiet_packages():
            return read()
    except Exception as e:  # noqa: BLE001  transformers raises what it likes
        raise ModelError(f"transformers cannot read this model ({kind}): {one_line(e)}") from None


def build_towers(config: Mapping[str, Any], recipe: Recipe, code_from: str | None = None) -> PreTrainedModel:
    """The whole that a config.json describes, towers included, on the meta device, with its weights as the recipe keeps them. Raises
    ModelError for one that transformers cannot build whole."""
    settings = read_settings(config, code_from, whole=True)
    try:
        with torch.device("meta"), quiet_packages():
            model = from_settings(
                settings, towers=True, dtype=DTYPES[recipe.precision], trust_remote_code=code_from is not None
            )
    except Exception as e:  # noqa: BLE001  transformers raises what it likes; some towers want further packages
        raise ModelError(f"its towers cannot be counted: {one_line(str(e).strip(), 160)}\n{WITHOUT_TOWERS}") from None
    if settings.model_type in TEXT_TYPES.values() or not describes_towers(settings.to_dict()):
        raise ModelError(f"its towers cannot be counted: transformers has no code for them.\n{WITHOUT_TOWERS}")
    model.tie_weights()
    with quiet_packages():
        if recipe.quantize != "none":
            quantise(model, recipe)
        if recipe.kbit_preparation:
            prepare_for_kbit(model)
    return model


def build_model(
    settings: PreTrainedConfig, recipe: Recipe, attention: str, device: str, remote_code: bool = False
) -> PreTrainedModel:
    """The model with random weights, in training mode; `settings` stay as they are. remote_code: may code that is not
    transformers' be run? Raises ModelError where there is none."""
    settings = turn_cache_off(copy.deepcopy(settings))
    with torch.device(device), quiet_packages():
        try:
            model = from_settings(
                settings,
                towers=bool(recipe.images),
                dtype=DTYPES[recipe.precision],
                attn_implementation=attention,
                trust_remote_code=remote_code,
            )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as e:
            if NO_HOST_MEMORY in str(e):
                raise
            raise ModelError(
                f"transformers cannot build {settings.model_type} with attention {attention!r}: {one_line(str(e).strip(), 200)}"
            ) from None
    with quiet_packages():
        if recipe.quantize != "none":
            quantise(model, recipe)
        if recipe.kbit_preparation:
            prepare_for_kbit(model)
        if recipe.lora_rank:
            add_adapters(model, recipe)
    selection = Selection(recipe.train, recipe.freeze)
    freeze(model, selection if recipe.images else selection.of_text())
    if recipe.input_gradients:
        model.enable_input_require_grads()
    return model.train()


def turn_cache_off(settings: PreTrainedConfig) -> PreTrainedConfig:
    """Turn the cache of keys and values off, in place, in a configuration and its parts. Training never reads it."""
    for config in (settings, *(getattr(settings, name, None) for name in settings.sub_configs)):
        if config is not None:
            config.use_cache = False
    return settings


class TrainingStep:
    """A model, its optimizer, and a batch of random tokens (b, s). `run` makes one optimizer step.

    Chunks must be numbers here, not "auto". runtime: what mstplan's own part of the step runs on. packages: what
    makes the optimizer and puts other packages' losses and kernels in place. Raises RecipeError for what no step can be built for, ModelError for a model
    that the runtime refuses, MissingError for a package that is not installed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        seq_len: int,
        runtime: Runtime = RUNTIME,
        packages: Packages = PACKAGES,
    ):
        check_runnable(recipe)
        self.recipe, self.model = recipe, model
        self.device = next(model.parameters()).device
        chunked = recipe.loss_in_chunks
        if recipe.kernels == "liger":
            packages.install_kernels(model)
        if LOSSES[recipe.loss].is_fused:
            head = model.get_output_embeddings().weight
            below = any(weight is not head for weight in weights_to_train(model)) or recipe.input_gradients
            LOSSES[recipe.loss].check(recipe, model.config.model_type, head_alone=not below)
            packages.install_loss(model, recipe.loss)
        elif not chunked:
            LOSSES[recipe.loss].install(model)
        if recipe.checkpoint == "children":
            checkpoint_children(find_parts(model).layers)
        if recipe.checkpoints_layers or chunked or recipe.mlp_chunks != 1:
            Minisequence(runtime).wrap(model, recipe)
        saves_on_host = recipe.offload == "saved-tensors"
        self.offloading = runtime.offload_saved(model) if saves_on_host else nullcontext()  # of both passes
        self.runtime = runtime
        self.group = sequence_group(recipe.sharers) if recipe.sharers > 1 else None
        if self.group is not None and recipe.sequence_parallel > 1:
            share_attention(model, self.group)
        self.replica: DistributedDataParallel | FullyShardedDataParallel | None = None  # what runs the model's passes
        if recipe.has_gradient_buckets:
            self.replica = runtime.replicate(model)
        elif recipe.flat:
            self.replica = flat_shards(model, recipe)
        make = packages.make_optimizer(recipe, kinds_in(model))
        self.optimizer = None if recipe.optimizer_in_backward else make(to_step(groups_of(weights_to_train(model))))
        self.backward_optimizers = step_in_backward(model, make) if recipe.optimizer_in_backward else []
        vocabulary = vocabulary_of(model)
        shape = recipe.rows, recipe.row_tokens(seq_len)
        self.tokens, self.labels = (torch.randint(0, vocabulary, shape, device=self.device) for _ in range(2))
        self.beside: dict[str, torch.Tensor] = {}
        self.positions = self.make_positions()
        self.renew_batch()
        self.images: dict[str, torch.Tensor] = {}
        if recipe.images:
            self._add_images(*image_batch(model.config, recipe, seq_len))

    def renew_batch(self) -> None:
        """Make the batch anew, as every step's comes. In a ring each tensor of it has the memory of whole sequences, of which torch's
        context_parallel leaves this rank's part; transformers' Trainer gives it labels, shifted ones, and a mask of ones beside tokens."""
        self.tokens, self.labels = self.tokens.clone(), self.labels.clone()
        self.positions = self.make_positions()
        if self.recipe.context_parallel > 1:
            assert self.positions is not None
            whole = [self.tokens, self.labels, self.positions, self.labels, torch.ones_like(self.tokens)]
            self.tokens, self.labels, self.positions, shifted, mask = (
                with_room_for_all(part, self.recipe.context_parallel) for part in whole
            )
            self.beside = {"shift_labels": shifted, "attention_mask": mask}

    def _add_images(self, ids: torch.Tensor, numbers: dict[str, torch.Tensor], pixels: tuple[int, ...]) -> None:
        """Tokens with those of images among them, and what comes with these; pixels in fp32, as processors make them."""
        self.tokens = ids.to(self.device)
        self.images = {name: values.to(self.device) for name, values in numbers.items()}
        self.images["pixel_values"] = torch.rand(pixels, device=self.device)

    def make_positions(self) -> torch.Tensor | None:
        """Position ids of this rank's part of rows, or of rows of several samples, the last of which may be shorter; None: the model makes its
        own."""
        samples, (rows, tokens) = self.recipe.samples_in_row, self.tokens.shape
        if self.group is not None:
            rank, ranks = self.group.rank(), self.group.size()
            whole = torch.arange(tokens * ranks, device=self.device) % -(-tokens * ranks // samples)
            if self.recipe.context_parallel > 1:
                pieces = whole.chunk(2 * ranks)
                return torch.cat([pieces[rank], pieces[-1 - rank]]).repeat(rows, 1)
            return whole.chunk(ranks)[rank].repeat(rows, 1)
        if self.recipe.sequence_parallel_norms:  # a model would count those that a rank has
            return torch.arange(tokens, device=self.device)[None]
        if samples == 1:
            return None
        return (torch.arange(tokens, device=self.device) % -(-tokens // samples)).repeat(rows, 1)

    @property
    def ring(self) -> AbstractContextManager[None]:
        """Within the context, of both passes, attention is that of the ranks of a ring."""
        if self.group is None or self.recipe.context_parallel == 1:
            return nullcontext()
        kernel = self.runtime.ring_kernel(self.device.type)
        return ring_attention(self.group, self.device, self.recipe.rotate_method, kernel)

    @property
    def split_loss(self) -> AbstractContextManager[None]:
        """Within the context, of both passes, cross-entropy is computed of each rank's part of the vocabulary."""
        return loss_parallel() if self.recipe.loss_parallel else nullcontext()

    def run(self, begin: Callable[[Pass], Any] = lambda _pass: None) -> torch.Tensor:
        """One optimizer step; `begin` is told when each pass of it begins. Returns the loss of the last micro-batch, detached."""
        for n in range(self.recipe.accumulation):
            with self.offloading, self.ring, self.split_loss, self.reduced_later(n + 1 < self.recipe.accumulation):
                begin(Pass.FORWARD)
                loss = self.forward()
                begin(Pass.BACKWARD)
                loss.backward()
                loss = loss.detach()
        self.average_gradients()
        begin(Pass.OPTIMIZER)
        self.update()
        return loss

    def reduced_later(self, later: bool) -> AbstractContextManager[None]:
        """Within the context the ranks' gradients are summed, or, of a micro-batch before the last, are left as they are."""
        if self.recipe.keeps_whole_gradients and isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(not later)  # as accelerate's no_sync
        waits = later and (self.recipe.keeps_whole_gradients or not self.recipe.sharded)
        return self.replica.no_sync() if waits and self.replica is not None else nullcontext()

    @property
    def gradient_buckets_bytes(self) -> int:
        """Bytes of the buckets that DDP has now, as its reducer says."""
        if not isinstance(self.replica, DistributedDataParallel):
            return 0
        facts = self.replica._get_ddp_logging_data()
        return sum(map(int, (facts.get("rebuilt_bucket_sizes") or facts["bucket_sizes"]).split(", ")))

    def forward(self) -> torch.Tensor:
        model = self.model if self.replica is None else self.replica
        on = self.recipe.runs_autocast or self.recipe.runs_beside_autocast
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on):
            beside = {"position_ids": self.positions} if self.positions is not None else {}
            if self.group is not None:  # of whole sequences labels are shifted
                beside |= {"shift_labels": self.labels, **self.beside}
            loss: torch.Tensor | None = model(input_ids=self.tokens, labels=self.labels, **beside, **self.images).loss
        if loss is None:
            raise ModelError(f"{type(self.model).__name__} gives no loss for token ids and labels.")
        return loss

    def average_gradients(self) -> None:
        """Average over ranks, in place, the gradients of weights that ranks which share sequences have whole and that nothing else reduces."""
        if self.group is None or self.recipe.sharding != "none":
            return
        for weight in weights_to_train(self.model):
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= dist.get_world_size()

    def update(self) -> None:
        """Clipping and the optimizer's step; gradients go."""
        if self.optimizer is not None:
            if self.recipe.max_grad_norm is not None:
                self.clip(self.recipe.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def clip(self, norm: float) -> None:
        """Scale gradients down to this norm, in place, where theirs is larger."""
        if isinstance(self.replica, FullyShardedDataParallel):
            self.replica.clip_grad_norm_(norm)
        else:
            clip_gradients(groups_of(weights_to_train(self.model)), norm)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Vocabulary usable as input and as label; embedding and head may be padded to different sizes."""
    input_size = model.get_input_embeddings().num_embeddings
    output_size = getattr(model.get_output_embeddings(), "out_features", input_size)
    return min(input_size, output_size, getattr(model.config.get_text_config(), "unpadded_vocab_size", input_size))


def weights_to_train(model: nn.Module) -> list[nn.Parameter]:
    """Weights that get gradients; some families have others, such as routers' corrections."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def groups_of(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The weights of each device mesh, and plain tensors, as which tensor parallelism leaves norms."""
    return by_mesh(weights, lambda weight: getattr(weight, "device_mesh", None))


def to_step(groups: list[list[nn.Parameter]]) -> Any:
    """What an optimizer is given of weights on several meshes: a group for each (transformers' Trainer.create_optimizer)."""
    return [{"params": group} for group in groups] if len(groups) > 1 else groups[0] if groups else []


def clip_gradients(groups: list[list[nn.Parameter]], most: float) -> None:
    """Scale gradients down, in place, to a norm of `most`, those of all meshes together (transformers' Trainer._mixed_mesh_grad_norm)."""
    if len(groups) < 2:
        nn.utils.clip_grad_norm_([weight for group in groups for weight in group], most)
        return
    norms = []
    for group in groups:
        norm = nn.utils.get_total_norm([weight.grad for weight in group if weight.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, most, norm)


def step_in_backward(model: nn.Module, make_optimizer: Make) -> list[torch.optim.Optimizer]:
    """Step each weight as soon as its gradient is there, then let the gradient go."""
    optimizers = []
    for weight in weights_to_train(model):
        optimizer = make_optimizer([weight])
        optimizers.append(optimizer)

        def step_weight(_weight: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        weight.register_post_accumulate_grad_hook(step_weight)
    return optimizers


def make_states(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let optimizers make the states that they make in their first step: gradients of any value do."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.empty_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
