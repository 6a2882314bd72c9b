"""What other trainers call things: values and options that people type, what is planned of them, and what to write instead.

Looked at only once something unknown was typed. Names are compared by their letters and digits alone, in any case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..errors import did_you_mean, one_line, quoted
from ..spec.model import NO_ADAPTERS


class Told(NamedTuple):
    """What is said of some names."""

    names: str  # with blanks between; one that ends in * stands for all that begin so
    said: str  # of values a verb and more, of options a clause
    write: Mapping[str, object] = {}  # fields or options, and their values; None: the user's own value
    but: str = ""  # how that differs from what was typed; "": not at all


_CHUNKED, _LAYER, _FSDP, _MIXED = (
    {"loss": "chunked"},
    {"checkpoint": "layer"},
    {"sharding": "fsdp"},
    {"precision": "mixed"},
)
_OFFLOADED = {"checkpoint": "layer", "offload_layer_inputs": True}
_WHOLE_LAYER = "which recomputes all of a layer"
_NO_LOGITS = "MsT's loss, which never holds all logits either; its temporaries are others"
_SHARDS_ALL = "which shards weights, gradients and optimizer states, as ZeRO-3 does"
_IS_NOT = "is not planned"
_NOT_YET = "is not planned yet: FSDP2, as ZeRO-3, is"

VALUES: dict[str, tuple[Told, ...]] = {
    "precision": (
        Told("bfloat16 torch.bfloat16 pure_bf16 bf16-true", "is weights in bf16", {"precision": "bf16"}),
        Told(
            "amp autocast bf16-mixed mixed-bf16 mixed-precision amp_bf16", "is bf16 autocast over fp32 weights", _MIXED
        ),
        Told(
            "float float32 torch.float32 full single tf32 32 32-true",
            "is fp32 (TF32 changes products, not bytes)",
            {"precision": "fp32"},
        ),
        Told(
            "fp16 float16 torch.float16 half 16 16-true 16-mixed fp16-mixed amp_fp16",
            _IS_NOT,
            _MIXED,
            "with bf16, of the same size",
        ),
        Told("fp8 float8 mxfp8 e4m3 int8 8 8bit fp4 nf4 mxfp4 nvfp4 int4 4 4bit fp64 float64 double", _IS_NOT),
    ),
    "optimizer": (
        Told("adamw_torch adamw_hf", "is torch's AdamW as it comes", {"optimizer": "adamw", "adamw_kernel": "foreach"}),
        Told(
            "adamw_torch_fused adamw_fused fused_adamw fused",
            "is torch's fused AdamW",
            {"optimizer": "adamw", "adamw_kernel": "fused"},
        ),
        Told("adam torch_adam", _IS_NOT, {"optimizer": "adamw"}, "which holds the same two moments"),
        Told("adamw_bnb_8bit bnb_adamw_8bit bitsandbytes", "is bitsandbytes' AdamW8bit", {"optimizer": "adamw-8bit"}),
        Told("adam_8bit adam_bnb_8bit", _IS_NOT, {"optimizer": "adamw-8bit"}, "which holds the same two moments"),
        Told(
            "paged_adamw_8bit",
            _IS_NOT,
            {"optimizer": "adamw-8bit"},
            "whose states stay on the GPU instead of in managed memory",
        ),
        Told(
            "adamw_torch_8bit",
            "is torchao's, not planned",
            {"optimizer": "adamw-8bit"},
            "bitsandbytes', with states of the same size",
        ),
        Told(
            "cpu_adam deepspeedcpuadam adamw_cpu",
            _IS_NOT,
            {"optimizer": "adamw", "optimizer_on_host": True},
            "without DeepSpeed's buffers",
        ),
        Told(
            "adamw_torch_4bit adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_anyprecision adamw_bnb_32bit paged_adamw paged_adamw_32bit "
            "muon lion* paged_lion* ademamix* paged_ademamix* adagrad rmsprop* galore* q_galore* lomo adalomo grokadamw schedule_free* apollo* "
            "stable_adamw lamb lars came soap shampoo sophia* prodigy adam_mini badam adan nadam radam sgd_momentum momentum",
            _IS_NOT,
        ),
    ),
    "adamw_kernel": (
        Told("single-tensor single loop", "is torch's loop over the weights", {"adamw_kernel": "for-loop"}),
        Told("multi-tensor multi default", "is torch's foreach", {"adamw_kernel": "foreach"}),
    ),
    "checkpoint": (
        Told(
            "true yes on all full full_ac each every every_layer per_layer layers block transformer_block gradient_checkpointing "
            "activation_checkpointing gc ac",
            "is checkpointing of every layer",
            _LAYER,
        ),
        Told("false no off disabled never", "is no checkpointing", {"checkpoint": "none"}),
        Told("selective selective_ac sac op ops per_op attention mlp min_cut", _IS_NOT, _LAYER, _WHOLE_LAYER),
        Told("offload cpu_offload offloaded", "is checkpointing with layer inputs in CPU RAM", _OFFLOADED),
        Told("unsloth", "is Unsloth's, not planned", _OFFLOADED, "which moves the layers' inputs too"),
    ),
    "loss": (
        Told(
            "liger* flce fused* fused_linear_cross_entropy",
            "is not planned (nor is any of Liger's kernels)",
            _CHUNKED,
            _NO_LOGITS,
        ),
        Told(
            "cce cut* unsloth chunked_nll nll tiled* chunked_cross_entropy chunked_ce linear_cross_entropy",
            _IS_NOT,
            _CHUNKED,
            _NO_LOGITS,
        ),
        Told("mst minisequence mini_sequence chunk chunks", "is MsT's loss", _CHUNKED),
        Told(
            "cross_entropy crossentropyloss ce full standard default plain none hf torch causal_lm forcausallm",
            "is the loss over all logits",
            {"loss": "transformers"},
        ),
        Told(
            "dft dpo grpo kto orpo ppo rloo simpo cpo mse kl distillation reward", "is not planned: next-token loss is"
        ),
    ),
    "attention": (
        Told(
            "flash_attention_2 flash_attention flash_attn flash_attn_2 flash2 fa fa2 kernels-community/flash-attn2 kernels-community/flash-attn",
            "is FlashAttention-2",
            {"attention": "flash"},
        ),
        Told(
            "flash_attention_3 flash_attn_3 flash3 fa3 kernels-community/vllm-flash-attn3 kernels-community/flash-attn3 "
            "flash_attention_4 flash_attn_4 flash4 fa4 kernels-community/flash-attn4",
            _IS_NOT,
            {"attention": "flash"},
            "which is FlashAttention-2",
        ),
        Told(
            "auto default sdp sdp_attention torch torch_sdpa sdpa_flash scaled_dot_product_attention",
            "is what transformers takes by itself",
            {"attention": "sdpa"},
        ),
        Told(
            "xformers memory_efficient mem_efficient sdpa_mem_efficient efficient cudnn sdpa_cudnn cudnn_attention",
            _IS_NOT,
            {"attention": "sdpa"},
            "with its flash kernel",
        ),
        Told("sdpa_math math", _IS_NOT, {"attention": "eager"}, "which writes out the score matrix too"),
        Told("disabled vanilla", "is transformers' eager attention", {"attention": "eager"}),
        Told("flex flex_attention paged* ring* ulysses sage* sparse linear* native_sparse", _IS_NOT),
    ),
    "sharding": (
        Told("fsdp2 fsdp_v2 fully_shard full_shard fsdp_full_shard", "is FSDP2", _FSDP),
        Told("fsdp1 fsdp_v1 fullyshardeddataparallel", "is FSDP1, not planned", _FSDP, "which is FSDP2"),
        Told("zero3 zero_3", "is ZeRO-3, which FSDP2 is too", _FSDP),  # on the command line it is taken for that
        Told(
            "zero zero_stage_3 stage3 deepspeed deepspeed_zero3 deepspeed_stage_3",
            "is DeepSpeed's, whose own buffers are not planned",
            _FSDP,
            _SHARDS_ALL,
        ),
        Told(
            "zero1 zero2 stage1 stage2 zero_stage_1 zero_stage_2 deepspeed_zero1 deepspeed_zero2 deepspeed_stage_1 deepspeed_stage_2 shard_grad_op "
            "fsdp_shard_grad_op grad_op fairscale oss",
            _NOT_YET,
            _FSDP,
            "which shards the weights too",
        ),
        Told(
            "hsdp hybrid hybrid_shard fsdp_hybrid_shard mics", _NOT_YET, _FSDP, "with the GPUs of one group as --gpus"
        ),
        Told(
            "ddp dp data_parallel dataparallel distributeddataparallel replicate no_shard",
            _NOT_YET,
            {"sharding": "none"},
            "a GPU alone, without --gpus; DDP adds a copy of the gradients",
        ),
        Told(
            "zero2_offload zero3_offload zero_offload zero_infinity fsdp_offload tp tensor* pp pipeline* cp context* sp sequence* ulysses ring* ep expert* "
            "megatron 2d 3d 4d 5d",
            _IS_NOT,
        ),
    ),
    "strategy": (
        Told(
            "baseline plain none default vanilla naive no_checkpoint",
            "is training without checkpoints and chunks",
            {"strategy": "no-checkpointing"},
        ),
        Told(
            "gradient_checkpointing activation_checkpointing gc ac full_checkpointing checkpoint_layer layer",
            "is checkpointing of every layer",
            {"strategy": "checkpointing"},
        ),
        Told("minisequence mini_sequence mini_sequence_transformer chunked chunks", "is MsT", {"strategy": "mst"}),
        Told(
            "tiled tiled_mlp alst",
            "is ALST's tiling, not planned",
            {"strategy": "mst"},
            "which runs MLP and loss in chunks too",
        ),
        Told(
            "offload cpu_offload activation_offloading",
            "is no strategy alone",
            {"strategy": "mst-offload"},
            "which moves the layers' inputs",
        ),
        Told(
            "fsdp fsdp2 zero3 deepspeed",
            "is no strategy: how a model is shared out is said beside it",
            _FSDP,
            _SHARDS_ALL,
        ),
        Told("lora qlora dora peft adapter*", f"is no strategy: {NO_ADAPTERS}"),
    ),
}

CHOICES: dict[str, tuple[Told, ...]] = {
    "rung": (
        Told("simulated simulate simulation fake", "is the trace", {"rung": "trace"}),
        Told("estimated estimate estimation analytical", "is the formula", {"rung": "formula"}),
        Told("measured measure measurement measurements", "is a command of its own: mstplan measure"),
    ),
    "device": (
        Told("gpu nvidia cuda:0", "is a CUDA device", {"device": "cuda"}),
        Told("cuda:*", "is chosen by CUDA_VISIBLE_DEVICES", {"device": "cuda"}, "behind CUDA_VISIBLE_DEVICES=1"),
        Told("rocm* hip* amd*", "is called cuda by torch", {"device": "cuda"}),
        Told("mps* metal xpu* npu* hpu*", "is not measured on"),
    ),
    "dtype": (
        Told("bf16 torch.bfloat16", "is bfloat16", {"dtype": "bfloat16"}),
        Told("fp32 float full torch.float32", "is float32", {"dtype": "float32"}),
        Told("fp16 float16 half torch.float16", _IS_NOT, {"dtype": "bfloat16"}, "of the same size"),
    ),
}
"""The same of options that are no fields of a recipe."""

_FULL = f"{NO_ADAPTERS}, only full fine-tuning of unquantised weights"
_NO_MEMORY = "it does not change what a step holds"
_OPTIONS = (
    Told(
        "lora* qlora* dora* adapter* peft* use-peft use-lora use-qlora use-dora use-rslora target-modules modules-to-save finetuning-type tuner-type "
        "train-type load-in-4bit load-in-8bit 4bit 8bit nf4 int4 int8 bnb* use-bnb* quant* bits double-quantization gptq awq",
        _FULL,
    ),
    Told("deepspeed* zero*", "DeepSpeed's own buffers are not planned", _FSDP, _SHARDS_ALL),
    Told("fsdp fsdp2 fully-shard", "", _FSDP),
    Told("hsdp ddp* dp data-parallel* dp-size", "of several GPUs, FSDP2 alone is planned", _FSDP, _SHARDS_ALL),
    Told(
        "tp tp-size tensor-parallel* pp pp-size pipeline-parallel* cp cp-size context-parallel* sp sp-size sequence-parallel* ulysses* ring-attention "
        "ep ep-size expert-parallel* expert-model-parallel*",
        "of several GPUs, FSDP2 alone is planned",
        _FSDP,
        "which shares out the weights, not a sequence or a matrix product",
    ),
    Told("fsdp-*", "how FSDP2 goes about it is not varied", _FSDP, _SHARDS_ALL),
    Told(
        "liger* use-liger* enable-liger* cce use-cce cut-cross-entropy",
        "Liger's and other kernels are not planned",
        _CHUNKED,
        _NO_LOGITS,
    ),
    Told("chunked-loss chunked-cross-entropy chunked-nll use-chunked-loss", "", _CHUNKED),
    Told("loss-type loss-function", "", {"loss": None}),
    Told("tiled-mlp use-tiled-mlp minisequence mst", "", {"strategy": "mst"}),
    Told("num-chunks mlp-chunks loss-chunks tiled-mlp-num-shards num-output-chunks", "", {"mlp_chunks": None}),
    Told("unsloth use-unsloth", "Unsloth's kernels are not planned"),
    Told("use-unsloth-gc", "", _OFFLOADED),
    Told(
        "gradient-checkpointing activation-checkpointing use-gradient-checkpointing enable-gradient-checkpointing enable-activation-checkpointing "
        "fsdp-activation-checkpointing recompute",
        "",
        _LAYER,
    ),
    Told(
        "no-gradient-checkpointing disable-gradient-checkpointing no-checkpoint no-checkpointing",
        "",
        {"checkpoint": "none"},
    ),
    Told(
        "selective-checkpointing selective-activation-checkpointing",
        "what is recomputed of a layer is not varied",
        _LAYER,
        _WHOLE_LAYER,
    ),
    Told(
        "activation-offloading activation-offload offload-activations enable-activation-offloading activation-cpu-offload activation-checkpointing-offload",
        "only the inputs of checkpointed layers are moved",
        _OFFLOADED,
        "which keeps them in CPU RAM",
    ),
    Told(
        "offload-optimizer optimizer-offload cpu-offload-optimizer offload-optimizer-device zero-offload cpu-adam",
        "",
        {"optimizer_on_host": True},
    ),
    Told(
        "offload-param offload-params offload-param-device cpu-offload offload-weights",
        "",
        {"optimizer_on_host": True, "weights_on_host": True},
    ),
    Told("flash-attn* flash-attention* use-flash-attn* use-flash-attention* fa2", "", {"attention": "flash"}),
    Told("sdpa sdp-attention", "", {"attention": "sdpa"}),
    Told("eager eager-attention", "", {"attention": "eager"}),
    Told("attn attn-impl attn-implementation attention-implementation attention-backend", "", {"attention": None}),
    Told("xformers* flex-attention", "no such attention is planned", {"attention": "sdpa"}, "with its flash kernel"),
    Told(
        "bf16 bfloat16",
        "it can mean weights in bf16, or autocast over fp32 weights",
        {"precision": "bf16"},
        "or for autocast --precision mixed",
    ),
    Told("pure-bf16", "", {"precision": "bf16"}),
    Told("amp mixed-precision autocast", "", _MIXED),
    Told("fp16 float16 half", "fp16 is not planned", _MIXED, "with bf16, of the same size"),
    Told("fp32 float32 tf32", "", {"precision": "fp32"}),
    Told("fp8 float8", "fp8 is not planned"),
    Told("dtype torch-dtype model-dtype", "", {"precision": None}),
    Told(
        "batch-size bs mbs micro-batch-size train-batch-size per-device-train-batch-size per-device-batch-size train-micro-batch-size-per-gpu",
        "",
        {"batch": None},
    ),
    Told(
        "gradient-accumulation-steps gradient-accumulation accumulation-steps grad-accum grad-accum-steps accumulate-grad-batches gas",
        "",
        {"accumulation": None},
    ),
    Told(
        "global-batch-size",
        "it is batch, micro-batches and GPUs multiplied",
        {"batch": None, "accumulation": None},
        "each by itself",
    ),
    Told("optim optimizer-type optimizer-name", "", {"optimizer": None}),
    Told("use-8bit-adam 8bit-adam adamw-8bit adam-8bit", "", {"optimizer": "adamw-8bit"}),
    Told("fused fused-adamw adamw-fused", "", {"optimizer": "adamw", "adamw_kernel": "fused"}),
    Told("optimizer-in-bwd fused-backward", "", {"optimizer_in_backward": True}),
    Told(
        "num-gpus n-gpus n-gpu ngpu ngpus gpu-count num-gpu nproc-per-node num-processes world-size devices num-devices",
        "",
        {"gpus": None},
    ),
    Told(
        "model-name-or-path model-name model-id model-path base-model pretrained-model-name-or-path",
        "",
        {"model": None},
    ),
    Told("gpu-name gpu-type card accelerator", "", {"gpu": None}),
    Told("vram gpu-memory gpu-ram vram-gb gpu-mem-gb memory mem", "", {"gpu_mem": None}),
    Told("ram cpu-ram cpu-memory cpu-mem host-memory host-ram", "", {"host_mem": None}),
    Told(
        "max-seq-length max-seq-len max-length seq-length sequence-length sequence-len context-length context max-context cutoff-len block-size "
        "model-max-length max-tokens tokens ctx",
        "",
        {"seq_len": None},
    ),
    Told(
        "packing sample-packing neat-packing padding-free",
        "a packed row counts as one sequence",
        {"seq_len": None},
        "with the row's length",
    ),
    Told("torch-compile* compile", "torch.compile is not planned"),
    Told(
        "max-model-len max-num-seqs kv-cache* gpu-memory-utilization max-new-tokens",
        "inference is not planned, training is",
    ),
    Told("eval* do-eval per-device-eval-batch-size", "evaluation is not planned, training is"),
    Told(
        "lr* learning-rate* warmup* weight-decay epochs num-train-epochs num-epochs max-steps adam-beta1 adam-beta2 adam-epsilon beta1 beta2 optim-args "
        "max-grad-norm gradient-clipping clip-grad* seed data-seed output-dir dataset* dataloader* logging* log-level report-to run-name save* "
        "push-to-hub hub-* do-train resume-from-checkpoint",
        _NO_MEMORY,
    ),
)


def _letters(name: str) -> str:
    return "".join(c for c in name[:100].lower() if c.isalnum())


def _of(table: Collection[Told], typed: str) -> Told | None:
    """The row of what was typed: where it is named, else where something like it is."""
    key = _letters(typed)
    rows = [(name, row) for row in table for name in row.names.split()]
    named = (row for name, row in rows if _letters(name) == key and not name.endswith("*"))
    like = (row for name, row in rows if name.endswith("*") and key.startswith(_letters(name)))
    return next(named, None) or next(like, None)


_FLAGS = {"offload_layer_inputs": "--offload", "mlp_chunks": "--chunks", "loss_chunks": "--chunks"}
_OTHERS = (
    "strategy",
    "model",
    "gpu",
    "gpu_mem",
    "host_mem",
    "seq_len",
    "device",
    "dtype",
    "rung",
    "from",
)  # options that are no fields of a recipe


def flags_of(row: Told) -> list[str]:
    """The options that a row says to write."""
    return [_FLAGS.get(field, "--" + field.replace("_", "-")) for field in row.write]


def _as_options(row: Told) -> str:
    words = zip(flags_of(row), row.write.values(), strict=True)
    return " ".join(flag if value is None or value is True else f"{flag} {value}" for flag, value in words)


def _as_fields(row: Told) -> str:
    fields = [
        field if value is None else f"{field}={value!r}" for field, value in row.write.items() if field not in _OTHERS
    ]
    return f"{', '.join(fields)} ({_as_options(row)})" if fields else _as_options(row)


_FIELD = re.compile(r"(\w+)=(?:'([^']*)'|(\w+))")
_BOTH = re.compile(rf"{_FIELD.pattern}(?:, {_FIELD.pattern})* \((--[^()]+)\)")


def in_options(said: str) -> str:
    """What is said of a recipe's fields, in the command line's words alone: `loss='chunked' (--loss chunked)` is --loss chunked there."""
    from .recipe import Recipe

    def flag(found: re.Match[str]) -> str:
        name = found[1]
        return _FLAGS.get(name, "--" + name.replace("_", "-")) if name in Recipe.model_fields else found[0]

    said = _BOTH.sub(lambda found: found[found.lastindex or 0], said)
    said = re.sub(r"\b(\w+) \((--[\w-]+)\)", lambda found: found[2] if flag(found) == found[2] else found[0], said)
    said = re.sub(r"(?<![\w'-])([a-z]+_[a-z_]+)(?![\w'])", flag, said)
    return re.sub(r"^(\w+)(?=:)", flag, said)


def _way(row: Told, written: str, otherwise: str) -> str:
    if not row.write:
        return otherwise
    if row.but:
        return f"Nearest: {written}, {row.but}."
    return f"Write it as {written}." if None in row.write.values() else f"Write {written}."


def unknown_value(
    field: str, typed: object, planned: Collection[str], more: str = "", older: Collection[str] = ()
) -> str:
    """Two lines about a value that `field` cannot have; `planned` are those it can, `more` what else, `older` names are taken too."""
    shown, word = (field, "Planned") if field in VALUES else (f"--{field}", "Known")
    text, all_planned = one_line(typed), f"{word}: {', '.join(planned)}{more}."
    spelled = [Told(value, "is spelled otherwise", {field: value}) for value in (*planned, *older)]
    rows = VALUES.get(field) or CHOICES.get(field, ())
    row = _of((*spelled, *rows), text) if isinstance(typed, str | bool) else None
    if row is None:
        return f"unknown {shown} {quoted(typed)}.{did_you_mean(text, (*planned, *older))}\n{all_planned}"
    return f"{shown}: {quoted(typed)} {row.said}.\n{_way(row, _as_fields(row), all_planned)}"


def unknown_field(typed: str) -> str | None:
    """Two lines about a field that a recipe does not have; None when nothing is known of it."""
    row = _of(_OPTIONS, typed)
    return _said(f"a recipe has no field {quoted(typed)}", row, _as_fields(row)) if row is not None else None


def option(typed: str) -> Told | None:
    """What is known of an option that does not exist."""
    return _of(_OPTIONS, typed)


def unknown_option(typed: str, row: Told, whose: str = "") -> str:
    """Two lines about it; `whose` says which commands have what is recommended."""
    return _said(f"no option {one_line(typed, 60)}", row, _as_options(row) + whose)


def _said(start: str, row: Told, written: str) -> str:
    return f"{start}{': ' * bool(row.said)}{row.said}.\n{_way(row, written, 'Leave it out.')}"
