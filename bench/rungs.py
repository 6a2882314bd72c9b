"""The formula rung against the trace: a step's peak on both, for shipped models, strategies and lengths.

    python bench/rungs.py --results rungs.jsonl              all of them: 2,100 traces, about half an hour on one core
    python bench/rungs.py --models gpt2 qwen3-4b --lengths 4k 32k --strategies mst
    python bench/rungs.py --results rungs.jsonl --markdown docs/rungs.md     writes the table that the documentation shows

What stands in the results file is not run again; each case is added to it as soon as it is done. A million tokens are traced of one model
of each family. What a model's layers cannot do (pieces of an MLP that shares its input with experts) is left out.

Exits with 1 where a peak is further off than 2% (dense) or 5% (mixture of experts).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

import mstplan
from mstplan.checking.rungs import PEAK_BOUNDS, PeakPair, Rungs, compare_rungs
from mstplan.spec.catalog import load_model
from mstplan.spec.model import Model
from mstplan.step.instants import Instant
from mstplan.step.recipe import STRATEGIES, USUAL_STRATEGIES, Recipe

CARD = "h100"
LENGTHS = ("4k", "32k", "256k")
LONGEST = "1M"
"""Of one model of each family."""
SLOW = {"gated delta": ("4k",)}
"""Mixers whose plain code loops over chunks of 64 tokens: a trace of one step at 32k tokens takes minutes, one at 256k hours."""


class Case(NamedTuple):
    """Lengths as they were asked for."""

    strategy: str
    length: str
    rungs: Rungs


def run(
    names: Sequence[str], strategies: Sequence[str], lengths: Sequence[str] | None, chunks: mstplan.Chunks, kept: Kept
) -> list[Case]:
    """All of them, a line printed for each model as soon as it is done. lengths: None, those that suit the model."""
    card, cases = mstplan.card(CARD), []
    for name in names:
        started, mine, model = time.perf_counter(), [], load_model(name)
        for plan in strategies:
            recipe = _in_chunks(mstplan.strategy(plan), chunks, model)
            if why_not(recipe, model) is not None:
                continue
            for length in lengths or _lengths_of(model):
                if (case := kept.find(name, plan, length)) is None:
                    case = Case(plan, length, compare_rungs(name, recipe, mstplan.parse_length(length), card))
                    kept.add(case)
                mine.append(case)
        print(
            f"{name:18s} {mine[0].rungs.kind:8s} {'   '.join(worst_of(mine))}   {time.perf_counter() - started:5.1f} s",
            flush=True,
        )
        cases += mine
    return cases


def _lengths_of(model: Model) -> tuple[str, ...]:
    for kind in model.layer_kinds:
        if kind.mixer in SLOW:
            return SLOW[kind.mixer]
    first = next(name for name in mstplan.model_names() if load_model(name).model_type == model.model_type)
    return (*LENGTHS, LONGEST) if model.name == first else LENGTHS


def why_not(recipe: Recipe, model: Model) -> str | None:
    """What of a recipe the formula refuses for a model."""
    try:
        mstplan.plan_at(model, recipe, mstplan.card(CARD), 4096)
    except mstplan.RecipeError as e:
        return str(e)
    return None


def _in_chunks(recipe: Recipe, chunks: mstplan.Chunks, model: Model) -> Recipe:
    """The recipe in so many pieces, the MLP where there is one; attention over two groups of heads, where these make two."""
    if recipe.mlp_recompute:
        recipe = recipe.changed(mlp_chunks=1 if model.mlp is None else chunks.mlp)
    if recipe.layer_in_chunks:
        recipe = recipe.changed(attention_groups=gcd(model.attention.kv_heads, 2))
    return recipe.changed(loss_chunks=chunks.loss) if recipe.loss_in_chunks else recipe


class Kept:
    """Cases of earlier runs, in a file of a JSON object a line; None: none are kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.cases = path, dict[tuple[str, str, str], Case]()
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                case = _case_from(json.loads(line))
                self.cases[_name(case), case.strategy, case.length] = case

    def find(self, name: str, strategy: str, length: str) -> Case | None:
        return self.cases.get((name, strategy, length))

    def add(self, case: Case) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(case) + "\n")


def _case_from(data: list[Any]) -> Case:
    """The case that json.dumps made lists of."""
    strategy, length, (model, kind, seq_len, peak, instants) = data
    pairs = [PeakPair(Instant(instant), formula, traced) for instant, formula, traced in (peak, *instants)]
    return Case(strategy, length, Rungs(model, kind, seq_len, pairs[0], tuple(pairs[1:])))


def by_peak(case: Case) -> float:
    return abs(case.rungs.peak.difference)


def by_instant(case: Case) -> float:
    return abs(case.rungs.worst_instant.difference)


def worst_of(cases: Iterable[Case]) -> tuple[str, str]:
    """The largest difference of a peak, and that of any instant, each with where it is."""
    cases = list(cases)
    peak, instant = max(cases, key=by_peak), max(cases, key=by_instant)
    at, other = peak.rungs.peak, instant.rungs.worst_instant
    return (
        f"peak {at.difference:+.4%} {peak.strategy} {peak.length}, {at.instant}",
        f"any instant {other.difference:+.4%} {instant.strategy} {instant.length}, {other.instant}",
    )


# ---- the page -----------------------------------------------------------------------------------------------------------


def page(cases: Sequence[Case], chunks: mstplan.Chunks) -> str:
    names, strategies, lengths = (
        [*dict.fromkeys(of(case) for case in cases)] for of in (_name, lambda c: c.strategy, lambda c: c.length)
    )
    bounds = PEAK_BOUNDS
    head = f"""# The formula rung against the trace

Generated by `python bench/rungs.py --markdown docs/rungs.md`; do not edit.

The formula counts every tensor in closed form; the trace runs transformers' own code on fake tensors and sees every allocation.
Here is the largest difference between their peaks of a training step, as a share of the trace's, for {len(names)} shipped models,
{len(strategies)} strategies and {len(lengths)} lengths ({", ".join(lengths)} tokens): one sequence, bf16, AdamW, the cuBLAS workspaces of an {CARD};
`mst` and `mst-layer` with {chunks.mlp} chunks of MLP or layer and {chunks.loss} of the loss, attention in two groups of heads. torch {version("torch")},
transformers {version("transformers")}.

What may differ: {bounds["dense"]:.0%} for dense models, {bounds["experts"]:.0%} for mixtures of experts. The step's peak decides whether it fits; beside it
stands the worst of all instants, whether they ever bind or not.

What still separates the two: blocks of 512 bytes that small weights fill in part, and buffers such as rotary frequencies; in mixtures
of experts the gradient of the routing scores, which the formula has a moment too early.
"""
    rows = ["", "| model | | peak | where | any instant | where |", "|---|---|---:|---|---:|---|"]
    for name in names:
        mine = [case for case in cases if _name(case) == name]
        peak, instant = max(mine, key=by_peak), max(mine, key=by_instant)
        at, other = peak.rungs.peak, instant.rungs.worst_instant
        rows.append(
            f"| {name} | {peak.rungs.kind} | {at.difference:+.4%} | {peak.strategy}, {peak.length}: {at.instant} "
            f"| {other.difference:+.4%} | {instant.strategy}, {instant.length}: {other.instant} |"
        )
    grid = [
        "",
        "The largest of all models, by strategy and length:",
        "",
        f"| strategy | {' | '.join(lengths)} |",
        f"|---|{'---:|' * len(lengths)}",
    ]
    for plan in strategies:
        cells = [max((c for c in cases if (c.strategy, c.length) == (plan, length)), key=by_peak) for length in lengths]
        grid.append(f"| {plan} | {' | '.join(f'{c.rungs.peak.difference:+.4%} {_name(c)}' for c in cells)} |")
    return "\n".join([head.rstrip("\n"), *grid, *rows, ""])


def _name(case: Case) -> str:
    return case.rungs.model


def pair_of_numbers(text: str) -> mstplan.Chunks:
    mlp, loss = text.split(",")
    return mstplan.Chunks(int(mlp), int(loss))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., object] = parser.add_argument
    add("--models", nargs="+", default=mstplan.model_names(), choices=mstplan.model_names(), metavar="NAME")
    add("--strategies", nargs="+", default=list(USUAL_STRATEGIES), choices=list(STRATEGIES), metavar="NAME")
    add("--lengths", nargs="+", metavar="TOKENS", help="default: those that suit the model")
    add(
        "--chunks",
        type=pair_of_numbers,
        default=mstplan.Chunks(16, 32),
        metavar="MLP,LOSS",
        help="pieces for strategies in chunks",
    )
    add("--results", type=Path, metavar="FILE", help="cases of earlier runs, to which this one adds its own")
    add("--markdown", type=Path, metavar="FILE")
    asked = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(
        f"mstplan {mstplan.__version__}, torch {version('torch')}, transformers {version('transformers')}, Python {platform.python_version()}, {CARD}"
    )
    cases = run(asked.models, asked.strategies, asked.lengths, asked.chunks, Kept(asked.results))
    print("all   " + "   ".join(worst_of(cases)))
    if asked.markdown is not None:
        asked.markdown.write_text(page(cases, asked.chunks), encoding="utf-8")
    broken = [case for case in cases if not case.rungs.holds]
    for case in broken:
        print(
            f"too far off: {_name(case)} {case.strategy} {case.length}: {case.rungs.peak.difference:+.3%} at {case.rungs.peak.instant}"
        )
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
