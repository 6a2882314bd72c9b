"""The paper's formulas, exactly as published (Mini-Sequence Transformer, arXiv 2407.15892, section 3 and appendix).

    standard          S_max = (M_max - W_mem) / (I_mem       + L       * A_mem)
    checkpoint (sqrt) S_max = (M_max - W_mem) / (I_mem       + sqrt(L) * A_mem)
    MsT               S_max = (M_max - W_mem) / (I_mem / M   + sqrt(L) * A_mem)
    MsT + CPU offload S_max = (M_max - W_mem) / (I_mem / M   + A_mem)
    memory with MsT         =  W_mem + S * (I_mem / M + sqrt(L) * A_mem)

They are upper-level approximations; `differences` says why the step model answers otherwise. The functions below take
plain numbers or symbols alike. Bytes; bytes per token; tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple

from ..errors import RecipeError
from ..spec.hardware import Card
from ..spec.model import Model
from ..step.instants import Instant
from ..step.recipe import STRATEGIES, STRATEGY_FIELDS, Recipe
from ..step.roles import Role
from ..step.steps import Chunks, Entry, Step, bytes_of, shown
from ..step.tape import BASIS, MIXER_CHUNKS, Label, forward, kept_by
from .layout import step_of_no_length
from .solve import Answer, max_seq

FORMULAS = ("standard", "checkpoint (sqrt)", "MsT", "MsT + CPU offload")
_HALF = Fraction(1, 2)
_TOKENS = max(MIXER_CHUNKS.values())
_UNITS = tuple(
    {"bs": _TOKENS, **{"b" + axis: _TOKENS // n for axis, n in MIXER_CHUNKS.items()}}.get(name, 0) for name in BASIS
)
"""Of so many tokens: how many there are, and how many chunks of what mixes them."""


def per_token(formula: str, i_mem: Any, a_mem: Any, layers: Any, chunks: Any) -> Any:
    """Bytes per token of one of `FORMULAS`: the denominator of its S_max."""
    return {
        "standard": lambda: i_mem + layers * a_mem,
        "checkpoint (sqrt)": lambda: i_mem + layers**_HALF * a_mem,
        "MsT": lambda: i_mem / chunks + layers**_HALF * a_mem,
        "MsT + CPU offload": lambda: i_mem / chunks + a_mem,
    }[formula]()


def s_max(formula: str, m_max: Any, w_mem: Any, i_mem: Any, a_mem: Any, layers: Any, chunks: Any) -> Any:
    """Tokens: (M_max - W_mem) over the formula's bytes per token."""
    return (m_max - w_mem) / per_token(formula, i_mem, a_mem, layers, chunks)


def memory(formula: str, seq_len: Any, w_mem: Any, i_mem: Any, a_mem: Any, layers: Any, chunks: Any) -> Any:
    """Bytes at `seq_len` tokens: W_mem + S * bytes per token."""
    return w_mem + seq_len * per_token(formula, i_mem, a_mem, layers, chunks)


@dataclass(frozen=True, slots=True)
class Coefficients:
    """The paper's coefficients of one model and recipe, and the tensors each comes from."""

    w_mem: int  # bytes
    i_mem: int  # bytes per token
    a_mem: int  # bytes per token and layer
    layers: int
    chunks: int  # M, of whichever of MLP and LM head I_mem comes from
    m_max: int  # bytes
    batch: int = 1  # sequences that i_mem and a_mem count
    w_from: tuple[Entry, ...] = ()
    i_from: tuple[Entry, ...] = ()
    a_from: tuple[Entry, ...] = ()

    def replaced(self, **values: int | None) -> Coefficients:
        """Coefficients with the values that are not None in place. Raises RecipeError for values that make no sense."""
        given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        for name, value in given.items():
            least = 1 if name in ("layers", "chunks") else 0
            if value < least:
                raise RecipeError(f"{_FLAGS.get(name, name.replace('_', '-'))} must be at least {least}, not {value}.")
        if given.get("i_mem", self.i_mem) == 0 and given.get("a_mem", self.a_mem) == 0:
            raise RecipeError("i-mem and a-mem cannot both be 0: then no length would need more memory than another.")
        sources = {"w_mem": "w_from", "i_mem": "i_from", "a_mem": "a_from"}
        given.update({source: () for name, source in sources.items() if name in given})
        return replace(self, **given)


_FLAGS = {"chunks": "m"}
"""What the paper and the command line call a coefficient, where that differs."""


class Row(NamedTuple):
    """One formula evaluated: S_max in tokens (0 when the weights alone do not fit), bytes at the length asked for."""

    formula: str
    s_max: int
    memory: int | None


class View(NamedTuple):
    """The formulas beside the step model."""

    coefficients: Coefficients
    rows: tuple[Row, ...]
    answers: tuple[Answer, ...]  # the step model's, one beside each formula
    differences: tuple[str, ...]
    seq_len: int | None


BESIDE = ("standard", "checkpoint-sqrt", "mst", "mst-offload")
"""The strategy whose step-model answer stands beside each of FORMULAS."""


def view(model: Model, card: Card, recipe: Recipe, overrides: dict[str, int | None], seq_len: int | None) -> View:
    answers = []
    for name in BESIDE:
        fields = {field: getattr(STRATEGIES[name], field) for field in STRATEGY_FIELDS}
        answers.append(max_seq(model, recipe.changed(**fields), card, name))
    own = coefficients(model, recipe, card, answers[2].plan.chunks).replaced(**overrides)
    return View(own, rows(own, seq_len), tuple(answers), differences(model, recipe), seq_len)


def coefficients(model: Model, recipe: Recipe, card: Card, chunks: Chunks) -> Coefficients:
    """W_mem: weights, gradients, optimizer states. A_mem: what autograd keeps of one layer. I_mem: the largest
    intermediate, of the LM head and loss or of the MLP, at the moment it peaks."""
    loss = "transformers" if recipe.loss_in_chunks else recipe.loss
    unchunked = {"mlp_chunks": 1, "mlp_recompute": False, "loss_chunks": 1, "loss": loss}
    plain = recipe.changed(checkpoint="none", offload="none", **unchunked)
    built = step_of_no_length(model, plain, card)
    constants = built.constants()
    kept = _kept_per_layer(built)
    by_layer = step_of_no_length(model, plain.changed(checkpoint="layer"), card)
    head = _per_token(by_layer, Instant.LOSS_BACKWARD, Role.LOSS)
    mlp = _per_token(by_layer, Instant.FIRST_LAYER if model.layers == 1 else Instant.LAST_LAYER, Role.MLP)
    largest, pieces = (head, chunks.loss) if bytes_of(head) >= bytes_of(mlp) else (mlp, chunks.mlp)
    b = recipe.batch  # the formulas know one sequence: with b of them a token position costs b times as much
    return Coefficients(
        bytes_of(constants),
        b * bytes_of(largest),
        b * bytes_of(kept),
        model.layers,
        pieces,
        card.budget_bytes,
        b,
        constants,
        largest,
        kept,
    )


def rows(c: Coefficients, seq_len: int | None = None) -> tuple[Row, ...]:
    """The four formulas with these coefficients; memory at `seq_len` tokens where one is given."""
    values = (c.w_mem, c.i_mem, c.a_mem, c.layers, c.chunks)
    result = []
    for formula in FORMULAS:
        denominator = per_token(formula, c.i_mem, c.a_mem, c.layers, c.chunks)
        longest = int(s_max(formula, c.m_max, *values)) if c.m_max > c.w_mem and denominator > 0 else 0
        result.append(Row(formula, longest, None if seq_len is None else int(memory(formula, seq_len, *values))))
    return tuple(result)


def _kept_per_layer(built: Step) -> tuple[Entry, ...]:
    """Tensors that autograd keeps of one layer, per token (of the layer that keeps most)."""
    best: tuple[Entry, ...] = ()
    for op in {id(o.part.tape): o for o in built.tape.ops if o.part is not None}.values():
        assert op.part is not None
        tape = op.part.tape
        replay = forward(tape, built.rules(detail=True), keep=True)
        # the output belongs to the next layer, which may keep it as its input
        kept = [
            (x, n)
            for x, n in replay.alive
            if _UNITS[x.basis] and (x != tape.output.label or op.reads[0] in kept_by(op))
        ]
        entries = _of_one_token(kept)
        best = max(best, entries, key=bytes_of)
    return best


def _per_token(built: Step, instant: Instant, role: Role) -> tuple[Entry, ...]:
    best: tuple[Entry, ...] = ()
    for moment in built.detailed()[instant]:
        mine = [(label, count) for label, count in moment.alive if label.role is role]
        best = max(best, _of_one_token(mine), key=bytes_of)
    return best


def _of_one_token(alive: Iterable[tuple[Label, int]]) -> tuple[Entry, ...]:
    """Entries of what grows with tokens or with chunks of them, in shares of a token."""

    def share(size: int) -> int:
        return size // _TOKENS

    entries = shown(alive, _UNITS)
    return tuple(
        e._replace(bytes=share(e.bytes), sizes=tuple(c._replace(bytes=share(c.bytes)) for c in e.sizes))
        for e in entries
    )


def differences(model: Model, recipe: Recipe) -> tuple[str, ...]:
    """Why the step model's answer differs from the formulas', in one line each."""
    n = model.layers
    reasons = [
        "the formulas add I_mem and the activations of all kept layers, which never live at the same moment",
        "they know no optimizer: AdamW's foreach step makes a temporary as large as the weights"
        if recipe.optimizer == "adamw" and recipe.adamw_kernel == "foreach" and not recipe.optimizer_in_backward
        else "they know no temporaries of the optimizer",
        f"sqrt(L) checkpointing keeps sqrt({n}) layers' activations; frameworks keep {n} layer inputs and one layer's activations",
        "backward makes gradients of the intermediates and, in attention, fp32 workspace, which A_mem does not hold",
        "I_mem / M chunks the LM head or the MLP alone; with chunks the other one, or attention, binds",
    ]
    if recipe.attention == "eager":
        reasons.append("eager attention's score matrices grow with S^2 and stand in none of the coefficients")
    if any(kind.experts for kind in model.layer_kinds):
        reasons.append("routed experts copy each token once per expert; A_mem holds the layer that keeps most")
    return tuple(reasons)
