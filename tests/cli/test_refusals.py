"""A refusal is in the command line's words, and what it names is taken."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from mstplan.cli import commands, declarations
from mstplan.cli.options import recipes_of
from mstplan.cli.planning import MaxSeqOptions
from mstplan.errors import RecipeError
from mstplan.plan.layout import check_counted
from mstplan.spec.catalog import load_model
from mstplan.step.names import in_options
from mstplan.step.recipe import Recipe, planned

from .conftest import Run

ONE_OF_EACH: dict[str, object] = {
    "accumulation": 2,
    "batch": 2,
    "pad_to": 8,
    "mlp_chunks": 2,
    "attention_groups": 2,
    "loss_chunks": 2,
    "max_grad_norm": 1.0,
    "lora_rank": 8,
    "lora_targets": ("lm_head", "q_proj"),
    "lora_dropout": 0.5,
    "lora_modules_to_save": ("lm_head",),
    "packing": 4,
    "images": 2,
    "image_tokens": 64,
    "image_size": "8x8",
    "train": ("layers.*.mlp.*",),
    "freeze": ("norms",),
    "gpus": 6,
    "replicas": 4,
    "gpus_per_node": 4,
    "sequence_parallel": 4,
    "context_parallel": 4,
    "tensor_parallel": 4,
    "expert_parallel": 4,
    "expert_imbalance": 5.5,
    **dict.fromkeys(("reduce_bucket_size", "prefetch_bucket_size", "param_persistence_threshold"), -1),
    **dict.fromkeys(("max_live_parameters", "max_reuse_distance", "sub_group_size"), -1),
}
"""A value for each field that is neither a name nor a switch, not the one that it comes with."""


def _settings() -> Iterator[tuple[str, object]]:
    for name, field in Recipe.model_fields.items():
        if name in ONE_OF_EACH:
            yield name, ONE_OF_EACH[name]
        elif isinstance(field.default, bool):
            yield name, True
        else:
            yield from ((name, value) for value in planned(name)[0] if value != field.default)
    yield "checkpoint", 2


def _refusals() -> set[str]:
    """What is said of all pairs of settings, on one GPU and in each way to use several."""
    several = [{"gpus": 8, "sharding": name} for name in planned("sharding")[0]]
    ranks = ("sequence_parallel", "context_parallel", "tensor_parallel")
    several += [{"gpus": 8, name: 8} for name in ranks]
    several += [{"gpus": 8, "sharding": "fsdp", name: 4} for name in (*ranks, "expert_parallel", "replicas")]
    adapters = [{"lora_rank": 8}, {"lora_rank": 8, "quantize": "nf4"}]
    layers = {"layer_in_chunks": True, "mlp_recompute": True, "checkpoint": "layer"}
    starts: list[Mapping[str, object]] = [
        {},
        layers,
        *adapters,
        *several,
        *({**a, **b} for a in adapters for b in several),
    ]
    return {_said_of({**start, **dict(pair)}) for start in starts for pair in combinations(_settings(), 2)} - {""}


def _said_of(fields: dict[str, Any]) -> str:
    try:
        Recipe(**fields)
    except RecipeError as e:
        return str(e)
    return ""


@pytest.fixture(scope="module")
def refusals() -> set[str]:
    return _refusals()


def test_no_refusal_says_to_users_of_options_what_is_python(refusals: set[str]) -> None:
    assert len(refusals) > 200
    fields = "|".join(sorted(Recipe.model_fields, key=len, reverse=True))
    of_python = re.compile(rf"\b({fields})=|\b({'|'.join(n for n in Recipe.model_fields if '_' in n)})\b")
    assert [message for message in map(in_options, refusals) if of_python.search(message)] == []


def test_every_option_that_a_refusal_names_is_one(refusals: set[str]) -> None:
    declarations(None)
    known = commands.FLAGS["max-seq"]
    for message in map(in_options, refusals):
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", message)) <= known, message


def _refused(model: str, asked: Mapping[str, object]) -> str:
    """What max-seq says before it plans; "": it plans."""
    read = load_model(model)
    try:
        for recipe in recipes_of(
            MaxSeqOptions(**{"model": model, "strategy": "checkpointing", **asked}), model=read
        ).values():
            check_counted(read, recipe)
    except RecipeError as e:
        return str(e)
    return ""


def _named(refusal: str) -> Iterator[dict[str, object]]:
    """Each way out that a refusal names in numbers, as options."""
    for alternative in re.split(r", or | or ", refusal.partition(": ")[2]):
        flags = re.findall(r"--([a-z-]+)(?: can be)?((?:[ ,]+[0-9]+)*)(?: (fsdp))?", alternative)
        fields = [(flag.replace("-", "_"), re.findall("[0-9]+", numbers) or [name]) for flag, numbers, name in flags]
        if len(fields) == 1:
            yield from ({fields[0][0]: int(n) if n.isdigit() else n} for n in fields[0][1] if n)
        elif fields:
            yield {name: int(values[0]) for name, values in fields}


SHARED = {
    "llama3.1-8b": ("sequence_parallel", "context_parallel", "tensor_parallel", "replicas"),
    "qwen3-30b-a3b": ("expert_parallel", "sequence_parallel", "replicas"),
    "qwen1.5-moe-a2.7b": ("expert_parallel",),
    "qwen2.5-7b": ("sequence_parallel", "tensor_parallel"),
}


@pytest.mark.parametrize(("model", "field"), [(model, field) for model, fields in SHARED.items() for field in fields])
def test_numbers_that_a_refusal_names_are_taken(model: str, field: str) -> None:
    tried = 0
    for sharding in ("fsdp", None):
        for gpus in (2, 3, 8, 12, 24):
            for ranks in (2, 3, 5, 8, 12):
                asked = {"gpus": gpus, "sharding": sharding, field: ranks}
                refusal = _refused(model, asked)
                if " gpus" not in refusal and "does not divide" not in refusal:
                    continue
                for way in _named(refusal):
                    tried += 1
                    assert _refused(model, {**asked, **way}) == "", (asked, refusal, way)
    assert tried > 10


@pytest.mark.parametrize(
    ("flag", "numbers"),
    [
        ("--max-grad-norm", ("nan", "inf", "-1", "-inf")),
        ("--expert-imbalance", ("nan", "inf", "0", "-1")),
        ("--lora-dropout", ("nan", "inf", "1", "-1")),
        ("--batch", ("nan", "inf", "0.5", "0", "-1")),
        ("--gpus", ("nan", "inf", "0.5", "0", "-1")),
        ("--reserve", ("nan", "inf", "0", "-1")),
        ("--host-mem", ("nan", "inf", "0", "-1")),
    ],
)
def test_numbers_that_are_none_are_refused_by_the_options_name(run: Run, flag: str, numbers: tuple[str, ...]) -> None:
    asked = ("max-seq", "-m", "gpt2", "--gpu", "h100", "--lora", "8", "-s", "checkpointing", flag)
    for number in numbers:
        said = run(*asked, number)
        assert said.code == 2 and flag in said.err.splitlines()[0], said
        assert re.search(r"must be a( whole)? number|must be greater|as an amount of memory", said.err), said


def test_no_clipping_is_zero(run: Run) -> None:
    assert run("max-seq", "-m", "gpt2", "--gpu", "h100", "-s", "checkpointing", "--max-grad-norm", "0").code == 0


def test_a_file_is_told_of_its_fields(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"lora_rank": -1}')
    assert (
        "'recipe.json': lora_rank: must be"
        in run("max-seq", "-m", "gpt2", "--gpu", "h100", "--recipe", "recipe.json").err
    )


def test_what_a_model_refuses_is_in_options_too(run: Run) -> None:
    said = run("max-seq", "-m", "gpt2", "--gpu", "h100", "--kernels", "liger").err
    assert said.endswith("\nSet --kernels torch.\n")
