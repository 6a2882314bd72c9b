"""What mstplan asks of a loss: the operations from hidden states to its value, and how a real step computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .. import tensor_parallel
from ..selection import WeightKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..layers import Writer
    from ..recipe import Recipe
    from ..tape import Tensor, Weight


class Loss:
    """A loss as recipes name it, with the LM head before it. A new one is a file with a subclass, and a line in this folder's
    `__init__.py`."""

    name: ClassVar[str]
    """What recipes and --loss call it."""
    in_chunks: ClassVar[bool] = False
    """Whether it runs over pieces of the sequence, with its gradients made in the forward pass (mstplan/train/loss.py)."""
    is_fused: ClassVar[bool] = False
    """Whether a package computes it from hidden states and the head's weight, and makes no logits (mstplan/train/heads.py)."""
    gradient_is_view: ClassVar[bool] = True
    """Whether the head's gradient is a matrix product's, transposed."""
    not_run: ClassVar[str] = ""
    """Why the step that is traced and measured cannot be run with it; empty: it can."""

    def check(self, recipe: Recipe, model_type: str, head_alone: bool = False) -> None:
        """Raise RecipeError for recipes and models that it does not serve. head_alone: hidden states need no gradient."""

    def lay_out(self, w: Writer, hidden: Tensor, head: Weight, labels: tuple[Tensor, ...], defers: bool) -> None:
        """Write LM head and loss on the tape of `w`. hidden (t, d); labels, if any, are made on the way; defers: the gradient of
        a tied head waits for that of the embedding."""
        raise NotImplementedError

    def install(self, model: PreTrainedModel) -> None:
        """Let a transformers model compute it, in place. Needs torch; asked only where it runs whole."""


def logits_of(w: Writer, hidden: Tensor, head: Weight, defers: bool) -> Tensor:
    """Logits (t, V), soft-capped where the model does so, in the dtype that the head computes in."""
    if w.numerics.splits > 1:
        hidden = tensor_parallel.enter(w, tensor_parallel.all_tokens(w, hidden))
        part = w.new("logits of a rank", str(head.shape[0]), w.numerics.compute)
        w.linear(hidden, part, "lm_head", kind=WeightKind.HEAD, weight=head)
        if w.numerics.loss_parallel:
            return part
        return tensor_parallel.gathered(w, part, w.new("logits", "V", part.dtype))
    logits = w.new("logits", "V", w.numerics.compute)
    if w.model.wide_residual:
        hidden = w.cast(hidden, w.numerics.weights, "hidden states, narrowed")
    bias = w.model.head_bias
    logits = w.linear(hidden, logits, "lm_head", kind=WeightKind.HEAD, bias=bias, weight=head, defers=defers)
    if w.code.widens_logits:
        logits = w.cast(logits, "float32", "logits, fp32")
    if w.code.scales_logits:
        logits = w.pointwise("scale logits", logits, w.new("scaled logits", "V", logits.dtype))
    if w.model.logit_softcap:
        logits = w.pointwise("divide logits", logits, w.new("logits / cap", "V", logits.dtype))
        tanh = w.new("tanh of logits", "V", logits.dtype)
        logits = w.pointwise("tanh of logits", logits, tanh, tanh)
        logits = w.pointwise("multiply logits", logits, w.new("capped logits", "V", logits.dtype))
    return logits


def cross_entropy(w: Writer, wide: Tensor, labels: tuple[Tensor, ...], variables: tuple[Tensor, ...]) -> None:
    """torch.nn.functional.cross_entropy of fp32 logits (t, V); variables: tensors that variables hold meanwhile."""
    tape = w.tape
    back_temps: tuple[Tensor, ...] = ()
    if w.numerics.loss_parallel:
        log_probs, back_temps = tensor_parallel.log_softmax(w, wide, variables)
    else:
        log_probs = w.new("log-softmax of logits", "V", "float32")
        tape.op("log-softmax", [wide], log_probs, keeps=(log_probs,), grads=((wide, tape.grad(wide)),), holds=variables)
    tape.op(
        "negative log-likelihood",
        [log_probs, *labels],
        tape.new("loss", "", "float32"),
        keeps=(log_probs, *labels),
        grads=((log_probs, tape.grad(log_probs)),),
        holds=(*variables, wide),
        back_temps=back_temps,
    )
