"""What packages with fused kernels for linear attention, Mamba-2 and short convolutions allocate in a training step of transformers' models.

    python bench/fused_mixers.py -o tests/step/fused_mixers.json

Needs, beside mstplan's torch extra, fla-core, triton and einops, and the Python files of causal-conv1d and mamba-ssm (the folders
`causal_conv1d` and `mamba_ssm` of their sources, of which nothing is built). transformers calls them wherever they can be imported.

Each case is mstplan's trace of a step, in a process in which the case's packages alone can be imported: their own Python code makes its
tensors, on fake ones. What it would launch on a card it does not: kernels of Triton, and extensions, which make no tensors but where torch is
told to be deterministic (causal-conv1d 1.7.0, csrc/causal_conv1d.cpp). tests/step/test_fused_mixers.py compares the formula with what is
recorded: the peak of every instant, in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

FOLDERS = {"fla": "fla", "causal-conv1d": "causal_conv1d", "mamba-ssm": "mamba_ssm"}
"""What is imported of each package, by its name in `--kernels`."""
KERNELS = {
    "torch": (),
    "fla": ("fla",),
    "causal-conv1d": ("causal-conv1d",),
    "fla+causal-conv1d": ("fla", "causal-conv1d"),
    "mamba-ssm": ("mamba-ssm", "causal-conv1d"),
}
SHARED_MEMORY = {"h100": 232_448, "a100-80gb": 166_912, "rtx-4090": 101_376}
"""Bytes of a block on cards, by which fla chooses its tiles (fla/utils/hardware.py, Backend)."""
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
LINEAR = {
    "layer_types": MIXED,
    "head_dim": 64,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}
DELTA = {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 512}
CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"]}
SCAN = {"mamba_n_heads": 16, "mamba_d_state": 64, "mamba_n_groups": 2}
BESIDE = {**SCAN, "mamba_d_ssm": 768, "mamba_n_heads": 12, "mamba_d_state": 128, "head_dim": 16}
"""Narrow heads: attention's backward comes first, and the formula holds cos and sin to the end of the first layer's."""
PARTED = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention", "mlp"],
    "mamba_num_heads": 16,
    "mamba_head_dim": 64,
    "ssm_state_size": 64,
    "n_groups": 2,
    "head_dim": 64,
}
ALONE = {"num_heads": 16, "head_dim": 64, "state_size": 64, "n_groups": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", DELTA),
    "qwen3.5": ("qwen3_5_text", LINEAR),
    "qwen3.5, equal heads": ("qwen3_5_text", {**LINEAR, "linear_num_key_heads": 8, "linear_value_head_dim": 64}),
    "lfm2": ("lfm2", CONVOLUTIONS),
    "lfm2, biases": ("lfm2", {**CONVOLUTIONS, "conv_bias": True}),
    "mamba2": ("mamba2", ALONE),
    "bamba": ("bamba", {**SCAN, "attn_layer_indices": [2]}),
    "granite": (
        "granitemoehybrid",
        {**SCAN, "layer_types": MIXED, "num_local_experts": 0, "shared_intermediate_size": 1024},
    ),
    "falcon_h1": ("falcon_h1", BESIDE),
    "falcon_h1, normed": ("falcon_h1", {**BESIDE, "mamba_rms_norm": True}),
    "nemotron_h": ("nemotron_h", PARTED),
    "nemotron_h, biases": ("nemotron_h", {**PARTED, "use_bias": True}),
}
WITH_FLA = ("qwen3_next", "qwen3.5", "qwen3.5, equal heads")
WITH_CONVOLUTIONS = ("lfm2", "lfm2, biases")
WITH_MAMBA = (
    "mamba2",
    "bamba",
    "granite",
    "falcon_h1",
    "falcon_h1, normed",
    "nemotron_h",
    "nemotron_h, biases",
)
PAIRS = [
    *((model, "fla+causal-conv1d") for model in WITH_FLA),
    *((model, "fla") for model in WITH_FLA[:2]),
    *((model, "causal-conv1d") for model in WITH_CONVOLUTIONS),
    *((model, "mamba-ssm") for model in WITH_MAMBA),
]
STRATEGIES = ("standard", "checkpoint", "mst", "mst-offload", "mst-layer")
CHANGES: list[dict[str, Any]] = [
    {"batch": 2},
    {"lora_rank": 16},
    {"freeze": ["attention"]},
    {"freeze": ["head"]},
    {"train": ["layers.1.*"]},
    {"accumulation": 2},
    {"optimizer_in_backward": True},
]
IN_PIECES = {"mlp_chunks": 4, "loss_chunks": 4}


def case_of(
    model: str, kernels: str, strategy: str, seq_len: int, card: str = "h100", **changes: Any
) -> dict[str, Any]:
    """A case: pieces where the strategy has them, of the MLP where the model has one; adapters where they reach the kernels' weights."""
    if "mst" in strategy:
        changes = {**IN_PIECES, **({"mlp_chunks": 1} if model == "mamba2" else {}), **changes}
    if "layer" in strategy:
        changes["attention_groups"] = 1
    if "lora_rank" in changes and kernels == "mamba-ssm":
        changes["lora_targets"] = ["in_proj"]
    return {
        "model": model,
        "kernels": kernels,
        "card": card,
        "strategy": strategy,
        "seq_len": seq_len,
        "changes": changes,
    }


def cases() -> Iterator[dict[str, Any]]:
    """What is recorded."""
    for model, kernels in PAIRS:
        mixes_twice = model.startswith(("mamba2", "falcon_h1"))  # whose layers do not run in pieces
        for strategy in STRATEGIES[: -1 if mixes_twice else None]:
            yield from (case_of(model, kernels, strategy, seq_len) for seq_len in (2048, 4096))
        yield case_of(model, kernels, "mst", 32768)
        for strategy in ("checkpoint",) if model.startswith("falcon_h1") else ("standard", "checkpoint"):
            yield case_of(model, kernels, strategy, 1500)
            yield from (case_of(model, kernels, strategy, 4096, **changes) for changes in CHANGES)
    for card in ("a100-80gb", "rtx-4090"):
        yield case_of("qwen3.5", "fla+causal-conv1d", "checkpoint", 4096, card)
    for model, seq_len in (("qwen3_next", 1024), ("qwen3.5", 1024), ("mamba2", 4096), ("bamba", 4096)):
        yield case_of(model, "causal-conv1d", "checkpoint", seq_len)


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a small model."""
    from transformers import CONFIG_MAPPING

    family, changes = MODELS[name]
    found: dict[str, Any] = json.loads(CONFIG_MAPPING[family](**{**SIZES, **changes}).to_json_string(use_diff=False))
    return found


def launch_nothing(card: str) -> None:
    """Put what does nothing in place of what is launched on a card."""
    import torch
    import triton.runtime.autotuner
    import triton.runtime.jit

    from mstplan.step.workspaces import MULTIPROCESSORS

    autotuner = triton.runtime.autotuner
    for kind in (triton.runtime.jit.JITFunction, autotuner.Autotuner, autotuner.Heuristics):
        kind.run = lambda self, *args, **kwargs: None
    autotuner.Autotuner.best_config = property(lambda self: self.configs[0])
    torch.cuda.device = lambda _index: nullcontext()
    torch.cuda.get_device_properties = lambda _device: SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    extension: Any = ModuleType("causal_conv1d_cuda")
    extension.causal_conv1d_fwd = extension.causal_conv1d_bwd = lambda *args: None
    sys.modules[extension.__name__] = extension
    sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")
    try:
        import fla.utils.hardware
    except ImportError:
        return

    class Memory:
        def __getitem__(self, _card: int | None) -> int:
            return SHARED_MEMORY[card]

    fla.utils.hardware.get_all_max_shared_mem = Memory


def record(case: dict[str, Any]) -> dict[str, int]:
    """The peaks of a case's instants, in bytes. Raises what transformers or a package cannot do."""
    from mstplan.spec.hardware import card
    from mstplan.step.recipe import strategy
    from mstplan.tracing.tracer import trace

    on = card(case["card"])
    recipe = strategy(case["strategy"]).changed(**case["changes"])
    config = config_of(case["model"])
    found = trace(config, recipe, case["seq_len"], workspace=on.gpu.workspaces_bytes, platform=on.platform)
    return {peak.instant: peak.bytes for peak in found.peaks}


def record_with(kernels: str, card: str) -> list[dict[str, Any]]:
    """All cases in which these packages can be imported, and no others, on a card."""
    for name in set(FOLDERS) - set(KERNELS[kernels]):
        sys.modules[FOLDERS[name]] = None  # type: ignore[assignment]
    launch_nothing(card)
    mine = [case for case in cases() if (case["kernels"], case["card"]) == (kernels, card)]
    rows = []
    for case in mine:
        print(*case.values(), file=sys.stderr)
        rows.append({**case, "peaks": record(case)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--with", dest="kernels", choices=KERNELS, help="for the processes that it starts")
    parser.add_argument("--card", default="h100", help="for the processes that it starts")
    arguments = parser.parse_args()
    if arguments.kernels:
        print(json.dumps(record_with(arguments.kernels, arguments.card)))
        return
    versions = {name: version(name) for name in ("torch", "transformers", "fla-core", "triton")}
    for folder in ("causal_conv1d", "mamba_ssm"):
        source = find_spec(folder)
        assert source is not None and source.origin is not None
        text = Path(source.origin).read_text()
        versions[folder.replace("_", "-")] = text.split('__version__ = "')[1].split('"')[0]
    rows = []
    for kernels, card in dict.fromkeys((case["kernels"], case["card"]) for case in cases()):
        command = [sys.executable, __file__, "--with", kernels, "--card", card]
        rows += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    lines = ",\n".join(json.dumps(row) for row in rows)
    configs = ",\n".join(f"{json.dumps(name)}: {json.dumps(config_of(name))}" for name in MODELS)
    text = f'{{"versions": {json.dumps(versions)},\n"models": {{\n{configs}\n}},\n"cases": [\n{lines}\n]}}\n'
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
