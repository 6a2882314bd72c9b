"""What other trainers call things: values and options that people type, what is planned of them, and what to write instead.

Looked at only once something unknown was typed. Names are compared by their letters and digits alone, in any case.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ..errors import did_you_mean, one_line, quoted


class Advice(NamedTuple):
    """What is said of some names."""

    names: str  # with blanks between; one that ends in * stands for all that begin so
    statement: str  # of values a verb and more, of options a clause
    write: Mapping[str, object] = {}  # fields or options, and their values; None: the user's own value
    difference: str = ""  # how that differs from what was typed; "": not at all


_CHUNKED, _LAYER, _FSDP, _MIXED = (
    {"loss": "chunked"},
    {"checkpoint": "layer"},
    {"sharding": "fsdp"},
    {"precision": "mixed"},
)
_ULYSSES: dict[str, object] = {"gpus": 8, "sequence_parallel": 8}
_RING: dict[str, object] = {"gpus": 8, "context_parallel": 8}
_SPLIT: dict[str, object] = {"gpus": 8, "tensor_parallel": 8}
_OFFLOADED = {"checkpoint": "layer", "offload": "layer-inputs"}
_SAVED = {"offload": "saved-tensors"}
_SELECTIVE = {"checkpoint": "selective"}
_NO_LOGITS = "MsT's loss, which never holds all logits either; its temporaries are others"
_SHARDS_ALL = "which shards weights, gradients and optimizer states, as ZeRO-3 does"
_IS_NOT = "is not planned"
_NO_MEMORY = "it does not change what a step holds"
_ON_HOST: dict[str, object] = {"optimizer_on_host": True, "weights_on_host": True}
_NOT_YET = "is not planned yet: FSDP2, ZeRO and DDP are"

VALUES: dict[str, tuple[Advice, ...]] = {
    "rotate_method": (
        Advice("gather", "is allgather", {"rotate_method": "allgather"}),
        Advice(
            "a2a p2p ring send_recv",
            "is alltoall, one rank's at a time",
            {"rotate_method": "alltoall"},
        ),
    ),
    "reduce_dtype": (
        Advice("bfloat16 torch.bfloat16", "is sums of gradients in bf16", {"reduce_dtype": "bf16"}),
        Advice("float float32 torch.float32", "is sums of gradients in fp32", {"reduce_dtype": "fp32"}),
    ),
    "precision": (
        Advice("bfloat16 torch.bfloat16 pure_bf16 bf16-true", "is weights in bf16", {"precision": "bf16"}),
        Advice(
            "amp autocast bf16-mixed mixed-bf16 mixed-precision amp_bf16", "is bf16 autocast over fp32 weights", _MIXED
        ),
        Advice(
            "float float32 torch.float32 full single tf32 32 32-true",
            "is fp32 (TF32 changes products, not bytes)",
            {"precision": "fp32"},
        ),
        Advice(
            "fp16 float16 torch.float16 half 16 16-true 16-mixed fp16-mixed amp_fp16",
            _IS_NOT,
            _MIXED,
            "with bf16, of the same size",
        ),
        Advice("fp8 float8 mxfp8 e4m3 8 mxfp4 nvfp4 4 fp64 float64 double", _IS_NOT),
        Advice("int8 8bit", "is how weights are quantised", {"lora_rank": 16, "quantize": "int8"}),
        Advice("nf4 fp4 int4 4bit", "is how weights are quantised", {"lora_rank": 16, "quantize": "nf4"}),
    ),
    "optimizer": (
        Advice(
            "adamw_torch adamw_hf", "is torch's AdamW as it comes", {"optimizer": "adamw", "adamw_kernel": "foreach"}
        ),
        Advice(
            "adamw_torch_fused adamw_fused fused_adamw fused",
            "is torch's fused AdamW",
            {"optimizer": "adamw", "adamw_kernel": "fused"},
        ),
        Advice("adam torch_adam", _IS_NOT, {"optimizer": "adamw"}, "which holds the same two moments"),
        Advice("adamw_bnb_8bit bnb_adamw_8bit bitsandbytes", "is bitsandbytes' AdamW8bit", {"optimizer": "adamw-8bit"}),
        Advice("lion_32bit lion_bnb_32bit", "is bitsandbytes' Lion", {"optimizer": "lion"}),
        Advice("paged_adamw_32bit", "is bitsandbytes' PagedAdamW32bit", {"optimizer": "paged-adamw"}),
        Advice("paged_lion_8bit", _IS_NOT, {"optimizer": "lion-8bit"}, "whose state stays on the GPU"),
        Advice("paged_lion_32bit paged_lion", _IS_NOT, {"optimizer": "lion"}, "whose state stays on the GPU"),
        Advice("lion_torch lion_pytorch", _IS_NOT, {"optimizer": "lion"}, "with its state in fp32"),
        Advice("adam_8bit adam_bnb_8bit", _IS_NOT, {"optimizer": "adamw-8bit"}, "which holds the same two moments"),
        Advice("adamw_torch_8bit torchao", "is torchao's AdamW8bit", {"optimizer": "adamw-8bit-torchao"}),
        Advice("adamw_torch_4bit", "is torchao's AdamW4bit", {"optimizer": "adamw-4bit"}),
        Advice(
            "cpu_adam deepspeedcpuadam adamw_cpu",
            _IS_NOT,
            {"optimizer": "adamw", "optimizer_on_host": True},
            "without DeepSpeed's buffers",
        ),
        Advice(
            "adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_anyprecision adamw_bnb_32bit ademamix* paged_ademamix* adagrad "
            "rmsprop* galore* q_galore* lomo adalomo grokadamw schedule_free* apollo* "
            "stable_adamw lamb lars came soap shampoo sophia* prodigy adam_mini badam adan nadam radam sgd_momentum momentum",
            _IS_NOT,
        ),
    ),
    "adamw_kernel": (
        Advice("single-tensor single loop", "is torch's loop over the weights", {"adamw_kernel": "for-loop"}),
        Advice("multi-tensor multi", "is torch's foreach", {"adamw_kernel": "foreach"}),
    ),
    "checkpoint": (
        Advice(
            "true yes on all full full_ac each every every_layer per_layer layers block transformer_block gradient_checkpointing "
            "activation_checkpointing gc ac",
            "is checkpointing of every layer",
            _LAYER,
        ),
        Advice("false no off disabled never", "is no checkpointing", {"checkpoint": "none"}),
        Advice(
            "selective_ac sac selective_checkpointing attention",
            "is checkpointing that does not run attention again",
            _SELECTIVE,
        ),
        Advice("op ops per_op mlp min_cut memory_budget", _IS_NOT, _SELECTIVE, "which keeps attention's results alone"),
        Advice(
            "every_n_layers every_n every_other every_second alternate",
            "is checkpointing of each n-th layer",
            {"checkpoint": "every-2"},
            "with n for 2",
        ),
        Advice("use_reentrant old legacy", "is torch's older checkpoint of every layer", {"checkpoint": "reentrant"}),
        Advice("offload cpu_offload offloaded", "is checkpointing with layer inputs in CPU RAM", _OFFLOADED),
        Advice("unsloth", "is Unsloth's, not planned", _OFFLOADED, "which moves the layers' inputs too"),
    ),
    "offload": (
        Advice(
            "true yes on cpu cpu_offload hidden_states inputs hidden boundaries unsloth activation_checkpointing_offload save_on_cpu",
            "is layer inputs in CPU RAM",
            _OFFLOADED,
        ),
        Advice(
            "all activations activation activation_offloading saved trl torchtune",
            "is all that autograd saves in CPU RAM",
            _SAVED,
        ),
        Advice("false no off gpu cuda", "is nothing in CPU RAM", {"offload": "none"}),
        Advice("optimizer states", "is the optimizer's, not activations'", {"optimizer_on_host": True}),
        Advice(
            "params parameters weights model",
            "is the weights', not activations'",
            {"optimizer_on_host": True, "weights_on_host": True},
        ),
        Advice("disk nvme legacy", _IS_NOT, _OFFLOADED, "which keeps them in CPU RAM"),
    ),
    "loss": (
        Advice(
            "liger_kernel liger_loss liger_cross_entropy liger_fused* flce fused* fused_linear_cross_entropy",
            "is Liger's, with the LM head",
            {"loss": "liger"},
        ),
        Advice("cut_cross_entropy cut linear_cross_entropy", "is cut cross-entropy", {"loss": "cce"}),
        Advice("nll chunked_nll fused_lm_head", "is the loss of TRL's trainers", {"loss": "trl"}),
        Advice(
            "unsloth tiled* chunked_cross_entropy chunked_ce",
            _IS_NOT,
            _CHUNKED,
            _NO_LOGITS,
        ),
        Advice("mst minisequence mini_sequence chunk chunks", "is MsT's loss", _CHUNKED),
        Advice(
            "cross_entropy crossentropyloss ce full standard default plain none hf torch causal_lm forcausallm",
            "is the loss over all logits",
            {"loss": "transformers"},
        ),
        Advice(
            "dft dpo grpo kto orpo ppo rloo simpo cpo mse kl distillation reward", "is not planned: next-token loss is"
        ),
    ),
    "kernels": (
        Advice(
            "plain default none off false no pytorch hf transformers eager",
            "is the model's own code",
            {"kernels": "torch"},
        ),
        Advice("true yes on triton linkedin liger_kernel liger_kernels use_liger", "is Liger's", {"kernels": "liger"}),
        Advice("flash-linear-attention fla_core", "is fla", {"kernels": "fla"}),
        Advice("causal_conv causal_conv1d_cuda", "is causal-conv1d", {"kernels": "causal-conv1d"}),
        Advice(
            "causal-conv1d,fla flash-linear-attention,causal-conv1d",
            "is both packages",
            {"kernels": "fla+causal-conv1d"},
        ),
        Advice(
            "mamba mamba2 mamba-ssm,causal-conv1d causal-conv1d,mamba-ssm",
            "is mamba-ssm, which needs causal-conv1d",
            {"kernels": "mamba-ssm"},
        ),
        Advice("unsloth quack hub kernels_community use_kernels apex xformers", _IS_NOT, {"kernels": "torch"}),
    ),
    "attention": (
        Advice(
            "flash_attention_2 flash_attention flash_attn flash_attn_2 flash2 fa fa2 kernels-community/flash-attn2 kernels-community/flash-attn",
            "is FlashAttention-2",
            {"attention": "flash"},
        ),
        Advice(
            "flash_attention_3 flash_attn_3 flash3 fa3 kernels-community/vllm-flash-attn3 kernels-community/flash-attn3 "
            "flash_attention_4 flash_attn_4 flash4 fa4 kernels-community/flash-attn4",
            _IS_NOT,
            {"attention": "flash"},
            "which is FlashAttention-2",
        ),
        Advice(
            "auto default sdp sdp_attention torch torch_sdpa sdpa_flash scaled_dot_product_attention",
            "is what transformers takes by itself",
            {"attention": "sdpa"},
        ),
        Advice(
            "memory_efficient mem_efficient sdpa_mem_efficient efficient_attention",
            "is sdpa with its memory-efficient kernel",
            {"attention": "efficient"},
        ),
        Advice("sdpa_cudnn cudnn_attention cudnn_sdpa", "is sdpa with cuDNN's kernel", {"attention": "cudnn"}),
        Advice("xformers", _IS_NOT, {"attention": "efficient"}, "torch's kernel of that kind"),
        Advice("sdpa_math math", _IS_NOT, {"attention": "eager"}, "which writes out the score matrix too"),
        Advice("disabled vanilla", "is transformers' eager attention", {"attention": "eager"}),
        Advice("flex flex_attention paged* sage* sparse linear* native_sparse", _IS_NOT),
        Advice("ring* context_parallel cp", "is no kernel: it shares sequences out", _RING),
        Advice("ulysses alst", "is no kernel: it shares sequences out", _ULYSSES),
    ),
    "sharding": (
        Advice("fsdp2 fsdp_v2 fully_shard full_shard fsdp_full_shard", "is FSDP2", _FSDP),
        Advice("fsdp_v1 fullyshardeddataparallel flat_parameters", "is FSDP1", {"sharding": "fsdp1"}),
        Advice(
            "zero zero_stage_3 stage3 deepspeed deepspeed_zero3 deepspeed_stage_3",
            "is DeepSpeed's, of which zero1, zero2 and zero3 are planned",
            {"sharding": "zero3"},
        ),
        Advice("stage1 zero_stage_1 deepspeed_zero1 deepspeed_stage_1", "is ZeRO-1", {"sharding": "zero1"}),
        Advice("stage2 zero_stage_2 deepspeed_zero2 deepspeed_stage_2", "is ZeRO-2", {"sharding": "zero2"}),
        Advice(
            "zero2_offload zero_offload",
            "is ZeRO-2 with the optimizer in CPU RAM",
            {"sharding": "zero2", "optimizer_on_host": True},
        ),
        Advice(
            "shard_grad_op fsdp_shard_grad_op grad_op fairscale oss",
            _NOT_YET,
            _FSDP,
            "which shards the weights too",
        ),
        Advice("hsdp hybrid hybrid_shard fsdp_hybrid_shard", "is FSDP2 in replicas", {**_FSDP, "replicas": 2}),
        Advice(
            "zero3_offload zero_infinity",
            "is ZeRO-3 with all in CPU RAM",
            {"sharding": "zero3", **_ON_HOST},
        ),
        Advice("mics", _NOT_YET, {**_FSDP, "replicas": 2}, "with as many replicas as there are groups"),
        Advice("fsdp_offload fsdp_cpu_offload", "is FSDP2's CPUOffloadPolicy", {**_FSDP, **_ON_HOST}),
        Advice(
            "dp data_parallel dataparallel distributeddataparallel replicate no_shard",
            "is all on each GPU",
            {"sharding": "ddp"},
        ),
        Advice(
            "pp pipeline* ep expert* megatron 2d 3d 4d 5d",
            _IS_NOT,
        ),
        Advice("sp sequence* ulysses alst", "shares sequences out, beside any sharding", _ULYSSES),
        Advice("cp context* ring*", "shares sequences out, beside any sharding", _RING),
        Advice("tp tensor*", "splits every matrix, as transformers' tp_plan does", _SPLIT),
    ),
    "quantize": (
        Advice("4bit 4 int4 bnb_4bit bitsandbytes load_in_4bit bnb", "is nf4, or fp4", {"quantize": "nf4"}),
        Advice("8bit 8 bnb_8bit llm_int8 load_in_8bit", "is int8", {"quantize": "int8"}),
        Advice("no off false bf16 fp32 16 32", "is no quantisation", {"quantize": "none"}),
        Advice(
            "gptq awq hqq eetq aqlm mxfp4 nvfp4 fp8 gguf torchao quanto",
            _IS_NOT,
            {"quantize": "nf4"},
            "of about the size",
        ),
    ),
    "quant_storage": (
        Advice("bytes int8 torch.uint8 none", "is uint8", {"quant_storage": "uint8"}),
        Advice("bfloat16 torch.bfloat16 16", "is bf16", {"quant_storage": "bf16"}),
        Advice("float32 float torch.float32 32", "is fp32", {"quant_storage": "fp32"}),
        Advice("fp16 float16 torch.float16 half", _IS_NOT, {"quant_storage": "bf16"}, "of the same size"),
    ),
    "backward_prefetch": (
        Advice("backward_pre", "is pre", {"backward_prefetch": "pre"}),
        Advice("no_prefetch no off false", "is none", {"backward_prefetch": "none"}),
        Advice("backward_post post", _IS_NOT, {"backward_prefetch": "none"}),
    ),
    "adapter_dtype": (
        Advice("float32 float torch.float32 full 32", "is fp32", {"adapter_dtype": "fp32"}),
        Advice("bfloat16 torch.bfloat16 16", "is bf16", {"adapter_dtype": "bf16"}),
        Advice("fp16 float16 half", _IS_NOT, {"adapter_dtype": "bf16"}, "of the same size"),
    ),
    "strategy": (
        Advice(
            "baseline plain none default vanilla naive no_checkpoint",
            "is training without checkpoints and chunks",
            {"strategy": "no-checkpointing"},
        ),
        Advice(
            "gradient_checkpointing activation_checkpointing gc ac full_checkpointing checkpoint_layer layer",
            "is checkpointing of every layer",
            {"strategy": "checkpointing"},
        ),
        Advice(
            "mst_layers layer_in_chunks layers_in_chunks chunked_layer chunked_layers",
            "is MsT with layers in pieces",
            {"strategy": "mst-layer"},
        ),
        Advice("minisequence mini_sequence mini_sequence_transformer chunked chunks", "is MsT", {"strategy": "mst"}),
        Advice(
            "tiled tiled_mlp alst",
            "is ALST's tiling, not planned",
            {"strategy": "mst"},
            "which runs MLP and loss in chunks too",
        ),
        Advice(
            "offload cpu_offload activation_offloading",
            "is no strategy alone",
            {"strategy": "mst-offload"},
            "which moves the layers' inputs",
        ),
        Advice(
            "fsdp fsdp2 zero3 deepspeed",
            "is no strategy: how a model is shared out is said beside it",
            _FSDP,
            _SHARDS_ALL,
        ),
        Advice("lora peft adapter*", "is no strategy", {"lora_rank": 16}, "beside any strategy"),
        Advice("qlora", "is no strategy", {"lora_rank": 16, "quantize": "nf4"}, "beside any strategy"),
        Advice("dora", "is no strategy", {"lora_rank": 16, "dora": True}, "beside any strategy"),
    ),
}

CHOICES: dict[str, tuple[Advice, ...]] = {
    "rung": (
        Advice("simulated simulate simulation fake", "is the trace", {"rung": "trace"}),
        Advice("estimated estimate estimation analytical", "is the formula", {"rung": "formula"}),
        Advice("measured measure measurement measurements", "is a command of its own: mstplan measure"),
    ),
    "device": (
        Advice("gpu nvidia cuda:0", "is a CUDA device", {"device": "cuda"}),
        Advice("cuda:*", "is chosen by CUDA_VISIBLE_DEVICES", {"device": "cuda"}, "behind CUDA_VISIBLE_DEVICES=1"),
        Advice("rocm* hip* amd*", "is called cuda by torch", {"device": "cuda"}),
        Advice("mps* metal xpu* npu* hpu*", "is not measured on"),
    ),
    "dtype": (
        Advice("bf16 torch.bfloat16", "is bfloat16", {"dtype": "bfloat16"}),
        Advice("fp32 float full torch.float32", "is float32", {"dtype": "float32"}),
        Advice("fp16 float16 half torch.float16", _IS_NOT, {"dtype": "bfloat16"}, "of the same size"),
    ),
}
"""The same of options that are no fields of a recipe."""

_OPTIONS = (
    Advice(
        "lora-r rank r use-peft use-lora peft* adapter adapters adapter-rank finetuning-type tuner-type train-type",
        "",
        {"lora_rank": None},
    ),
    Advice("qlora use-qlora", "", {"lora_rank": 16, "quantize": "nf4"}),
    Advice("use-dora peft-use-dora", "", {"dora": True}),
    Advice(
        "target-modules lora-target lora-target-modules lora-modules lora-target-linear", "", {"lora_targets": None}
    ),
    Advice("modules-to-save", "", {"lora_modules_to_save": None}),
    Advice(
        "lora-target-parameters target-parameters",
        "adapters of single parameters (experts') are not planned",
        {"lora_targets": None},
        "whose targets are modules",
    ),
    Advice("lora-alpha lora-bias use-rslora lora-init* lora-plus* loraplus* lora-task-type task-type", _NO_MEMORY),
    Advice("bnb-4bit-quant-storage bnb-4bit-quant-storage-dtype quant-storage-dtype", "", {"quant_storage": None}),
    Advice("load-in-4bit 4bit nf4 int4 bnb-4bit* quantization-bit quant-bits bits", "", {"quantize": "nf4"}),
    Advice("load-in-8bit 8bit int8", "", {"quantize": "int8"}),
    Advice("use-bnb-nested-quant double-quantization double-quant bnb-nested*", "", {"double_quantize": True}),
    Advice("quantization quantization-method quant-method quant-type quant", "", {"quantize": None}),
    Advice(
        "gptq awq hqq eetq aqlm",
        "of quantised weights bitsandbytes' are planned",
        {"quantize": "nf4"},
        "of about the size",
    ),
    Advice("prepare-model-for-kbit-training kbit", "", {"kbit_preparation": True}),
    Advice(
        "deepspeed* zero*",
        "of DeepSpeed's ZeRO its stages are planned",
        {"sharding": "zero3"},
        "or zero1 and zero2",
    ),
    Advice("fsdp fsdp2 fully-shard", "", _FSDP),
    Advice("fsdp1 fsdp-version", "", {"sharding": "fsdp1"}, "for version 1, fsdp for 2"),
    Advice("hsdp dp-replicate* replicate-size", "", {"replicas": None}),
    Advice("fsdp-offload-params fsdp-cpu-offload fsdp-offload", "", {**_FSDP, **_ON_HOST}),
    Advice("fsdp-reduce-dtype mp-reduce-dtype mixed-precision-reduce", "", {"reduce_dtype": None}),
    Advice("gpus-per-machine num-gpus-per-node devices-per-node local-world-size", "", {"gpus_per_node": None}),
    Advice("ddp* dp data-parallel* dp-size", "of several GPUs, FSDP2 alone is planned", _FSDP, _SHARDS_ALL),
    Advice("cp cp-size context-parallel-size context-parallel-degree ring-attention*", "", {"context_parallel": None}),
    Advice("cp-comm-strategy cp-rotate-method set-rotate-method", "", {"rotate_method": None}),
    Advice("sp sp-size sequence-parallel-size sequence-parallel-degree ulysses* alst", "", {"sequence_parallel": None}),
    Advice(
        "enable-sequence-parallel megatron-sequence-parallel",
        "is norms over tokens beside split matrices",
        {**_SPLIT, "sequence_parallel_norms": True},
    ),
    Advice(
        "enable-loss-parallel parallel-loss vocab-parallel*",
        "",
        {**_SPLIT, "sequence_parallel_norms": True, "loss_parallel": True},
    ),
    Advice("tp tp-size tp-plan tensor-parallel-size tensor-parallel-degree", "", {"tensor_parallel": None}),
    Advice(
        "ep ep-size expert-parallel-size expert-parallel-degree expert-model-parallel*", "", {"expert_parallel": None}
    ),
    Advice("moe-imbalance expert-load-imbalance router-imbalance capacity-factor", "", {"expert_imbalance": None}),
    Advice(
        "pp pp-size pipeline-parallel*",
        "of several GPUs, FSDP2, DDP, Ulysses, ring attention, tensor and expert parallel are planned",
        _FSDP,
        "which shares out the weights, not a matrix product",
    ),
    Advice("fsdp-*", "how FSDP2 goes about it is not varied", _FSDP, _SHARDS_ALL),
    Advice(
        "liger-fused-linear-cross-entropy liger-cross-entropy liger-loss flce",
        "",
        {"loss": "liger"},
    ),
    Advice("liger* use-liger* enable-liger*", "", {"loss": "liger", "kernels": "liger"}),
    Advice("cce use-cce cut-cross-entropy", "", {"loss": "cce"}),
    Advice("chunked-loss chunked-cross-entropy chunked-nll use-chunked-loss", "", _CHUNKED),
    Advice("loss-type loss-function", "", {"loss": None}),
    Advice("tiled-mlp use-tiled-mlp minisequence mst", "", {"strategy": "mst"}),
    Advice("num-chunks mlp-chunks loss-chunks tiled-mlp-num-shards num-output-chunks", "", {"mlp_chunks": None}),
    Advice("unsloth use-unsloth", "Unsloth's kernels are not planned"),
    Advice("use-unsloth-gc", "", _OFFLOADED),
    Advice(
        "gradient-checkpointing activation-checkpointing use-gradient-checkpointing enable-gradient-checkpointing enable-activation-checkpointing "
        "fsdp-activation-checkpointing recompute",
        "",
        _LAYER,
    ),
    Advice(
        "no-gradient-checkpointing disable-gradient-checkpointing no-checkpoint no-checkpointing",
        "",
        {"checkpoint": "none"},
    ),
    Advice(
        "selective-checkpointing selective-activation-checkpointing",
        "",
        _SELECTIVE,
    ),
    Advice("use-reentrant reentrant use-reentrant-gc", "", {"checkpoint": "reentrant"}),
    Advice("every-n-layers checkpoint-every", "", {"checkpoint": "every-2"}, "with n for 2"),
    Advice(
        "activation-offloading activation-offload offload-activations enable-activation-offloading",
        "",
        _SAVED,
    ),
    Advice("activation-cpu-offload activation-checkpointing-offload", "", _OFFLOADED),
    Advice(
        "offload-optimizer optimizer-offload cpu-offload-optimizer offload-optimizer-device zero-offload cpu-adam",
        "",
        {"optimizer_on_host": True},
    ),
    Advice(
        "offload-param offload-params offload-param-device cpu-offload offload-weights",
        "",
        _ON_HOST,
    ),
    Advice("flash-attn* flash-attention* use-flash-attn* use-flash-attention* fa2", "", {"attention": "flash"}),
    Advice("sdpa sdp-attention", "", {"attention": "sdpa"}),
    Advice("eager eager-attention", "", {"attention": "eager"}),
    Advice("attn attn-impl attn-implementation attention-implementation attention-backend", "", {"attention": None}),
    Advice(
        "xformers* flex-attention",
        "no such attention is planned",
        {"attention": "sdpa"},
        "with the kernel that torch chooses",
    ),
    Advice(
        "bf16 bfloat16",
        "it can mean weights in bf16, or autocast over fp32 weights",
        {"precision": "bf16"},
        "or for autocast --precision mixed",
    ),
    Advice("pure-bf16", "", {"precision": "bf16"}),
    Advice("amp mixed-precision", "", _MIXED),
    Advice("fp16 float16 half", "fp16 is not planned", _MIXED, "with bf16, of the same size"),
    Advice("fp32 float32 tf32", "", {"precision": "fp32"}),
    Advice("fp8 float8", "fp8 is not planned"),
    Advice("dtype torch-dtype model-dtype", "", {"precision": None}),
    Advice(
        "batch-size bs mbs micro-batch-size train-batch-size per-device-train-batch-size per-device-batch-size train-micro-batch-size-per-gpu",
        "",
        {"batch": None},
    ),
    Advice(
        "gradient-accumulation-steps gradient-accumulation accumulation-steps grad-accum grad-accum-steps accumulate-grad-batches gas",
        "",
        {"accumulation": None},
    ),
    Advice(
        "global-batch-size",
        "it is batch, micro-batches and GPUs multiplied",
        {"batch": None, "accumulation": None},
        "each by itself",
    ),
    Advice("optim optimizer-type optimizer-name", "", {"optimizer": None}),
    Advice("use-8bit-adam 8bit-adam adamw-8bit adam-8bit", "", {"optimizer": "adamw-8bit"}),
    Advice("fused fused-adamw adamw-fused", "", {"optimizer": "adamw", "adamw_kernel": "fused"}),
    Advice("gradient-clipping gradient-clip-val clip-grad* clipping", "", {"max_grad_norm": None}),
    Advice("fsdp-use-orig-params orig-params", "", {"use_orig_params": True}),
    Advice("optimizer-in-bwd fused-backward", "", {"optimizer_in_backward": True}),
    Advice(
        "num-gpus n-gpus n-gpu ngpu ngpus gpu-count num-gpu nproc-per-node num-processes world-size devices num-devices",
        "",
        {"gpus": None},
    ),
    Advice(
        "model-name-or-path model-name model-id model-path base-model pretrained-model-name-or-path",
        "",
        {"model": None},
    ),
    Advice("gpu-name gpu-type card accelerator", "", {"gpu": None}),
    Advice("vram gpu-memory gpu-ram vram-gb gpu-mem-gb memory mem", "", {"gpu_mem": None}),
    Advice("ram cpu-ram cpu-memory cpu-mem host-memory host-ram", "", {"host_mem": None}),
    Advice(
        "max-seq-length max-seq-len max-length seq-length sequence-length sequence-len context-length context max-context cutoff-len block-size "
        "model-max-length max-tokens tokens ctx",
        "",
        {"seq_len": None},
    ),
    Advice(
        "packing-strategy sample-packing neat-packing packed",
        "samples of a row are told apart",
        {"packing": None},
        "with how many there are in a row",
    ),
    Advice("torch-compile* compile", "torch.compile is not planned"),
    Advice(
        "max-model-len max-num-seqs kv-cache* gpu-memory-utilization max-new-tokens",
        "inference is not planned, training is",
    ),
    Advice("eval* do-eval per-device-eval-batch-size", "evaluation is not planned, training is"),
    Advice(
        "lr* learning-rate* warmup* weight-decay epochs num-train-epochs num-epochs max-steps adam-beta1 adam-beta2 adam-epsilon beta1 beta2 optim-args "
        "seed data-seed output-dir dataset* dataloader* logging* log-level report-to run-name save* "
        "push-to-hub hub-* do-train resume-from-checkpoint",
        _NO_MEMORY,
    ),
)


def _letters(name: str) -> str:
    return "".join(c for c in name[:100].lower() if c.isalnum())


def _find_advice(table: Collection[Advice], typed: str) -> Advice | None:
    """The advice on what was typed: where it is named, else where something like it is."""
    key = _letters(typed)
    rows = [(name, advice) for advice in table for name in advice.names.split()]
    named = (advice for name, advice in rows if _letters(name) == key and not name.endswith("*"))
    like = (advice for name, advice in rows if name.endswith("*") and key.startswith(_letters(name)))
    return next(named, None) or next(like, None)


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


def flags_of(advice: Advice) -> list[str]:
    """The options that an advice says to write."""
    return [_flag(field) for field in advice.write]


def _as_options(advice: Advice) -> str:
    words = zip(flags_of(advice), advice.write.values(), strict=True)
    return " ".join(flag if value is None or value is True else f"{flag} {value}" for flag, value in words)


def _as_fields(advice: Advice) -> str:
    fields = [
        field if value is None else f"{field}={value!r}"
        for field, value in advice.write.items()
        if field not in _OTHERS
    ]
    return f"{', '.join(fields)} ({_as_options(advice)})" if fields else _as_options(advice)


def _flag(field: str) -> str:
    """The option for a field; where a strategy alone decides it, that."""
    from .recipe import option_of

    return "-s mst-layer" if field == "layer_in_chunks" else option_of(field)


_FIELD = re.compile(r"\b(\w+)=('[^']*'|\([^()]*\)|[\w.]+)")
_BOTH = re.compile(rf"{_FIELD.pattern}(?:, {_FIELD.pattern})* \((--?[a-z][^()]*)\)")


def in_options(message: str) -> str:
    """What is said of a recipe's fields, in the command line's words alone: `loss='chunked' (--loss chunked)` is --loss chunked there, and so is
    `loss='chunked'`."""
    from .recipe import Recipe

    def flag(match: re.Match[str]) -> str:
        name = match[1]
        return _flag(name) if name in Recipe.model_fields else match[0]

    def words(match: re.Match[str]) -> str:
        value = match[2].strip("'")
        return match[0] if (named := flag(match)) == match[0] else named + f" {value}" * (value != "True")

    message = _FIELD.sub(words, _BOTH.sub(lambda match: match[match.lastindex or 0], message))
    message = re.sub(
        r"\b(\w+) \((--[\w-]+)\)", lambda match: match[2] if flag(match) == match[2] else match[0], message
    )
    message = re.sub(r"(?<![\w'-])([a-z]\w*_[a-z_]+)(?![\w'])", flag, message)
    return re.sub(r"^(\w+)(?=:)", flag, message)


def _compose_way_out(advice: Advice, replacement: str, otherwise: str) -> str:
    if not advice.write:
        return otherwise
    if advice.difference:
        return f"Nearest: {replacement}, {advice.difference}."
    return f"Write it as {replacement}." if None in advice.write.values() else f"Write {replacement}."


def unknown_value(
    field: str, typed: object, planned: Collection[str], more: str = "", older: Collection[str] = ()
) -> str:
    """Two lines about a value that `field` cannot have; `planned` are those it can, `more` what else, `older` names are taken too."""
    shown, word = (field, "Planned") if field in VALUES else (f"--{field}", "Known")
    text, all_planned = one_line(typed), f"{word}: {', '.join(planned)}{more}."
    spelled = [Advice(value, "is spelled otherwise", {field: value}) for value in (*planned, *older)]
    rows = VALUES.get(field) or CHOICES.get(field, ())
    advice = _find_advice((*spelled, *rows), text) if isinstance(typed, str | bool) else None
    if advice is None:
        return f"unknown {shown} {quoted(typed)}.{did_you_mean(text, (*planned, *older))}\n{all_planned}"
    return f"{shown}: {quoted(typed)} {advice.statement}.\n{_compose_way_out(advice, _as_fields(advice), all_planned)}"


def unknown_field(typed: str) -> str | None:
    """Two lines about a field that a recipe does not have; None when nothing is known of it."""
    advice = _find_advice(_OPTIONS, typed)
    return (
        _compose_message(f"a recipe has no field {quoted(typed)}", advice, _as_fields(advice))
        if advice is not None
        else None
    )


def find_option(typed: str) -> Advice | None:
    """What is known of an option that does not exist."""
    return _find_advice(_OPTIONS, typed)


def unknown_option(typed: str, advice: Advice, whose: str = "") -> str:
    """Two lines about it; `whose` says which commands have what is recommended."""
    return _compose_message(f"no option {one_line(typed, 60)}", advice, _as_options(advice) + whose)


def _compose_message(start: str, advice: Advice, replacement: str) -> str:
    return f"{start}{': ' * bool(advice.statement)}{advice.statement}.\n{_compose_way_out(advice, replacement, 'Leave it out.')}"
