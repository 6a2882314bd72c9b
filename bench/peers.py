"""The models of bench/runtime.py and the ways of training it compares: mstplan's, and other libraries' chunked MLPs and losses.

A way is a function of a model, on its device, and of how many pieces the MLP and the loss shall run in; it changes the model
and gives the function from token ids to the loss. One that cannot run here raises Absent, with the reason. The peers stand on
checkpoints of each layer, as transformers makes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mstplan import profiles
from mstplan.train import minisequence

SMALL = {
    "model_type": "llama",
    "hidden_size": 640,
    "intermediate_size": 1792,
    "num_hidden_layers": 10,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "vocab_size": 32000,
    "max_position_embeddings": 2**17,
    "tie_word_embeddings": False,
}
Loss = Callable[[torch.Tensor], torch.Tensor]


class Absent(Exception):
    """A way of training that cannot run here, and why."""


def build(name: str, layers: int | None, device: str, dtype: torch.dtype) -> nn.Module:
    """The model "small" or a shipped one, with random weights and as many layers as asked for."""
    path = profiles.ROOT / "models" / f"{name}.json"
    config = SMALL if name == "small" else json.loads(path.read_text(encoding="utf-8"))
    changes = {"use_cache": False, **({"num_hidden_layers": layers} if layers else {})}
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**config, **changes}), dtype=dtype).train()


def plain(model: nn.Module, *_chunks: int) -> Loss:
    return lambda ids: model(input_ids=ids, labels=ids).loss


def mst(model: nn.Module, mlp_chunks: int, loss_chunks: int) -> Loss:
    return plain(minisequence(model, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks))


def mst_auto(model: nn.Module, *_chunks: int) -> Loss:
    """With as many chunks as are recommended."""
    return plain(minisequence(model))


def mst_offload(model: nn.Module, mlp_chunks: int, loss_chunks: int) -> Loss:
    """Layer inputs on the host."""
    return plain(minisequence(model, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks, offload=True))


def mst_layer(model: nn.Module, mlp_chunks: int, loss_chunks: int) -> Loss:
    """All of a layer but attention in the MLP's chunks."""
    return plain(_in_layers(model, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks, attention_groups=1))


def mst_layer_auto(model: nn.Module, *_chunks: int) -> Loss:
    """With as many chunks, and groups of heads, as are recommended."""
    return plain(_in_layers(model))


def mst_layer_offload(model: nn.Module, *_chunks: int) -> Loss:
    """The same, with layer inputs on the host."""
    return plain(_in_layers(model, offload=True))


def mst_layer_host(model: nn.Module, *_chunks: int) -> Loss:
    """The same, with attention's queries, keys, values and results on the host as well."""
    return plain(_in_layers(model, offload=True, attention_on_host=True))


def mst_layer_liger(model: nn.Module, *_chunks: int) -> Loss:
    """The same as mst-layer-auto, over Liger's norms, rotary embedding and SwiGLU."""
    _liger(model, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=False)
    return mst_layer_auto(model)


def _in_layers(model: nn.Module, **settings: Any) -> nn.Module:
    return minisequence(model, layer_in_chunks=True, **settings)


def checkpoint(model: nn.Module, *_chunks: int) -> Loss:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return plain(model)


def deepspeed_mlp(model: nn.Module, mlp_chunks: int, _loss_chunks: int) -> Loss:
    """DeepSpeed's TiledMLP."""
    tiled = _library("deepspeed", "deepspeed.runtime.sequence_parallel.ulysses_sp").TiledMLP
    for mlp in _mlps(model):
        _replace(mlp, lambda self, x: tiled.apply(type(self).forward, self, x, mlp_chunks, list(self.parameters())))
    return checkpoint(model)


def deepspeed_both(model: nn.Module, mlp_chunks: int, loss_chunks: int) -> Loss:
    """DeepSpeed's TiledMLP and TiledFusedLogitsLoss, as in Arctic long sequence training (ALST)."""
    deepspeed_mlp(model, mlp_chunks, loss_chunks)
    tiled = _library("deepspeed", "deepspeed.runtime.sequence_parallel.ulysses_sp").TiledFusedLogitsLoss

    def loss(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state
        targets = F.pad(ids, (0, 1), value=-100)[:, 1:]
        count = ids.numel() - ids.shape[0]

        def chunk(head: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(head(x).float(), y, reduction="sum") / count

        return tiled.apply(
            chunk, model.lm_head, hidden, targets, None, loss_chunks, list(model.lm_head.parameters()), "sum"
        )

    return loss


def liger_loss(model: nn.Module, _mlp_chunks: int, _loss_chunks: int) -> Loss:
    """Liger's fused linear cross entropy, which chooses its pieces itself."""
    _liger(model, rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True)
    return checkpoint(model)


def liger_all(model: nn.Module, *_chunks: int) -> Loss:
    """Liger's norms, rotary embedding, SwiGLU and loss."""
    _liger(model, rope=True, rms_norm=True, swiglu=True, fused_linear_cross_entropy=True)
    return checkpoint(model)


def _liger(model: nn.Module, **kernels: bool) -> None:
    patch = _on_gpu(model, "liger_kernel.transformers").apply_liger_kernel_to_llama
    patch(cross_entropy=False, model=model, **kernels)


def liger_both(model: nn.Module, mlp_chunks: int, loss_chunks: int) -> Loss:
    """The same, with Liger's tiled MLP."""
    tiled = _on_gpu(model, "liger_kernel.ops.tiled_mlp").apply_tiled_mlp
    for mlp in _mlps(model):
        _replace(mlp, lambda self, x: tiled(type(self).forward, self, x, mlp_chunks, list(self.parameters())))
    return liger_loss(model, mlp_chunks, loss_chunks)


WAYS = {
    "plain": plain,
    "checkpoint": checkpoint,
    "mst": mst,
    "mst-auto": mst_auto,
    "mst-offload": mst_offload,
    "mst-layer": mst_layer,
    "mst-layer-auto": mst_layer_auto,
    "mst-layer-offload": mst_layer_offload,
    "mst-layer-host": mst_layer_host,
    "mst-layer-liger": mst_layer_liger,
    "deepspeed-mlp": deepspeed_mlp,
    "deepspeed-mlp-loss": deepspeed_both,
    "liger-loss": liger_loss,
    "liger-mlp-loss": liger_both,
    "liger-all": liger_all,
}


def _library(package: str, module: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as e:
        raise Absent(
            f"not installed: pip install {package.replace('_', '-')}" if e.name == package else f"lacks {e.name}"
        ) from None
    except Exception as e:  # noqa: BLE001 - whatever another library's import raises means that it cannot run here
        raise Absent(f"{package} cannot be imported: {str(e).splitlines()[0]}") from None


def _on_gpu(model: nn.Module, module: str) -> ModuleType:
    found = _library("liger_kernel", module)
    if not next(model.parameters()).is_cuda:
        raise Absent("needs a GPU")
    return found


def _mlps(model: nn.Module) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def _replace(module: nn.Module, forward: Callable[..., torch.Tensor]) -> None:
    module.forward = MethodType(forward, module)
