"""What is worth saying about an answer."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from ..errors import RecipeError
from ..spec import hardware
from ..spec.families import family_of
from ..spec.hardware import (
    EXPANDABLE,
    EXPANDABLE_SETTING,
    GRANULARITY,
    USUAL,
    WITHOUT_SETTINGS,
    Card,
    Gpu,
    gpus_of_size,
)
from ..spec.model import Experts, Mixer, Model
from ..spec.speeds import speeds_of
from ..step.cuda import BIAS_ROWS
from ..step.expert_parallel import most_rows, rows_of_a_token
from ..step.kernels import SDPA
from ..step.mixer_packages import VERSIONS, kernels_for, kernels_in_words
from ..step.optimizers import OPTIMIZERS, stand_ins
from ..step.parameters import parameter_count, trained_count
from ..step.recipe import STRATEGY_FIELDS, Recipe, strategy_label, strategy_of, words_of
from ..step.steps import Chunks, Layout, attention_kernel, embeddings_are_frozen, kernels_of
from ..step.tape import ITEMSIZE
from ..step.towers import masks_text
from ..units import GIB, format_count, format_gib, format_seconds, format_tokens
from . import calibration
from .allocation import longest_that_runs
from .layout import check_counted, pieces_that_there_are, window_of
from .solve import (
    Answer,
    Plan,
    attention_copies_bytes,
    longest_sequence,
    max_seq,
    peak_up_to,
    smallest_chunks_tokens,
    why_no_time,
)
from .ways import MOST_GPUS, Way, nearest_plan, tries_adapters


def left_out_notes(model: Model | None = None) -> list[str]:
    """A line for each file of the user's folder that answers, on this model, do without because it is damaged."""
    return hardware.left_out_notes() + (calibration.left_out_notes(model) if model is not None else [])


def card_notes(card: Card) -> list[str]:
    """How the budget came about."""
    gpu = card.gpu
    if card.named and card.total_bytes == gpu.usable_bytes:
        size = f"{gpu.label}: torch sees {format_gib(card.total_bytes)} ({gpu.usable_kind})"
    elif card.named:
        size = f"{gpu.label}, limited to {format_gib(card.total_bytes)} by --gpu-mem"
    else:
        size = (
            f"--gpu-mem: {format_gib(card.total_bytes)} nominal (GB is read as GiB: a GPU sold as 80 GB holds 80 GiB)"
        )
    notes = [
        f"{size}; minus {format_gib(gpu.context_bytes)} CUDA context ({_context_origin(card)}) and {format_gib(GRANULARITY, 0)} allocator granularity"
        + (f" and {format_gib(card.reserve_bytes)} reserve" if card.reserve_bytes else "")
        + f": a budget of {format_gib(card.budget_bytes)}."
    ]
    if not card.named:
        similar = gpus_of_size(card)
        if similar:
            examples = ", ".join(f"{g.name} {g.usable_bytes / GIB:.2f}" for g in similar[:4])
            notes.append(f"Real GPUs show less; name yours with --gpu (GiB that torch sees: {examples}).")
        notes.append(f"Chunk sizes and step times assume the rates of {gpu.name}; --gpu names another.")
    if card.named and gpu.shared_memory:
        notes.append(
            f"{gpu.name} shares its memory with the CPU: leave room for the system and your program with --reserve; CPU RAM offloads nothing here."
        )
    if gpu.architecture in ("pascal", "volta", "turing"):
        notes.append(
            f"{gpu.name} has neither bf16 tensor cores nor FlashAttention-2: real steps there need more memory and time."
        )
    return notes


def other_allocator(card: Card) -> Card:
    """The card with torch's allocator set the other way."""
    return card._replace(allocator=USUAL if card.expandable else EXPANDABLE)


def _setting(card: Card) -> str:
    return f"with {EXPANDABLE_SETTING}" if card.expandable else WITHOUT_SETTINGS


def longest_allocator_note(best: Answer, other_s_max: int) -> str:
    """What S_max stands on, and what it is with the allocator set the other way."""
    card, label = best.plan.card, strategy_label(best.strategy)
    advice = " (export it)" if card.expandable else ""
    other = f"{_setting(other_allocator(card))} {label} reaches {format_tokens(other_s_max)}"
    return f"longest: what torch's allocator finds room for, step after step, {_setting(card)}{advice}; {other}."


def allocator_note(plan: Plan) -> list[str]:
    """How a step whose tensors fit fares with the allocator set the other way."""
    if not plan.tensors_fit:
        return []
    other = plan._replace(card=other_allocator(plan.card))
    usage = other.usage
    runs = (
        f"runs with {format_gib(usage.reserved)} reserved"
        if usage.runs
        else f"runs out of memory in step {usage.steps}"
    )
    notes = [f"torch's allocator is simulated {_setting(plan.card)}; {_setting(other.card)} it {runs}."]
    if plan.fits and plan.usage.retries > plan.usage.steps:
        notes.append(
            f"At this length the allocator gives back what it cached {plan.usage.retries // plan.usage.steps:,} times a step, and waits"
            " for the GPU each time: somewhat shorter sequences run faster."
        )
    return notes


def _context_origin(card: Card) -> str:
    """How its bytes are known, in a word or two."""
    kind = card.gpu.context_kind
    return kind if card.named or kind == "assumed" else f"{kind} on {card.gpu.name}"


def recipe_notes(model: Model, recipe: Recipe) -> list[str]:
    notes = []
    if recipe.attention == "sdpa" and not model.has_sdpa and model.attends and model.stand_in is None:
        kernel = "eager" if recipe.runs_in_fp32 or model.eager_only else "flash_attention_2"
        notes.append(f"transformers has no sdpa for {model.model_type}: planned with attn_implementation='{kernel}'.")
        if model.attention.sinks and kernel != "eager":
            notes.append(
                "Kernels that know attention sinks come with the package kernels; without it: --attention eager."
            )
    if recipe.attention == "sdpa" and model.release is not None:
        notes.append(
            f"{model.model_type} as in {model.release.words}: sdpa {_sdpa_in_releases(model)}; --transformers names yours."
        )
    notes += [
        _mixer_note(mixer, recipe)
        for mixer in dict.fromkeys(kind.mixer for kind in model.layer_kinds)
        if mixer in PACKAGES
    ]
    windows = any(kind.window is not None for kind in model.layer_kinds)
    if recipe.attention == "sdpa" and masks_text(model, recipe):
        notes.append(
            "With images transformers gives sdpa an explicit S x S mask in every layer, at any length: an image sees all of itself. Where S is no "
            f"multiple of {BIAS_ROWS}, the memory-efficient kernel pads a copy of it."
        )
    elif recipe.attention == "sdpa" and model.has_sdpa and windows:
        notes.append(
            "With sdpa, sliding-window layers take an explicit S x S mask beyond their window, and a padded copy of it where S is no multiple"
            f" of {BIAS_ROWS}; --attention flash needs none."
        )
    if recipe.attention == "sdpa" and any(kind.causal_mask for kind in model.layer_kinds):
        notes.append(
            f"transformers gives sdpa an explicit S x S mask for {model.model_type}, and each layer makes a bias of it."
        )
    if recipe.attention == "sdpa" and model.attention.keys == "broadcast":
        notes.append(
            "Its queries share one head of keys in a way that leaves sdpa the math kernel, which writes out the score matrix."
        )
    if (
        recipe.compute_dtype == "float32"
        and recipe.attention == "sdpa"
        and model.attention.kv_heads != model.attention.heads
    ):
        notes.append("In fp32, sdpa has no fast kernel for grouped queries and writes out the score matrix.")
    if OPTIMIZERS[recipe.optimizer].paged and not recipe.optimizer_on_host:
        notes.append(
            "Paged states count as the GPU's memory, though torch's allocator does not show them: the driver moves them to CPU RAM only "
            "when the GPU is full, and every step needs all of them."
        )
    notes += _frozen_notes(model, recipe) if recipe.train or recipe.freeze else []
    return notes + _notes_of_several_gpus(model, recipe)


_MAMBA2 = "Mamba-2's scan runs", "mamba-ssm and causal-conv1d"
PACKAGES: Mapping[Mixer, tuple[str, str]] = {
    "short conv": ("Short convolutions run", "causal-conv1d"),
    "mamba2": _MAMBA2,
    "attention and mamba2": _MAMBA2,
    "gated delta": ("Linear attention runs", "flash-linear-attention and causal-conv1d"),
}
"""What mixes tokens otherwise than by attention, and the packages with kernels for it, which transformers takes where it finds them."""


def _mixer_note(mixer: Mixer, recipe: Recipe) -> str:
    what, packages = PACKAGES[mixer]
    if recipe.kernels not in VERSIONS:
        return (
            f"{what} as transformers' own torch code (--kernels torch); kernels of {packages}, which it takes where they are installed, hold less: "
            "--kernels names those that you have."
        )
    first = " Triton tunes them in the first step, with 256 MiB of its own that are not counted."
    return (
        f"{what} by {kernels_in_words(recipe.kernels)} ({VERSIONS[recipe.kernels]}), which transformers takes where they are installed; its own "
        f"torch code (--kernels torch) holds more.{first if recipe.kernels != 'causal-conv1d' else ''}"
    )


def kernels_note(answer: Answer) -> list[str]:
    """How far a strategy reaches with the other code of what mixes tokens: with the most packages, or with none."""
    plan, planned = answer.plan, kernels_for(answer.plan.model.mixer)
    if not planned:
        return []
    kernels = planned[-1] if plan.recipe.kernels == "torch" else "torch"
    try:
        s_max = max_seq(plan.model, plan.recipe.changed(kernels=kernels), plan.card).s_max
    except RecipeError:  # what the packages do not serve
        return []
    reached = f"{format_tokens(s_max)} tokens" if s_max else "nothing"
    whose = kernels_in_words(kernels) or "transformers' own torch code"
    return [f"{strategy_label(answer.strategy)} with {whose} (--kernels {kernels}): {reached}."]


def _sdpa_in_releases(model: Model) -> str:
    """In which releases transformers has sdpa for a model of which it has not in all."""
    major, minor = family_of(model.model_type).no_sdpa_from or (0, 0)
    return f"up to {major}.{minor - 1}, none from {major}.{minor} on"


def _frozen_notes(model: Model, recipe: Recipe) -> list[str]:
    """What is trained of a model whose formula is known, and how far down backward goes."""
    if model.stand_in is not None:
        return []
    trained, total = trained_count(model, recipe), parameter_count(model)[0]
    notes = [f"{format_count(trained)} of {format_count(total)} parameters are trained."]
    if recipe.checkpoint != "none" and not recipe.input_gradients and embeddings_are_frozen(model, recipe):
        notes.append(
            "Backward ends at the first trained weight, as under minisequence; with transformers' own checkpointing, from 5.0 on,"
            " it goes on to the embeddings: --input-gradients."
        )
    return notes


def kernel_words(model: Model, recipe: Recipe, card: Card) -> str:
    """What sdpa comes to on a card, in words; nothing where the recipe says it, or nothing tells."""
    if attention_kernel(model, recipe) != SDPA or model.stand_in is not None:
        return ""
    layouts = [Layout(recipe, False, False, masked, platform=card.platform) for masked in (False, True)]
    plain, masked = (kernels_of(model, layout) for layout in layouts)
    others = [kernel.label for kernel in masked if kernel not in plain] if window_of(model, recipe) is not None else []
    return plain[0].label + "".join(f", under a mask by {label}" for label in others)


def kernel_notes(model: Model, recipe: Recipe, card: Card) -> list[str]:
    """By which build of torch sdpa's kernel is chosen, where it depends on that (Platform.prefers_cudnn)."""
    capability = card.gpu.compute_capability
    depends = capability is not None and capability[0] in (9, 10)
    if not depends or attention_kernel(model, recipe) != SDPA or recipe.compute_dtype == "float32":
        return []
    how = "assumed: no build for CUDA is installed here" if card.build.assumed else "as installed or named"
    ran = "cuDNN's attention" if card.platform.prefers_cudnn else "FlashAttention-2"
    gpu = card.gpu.name if card.named else f"a GPU like {card.gpu.name}"
    return [
        f"Attention on {gpu}: with torch {card.build.name} ({how}) sdpa first asks for {ran}; --torch 2.10+cu128 counts with another build."
    ]


def time_notes(plans: Iterable[Plan]) -> list[str]:
    """What expected times stand on, and why there are none, where a GPU's rates have been measured."""
    notes = []
    for plan in plans:
        gpu, why = plan.card.gpu, why_no_time(plan)
        if copied := attention_copies_bytes(plan):
            notes.append(
                f"--attention-on-host: {format_gib(copied)} of queries, keys, values, results and gradients cross between CPU RAM and GPU in a step, "
                f"while nothing else runs: {format_seconds(copied / gpu.host_link)} at {gpu.host_link / 1e9:.0f} GB/s ({gpu.host_link_name})."
            )
        if why:
            notes.append(
                f"No expected step time: of {why} nothing was measured on {gpu.name}. step >= is at nominal rates."
            )
        elif (speeds := speeds_of(gpu)) is not None and plan.expected_seconds is not None:
            shares = "" if speeds.gpu == gpu.name else f", as shares of {gpu.name}'s nominal ones"
            model, steps, within = speeds.checked
            notes.append(
                f"step: expected from rates measured on {speeds.gpu} with torch {speeds.torch}{shares}; {steps} measured steps of {model} "
                f"took within {within:.0%} of it. --json has the least a step can take, too."
            )
    return list(dict.fromkeys(notes))


def adapter_notes(plan: Plan) -> list[str]:
    """Where adapters need more than full fine-tuning would, as those in fp32 can, or kbit preparation makes them: why, and what saves it."""
    recipe = plan.recipe
    if not recipe.lora_rank:
        return []
    return _kbit_notes(plan) if recipe.kbit_preparation else _fp32_adapter_notes(plan)


def _kbit_notes(plan: Plan) -> list[str]:
    """Why QLoRA may need more than LoRA: what kbit preparation brings at this length."""
    autocast = plan.recipe.runs_autocast
    changes: dict[str, dict[str, object]] = {} if autocast else {"--autocast": {"autocast": True}}
    saved = _savings(plan, {**changes, "leaving --kbit-preparation out": {"kbit_preparation": False}})
    wider = "hidden states" if autocast else "hidden states, attention and logits"
    what = f"Kbit preparation makes embeddings, head and norms fp32, and with them {wider}"
    why = f"{what}, so that QLoRA may need more than LoRA"
    return [f"{why}: at {format_tokens(plan.seq_len)} tokens {', '.join(saved)}." if saved else f"{what}."]


_FULL = {
    name: Recipe.model_fields[name].default
    for name in (
        "lora_rank",
        "lora_targets",
        "lora_dropout",
        "lora_modules_to_save",
        "dora",
        "adapter_dtype",
        "train",
        "freeze",
    )
}
"""Fields of full fine-tuning in place of adapters."""


def _fp32_adapter_notes(plan: Plan) -> list[str]:
    if plan.recipe.uses_adapters_in_bf16 or plan.recipe.quantize != "none":
        return []
    full = _peak_with(plan, _FULL)
    more = plan.peak_bytes - full if full is not None else 0
    if more < GIB // 100:
        return []
    changes: dict[str, dict[str, object]] = {
        "--adapter-dtype bf16": {"adapter_dtype": "bf16"},
        "--autocast": {"autocast": True},
        "--checkpoint layer": {"checkpoint": "layer"},
    }
    what = f"At {format_tokens(plan.seq_len)} tokens this needs {format_gib(more)} more than full fine-tuning"
    why = "each adapter in fp32 keeps an fp32 copy of what its layer is given"
    saved = _savings(plan, changes)
    return [f"{what}: {why}; {', '.join(saved)}." if saved else f"{what}: {why}."]


def _peak_with(plan: Plan, fields: dict[str, object]) -> int | None:
    """Bytes of the peak at the plan's length and chunks with other fields of the recipe; None: that is not planned."""
    try:
        return peak_up_to(plan.model, plan.recipe.changed(**fields), plan.card, plan.seq_len, plan.chunks).bytes
    except RecipeError:
        return None


def _savings(plan: Plan, changes: Mapping[str, dict[str, object]]) -> list[str]:
    """What each of some changes saves at the plan's length: '--autocast saves 28.38 GiB'."""
    peaks = {words: _peak_with(plan, fields) for words, fields in changes.items()}
    saved = {words: plan.peak_bytes - peak for words, peak in peaks.items() if peak is not None}
    return [f"{words} saves {format_gib(size)}" for words, size in saved.items() if size >= GIB // 100]


def _notes_of_several_gpus(model: Model, recipe: Recipe) -> list[str]:
    if recipe.gpus == 1:
        return []
    if recipe.expert_parallel > 1:
        return notes_of_experts(model, recipe)
    if recipe.sharded:
        return sharding_notes(model, recipe)
    if recipe.zero_stage:
        return partition_notes(model, recipe)
    return replica_notes(recipe) if recipe.has_gradient_buckets else [_sequences_of_each(recipe) + ".", _NOT_COUNTED]


_NOT_COUNTED = (
    "NCCL's own memory lies outside of torch's allocator, 0.5 to 2 GiB a GPU: --reserve is 2GiB where nothing else is said. Step times count "
    "no communication."
)


def replica_notes(recipe: Recipe) -> list[str]:
    """What a card holds under DDP, and what is not counted."""
    return [
        (
            f"{_sequences_of_each(recipe)}: DDP keeps all of it on each, and a copy of the gradients in the "
            "buckets that it reduces; gradient_as_bucket_view=True would spare the copy, but is not planned."
        ),
        _NOT_COUNTED,
    ]


def _sequences_of_each(recipe: Recipe, where: str = "") -> str:
    sequences, ranks = "sequences" if recipe.batch > 1 else "sequence", recipe.sharers
    if recipe.tensor_parallel > 1:
        split = recipe.tensor_parallel
        which = "which have" if split == recipe.gpus else f"of which {split:,} have"
        how = "transformers' tp_plan does it, norms, hidden states and logits are whole on each"
        if recipe.sequence_parallel_norms:
            loss = "each GPU has its part of the logits" if recipe.loss_parallel else "logits are whole on each"
            how = (
                f"torchtitan does it, norms and hidden states between layers are of 1 / {split:,} of the tokens, {loss}"
            )
        return (
            f"Per GPU, of {recipe.gpus:,}{where}, {which} the same {sequences}: matrices are split as {how}, and the embedding's gradient is whole, for torch "
            "makes it so"
        )
    if ranks == 1:
        return f"Per GPU, of {recipe.gpus:,}{where}, each with its own {sequences}"
    how, attention = "Ulysses", "in attention all of them for its part of the heads"
    if recipe.context_parallel > 1:
        how, attention = "context parallel", "in attention keys and values of all come round"
    return (
        f"Per GPU, of {recipe.gpus:,}{where}, of which {ranks:,} share each sequence ({how}): lengths are of whole sequences, padded to a multiple of "
        f"{recipe.multiple:,}; each GPU has the tokens of its part, and {attention}"
    )


def partition_notes(model: Model, recipe: Recipe) -> list[str]:
    """What a card holds under DeepSpeed's ZeRO, and what is not counted."""
    if recipe.zero_stage == 3:
        return [*_notes_of_zero_3(model, recipe), _NOT_COUNTED]
    where = "in CPU RAM, pinned" if recipe.optimizer_on_host else "here"
    bucket = recipe.bucket_values(model.hidden)
    buckets = f"{'two buckets' if recipe.overlap_comm else 'a bucket'} of {bucket:,} values (--reduce-bucket-size)"
    gradients = "whole gradients until the last backward is over" if recipe.zero_stage == 1 else "its part of gradients"
    whole = "bf16 weights" if recipe.quantize == "none" else f"bf16 and {recipe.quantize} weights"
    of_all = recipe.lora_rank == 0 and not (recipe.train or recipe.freeze)
    return [
        (
            f"{_sequences_of_each(recipe)}: DeepSpeed's ZeRO-{recipe.zero_stage} with bf16 enabled. Counted: {whole}, whole; 1/{recipe.gpus:,} of fp32 "
            f"weights and optimizer states{'' if of_all else ' of what is trained'}, {where}; {gradients}, "
            f"summed in bf16, and {buckets}; for their norm one gradient at a time in fp64 "
            "(docs/sharding.md)."
        ),
        _NOT_COUNTED,
    ]


_WITHOUT_ORIGINALS = ". use_orig_params=True, Trainer's default, is --use-orig-params"


def flat_notes(recipe: Recipe) -> list[str]:
    """What a card holds under FSDP1, and what is not counted."""
    runs = "the layer that runs" + (", in backward the one before it" if recipe.backward_prefetch == "pre" else "")
    notes = [
        (
            f"{_sequences_of_each(recipe)}: FSDP1 over every layer and the model (FullyShardedDataParallel; --backward-prefetch none is Trainer's "
            f"default). Counted: flat shards, padded; {runs}, and embedding, norm and head throughout; a group's gradients and "
            f"their joined copy, and that in the dtype they are summed in (docs/sharding.md){'' if recipe.use_orig_params else _WITHOUT_ORIGINALS}."
        ),
        _NOT_COUNTED,
    ]
    if recipe.keeps_whole_gradients:
        notes.append(
            f"Accumulation under no_sync keeps whole gradients of all that is trained on every GPU, {ITEMSIZE[recipe.used_dtype]} bytes each, until the last "
            "micro-batch, as accelerate and Trainer do."
        )
    return notes


def _notes_of_zero_3(model: Model, recipe: Recipe) -> list[str]:
    kept = "of fp32 weights, optimizer states and gradients, here"
    if recipe.optimizer_on_host:
        kept = f"of fp32 weights, optimizer states and gradients{', and of bf16 weights' * recipe.weights_on_host}, in CPU RAM"
    small = recipe.persistent_values(model.hidden)
    return [
        (
            f"{_sequences_of_each(recipe)}: DeepSpeed's ZeRO-3 with bf16 enabled. Counted: 1/{recipe.gpus:,} {kept}; weights of up to {small:,} values "
            f"whole (--param-persistence-threshold); others gathered, {recipe.prefetch_values(model.hidden):,} values ahead (--prefetch-bucket-size) until "
            f"{recipe.max_live_parameters:,} are there (--max-live-parameters); a bucket of {recipe.bucket_values(model.hidden):,} gradients "
            "(--reduce-bucket-size), and a copy of it (docs/sharding.md)."
        ),
        "ZeRO-3 gathers and reduces on streams of their own, whose memory torch keeps apart, and so does longest (docs/sharding.md).",
    ]


def notes_of_experts(model: Model, recipe: Recipe) -> list[str]:
    """What a card holds of experts that several share out, and what depends on the router."""
    ranks, e = recipe.expert_parallel, model.experts
    assert e is not None
    rows = rows_of_a_token(e.per_token, recipe.expert_imbalance)
    most = most_rows(e.per_token, e.number, ranks)
    mine = f"{e.number // ranks:,} of {e.number:,} experts of every layer"
    shards = f", in shards over {recipe.gpus // ranks:,}" if recipe.gpus > ranks else ""
    return [
        (
            f"{_sequences_of_each(recipe)}: transformers' expert parallel (DistributedConfig(fsdp_size={recipe.gpus}, ep_size={ranks})), {mine} on "
            f"each{shards}; all else as FSDP2 by its own plan, embedding, layers, norm and head a group each. Counted: rows sent and received, and what "
            "comes back (docs/sharding.md)."
        ),
        (
            f"What a GPU receives depends on the router. Counted for each token of its own: {rows:,} rows, {_of_router(e, recipe)}. At worst, all tokens "
            f"at the experts of one GPU, it is {most:,}: --expert-imbalance {most / e.per_token:g}."
        ),
        _NOT_COUNTED,
    ]


def _of_router(e: Experts, recipe: Recipe) -> str:
    if recipe.expert_imbalance == 1:
        return "as many as it sends, of a router that shares tokens out evenly"
    return f"{recipe.expert_imbalance:g} times the {e.per_token:,} of a router that shares tokens out evenly (--expert-imbalance)"


def sharding_notes(model: Model, recipe: Recipe) -> list[str]:
    """What a card holds under FSDP2, or FSDP1, and what is not counted."""
    if recipe.flat:
        return flat_notes(recipe)
    where = f" in {recipe.replicas:,} replicas of {recipe.shards:,} shards" if recipe.replicas > 1 else ""
    kept = "shards in CPU RAM (CPUOffloadPolicy)" if recipe.weights_on_host else "shards, padded"
    notes = [
        (
            f"{_sequences_of_each(recipe, where)}: FSDP2 over every layer and the model (--sharding zero3 is DeepSpeed's). "
            f"Counted: {kept}; the layer that runs and the all-gather buffer of its neighbour; embedding, norm and head, gathered "
            "throughout; whole gradients until they are scattered, and the reduce-scatter's input (docs/sharding.md)."
        ),
        _NOT_COUNTED,
    ]
    if recipe.quantize in ("nf4", "fp4") and recipe.packed_in == "uint8":
        notes.append(
            "4-bit weights are whole on every GPU, which FSDP2 does not shard as bytes (bnb_4bit_quant_storage's default): --quant-storage bf16 has them in "
            "shards."
        )
    if recipe.keeps_whole_gradients:
        notes.append(
            f"Accumulation without sync keeps whole gradients of all trained weights on every GPU, {ITEMSIZE[recipe.reduced_dtype]} bytes each, until the last "
            "micro-batch, as accelerate and Trainer do. --sync-each-batch scatters them each time: accelerator_config="
            '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}.'
        )
    experts = model.experts.number if model.experts is not None else None
    if experts is not None and recipe.gpus > experts:
        notes.append(
            f"{experts:,} experts in one tensor over {recipe.gpus:,} GPUs: fully_shard pads it to {recipe.gpus:,} experts wherever it is gathered. "
            "Its shard_placement_fn can split another dimension; that is not planned."
        )
    return notes


def fewest_gpus_line(count: int | None) -> str:
    """From how many GPUs a recipe in shards fits; None: from none."""
    if count is None:
        return f"It fits on no number of these GPUs up to {MOST_GPUS:,}."
    return f"It fits from {count:,} of these GPUs on: --gpus {count}."


def master_weights_notes(plan: Plan, mixed: Plan | None) -> list[str]:
    """Whether shards in fp32, as accelerate keeps them, would change the verdict."""
    if mixed is None:
        return []
    need = f"{format_gib(mixed.peak_bytes)} of {format_gib(mixed.budget_bytes)}"
    options = (
        "accelerate's mixed_precision bf16 keeps weights and moments in fp32 (--precision mixed --reduce-dtype bf16)"
    )
    if mixed.fits == plan.fits:
        return [f"{options}: {'it fits as well' if mixed.fits else 'it does not fit either'}, {need}."]
    return [f"{options}, and then it {'fits' if mixed.fits else 'does not fit'}: {need}."]


def answer_notes(answer: Answer) -> list[str]:
    """Position limit passed, CPU RAM short, padded batches, what a larger M would buy."""
    plan = answer.plan
    if answer.s_max == 0:
        return [
            f"{strategy_label(answer.strategy)}: not even {format_tokens(plan.seq_len)} tokens fit: {_shortage(plan)}."
        ]
    notes = position_notes(plan.model, answer.s_max)
    if plan.card.host_bytes is not None:
        on_gpu = longest_sequence(plan.model, plan.recipe, plan.card, plan.chunks)
        gpu_s_max = longest_that_runs(plan.model, plan.recipe, plan.card, plan.chunks, on_gpu)
        if gpu_s_max > answer.s_max:
            host_size = format_gib(plan.card.host_bytes)
            allowed = f"{host_size} allows {format_tokens(answer.s_max)} tokens, the GPU {format_tokens(gpu_s_max)}"
            notes.append(f"{strategy_label(answer.strategy)}: CPU RAM is short: {allowed}.")
    return notes + padding_notes(strategy_label(answer.strategy), plan, answer.s_max) + larger_chunks_note(answer)


def layer_note(answers: Sequence[Answer]) -> list[str]:
    """The strategy that reaches further than those of the answer, where they end with the MLP in chunks."""
    plan = next((answer.plan for answer in answers if answer.strategy == "mst-offload"), None)
    if plan is None or any(answer.plan.recipe.layer_in_chunks for answer in answers):
        return []
    if not _is_counted(plan, layer_in_chunks=True):
        return []
    attention, measured = plan.model.attention, "No GPU has measured it yet."
    further = "Further than mst-offload: --strategy mst-layer-offload, all of a layer but attention in chunks"
    if attention.sinks or plan.model.eager_only or not _is_counted(plan, layer_in_chunks=True, attention_on_host=True):
        return [f"{further}. {measured}"]
    return [f"{further}; with --attention-on-host its queries, keys and values wait in CPU RAM. {measured}"]


def _is_counted(plan: Plan, **fields: object) -> bool:
    """Whether the formula counts the plan's model with other fields of its recipe."""
    try:
        check_counted(plan.model, plan.recipe.changed(**fields))
    except RecipeError:
        return False
    return True


def padding_notes(strategy: str, plan: Plan, s_max: int) -> list[str]:
    """How far batches reach whose masks need no padding."""
    window = window_of(plan.model, plan.recipe)
    if window is None or s_max < window - 1 or plan.recipe.pad_to % BIAS_ROWS == 0:
        return []
    padded_s_max = max_seq(plan.model, plan.recipe.changed(pad_to=BIAS_ROWS), plan.card).s_max
    if padded_s_max <= s_max:
        return []
    effect = f"with batches padded to multiples of {BIAS_ROWS} (--pad-to {BIAS_ROWS}) {format_tokens(padded_s_max)} tokens fit"
    return [
        f"{strategy}: lengths that are no multiple of {BIAS_ROWS} need a padded mask, which ends it at {format_tokens(s_max)}; {effect}."
    ]


def _shortage(plan: Plan) -> str:
    """What is missing of the card, and of CPU RAM."""
    parts = []
    if plan.peak_bytes > plan.budget_bytes:
        missing = format_gib(plan.peak_bytes - plan.budget_bytes)
        parts.append(f"{plan.instant} needs {format_gib(plan.peak_bytes)}, {missing} more than the budget")
    elif (failed := plan.usage.out_of_memory) is not None:
        parts.append(
            f"the allocator finds no room for {format_gib(failed.requested)} beside {format_gib(failed.allocated)}"
        )
    return "; ".join([*parts, *host_notes(plan)])


def host_notes(plan: Plan) -> list[str]:
    """Host memory that is short, and of what."""
    if plan.fits_host or plan.card.host_bytes is None:
        return []
    recipe = plan.recipe
    users = {
        "optimizer states": recipe.optimizer_on_host,
        "weights": recipe.weights_on_host,
        "layer inputs": recipe.offload_layer_inputs,
        "saved tensors": recipe.offload == "saved-tensors",
    }
    users_words = ", ".join(name for name, uses_host in users.items() if uses_host)
    if plan.card.gpu.shared_memory:
        return [f"{users_words} in CPU RAM would stay in the memory of {plan.card.gpu.name}, which is the CPU's, too"]
    return [
        f"CPU RAM is short: {users_words} need {_host_need(plan)} there, and it has {format_gib(plan.card.host_bytes)}"
    ]


def _host_need(plan: Plan) -> str:
    """'96.00 GiB (8 processes of 12.00 GiB)'."""
    processes = plan.recipe.processes_per_node
    each = f" ({processes:,} processes of {format_gib(plan.host_bytes)})" if processes > 1 else ""
    return f"{format_gib(plan.host_bytes_of_node)}{each}"


def position_notes(model: Model, seq_len: int) -> list[str]:
    """What a length beyond the model's positions asks for."""
    if model.context is None or seq_len <= model.context:
        return []
    more = "a longer position table" if model.learned_positions else "RoPE scaling or the like"
    return [f"{model.name} was made for {format_tokens(model.context)} positions: longer sequences need {more}."]


def changes_do_not_help(adapters_tried: bool = True, adapters_help: bool = False) -> str:
    others = ", ".join(each.short for each in stand_ins().values())
    adapters = "adapters, " if adapters_tried and not adapters_help else ""
    nothing = "Nothing else" if adapters_help else "Nothing"
    return f"{nothing} that is tried ({adapters}checkpointing, chunks, batch 1, bf16, {others}, the optimizer in backward, CPU RAM)"


def adapter_lines(ways: Sequence[Way]) -> list[str]:
    """The adapter with which it fits, how far it reaches, and what to add to the options for it."""
    lines = []
    for way in ways:
        if (change := way.adapters) is None:
            continue
        fields = dict.fromkeys(name for each in way.changes for name in each.fields if name not in STRATEGY_FIELDS)
        strategy = strategy_of(way.plan.recipe)
        others = ", ".join(each.name for each in way.changes if set(STRATEGY_FIELDS) & each.fields.keys())
        how = f"with {strategy_label(strategy) if strategy else others or 'all else as it is'}"
        options = shlex.join(words_of(way.plan.recipe, fields))
        lines.append(f"{change.name} ({options}): {format_tokens(way.s_max)} tokens {how}.")
    return lines


def nothing_fits_notes(answers: Sequence[Answer], ways_to_fit: Sequence[Way], smallest: Gpu | None) -> list[str]:
    """When no strategy holds even the shortest sequence: what is missing, and the smallest card where it would be enough."""
    plan = nearest_plan([answer.plan for answer in answers])
    lines = [f"Nothing fits, not even {format_tokens(plan.seq_len)} tokens: {_shortage(plan)}."]
    if all(way.adapters is not None for way in ways_to_fit):
        last_words = f" The smallest GPU that holds it: {smallest.name}." if smallest else " No single GPU holds it."
        tried = changes_do_not_help(tries_adapters(plan), adapters_help=bool(ways_to_fit))
        lines.append(f"{tried} makes it fit on this GPU." + last_words)
    return [*adapter_lines(ways_to_fit), *lines]


def larger_chunks_note(answer: Answer) -> list[str]:
    """What doubling the recommended chunk counts would buy and cost."""
    plan = answer.plan
    recipe = pieces_that_there_are(plan.model, plan.recipe)
    mlp, loss = recipe.mlp_chunks == "auto", recipe.loss_chunks == "auto"
    if not (mlp or loss) or answer.s_max_tensors is None:
        return []
    m, n, groups = plan.chunks
    double = Chunks(m * (2 if mlp else 1), n * (2 if loss else 1), groups)
    larger_s_max = longest_sequence(plan.model, plan.recipe, plan.card, double)
    gain = (larger_s_max - answer.s_max_tensors) / answer.s_max_tensors
    effect = f"{strategy_label(answer.strategy)}: twice the pieces, {double.mlp} (MLP) and {double.loss} (loss), would "
    if abs(gain) < 0.0005:
        return []
    if gain < 0:
        return [f"{effect}shorten it by {-gain:.1%}: chunks need fp32 sums of their weights' gradients."]
    min_chunk_tokens = smallest_chunks_tokens(plan.model, plan.card.gpu)
    rows = larger_s_max * plan.recipe.batch
    missed = [
        need
        for count, need in ((double.mlp, min_chunk_tokens[0]), (double.loss, min_chunk_tokens[1]))
        if rows // count < need
    ]
    cost = (
        f"; a chunk would fall below the {missed[0]:,} tokens that keep {plan.card.gpu.name} compute-bound"
        if missed
        else ""
    )
    return [f"{effect}lengthen it by {gain:.1%}{cost}."]
