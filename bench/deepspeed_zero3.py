"""What DeepSpeed's own engine allocates under ZeRO-3, in which order: processes over gloo on the CPU, a small Llama or mixture of experts in bf16.

    python -m bench.deepspeed_zero3 -o tests/step/deepspeed_zero3.json

As bench/deepspeed_zero.py, which says what it needs and what is left out. Steps are recorded when the order of modules is known, and what persists is
gathered. tests/step/test_zero3.py compares the formula with them, event by event.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.deepspeed_zero import LEAST, begin, least, peaks, run, whole_steps, without_cpus

WARM_UP, RUNS = 3, 8
"""Steps before any is recorded, and how many are at a time: see bench/deepspeed_zero.py."""
SETTINGS: dict[str, dict[str, int]] = {
    "default": {},
    "auto": {"reduce_bucket_size": 65_536, "prefetch_bucket_size": 58_982, "param_persistence_threshold": 2_560},
    "small": {
        "reduce_bucket_size": 350_000,
        "prefetch_bucket_size": 60_000,
        "param_persistence_threshold": 2_560,
        "max_live_parameters": 400_000,
        "max_reuse_distance": 100_000,
    },
    "middle": {
        "reduce_bucket_size": 200_000,
        "prefetch_bucket_size": 200_000,
        "param_persistence_threshold": 40_000,
        "max_live_parameters": 600_000,
        "max_reuse_distance": 500_000,
        "sub_group_size": 300_000,
    },
    "none": {
        "reduce_bucket_size": 1,
        "prefetch_bucket_size": 0,
        "param_persistence_threshold": 0,
        "max_reuse_distance": 0,
        "sub_group_size": 1,
    },
}
"""DeepSpeed's settings; auto: what transformers fills in for hidden states of 256."""
NAMES = ("ranks", "settings", "tied", "accumulation", "checkpoint", "host", "part", "model", "loss")
CASES: list[dict[str, Any]] = [
    dict(zip(NAMES, row, strict=False))
    for row in (
        (2, "default", False, 1, False, ""),
        (2, "auto", False, 1, False, ""),
        (2, "auto", False, 2, True, ""),
        (2, "auto", True, 1, True, ""),
        (2, "small", False, 1, False, ""),
        (2, "small", False, 3, False, ""),
        (2, "small", False, 1, True, ""),
        (2, "small", True, 2, False, ""),
        (2, "middle", False, 1, True, ""),
        (2, "middle", True, 2, True, ""),
        (2, "none", False, 1, False, ""),
        (2, "none", False, 2, True, ""),
        (2, "small", False, 1, True, "optimizer"),
        (2, "auto", False, 2, False, "optimizer"),
        (2, "middle", False, 2, True, "all"),
        (2, "auto", False, 2, "reentrant", ""),
        (2, "small", True, 1, "reentrant", ""),
        (2, "middle", False, 2, "reentrant", "all"),
        (2, "none", False, 1, "reentrant", ""),
        (4, "middle", False, 1, False, ""),
        (4, "auto", False, 1, True, ""),
        (4, "small", False, 2, True, ""),
        (2, "default", False, 1, False, "", "lora"),
        (2, "default", False, 1, True, "", "lora with input gradients"),
        (2, "auto", False, 2, True, "", "lora with input gradients"),
        (2, "auto", False, 1, True, "", "lora with input gradients"),
        (2, "small", False, 2, True, "", "lora of attention"),
        (2, "none", False, 1, False, "", "lora"),
        (2, "auto", False, 1, True, "", "without embeddings, with input gradients"),
        (2, "middle", False, 2, True, "optimizer", "lora with input gradients"),
        (2, "auto", False, 2, "reentrant", "", "lora with input gradients"),
        (2, "small", False, 1, "reentrant", "", "lora of attention"),
        (2, "default", False, 1, "reentrant", "", "lora with input gradients"),
        (4, "auto", True, 1, True, "", "lora with input gradients"),
        (2, "default", False, 1, True, "", "", "qwen3_moe"),
        (2, "middle", False, 2, True, "", "", "qwen3_moe"),
        (2, "auto", False, 1, False, "", "", "qwen3_moe"),
        (2, "small", False, 1, True, "", "", "mixtral"),
        (2, "none", False, 1, False, "", "", "mixtral"),
        (2, "small", False, 2, False, "", "", "qwen2_moe"),
        (2, "middle", False, 1, True, "", "", "qwen2_moe"),
        (2, "auto", False, 1, True, "", "", "deepseek_v3"),
        (2, "small", False, 1, False, "", "", "deepseek_v3"),
        (2, "middle", False, 2, True, "", "", "glm4_moe"),
        (2, "none", False, 1, False, "", "", "glm4_moe"),
        (2, "small", False, 1, True, "", "", "gpt_oss"),
        (2, "none", False, 1, False, "", "", "gpt_oss"),
        (2, "middle", False, 1, False, "", "", "olmoe"),
        (2, "auto", False, 1, True, "", "", "granitemoe"),
        (2, "auto", False, 2, "reentrant", "", "", "qwen3_moe"),
        (2, "small", False, 1, True, "all", "", "mixtral"),
        (2, "none", False, 1, True, "", "", "qwen2_moe"),
        (4, "auto", False, 1, True, "", "", "deepseek_v3"),
        (4, "small", False, 1, True, "", "", "qwen3_moe"),
        (2, "auto", False, 1, True, "", "lora of attention", "qwen3_moe"),
        (2, "small", False, 1, False, "", "lora of attention", "mixtral"),
        (2, "none", False, 1, "reentrant", "", "lora of attention", "qwen2_moe"),
        (2, "middle", False, 1, True, "", "lora of attention", "glm4_moe"),
        (2, "small", False, 2, True, "", "lora of attention", "gpt_oss"),
        (2, "none", False, 1, False, "", "lora of attention", "olmoe"),
        (2, "auto", False, 1, False, "", "lora", "granitemoe"),
        (2, "auto", False, 1, True, "", "without embeddings, with input gradients", "granitemoe"),
        (2, "small", False, 1, False, "", "mlp, with input gradients", "qwen3_moe"),
        (2, "auto", False, 1, False, "", "qlora in bf16"),
        (2, "small", False, 1, True, "", "qlora in bf16, with input gradients"),
        (2, "auto", False, 2, "reentrant", "", "qlora in bf16, with input gradients"),
        (2, "none", False, 1, True, "", "qlora in bf16, with input gradients"),
        (4, "small", False, 1, "reentrant", "", "qlora in bf16, with input gradients"),
        (2, "small", False, 1, True, "", "qlora of attention in bf16", "qwen3_moe"),
        (2, "default", False, 1, True, "", "", "", "liger"),
        (2, "auto", False, 2, True, "", "", "", "liger"),
        (2, "small", False, 2, False, "", "", "", "liger"),
        (2, "middle", False, 1, "reentrant", "all", "", "", "liger"),
        (2, "none", False, 1, True, "", "", "", "liger"),
        (2, "auto", True, 2, True, "", "", "", "liger"),
        (2, "auto", False, 1, True, "", "lora with input gradients", "", "liger"),
        (2, "small", False, 2, "reentrant", "", "lora of attention", "", "liger"),
    )
]
OF_STAGE_3 = ("prefetch_bucket_size", "param_persistence_threshold", "max_live_parameters", "max_reuse_distance")


def settings_of(case: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings of a case."""
    sizes = {("stage3_" if key in OF_STAGE_3 else "") + key: size for key, size in SETTINGS[case["settings"]].items()}
    on_cpu = {"device": "cpu", "pin_memory": False}
    offload = {"offload_optimizer": on_cpu} if case["host"] else {}
    if case["host"] == "all":
        offload["offload_param"] = on_cpu
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": case["accumulation"],
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, **sizes, **offload},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def record(case: dict[str, Any]) -> dict[str, Any]:
    """What one rank allocates in a step of a case."""
    engine, step = begin(case, settings_of(case))
    hold_most(engine.module)
    for _ in range(WARM_UP):
        step()
    kept_whole = (each.data.untyped_storage().nbytes() for each in engine.optimizer.persistent_parameters)
    persistent = [size for size in kept_whole if size >= LEAST]
    whole = [without_cpus(events) for events in whole_steps(step, RUNS, persistent)]
    found = {"peaks": least(map(peaks, whole)), **kept(engine.optimizer)}
    found["events"] = {phase: commonest(whole, phase, peak) for phase, peak in found["peaks"].items()}
    engine.destroy()
    return found


def hold_most(module: Any) -> None:
    """Have DeepSpeed's sets of a module's weights, whose order is one of addresses in memory, in the order that holds most: first a weight of each
    all-gather of several that is not yet copied, whose copies are made then, and only then those with which buffers go."""
    from deepspeed.runtime.zero import partitioned_param_coordinator

    class Ordered(set):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(in_order(set.__iter__(self)))

    def in_order(members: Any) -> list[Any]:
        members = list(members)
        if not all(hasattr(member, "ds_id") for member in members):
            return members
        copied: set[int] = set()
        first, later = [], []
        for param in sorted(members, key=lambda each: each.ds_id):
            handle = module.ds_inflight_param_registry.get(param)
            several = getattr(handle, "handles", ())
            copies = not all(getattr(each, "complete", True) for each in several) and id(handle) not in copied
            copied.add(id(handle))
            (first if copies else later).append(param)
        return first + later

    vars(partitioned_param_coordinator)["set"] = Ordered


def commonest(whole: list[list[Any]], phase: str, peak: int) -> str:
    """Bytes that come and go in a phase, in order, as most steps with its least peak have it."""
    rows = (events for events in whole if peaks(events)[phase] == peak)
    texts = Counter(" ".join(str(event.bytes) for event in events if event.phase == phase) for events in rows)
    return texts.most_common(1)[0][0]


def kept(zero: Any) -> dict[str, int]:
    """Bytes of what stays from one step to the next."""
    import torch

    states = [t for state in zero.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    frozen = [weight.ds_tensor for weight in zero.module.parameters() if not weight.requires_grad]
    return {
        **({"frozen": sum(each.nbytes for each in frozen)} if frozen else {}),
        "parts": sum(each.nbytes for each in zero.fp16_partitioned_groups_flat),
        "fp32": sum(each.nbytes for each in zero.fp32_partitioned_groups_flat),
        "sub_groups": len(zero.fp16_groups),
        "gradients": zero.grad_partitions_flat_buffer.nbytes,
        "bucket": sum(bucket.buffer.nbytes for bucket in zero.ipg_buckets.values()),
        "persistent": sum(each.data.untyped_storage().nbytes() for each in zero.persistent_parameters),
        "states": sum(each.nbytes for each in states),
    }


if __name__ == "__main__":
    run(__doc__, __file__, CASES, record)
