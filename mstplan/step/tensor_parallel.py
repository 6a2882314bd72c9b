"""Tensor parallelism as transformers' tp_plan="auto" runs it (transformers/distributed/tensor_parallel.py, transformers 5.23): what a rank holds.

Every rank has all tokens. Projections of queries, keys and values, gate and up are split by columns, those of attention's output and down by
rows, embedding and head by the vocabulary. Norms, and hidden states between layers, are whole on every rank:

- what a product by rows makes is a part of a sum, which DTensor's all-reduce makes anew (Partial to Replicate);
- in backward each product by columns makes a part of its input's gradient, and an all-reduce a new tensor of each;
- embeddings are looked up in a rank's rows and summed up, and their gradient is made whole: torch's rule for embedding_dense_backward knows
  no sharding by rows (torch/distributed/tensor/_ops/_embedding_ops.py), so that the whole vocabulary's stays until the optimizer has stepped;
- a rank's logits are gathered from all, in order of ranks and then joined in order of tokens; their gradient is cut, in a copy.

No operation of torch spans DTensors and plain tensors, as which transformers leaves norms: its Trainer clips, and steps, one after the other.

Beside FSDP2 (fsdp.py) each rank's part of a matrix is in shards over the ranks that have the same part, split along dimension 0 once more
(_StridedShard), and so are norms, which no rank splits. All weights are DTensors then, and every kernel of AdamW steps them. The whole gradient
of the embedding is cut before it is scattered, in a copy (FSDPParam._get_grad_inner_tensor).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RecipeError
from .optimizers.base import Held, dtype_of, itemsize_of
from .selection import WeightKind

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..spec.model import Model
    from .layers import Writer
    from .recipe import Recipe
    from .tape import Tensor, Weight

COLUMNS = frozenset({"q_proj", "k_proj", "v_proj", "mlp.gate_proj", "mlp.up_proj"})
ROWS = frozenset({"o_proj", "mlp.down_proj"})
ROWS_TO_STEP = "rows of the embedding's gradient"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose plans are those above, and nothing else."""


def can_split(model: Model, ranks: int) -> bool:
    """Whether so many ranks can split a model's matrices evenly."""
    return not any(size % ranks for size in _sizes(model))


def _sizes(model: Model) -> tuple[int, ...]:
    """What is split evenly."""
    return (
        model.attention.heads,
        model.attention.kv_heads,
        model.mlp.width if model.mlp is not None else 1,
        model.vocab,
    )


def check(model: Model, recipe: Recipe) -> None:
    """Check that a recipe's ranks can split a model. Raises RecipeError with the numbers of ranks that can, or what else would do."""
    ranks, a = recipe.tensor_parallel, model.attention
    if ranks == 1:
        return
    if recipe.optimizer != "adamw":
        raise RecipeError("--tensor-parallel is planned with AdamW alone.\nUse --optimizer adamw.")
    if model.model_type not in FAMILIES or model.tied or a.out_bias or model.mlp is None:
        what = (
            "embeddings tied to its head"
            if model.tied
            else f"a plan ({model.model_type}) with more than columns and rows"
        )
        raise RecipeError(
            f"--tensor-parallel: {model.name} has {what}, which is not planned.\nPlanned are {', '.join(FAMILIES)} without tied embeddings."
        )
    if not can_split(model, ranks):
        shared = recipe.gpus if recipe.sharded else 0  # which these numbers divide, too
        *others, last = (str(n) for n in range(1, a.kv_heads + 1) if shared % n == 0 and can_split(model, n))
        raise RecipeError(
            f"--tensor-parallel {ranks}: {model.name} has {a.heads} heads of queries, {a.kv_heads} of keys, an MLP {model.mlp.width:,} wide and "
            f"{model.vocab:,} tokens to tell apart, which {ranks} GPUs cannot split evenly.\nUse {', '.join(others)}{' or ' if others else ''}{last}."
        )


def of_a_rank(model: Model, recipe: Recipe) -> Model:
    """The model with a rank's heads and its part of the MLP's width."""
    ranks, a = recipe.tensor_parallel, model.attention
    if ranks == 1 or model.mlp is None:
        return model
    return model._replace(
        attention=a._replace(heads=a.heads // ranks, kv_heads=a.kv_heads // ranks),
        mlp=model.mlp._replace(width=model.mlp.width // ranks),
    )


def enter(w: Writer, x: Tensor) -> Tensor:
    """The input of a product by columns; of its gradient every rank makes a part, and an all-reduce the sum, unless `all_tokens` gathered it."""
    tape = w.tape
    if w.numerics.norm_sharers > 1:
        return x
    return tape.op(f"{x.name}, to columns", [x], tape.view(x, x.name, x.shape), grads=((x, tape.grad(x)),))


def as_part(w: Writer, x: Tensor) -> Tensor:
    """A rank's tensor as that of a DTensor."""
    return w.tape.op(f"{x.name} as a part", [x], w.tape.view(x, x.name, x.shape), grads=((x, None),))


def all_tokens(w: Writer, x: Tensor) -> Tensor:
    """All tokens of what each rank has normed a part of: an all-gather, and in backward a reduce-scatter of the gradient's parts."""
    if w.numerics.norm_sharers == 1:
        return x
    with w.tape.distributed():
        whole = w.new(f"{x.name}, all tokens", "d", x.dtype)
    by_rank = w.new(f"gradient of {whole.name}, by rank", "d", x.dtype)
    temps = _as_gathered(w, whole)
    return w.tape.op(f"gather {x.name}", [x], whole, temps=temps, grads=((x, w.tape.grad(x)),), back_temps=(by_rank,))


def summed(w: Writer, part: Tensor, whole: Tensor, *given: Tensor) -> Tensor:
    """The sum over ranks of what each has made of what its module was given, which is there until then; of norms' tokens where these are shared out."""
    if w.numerics.norm_sharers == 1:
        return w.tape.op(f"all-reduce {part.name}", [part], whole, grads=((part, None),), holds=given)
    by_rank = w.new(f"{part.name}, by rank", "d", part.dtype)
    return w.tape.op(
        f"reduce-scatter {part.name}",
        [part],
        whole,
        temps=(by_rank,),
        grads=((part, w.tape.grad(part)),),
        back_temps=_as_gathered(w, part),
        holds=given,
    )


def _as_gathered(w: Writer, whole: Tensor) -> tuple[Tensor, ...]:
    """What an all-gather makes of several rows, whose tokens are not one after the other, before they are put in order."""
    return (w.new(f"{whole.name}, by rank", "d", whole.dtype),) if w.numerics.several_rows else ()


def gathered(w: Writer, part: Tensor, whole: Tensor) -> Tensor:
    """What all ranks have made, joined along the last axis."""
    buffer = w.tape.new(f"{part.name}, of all ranks", whole.shape, whole.dtype)
    return w.tape.op(f"gather {part.name}", [part], whole, temps=(buffer,), grads=((part, w.tape.grad(part)),))


def log_softmax(w: Writer, wide: Tensor, variables: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The log-softmax of a rank's part of fp32 logits, of logits less their largest; and what the loss makes in backward before the gradient of logits:
    zeros for the labels, and their sum with its exponential (torch/distributed/tensor/parallel/loss.py). variables: tensors that variables hold meanwhile."""
    tape = w.tape
    names = (
        "log-softmax of a rank's logits",
        "logits less their largest",
        "gradient of picked logits",
        "the same and probabilities",
    )
    log_probs, shifted, zeros, summed_up = (tape.new(name, wide.shape, wide.dtype) for name in names)
    of_tokens = tuple(
        w.new(name, "", "float32") for name in ("largest logits", "sums of exponentials", "their logarithms")
    )
    grads = ((wide, None),)  # that of its result, which the loss makes
    tape.op(
        "log-softmax", [wide], log_probs, keeps=(log_probs,), temps=(shifted, *of_tokens), grads=grads, holds=variables
    )
    return log_probs, (zeros, summed_up)


def part_of(weight: Weight, ranks: int) -> Weight:
    """A weight as a rank keeps it: of the embedding, whose gradient is whole, its rows."""
    if ranks == 1 or WeightKind.EMBEDDINGS not in weight.kinds:
        return weight
    return replace(weight, shape=(weight.shape[0] // ranks, *weight.shape[1:]))


def keeps_whole(recipe: Recipe) -> bool:
    """Whether the optimizer is given the embedding's whole gradient, not that of a rank's rows."""
    return recipe.tensor_parallel > 1 and not recipe.sharded


def cuts_rows(recipe: Recipe) -> bool:
    """Whether torch's fused AdamW has a rank's rows of it cut, in a copy, while it steps."""
    return keeps_whole(recipe) and recipe.adamw_kernel == "fused"


def rows_to_step(recipe: Recipe, weights: Iterable[tuple[Weight, int]]) -> tuple[Held, ...]:
    """A rank's rows of the embedding's whole gradient, which torch's fused AdamW has cut, in a copy, while it steps. Of weights as a rank keeps them, given
    as (weight, how many). The other kernels have them cut for each operation, and at most two at once, which is less than they make themselves."""
    if not cuts_rows(recipe):
        return ()
    tables = (weight for weight, _ in weights if WeightKind.EMBEDDINGS in weight.kinds)
    return tuple(Held(ROWS_TO_STEP, dtype_of(recipe, w), w.numel * itemsize_of(recipe, w)) for w in tables)


def gradient_beyond(weights: list[tuple[Weight, int]], recipe: Recipe) -> int:
    """Numbers that gradients have more than a rank's weights: those of the embedding's other rows."""
    if not keeps_whole(recipe):
        return 0
    ranks = recipe.tensor_parallel
    return sum(w.numel * n // ranks * (ranks - 1) for w, n in weights if WeightKind.EMBEDDINGS in w.kinds)
