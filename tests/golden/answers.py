"""The planner's and the trace's answers, written down so that rebuilding the inside changes none of them without notice.

python -m tests.golden.answers [formula|trace] [MODEL ...]     # compares, a line for every difference
python -m tests.golden.answers --write                         # writes them anew, where an answer is meant to change
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mstplan.plan.solve import max_seq_of_tensors, plan_at
from mstplan.spec.catalog import load_config, load_model
from mstplan.spec.hardware import card
from mstplan.step.recipe import STRATEGIES, Recipe

FOLDER = Path(__file__).parent
LENGTHS = (1024, 16_384, 131_072)
CARDS = ("h100", "a100-40gb")
PLANNED = ("deepseek-v2-lite", "gemma3-1b", "gpt-oss-20b", "gpt2", "llama3.1-8b")
TRACED = ("llama3.1-8b", "olmo2-7b", "phi3-mini-4k")
TRACED_TOKENS = 4096 + 8
VARIANTS: dict[str, Recipe] = {
    "mixed, accumulation": STRATEGIES["checkpoint"].changed(precision="mixed", accumulation=2, batch=2),
    "fp32, eager": STRATEGIES["mst"].changed(precision="fp32", attention="eager", optimizer="adafactor"),
    "8-bit in backward": STRATEGIES["mst"].changed(
        optimizer="adamw-8bit", optimizer_in_backward=True, attention="flash"
    ),
    "on the host": STRATEGIES["mst-offload"].changed(optimizer_on_host=True, weights_on_host=True),
    "fsdp": STRATEGIES["mst"].changed(sharding="fsdp", gpus=8, precision="mixed", adamw_kernel="fused"),
    "every 3 layers": STRATEGIES["mst"].changed(checkpoint=3, mlp_recompute=False, pad_to=8),
    "old loss": STRATEGIES["standard"].changed(loss="transformers<4.45", optimizer="sgd"),
}
"""What the strategies leave at its default, each value at least once."""


def formula(name: str) -> dict[str, Any]:
    """S_max, chunks, and at three lengths the bytes of every instant; for all recipes on both cards."""
    model = load_model(name)
    found: dict[str, Any] = {}
    for on in CARDS:
        there = card(on)
        for what, recipe in {**STRATEGIES, **VARIANTS}.items():
            s_max, chunks = max_seq_of_tensors(model, recipe, there)
            row: dict[str, Any] = {"s_max_tensors": s_max, "chunks": list(chunks)}
            for seq_len in LENGTHS:
                plan = plan_at(model, recipe, there, seq_len)
                instants = plan.instants()
                row[str(seq_len)] = [
                    *plan.chunks,
                    plan.peak.bytes,
                    plan.instant,
                    plan.host_bytes,
                    f"{plan.step_seconds:.6g}",
                    [i.bytes for i in instants],
                    digest([i.operation, *(list(e[:5]) for e in i.entries)] for i in instants),
                ]
            found[f"{on}, {what}"] = row
    return found


def trace(name: str) -> dict[str, Any]:
    """The peak of a traced step of some layers, its instant and how many tensors it made; and the bytes of every instant."""
    from mstplan.tracing.tracer import trace as trace_step

    config = dict(load_config(name))
    found: dict[str, Any] = {}
    for what in ("standard", "mst", "mst-offload"):
        recipe = STRATEGIES[what].changed(**({"mlp_chunks": 2, "loss_chunks": 4} if what != "standard" else {}))
        one = trace_step(config, recipe, TRACED_TOKENS)
        found[what] = [
            one.peak.bytes,
            one.peak.instant,
            one.host_peak,
            [[p.instant, p.bytes] for p in one.peaks],
            digest(sorted(map(str, one.short.storages))),
        ]
    return found


def digest(values: Iterable[Any]) -> str:
    return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()[:12]


def differences(now: Any, before: Any, where: str = "") -> Iterable[str]:
    if isinstance(now, dict) and isinstance(before, dict):
        for key in dict.fromkeys([*before, *now]):
            yield from differences(now.get(key), before.get(key), f"{where} / {key}")
    elif now != before:
        yield f"{where}: {before} -> {now}"


def main(arguments: list[str]) -> int:
    write, names = "--write" in arguments, [a for a in arguments if a not in ("--write", "formula", "trace")]
    count = 0
    for kind, of, all_names in (("formula", formula, PLANNED), ("trace", trace, TRACED)):
        if kind not in arguments and {"formula", "trace"} & set(arguments):
            continue
        path = FOLDER / f"{kind}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        chosen = [name for name in all_names if not names or name in names]
        now = {name: of(name) for name in chosen}
        if write:
            path.write_text(
                "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in {**before, **now}.items()) + "\n}\n"
            )
            continue
        for line in differences(now, {name: before.get(name) for name in chosen}, kind):
            print(line)
            count += 1
    print(f"{count} differences" if not write else "written")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
