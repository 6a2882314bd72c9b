"""Every causal-LM class of transformers, small and in float64: does it train exactly in mini-sequences?

    python -m tests.train.survey [part of a class name ...]

Each class makes one plain step, then the same step in mini-sequences with and without checkpoints; loss and every gradient
must agree to 1e-10. Classes cast to float32 where they like (norms, routers, the loss): the survey reads float32 as float64,
in both steps alike, so that the class's own loss is the truth and rounding does not drown a difference.
"""

from __future__ import annotations

import inspect
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from mstplan.errors import ModelError
from mstplan.train import minisequence

from .double import Float64, Step, difference, float64, total_norm
from .tiny import EXPERTS, HIDDEN, VOCABULARY, WIDTH, tiny_batch, tiny_model

CHUNKS: dict[str, Any] = {"mlp_chunks": 3, "loss_chunks": 4, "checkpoint": "none"}
OUTCOMES = ("exact", "whole", "refused", "wrong", "crash", "unbuildable")
# Settings that change where the MLP stands or what it is.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("BloomForCausalLM", {"apply_residual_connection_post_layernorm": True}),
    ("DogeForCausalLM", {"is_moe": True, "num_experts": 16}),
    ("FalconForCausalLM", {"new_decoder_architecture": True}),
    ("FalconForCausalLM", {"parallel_attn": False}),
    (
        "Gemma4ForCausalLM",
        {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": WIDTH},
    ),
    ("GPTNeoXForCausalLM", {"use_parallel_residual": False}),
    ("GraniteMoeHybridForCausalLM", {"num_local_experts": 0}),
    ("GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 0}),
    ("JambaForCausalLM", {"num_experts": 1}),
    ("OPTForCausalLM", {"do_layer_norm_before": False}),
    ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}),
    ("StableLmForCausalLM", {"use_parallel_residual": True}),
    ("Zamba2ForCausalLM", {"use_shared_attention_adapter": True}),
]

Batch = dict[str, torch.Tensor]
Finding = tuple[str, str]  # outcome, and the reason in one line where it is not "exact"


class Record(NamedTuple):
    """What the survey found of one class. whole: exact, but something stayed in one piece that should be in chunks."""

    name: str
    outcome: str
    reason: str = ""
    layers: Finding = ("", "")  # of a checkpointed step with its layers in chunks
    loss_alone: str = ""  # the outcome with mlp_chunks=1, where chunks are refused
    router_loss: str = ""  # the outcome with output_router_logits, where that adds to the loss
    checkpoint: bool = True  # does the class support checkpoints?
    variant: str = ""  # the class with other settings than its defaults
    seconds: float = 0.0


def causal_lm_classes() -> list[type[PreTrainedModel]]:
    """All classes of transformers that AutoModelForCausalLM gives, each once, by name; not what remote code has added to it."""
    found: set[type[PreTrainedModel]] = set()
    for config_cls in list(MODEL_FOR_CAUSAL_LM_MAPPING.keys()):
        entry = MODEL_FOR_CAUSAL_LM_MAPPING[config_cls]
        found.update(entry if isinstance(entry, tuple) else [entry])
    return sorted((cls for cls in found if cls.__module__.startswith("transformers.")), key=lambda cls: cls.__name__)


def survey(only: Sequence[str] = ()) -> Iterator[Record]:
    """One record a class, then one a variant; `only` those with one of these strings in their name."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    classes = {cls.__name__: cls for cls in causal_lm_classes()}
    for name, more in [*((name, {}) for name in classes), *VARIANTS]:
        if only and not any(part.lower() in name.lower() for part in only):
            continue
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            record = examine(classes[name], **more)
        yield record._replace(seconds=time.perf_counter() - start)
    logging.set_verbosity(verbosity)


def examine(cls: type[PreTrainedModel], **more: Any) -> Record:
    """The class, built small, through all the steps that it can make: the first that is not exact is its finding."""
    record = Record(cls.__name__, "exact", variant=", ".join(f"{k}={v}" for k, v in more.items()))
    try:
        model = tiny_model(cls, cls.config_class, **more)
        batch = tiny_batch(model.config)
    except Exception as problem:  # noqa: BLE001 - whatever a class raises is its finding
        return record._replace(outcome="unbuildable", reason=one_line(problem))
    outcome, reason = compare(model, batch, **CHUNKS)
    if outcome == "exact":
        outcome, reason = trained_as_usual(model, batch)
    router, why = with_router_loss(model, batch) if outcome == "exact" else ("", "")
    if router in ("wrong", "crash", "whole"):
        outcome, reason = router, why
    alone = compare(model, batch, **{**CHUNKS, "mlp_chunks": 1})[0] if outcome == "refused" else ""
    checkpoint = bool(model.supports_gradient_checkpointing)
    layers = trained_as_usual(model, batch, layer_in_chunks=True, attention_groups=1)
    return record._replace(
        outcome=outcome, reason=reason, layers=layers, loss_alone=alone, router_loss=router, checkpoint=checkpoint
    )


def trained_as_usual(model: PreTrainedModel, batch: Batch, **settings: Any) -> Finding:
    """With checkpoints and more settings, and the number of tokens that a trainer gives for accumulation."""
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    count = {"num_items_in_batch": torch.tensor(40)} if takes_more else {}
    checkpoint = "layer" if model.supports_gradient_checkpointing else "none"
    return compare(model, {**batch, **count}, **{**CHUNKS, "checkpoint": checkpoint, **settings})


def with_router_loss(model: PreTrainedModel, batch: Batch) -> Finding:
    """With the auxiliary loss of a mixture of experts, which is off unless asked for; "" where there is none."""
    if not hasattr(model.config, "output_router_logits"):
        return "", ""
    plain, _ = step(model, batch)
    model.config.output_router_logits = True
    try:
        added = step(model, batch)[0][0] != plain[0]
        outcome, reason = compare(model, batch, **CHUNKS)
    except Exception:  # noqa: BLE001 - Flint lists the scores of layers that have no experts
        return "", ""
    finally:
        model.config.output_router_logits = False
    return (outcome, f"{reason} [output_router_logits]") if added else ("", "")


def step(model: PreTrainedModel, batch: Batch) -> tuple[Step, Float64]:
    """Loss, gradients and the shapes seen in one step."""
    model.zero_grad()
    torch.manual_seed(2)
    with float64() as mode:
        loss = model(**batch).loss
        loss.backward()
    return (loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), mode


def check(found: Step) -> None:
    """A comparison with nothing in it would prove nothing."""
    loss, gradients = found
    if not torch.isfinite(torch.tensor(loss)):
        raise ValueError(f"the plain loss is {loss}")
    if not all(g.isfinite().all() for g in gradients.values()) or total_norm(gradients) == 0:
        raise ValueError("the plain gradients are not finite, or all 0")


def compare(model: PreTrainedModel, batch: Batch, **settings: Any) -> Finding:
    """The step in mini-sequences against the plain one."""
    how = ", ".join(f"{k}={v}" for k, v in settings.items())
    before = patched(model)
    try:
        wanted, plain = step(model, batch)
        check(wanted)
    except Exception as problem:  # noqa: BLE001 - the class's own failure
        return "unbuildable", f"plain step: {one_line(problem)} [{how}]"
    try:
        minisequence(model, **settings)
        found, seen = step(model, batch)
    except ModelError as problem:
        return "refused", one_line(problem)
    except Exception as problem:  # noqa: BLE001 - the runtime's
        return "crash", f"{one_line(problem)} [{how}]"
    finally:
        minisequence.undo(model)
    if patched(model) != before:
        return "wrong", f"undo leaves {', '.join(sorted(patched(model) ^ before))} [{how}]"
    if problem := difference(found, wanted):
        return "wrong", f"{problem} [{how}]"
    if left := in_one_piece(batch, plain, seen, settings["mlp_chunks"] > 1):
        return "whole", f"{left} [{how}]"
    return "exact", ""


def patched(model: nn.Module) -> set[str]:
    """The modules whose forward or loss function is not their class's own."""
    return {
        f"{name}.{key}"
        for name, m in model.named_modules()
        for key in ("forward", "_loss_function")
        if key in m.__dict__
    }


def in_one_piece(batch: Batch, plain: Float64, seen: Float64, mlp: bool) -> str:
    """What exists for all tokens at once in the plain step and still does in mini-sequences."""
    sequences, tokens = batch["labels"].shape[:2]
    rows = (sequences * tokens, sequences * (tokens - 1))
    left = ["logits"] * (plain.whole(rows, VOCABULARY) and seen.whole(rows, VOCABULARY))
    widths = [w for w in (WIDTH, 2 * WIDTH, EXPERTS) if plain.whole(rows[:1], w)] or [
        4 * HIDDEN
    ]  # some MLPs are 4 times the hidden size
    left += ["MLP"] * (mlp and any(plain.whole(rows[:1], w) and seen.whole(rows[:1], w) for w in widths))
    return f"{' and '.join(left)} in one piece" if left else ""


def one_line(problem: BaseException) -> str:
    kind = "" if isinstance(problem, ModelError) else f"{type(problem).__name__}: "
    return kind + " ".join(str(problem).split())[:220]


def main(only: Sequence[str]) -> None:
    start = time.perf_counter()
    records = list(survey(only))
    classes = [record for record in records if not record.variant]
    print(f"transformers {transformers.__version__}: {len(classes)} classes in {time.perf_counter() - start:.0f} s")
    counts = Counter(record.outcome for record in classes)
    for outcome in OUTCOMES:
        print(f"  {outcome:12} {counts[outcome]:4} {counts[outcome] / max(len(classes), 1):7.1%}")
    print("  layers in chunks", dict(Counter(record.layers[0] for record in classes)))
    print("  checkpoints", sum(record.checkpoint for record in classes))
    print("  router loss", dict(Counter(record.router_loss for record in classes if record.router_loss)))
    for record in sorted(records, key=lambda r: (bool(r.variant), OUTCOMES.index(r.outcome), r.name)):
        if record.outcome != "exact" or only:
            print(line(record))
        if record.layers[0] != "exact":
            print(f"  in layers: {record.name} | {': '.join(record.layers)}")


def line(record: Record) -> str:
    """What is to be said of a class, in one line."""
    name = f"{record.name}({record.variant})" if record.variant else record.name
    alone = f" | loss alone: {record.loss_alone}" if record.loss_alone else ""
    return f"{record.outcome} | {name} | {record.reason}{alone}"


if __name__ == "__main__":
    main(sys.argv[1:])
