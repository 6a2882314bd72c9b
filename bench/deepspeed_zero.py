"""What DeepSpeed's own engine allocates under ZeRO-1 and ZeRO-2: processes over gloo on the CPU, a small Llama in bf16.

    python bench/deepspeed_zero.py -o tests/step/deepspeed_zero.json

Needs deepspeed (`pip install deepspeed==0.19.8`, which builds no kernels), peft and bitsandbytes beside mstplan's torch extra. tests/step/test_zero.py compares
the formula with what is recorded. Recorded is what is larger than LEAST: gradients, and what DeepSpeed makes, not what a layer makes of four tokens.
Left out are buffers that a GPU does not have: scratch of the CPU's matrix products, and gloo's copies.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import Any

TOKENS = 4
LEAST = 20_000
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 1001,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TIED = {**CONFIG, "tie_word_embeddings": True}
_TEXT = {
    name: CONFIG[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
}
_TEXT |= {"intermediate_size": 640, "vocab_size": 1001, "max_position_embeddings": 512, "pad_token_id": 0}
_TOWER = {"image_size": 28, "patch_size": 14, "hidden_size": 128, "intermediate_size": 384}
_TOWER |= {"num_hidden_layers": 3, "num_attention_heads": 4}
WITH_IMAGES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "model_type": "gemma3",
        "mm_tokens_per_image": 4,
        "text_config": {**_TEXT, "model_type": "gemma3_text", "head_dim": 64, "query_pre_attn_scalar": 64},
        "vision_config": {**_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "llava": {
        "model_type": "llava",
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
    },
}
"""Models whose sequences have an image, of pixels that are smaller than LEAST. Their towers are not trained: oneDNN has buffers of its own for the gradient
of a convolution."""
TOKENS_WITH_IMAGE = 7
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_GROUPS = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 192},
    "qwen3_moe": {**_EXPERTS, "head_dim": 64},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128, "head_dim": 64},
    "glm4_moe": {**_EXPERTS, **_GROUPS, "head_dim": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "deepseek_v3": {
        **_EXPERTS,
        **_GROUPS,
        "num_key_value_heads": 4,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
    },
}
"""Mixtures of experts, as they differ from that. Of the last two the first layer is dense."""
WARM_UP, ROUNDS, RUNS = 2, 12, 16
"""Steps before any is recorded, and those that are: gloo's thread may hold on to a buffer for a moment more, and what it gives back the profiler does not
see; but not in all of so many."""
BUCKETS = {"all": 10_000_000, "some": 350_000, "auto": 256 * 256}
PART: dict[str, dict[str, Any]] = {
    "lora": {"lora_rank": 96, "lora_targets": ["all-linear"]},
    "lora with input gradients": {"lora_rank": 96, "lora_targets": ["all-linear"], "input_gradients": True},
    "lora of attention": {"lora_rank": 100, "lora_targets": ["attention"], "input_gradients": True},
    "lora and head": {"lora_rank": 96, "lora_targets": ["all-linear"], "lora_modules_to_save": ["lm_head"]},
    "qlora": {"lora_rank": 96, "lora_targets": ["all-linear"], "quantize": "nf4"},
    "qlora in bf16": {"lora_rank": 96, "lora_targets": ["all-linear"], "quantize": "nf4", "quant_storage": "bf16"},
    "qlora of attention in bf16": {
        "lora_rank": 100,
        "lora_targets": ["attention"],
        "quantize": "nf4",
        "quant_storage": "bf16",
        "input_gradients": True,
    },
    "qlora in bf16, with input gradients": {
        "lora_rank": 96,
        "lora_targets": ["all-linear"],
        "quantize": "nf4",
        "quant_storage": "bf16",
        "input_gradients": True,
    },
    "without embeddings": {"freeze": ["embeddings"]},
    "without embeddings, with input gradients": {"freeze": ["embeddings"], "input_gradients": True},
    "mlp": {"train": ["mlp"]},
    "without vision": {"freeze": ["vision"]},
    "mlp, with input gradients": {"train": ["mlp"], "input_gradients": True},
}
"""What trains a part of a model's weights, as fields of a recipe."""
BARE = {"lora_rank": 0, "lora_targets": ["all-linear"], "quantize": "none", "quant_storage": "uint8"}
"""Of these, what leaves a model as transformers builds it."""
NAMES = ("ranks", "tied", "bucket", "accumulation", "overlap", "host", "part", "images")
CASES: list[dict[str, Any]] = [
    {**dict(zip(NAMES, row, strict=False)), "stage": stage}
    for row in (
        (2, False, "all", 1, False, False),
        (2, False, "some", 1, False, False),
        (2, False, "auto", 1, False, False),
        (2, False, "some", 3, False, False),
        (2, True, "auto", 2, False, False),
        (2, False, "some", 1, True, False),
        (2, False, "some", 2, True, False),
        (2, False, "some", 1, False, True),
        (2, False, "auto", 2, False, True),
        (3, False, "some", 1, False, False),
        (3, False, "auto", 2, False, False),
        (3, True, "all", 1, False, False),
        (2, False, "all", 1, False, False, "lora"),
        (2, False, "auto", 2, False, False, "lora"),
        (2, True, "some", 1, True, False, "lora"),
        (2, False, "some", 2, False, True, "lora"),
        (2, True, "auto", 1, False, False, "lora of attention"),
        (2, False, "some", 2, False, False, "lora and head"),
        (2, False, "auto", 2, False, False, "qlora"),
        (2, False, "all", 1, False, False, "qlora in bf16"),
        (2, False, "some", 2, False, False, "without embeddings"),
        (2, False, "some", 1, False, False, "mlp"),
        (2, True, "some", 1, True, False, "lora of attention", "gemma3"),
        (2, False, "some", 2, False, False, "without vision", "llava"),
        (2, False, "auto", 1, False, False, "without vision", "llava"),
        (3, False, "some", 2, False, False, "lora"),
        (3, False, "all", 1, False, False, "qlora"),
    )
    for stage in (1, 2)
]


def config_of(case: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a case's model."""
    if "images" in case:
        return {**WITH_IMAGES[case["images"]], "image_token_id": 1000, "image_token_index": 1000}
    if case.get("model"):
        return {**CONFIG, **MIXTURES[case["model"]], "model_type": case["model"]}
    return TIED if case["tied"] else CONFIG


def tokens_of(case: dict[str, Any]) -> int:
    return TOKENS_WITH_IMAGE if "images" in case else TOKENS


def attention_of(case: dict[str, Any]) -> str:
    """Eager attention is not counted with images."""
    return "sdpa" if "images" in case else "eager"


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    """What a case is beside its sharding, as fields of a recipe."""
    return PART.get(case.get("part", ""), {}) | ({"images": 1} if "images" in case else {})


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings of a case."""
    zero: dict[str, Any] = {
        "stage": case["stage"],
        "reduce_bucket_size": BUCKETS[case["bucket"]],
        "overlap_comm": case["overlap"],
    }
    if case["host"]:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def begin(case: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, Callable[..., None]]:
    """DeepSpeed's engine of a case, and a step of it, which tells a function of each pass that begins."""
    import deepspeed
    import torch

    from mstplan.step.recipe import strategy
    from mstplan.tracing.fused_losses import COMPUTES
    from mstplan.train.fused import compute_loss_by
    from mstplan.train.images import image_batch
    from mstplan.train.quantise import quantise
    from mstplan.train.step import build_model, read_settings

    fields = fields_of(case)
    is_wrapped = "stage" not in case and "lora_rank" in fields  # ZeRO-3's hooks meet peft's own classes as well
    recipe = strategy("standard", **fields)
    bare = recipe.changed(**BARE) if is_wrapped else recipe
    settings_of_model = read_settings(config_of(case), whole="images" in case)
    model: Any = build_model(settings_of_model, bare, attention_of(case), "cpu")
    if is_wrapped and recipe.quantize != "none":
        quantise(model, recipe)
    if case.get("loss"):
        compute_loss_by(model, with_numbers(COMPUTES[case["loss"]]))
    if is_wrapped:
        model = with_peft(model, fields)
    if case.get("checkpoint"):
        model.gradient_checkpointing_enable({"use_reentrant": case["checkpoint"] == "reentrant"})
        model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, 1000, (1, TOKENS))}
    if "images" in case:
        ids, numbers, pixels = image_batch(model.config, recipe, TOKENS_WITH_IMAGE)
        inputs = {"input_ids": ids, **numbers, "pixel_values": torch.rand(pixels)}

    def step(mark: Any = lambda _: None) -> None:
        for number in range(case["accumulation"]):
            mark(f"forward {number}")
            loss = engine(labels=inputs["input_ids"], use_cache=False, **inputs).loss
            mark(f"backward {number}")
            engine.backward(loss)
            del loss
            if number == case["accumulation"] - 1:
                mark("step")
            engine.step()

    return engine, step


def with_numbers(compute: Callable[..., Any]) -> Callable[..., Any]:
    """A stand-in for a loss, with gradients that are zero: it computes none, and DeepSpeed skips a step of what is no number."""

    def computed(hidden: Any, weight: Any, *more: Any) -> Any:
        for each in (hidden, weight):
            if each.requires_grad:
                each.register_hook(lambda gradient: gradient.zero_())
        return compute(hidden, weight, *more)

    return computed


def with_peft(model: Any, fields: dict[str, Any]) -> Any:
    """The model within peft's classes, with adapters of a recipe's fields."""
    import peft

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "attention" in fields["lora_targets"] else "all-linear"
    config = peft.LoraConfig(r=fields["lora_rank"], target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def whole_steps(step: Callable[..., None], runs: int, persistent: Iterable[int] = ()) -> list[list[Any]]:
    """What steps allocate of LEAST bytes and more, of those that were seen whole: of so many, and again, until every rank has seen one."""
    import torch

    from mstplan.measuring.allocations import record_allocations

    whole: list[list[Any]] = []
    for _ in range(ROUNDS):
        several = [record_allocations(step).events for _ in range(runs)]  # all ranks as many
        large = [[event for event in events if abs(event.bytes) >= LEAST] for events in several]
        whole += [events for events in large if is_whole(events, persistent)]
        missing = torch.tensor(float(not whole))
        torch.distributed.all_reduce(missing)
        if not missing:
            return whole
    raise SystemExit(
        f"a rank saw none of {ROUNDS * runs} steps whole: run it again, on a machine that does nothing else."
    )


def record(case: dict[str, Any]) -> dict[str, Any]:
    """What one rank allocates in a step of a case."""
    import torch

    engine, step = begin(case, settings_of(case))
    for _ in range(WARM_UP):
        step()
    recorded = whole_steps(step, RUNS)
    last = f"backward {case['accumulation'] - 1}"
    zero = engine.optimizer
    states = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    found = {
        "flat": sum(each.nbytes for each in zero.bit16_groups_flat),
        "partition": sum(each.nbytes for each in zero.single_partition_of_fp32_groups),
        "gathered": 2 * sum(weight.numel() for group in zero.params_in_partition for weight in group),
        "states": sum(each.nbytes for each in states),
        "flattened": [
            e.bytes for e in recorded[0] if e.bytes > 0 and e.phase == last and "flatten_dense_tensors" in e.operations
        ],
        "peaks": least(peaks(without_cpus(events)) for events in recorded),
    }
    engine.destroy()
    return found


def is_whole(events: list[Any], persistent: Iterable[int] = ()) -> bool:
    """Whether all that was allocated was seen to be given back, as nothing outlives a step, but what persists, in bytes, which a step of ZeRO-3 gathers
    anew (that it goes before is not recorded, as it was there before)."""
    alive: dict[int, int] = {}
    for event in events:
        if event.bytes > 0 and event.address in alive:
            return False
        if event.bytes > 0:
            alive[event.address] = event.bytes
        else:
            alive.pop(event.address, None)
    return sorted(alive.values()) == sorted(persistent)


def without_cpus(events: list[Any]) -> list[Any]:
    """Events without scratch of products, which goes as soon as it has come, and without gloo's copies."""
    kept: list[Any] = []
    copies: set[int] = set()
    for event in events:
        before = kept[-1] if kept else None
        if event.bytes > 0:
            copies.discard(event.address)  # whose end was not seen
        if event.bytes > 0 and any("gloo" in name or "c10d" in name for name in event.operations):
            copies.add(event.address)
        elif event.bytes < 0 and event.address in copies:
            copies.remove(event.address)
        elif event.bytes < 0 and event.operations[-1:] == ("mm",) and _undoes(event, before):
            kept.pop()
        else:
            kept.append(event)
    return kept


def _undoes(event: Any, before: Any) -> bool:
    return before is not None and (before.bytes, before.address) == (-event.bytes, event.address)


def peaks(events: list[Any]) -> dict[str, int]:
    """The most bytes beside what there was before the step, by phase of it; the latest micro-batch's alone."""
    live = accumulate(event.bytes for event in events)
    found: dict[str, int] = {}
    for event, size in zip(events, live, strict=True):
        found[event.phase] = max(found.get(event.phase, 0), size)
    return found


def least(found: Iterable[dict[str, int]]) -> dict[str, int]:
    """The least of each phase."""
    rows = list(found)
    return {
        phase: min(row[phase] for row in rows if phase in row)
        for phase in dict.fromkeys(name for row in rows for name in row)
    }


Record = Callable[[dict[str, Any]], dict[str, Any]]


def run_rank(rank: int, cases: list[dict[str, Any]], record: Record, folder: Path) -> None:
    import deepspeed
    import torch

    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None  # no kernels of its own for the CPU
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    found = [record(case) for case in cases]
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)


def run_ranks(ranks: int, script: str) -> list[list[dict[str, Any]]]:
    """What each rank found, by case. script: what they run."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        started = []
        for rank in range(ranks):
            where = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            env = {**os.environ, **{key: str(value) for key, value in where.items()}, "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, script, "--rank", str(rank), "--ranks", str(ranks), "-o", name]
            started.append(subprocess.Popen(command, env=env))
        codes = [process.wait() for process in started]
        if any(codes):
            raise SystemExit("a rank failed.")
        return [json.loads((Path(name) / f"rank{rank}.json").read_text()) for rank in range(ranks)]


def run(description: str | None, script: str, all_cases: list[dict[str, Any]], record: Record) -> None:
    """Record cases in processes of their own, and write down what they found; or be one of these."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rank", type=int, help="for the processes that it starts")
    parser.add_argument("--ranks", type=int, help="for the processes that it starts")
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(
            arguments.rank, [case for case in all_cases if case["ranks"] == arguments.ranks], record, arguments.output
        )
    rows = []
    for ranks in sorted({case["ranks"] for case in all_cases}):
        cases = [case for case in all_cases if case["ranks"] == ranks]
        rows += [{**case, "found": list(found)} for case, *found in zip(cases, *run_ranks(ranks, script), strict=True)]
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    import deepspeed

    versions["deepspeed"] = deepspeed.__version__.strip()
    arguments.output.write_text(json.dumps({"versions": versions, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    run(__doc__, __file__, CASES, record)
