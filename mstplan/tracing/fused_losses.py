"""What stands in for LM heads and losses in one, which kernels compute that fake tensors cannot run: they allocate what those do, and
compute nothing. By the name that recipes have for them, in `COMPUTES`. What the formula has of them stands in mstplan/step/losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ..errors import RecipeError
from ..step.losses.cce import BLOCK_TOKENS, BLOCK_WIDTH
from ..step.losses.liger import LigerChunk
from ..step.losses.trl import TILE_ENTRIES, TILE_TOKENS
from ..train.fused import Compute, Packages, compute_loss_by
from .optimizers import make_fake_optimizer

if TYPE_CHECKING:
    from ..step.optimizers.base import KindsOf, Make
    from ..step.recipe import Recipe


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.bfloat16 if torch.is_autocast_enabled("cpu") else x.dtype


def _liger(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, _cap: float | None) -> torch.Tensor:
    """from source: liger_kernel 0.8.5, transformers/model/loss_utils.py, LigerForCausalLMLoss."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    loss: torch.Tensor = _LigerLoss.apply(hidden.view(-1, hidden.shape[-1]), weight, labels.view(-1))
    return loss


class _LigerLoss(torch.autograd.Function):
    """from source: ops/fused_linear_cross_entropy.py, fused_linear_cross_entropy_forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens, dtype, (entries, width) = x.shape[0], _compute_dtype(x), weight.shape
        d_x = torch.empty_like(x)
        d_weight = torch.empty_like(weight) if x.requires_grad and weight.requires_grad else None
        losses = x.new_empty(tokens, dtype=torch.float32)
        mask = torch.empty_like(target, dtype=torch.bool)
        rows = LigerChunk(entries, width, "").tokens(tokens)
        casts = (
            ()
            if x.dtype == dtype
            else (weight.new_empty(weight.shape, dtype=dtype), x.new_empty(rows, width, dtype=dtype))
        )
        logits = x.new_empty(rows, entries, dtype=dtype)
        if d_weight is not None and dtype == torch.float32:
            torch.empty_like(d_weight)  # a chunk's
        del casts, logits, losses, mask
        ctx.save_for_backward(d_x, *([d_weight] if d_weight is not None else []))
        return x.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        d_x, *d_weight = ctx.saved_tensors
        return d_x, d_weight[0] if d_weight else None, None


def _cce(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, _cap: float | None) -> torch.Tensor:
    """from source: apple/ml-cross-entropy d42911f, cut_cross_entropy/cce.py, cce_linear_cross_entropy."""
    tokens = labels[..., 1:].numel()
    mask, places = (labels.new_empty(tokens, *size) for size in ((), (2,)))
    del mask
    narrow = labels.new_empty(tokens, 2, dtype=torch.int32)
    del places
    valid = labels.new_empty(tokens)
    del narrow
    loss: torch.Tensor = _CutCrossEntropy.apply(hidden.contiguous().flatten(0, -2), weight, labels.flatten(), valid)
    return loss


class _CutCrossEntropy(torch.autograd.Function):
    """from source: cce.py, LinearCrossEntropyFunction; cce_lse_forward.py, indexed_dot.py, cce_backward.py."""

    @staticmethod
    def forward(ctx: Any, e: torch.Tensor, c: torch.Tensor, target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        ctx.dtypes, dtype = (e.dtype, c.dtype), _compute_dtype(e)
        e, c = e.to(dtype), c.to(dtype)
        log_sum_exp = e.new_empty(valid.shape[0], dtype=torch.float32)
        means = e.new_empty(c.shape[0], dtype=torch.float32)
        negative = torch.empty_like(log_sum_exp)
        ctx.save_for_backward(e, c, log_sum_exp, target, valid, means)
        del negative
        return e.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        e, c, *_, valid, means = ctx.saved_tensors
        order = _order_of(means)
        wants_e, wants_c = ctx.needs_input_grad[:2]
        d_e = torch.empty_like(e) if wants_e else None
        d_c = torch.empty_like(c) if wants_c else None
        columns = -(-c.shape[1] // BLOCK_WIDTH)
        locks = [
            e.new_empty(-(-rows // BLOCK_TOKENS), columns, dtype=torch.int32)
            for rows, wanted in ((valid.shape[0], wants_e), (c.shape[0], wants_c))
            if wanted
        ]
        d_c = d_c.to(ctx.dtypes[1]) if d_c is not None else None
        d_e = d_e.to(ctx.dtypes[0]) if d_e is not None else None
        del locks, order
        return d_e, d_c, None, None


def _order_of(means: torch.Tensor) -> torch.Tensor:
    """argsort, which keeps values and numbers, sorted and not, while it sorts (torch.compile's call of aten::sort; CUB's scratch memory
    is measured: 1,572,351 bytes of 128,256 entries)."""
    entries = means.shape[0]
    values, *numbers = means.new_empty(entries), *(means.new_empty(entries, dtype=torch.int64) for _ in range(2))
    means.new_empty(3 * entries + 8320)
    order = means.new_empty(entries, dtype=torch.int32)
    del values, numbers
    return order


def _trl(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, _cap: float | None) -> torch.Tensor:
    """from source: trl 1.16.0, trl/trainer/utils.py, add_fused_lm_head, as SFTTrainer asks for it."""
    mask = labels[:, 1:] != -100
    picked: torch.Tensor = _Pick.apply(hidden[:, :-1], mask)
    target = labels.new_empty(picked.shape[0])
    log_probs: torch.Tensor = _TrlLoss.apply(picked, weight, target)
    return -log_probs.sum() / mask.numel()


class _Pick(torch.autograd.Function):
    """x[mask] where the mask takes all (aten native/cuda/Indexing.cu, index_put_with_sort_kernel)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        _places = mask.new_empty(mask.numel(), 2, dtype=torch.int64)
        ctx.save_for_backward(mask)
        return x.new_empty(mask.numel(), x.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (mask,) = ctx.saved_tensors
        d_x = grads[0].new_empty(*mask.shape, grads[0].shape[-1])
        _numbers = [mask.new_empty(mask.numel(), dtype=torch.int64) for _ in range(8)]
        return d_x, None


class _TrlLoss(torch.autograd.Function):
    """from source: trl/kernels/chunked_logprob.py, ChunkedLogProbFunction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        ctx.dtype, tokens = _compute_dtype(x), x.shape[0]
        sums = [x.new_empty(tokens, dtype=torch.float32) for _ in range(7)]
        tile = _tile(x, weight, ctx.dtype)
        log_probs, log_z, entropy = (torch.empty_like(sums[0]) for _ in range(3))
        ctx.save_for_backward(x, weight, target, log_z, entropy)
        del tile, sums
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, *_ = ctx.saved_tensors
        wide = [
            torch.empty_like(each, dtype=torch.float32) if wanted else None
            for each, wanted in zip((x, weight), ctx.needs_input_grad[:2], strict=True)
        ]
        tile = _tile(x, weight, ctx.dtype)
        del tile[1:]  # casts
        gradients = [g.to(each.dtype) if g is not None else None for g, each in zip(wide, (x, weight), strict=True)]
        return (*gradients, None)


def _tile(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tile of logits, and the copies that its product takes in another dtype."""
    tokens, entries = min(x.shape[0], TILE_TOKENS), min(weight.shape[0], TILE_ENTRIES)
    tile = [x.new_empty(tokens, TILE_ENTRIES, dtype=dtype)]
    if x.dtype != dtype:
        tile.append(x.new_empty(tokens, x.shape[1], dtype=dtype))
    if weight.dtype != dtype:
        tile.append(x.new_empty(entries, x.shape[1], dtype=dtype))
    return tile


COMPUTES: dict[str, Compute] = {"liger": _liger, "cce": _cce, "trl": _trl}


class StandInPackages(Packages):
    """Puts stand-ins in place."""

    def make_optimizer(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        return make_fake_optimizer(recipe, kinds_of)

    def install_loss(self, model: PreTrainedModel, loss: str) -> None:
        compute_loss_by(model, COMPUTES[loss])

    def install_kernels(self, model: PreTrainedModel) -> None:
        """They are in place (`liger_stand_ins.py`)."""


class NoPackages(Packages):
    """On the CPU, where the kernels do not run."""

    def make_optimizer(self, recipe: Recipe, kinds_of: KindsOf) -> Make:
        return make_fake_optimizer(recipe, kinds_of)

    def install_loss(self, model: PreTrainedModel, loss: str) -> None:
        raise RecipeError(
            f"the loss {loss} is traced as on a card only.\nUse another one, or trace the step of a card."
        )

    def install_kernels(self, model: PreTrainedModel) -> None:
        raise RecipeError("Liger's kernels are traced as on a card only.\nUse torch's, or trace the step of a card.")
