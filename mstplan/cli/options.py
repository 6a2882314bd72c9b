"""Options, each said once, in classes that commands take together; and what they make: the library's objects."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .commands import Options, arguments, flags_given, option

if TYPE_CHECKING:
    from ..plan.solve import Plan
    from ..spec.hardware import Card
    from ..spec.model import Model
    from ..step.recipe import Recipe


# ---- choices: read from where they are defined, when help is asked for or something else was typed ------------------------


def listed(names: Iterable[str], descriptions: dict[str, str] | None = None) -> str:
    """'a | b (what b is) | c'."""
    shown = ((name, (descriptions or {}).get(name)) for name in names)
    return " | ".join(shlex.quote(name) + (f" ({words})" if words else "") for name, words in shown)


def _of_recipe(field: str, descriptions: dict[str, str] | None = None, more: str = "") -> Callable[[], str]:
    """The values that a field of a recipe can have; and its default, unless the strategy decides it, with `more` about that."""

    def text() -> str:
        from ..step.recipe import STRATEGY_FIELDS, Recipe, planned

        names, otherwise = planned(field)
        default = "" if field in STRATEGY_FIELDS else f" Default {Recipe.model_fields[field].default}{more}."
        return f"{listed(names, descriptions)}{otherwise}.{default}"

    return text


def _planned(field: str) -> Callable[[], list[str]]:
    """The names that a field of a recipe can have as its value, for a shell to offer."""

    def names() -> list[str]:
        from ..step.recipe import planned

        return planned(field)[0]

    return names


def _trainers() -> str:
    from ..step.trainers import TRAINERS

    return f"Start from a trainer's defaults: {listed(TRAINERS)}; options override them (mstplan recipes)."


def known_trainers() -> list[str]:
    from ..step.trainers import TRAINERS

    return list(TRAINERS)


def _weight_kinds() -> str:
    from ..step.selection import WeightKind

    return f"Train these weights only: {listed(map(str, WeightKind))}, or patterns over their names."


def _assumptions() -> str:
    from ..spec.config import TEXT_ALONE
    from ..spec.unread import LLAMA_LIKE

    return f"{LLAMA_LIKE}: count a model that mstplan does not read as a Llama. {TEXT_ALONE}: leave towers out."


def _devices() -> str:
    from ..measuring.measurement import DEVICES

    descriptions = {"cpu": "its own kernels, seen by torch's profiler"}
    return f"{listed(DEVICES, descriptions)}. Default {DEVICES[0]}."


# ---- what a shell offers: read from where it is defined, when a shell asks ----------------------------------------------


def strategy_names() -> list[str]:
    from ..step.recipe import strategy_labels

    return [*strategy_labels(), "all"]


def shipped_models() -> list[str]:
    from ..spec.catalog import model_names

    return list(model_names())


def known_gpus() -> list[str]:
    from ..spec.hardware import gpus

    return [gpu.name for gpu in gpus()]


def known_devices() -> list[str]:
    from ..measuring.measurement import DEVICES

    return list(DEVICES)


def weight_kinds() -> list[str]:
    from ..step.selection import WeightKind

    return [str(kind) for kind in WeightKind]


def known_assumptions() -> list[str]:
    from ..spec.config import TEXT_ALONE
    from ..spec.unread import LLAMA_LIKE

    return [LLAMA_LIKE, TEXT_ALONE]


def formats() -> list[str]:
    from ..show.formats import FORMATS

    return list(FORMATS)


def strategies(default: str) -> Callable[[], str]:
    def text() -> str:
        from ..step.recipe import strategy_labels

        return f"{listed(strategy_labels())}: some of them, with commas between, or all. Default {default}."

    return text


def one_of(name: str, typed: str, names: Collection[str]) -> str:
    """`typed`, the value of option `name`, if it is a known one. Raises RecipeError, which tells of the nearest."""
    if typed not in names:
        from ..errors import RecipeError
        from ..step.names import unknown_value

        raise RecipeError(unknown_value(name, typed, names))
    return typed


# ---- options ------------------------------------------------------------------------------------------------------------


def _formats() -> str:
    from ..show.formats import FORMATS

    return f"{', '.join(f'{each.name} ({each.about})' for each in FORMATS.values())}. Default text."


class FormatOptions(Options):
    json = option(bool, "--json", "Short for --format json.", False, last=True)
    format = option(str, "--format", _formats, metavar="NAME", last=True, choices=formats)


class TensorsOptions(Options):
    tensors = option(
        bool,
        "--tensors",
        "Show all tensors at the peak that there is room for, with their shapes' symbols.",
        False,
        last=True,
    )


class AssumeOptions(Options):
    assume = option(str, "--assume", _assumptions, metavar="NAME", choices=known_assumptions)


class ReleaseOptions(Options):
    transformers = option(
        str,
        "--transformers",
        "The release whose modelling code is planned: 5.17. Default the installed one, else the newest known.",
        metavar="VERSION",
    )


WHICH_MODEL = "A shipped name (see `mstplan models`), a config.json or its folder, or a Hugging Face id."


class ModelOptions(AssumeOptions, ReleaseOptions):
    model = option(str, "--model -m", WHICH_MODEL, ..., metavar="MODEL", choices=shipped_models)


class LengthOptions(Options):
    seq_len = option(str, "--seq-len", "Tokens per sequence: 65536, 64k, 1M.", ..., metavar="TOKENS")


def _allocators() -> dict[str, str]:
    """Settings of torch's allocator by name, in words."""
    from ..spec.hardware import ALLOCATORS, WITHOUT_SETTINGS

    return {name: setting or WITHOUT_SETTINGS for name, setting in ALLOCATORS.items()}


def _describe_allocators() -> str:
    allocators = _allocators()
    return f"How torch's allocator is set: {listed(allocators, allocators)}. Default {next(iter(allocators))}."


class CardOptions(Options):
    gpu = option(str, "--gpu", "A GPU by name (see `mstplan gpus`).", panel="GPU", metavar="NAME", choices=known_gpus)
    gpu_mem = option(
        str, "--gpu-mem", "Any amount of GPU memory: 80GB, 79.15GiB, 24576MiB.", panel="GPU", metavar="SIZE"
    )
    host_mem = option(str, "--host-mem", "CPU RAM for what is offloaded.", panel="GPU", metavar="SIZE")
    reserve = option(
        str,
        "--reserve",
        "GPU memory that others hold. Default 0B; 2GiB, for NCCL, with several --gpus.",
        panel="GPU",
        metavar="SIZE",
    )
    allocator = option(
        str,
        "--allocator",
        _describe_allocators,
        panel="GPU",
        metavar="NAME",
        choices=_allocators,
    )
    torch = option(
        str,
        "--torch",
        "The build of torch that trains, which decides on attention kernels: 2.13, 2.10+cu128. Default: the one installed, else the newest known.",
        panel="GPU",
        metavar="VERSION",
    )


class StepOptions(Options):
    """Of a recipe, what the paper's formulas leave to the user."""

    recipe = option(
        Path, "--recipe", "A recipe in a JSON file; options below override it.", panel="Recipe", metavar="FILE"
    )
    like = option(
        str,
        "--like",
        _trainers,
        panel="Recipe",
        metavar="NAME",
        choices=known_trainers,
    )
    precision = option(
        str,
        "--precision",
        _of_recipe("precision", {"mixed": "fp32 weights, bf16 autocast"}),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("precision"),
    )
    optimizer = option(
        str, "--optimizer", _of_recipe("optimizer"), panel="Recipe", metavar="NAME", choices=_planned("optimizer")
    )
    adamw_kernel = option(
        str,
        "--adamw-kernel",
        _of_recipe("adamw_kernel", more=", as Trainer, TRL and Axolotl do"),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("adamw_kernel"),
    )
    fp32_embedding_states = option(
        bool, "--fp32-embedding-states", "States of embeddings in fp32, as Trainer has them.", False, panel="Recipe"
    )
    optimizer_in_backward = option(
        bool, "--optimizer-in-backward", "Step each weight as its gradient is made.", False, panel="Recipe"
    )
    optimizer_on_host = option(
        bool, "--optimizer-on-host", "Optimizer states in CPU RAM, and the step on the CPU.", False, panel="Recipe"
    )
    weights_on_host = option(
        bool, "--weights-on-host", "Weights in CPU RAM too, gathered layer by layer.", False, panel="Recipe"
    )
    accumulation = option(
        int, "--accumulation", "Micro-batches per optimizer step. Default 1.", panel="Recipe", metavar="N"
    )
    batch = option(int, "--batch -b", "Sequences per micro-batch. Default 1.", panel="Recipe", metavar="N")
    pad_to = option(
        int, "--pad-to", "Tokens that batches are padded to a multiple of. Default 1.", panel="Recipe", metavar="N"
    )
    attention = option(
        str, "--attention", _of_recipe("attention"), panel="Recipe", metavar="NAME", choices=_planned("attention")
    )
    autocast = option(
        bool,
        "--autocast",
        "bf16 autocast whatever dtype the weights have: Trainer's and TRL's bf16=True.",
        False,
        panel="Recipe",
    )
    kernels = option(
        str, "--kernels", _of_recipe("kernels"), panel="Recipe", metavar="NAME", choices=_planned("kernels")
    )
    max_grad_norm = option(
        float, "--max-grad-norm", "Scale gradients down to this norm. 0: do not.", panel="Recipe", metavar="NORM"
    )
    lora = option(
        int, "--lora", "Train LoRA adapters of this rank, and nothing else. 0: none.", panel="Adapters", metavar="R"
    )
    lora_targets = option(
        str,
        "--lora-targets",
        "all-linear | attention, or names of modules: q_proj,v_proj. Default all-linear.",
        panel="Adapters",
        metavar="NAMES",
    )
    lora_dropout = option(
        float, "--lora-dropout", "Dropout of adapters' input. Default 0.", panel="Adapters", metavar="P"
    )
    lora_modules_to_save = option(
        str,
        "--lora-modules-to-save",
        "Modules trained whole, in a copy, beside adapters: embed_tokens,lm_head.",
        panel="Adapters",
        metavar="NAMES",
    )
    dora = option(bool, "--dora", "DoRA: adapters with a trained magnitude (use_dora).", False, panel="Adapters")
    adapter_dtype = option(
        str,
        "--adapter-dtype",
        _of_recipe("adapter_dtype"),
        panel="Adapters",
        metavar="NAME",
        choices=_planned("adapter_dtype"),
    )
    quantize = option(
        str,
        "--quantize",
        _of_recipe("quantize"),
        panel="Adapters",
        metavar="NAME",
        choices=_planned("quantize"),
    )
    double_quantize = option(
        bool, "--double-quantize", "Quantise the scales of 4-bit weights, too.", False, panel="Adapters"
    )
    quant_storage = option(
        str,
        "--quant-storage",
        _of_recipe("quant_storage", {"bf16": "4-bit weights that FSDP shards"}),
        panel="Adapters",
        metavar="NAME",
        choices=_planned("quant_storage"),
    )
    kbit_preparation = option(
        bool,
        "--kbit-preparation",
        "peft's prepare_model_for_kbit_training: all that is not quantised becomes fp32.",
        False,
        panel="Adapters",
    )
    packing = option(int, "--packing", "Samples that each row is made of. Default 1.", panel="Recipe", metavar="N")
    padding_free = option(bool, "--padding-free", "All samples of a batch in one row.", False, panel="Recipe")
    images = option(
        int,
        "--images",
        "Images in each sequence, of a model that reads images. Default 0.",
        panel="Recipe",
        metavar="N",
    )
    image_tokens = option(
        int, "--image-tokens", "Tokens that each image takes, where its size decides.", panel="Recipe", metavar="T"
    )
    image_size = option(
        str,
        "--image-size",
        "Height and width of each image in pixels: 896x1344.",
        panel="Recipe",
        metavar="HxW",
    )
    train = option(str, "--train", _weight_kinds, panel="Recipe", metavar="NAMES", choices=weight_kinds)
    freeze = option(
        str, "--freeze", "Do not train these weights.", panel="Recipe", metavar="NAMES", choices=weight_kinds
    )
    input_gradients = option(
        bool,
        "--input-gradients",
        "Backward goes down to the embeddings' output whatever is trained, as with transformers' own checkpointing.",
        False,
        panel="Recipe",
    )


class VariedOptions(Options):
    """Of a recipe, what the paper's formulas vary themselves, or do not know."""

    checkpoint = option(
        str, "--checkpoint", _of_recipe("checkpoint"), panel="Recipe", metavar="HOW", choices=_planned("checkpoint")
    )
    chunks = option(
        str,
        "--chunks",
        "M for MLP and loss: 8, or 8,32, or auto (as recommended).",
        panel="Recipe",
        metavar="M[,M]",
    )
    attention_groups = option(
        str,
        "--attention-groups",
        "Groups of heads that attention runs over one after the other, with mst-layer: 4, or auto.",
        panel="Recipe",
        metavar="G",
    )
    attention_on_host = option(
        bool,
        "--attention-on-host",
        "With mst-layer: queries, keys, values and what attention makes wait in CPU RAM.",
        False,
        panel="Recipe",
    )
    no_recompute = option(bool, "--no-recompute", "Do not recompute each MLP chunk by itself.", False, panel="Recipe")
    offload = option(
        str,
        "--offload",
        _of_recipe(
            "offload",
            {"layer-inputs": "in CPU RAM, also if no name follows", "saved-tensors": "TRL's activation_offloading"},
        ),
        panel="Recipe",
        metavar="NAME",
        bare="layer-inputs",
        choices=_planned("offload"),
    )
    loss = option(str, "--loss", _of_recipe("loss"), panel="Recipe", metavar="NAME", choices=_planned("loss"))
    gpus = option(
        int,
        "--gpus",
        "GPUs that train together, all alike; answers are per GPU. Default 1.",
        panel="Recipe",
        metavar="N",
    )
    sharding = option(
        str,
        "--sharding",
        _of_recipe(
            "sharding",
            {
                "ddp": "all on each of --gpus",
                "zero2": "DeepSpeed's ZeRO, as zero1",
                "zero3": "DeepSpeed's, weights in parts too",
                "fsdp": "FSDP2: everything in shards over them",
                "fsdp1": "flat shards, FSDP of before",
            },
        ),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("sharding"),
    )
    replicas = option(
        int,
        "--replicas",
        "Under fsdp, groups of GPUs that hold the same shards (HSDP). Default 1.",
        panel="Recipe",
        metavar="N",
    )
    gpus_per_node = option(
        int, "--gpus-per-node", "GPUs that share a machine's CPU RAM. Default 8.", panel="Recipe", metavar="N"
    )
    backward_prefetch = option(
        str,
        "--backward-prefetch",
        _of_recipe("backward_prefetch", {"pre": "under fsdp1, BACKWARD_PRE"}),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("backward_prefetch"),
    )
    use_orig_params = option(
        bool,
        "--use-orig-params",
        "Under fsdp1, the optimizer steps views of each weight: use_orig_params=True, Trainer's default.",
        False,
        panel="Recipe",
    )
    sync_each_batch = option(
        bool,
        "--sync-each-batch",
        "Under fsdp, scatter the gradients of each micro-batch: accelerate's sync_each_batch.",
        False,
        panel="Recipe",
    )
    reduce_dtype = option(
        str,
        "--reduce-dtype",
        _of_recipe("reduce_dtype", {"bf16": "accelerate's mixed_precision"}),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("reduce_dtype"),
    )
    reduce_bucket_size = option(
        str,
        "--reduce-bucket-size",
        "Under zero1, zero2 and zero3, values in DeepSpeed's bucket of gradients, or auto: the hidden size squared, as transformers fills it in. Default "
        "500,000,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    overlap_comm = option(
        bool, "--overlap-comm", "Under zero1 and zero2, two buckets: DeepSpeed's overlap_comm.", False, panel="Recipe"
    )
    prefetch_bucket_size = option(
        str,
        "--prefetch-bucket-size",
        "Under zero3, values gathered ahead at a time (stage3_ of that name), or auto: nine tenths of the hidden size squared, as transformers "
        "fills it in. Default 50,000,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    param_persistence_threshold = option(
        str,
        "--param-persistence-threshold",
        "Under zero3, values of the largest weights that stay whole (stage3_ of that name), or auto: ten times the hidden size, as "
        "transformers fills it in. Default 100,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    max_live_parameters = option(
        str,
        "--max-live-parameters",
        "Under zero3, gathered values from which no more are gathered ahead (stage3_ of that name). Default 1,000,000,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    max_reuse_distance = option(
        str,
        "--max-reuse-distance",
        "Under zero3, weights stay that are used again within so many values (stage3_ of that name). Default 1,000,000,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    sub_group_size = option(
        str,
        "--sub-group-size",
        "Under zero3, values of a GPU's weights that the optimizer steps at a time. Default 1,000,000,000, DeepSpeed's.",
        panel="Recipe",
        metavar="N",
    )
    sequence_parallel = option(
        int,
        "--sequence-parallel",
        "GPUs that share each sequence: Ulysses, as in DeepSpeed's ALST. Lengths are of whole sequences. Default 1.",
        panel="Recipe",
        metavar="N",
    )
    context_parallel = option(
        int,
        "--context-parallel",
        "GPUs that share each sequence in a ring: torch's context_parallel, accelerate's cp_size. Default 1.",
        panel="Recipe",
        metavar="N",
    )
    tensor_parallel = option(
        int,
        "--tensor-parallel",
        "GPUs that split every matrix: transformers' tp_plan. Default 1.",
        panel="Recipe",
        metavar="N",
    )
    sequence_parallel_norms = option(
        bool,
        "--sequence-parallel-norms",
        "With --tensor-parallel, norms share out tokens: Megatron's sequence parallelism, torch's SequenceParallel.",
        False,
        panel="Recipe",
    )
    loss_parallel = option(
        bool,
        "--loss-parallel",
        "With that, each GPU has its part of the logits alone: torch's loss_parallel.",
        False,
        panel="Recipe",
    )
    expert_parallel = option(
        int,
        "--expert-parallel",
        "GPUs that share out the experts of every layer: transformers' ep_size, with --sharding fsdp. Default 1.",
        panel="Recipe",
        metavar="N",
    )
    expert_imbalance = option(
        float,
        "--expert-imbalance",
        "Rows that the fullest GPU receives for its experts, beside an even router's. Default 1: even.",
        panel="Recipe",
        metavar="F",
    )
    rotate_method = option(
        str,
        "--rotate-method",
        _of_recipe("rotate_method", {"allgather": "torch's own choice"}),
        panel="Recipe",
        metavar="NAME",
        choices=_planned("rotate_method"),
    )


class RecipeOptions(StepOptions, VariedOptions):
    """All of a recipe."""


class RecipesOptions(RecipeOptions):
    """Strategies, and what differs from them: recipes."""

    strategy = option(
        str,
        "--strategy -s",
        strategies(default="no-checkpointing to mst-offload"),
        adds_up=True,
        metavar="NAME[,NAME]",
        choices=strategy_names,
    )


class TracedOptions(ModelOptions):
    """A model, and how it is traced."""

    no_cache = option(bool, "--no-cache", "Trace anew, and keep nothing.", False, panel="Trace")
    trust_remote_code = option(
        bool, "--trust-remote-code", "Run the model's own code where transformers has none.", False, panel="Trace"
    )


HOW_TRACED = ("no_cache", "trust_remote_code")


class PlannedOptions(TracedOptions, LengthOptions, RecipesOptions, CardOptions):
    """A step at one length, by formula or by trace."""


class ResultsOptions(Options):
    files = arguments(Path, "RESULTS", "Results files, as --results names them.")
    results = option(
        str,
        "--results",
        "Results files, with commas between. Default: those that ship.",
        adds_up=True,
        metavar="FILE[,FILE]",
    )


FORCE = option(bool, "--force", "Overwrite the file.", False, last=True)
MARKDOWN = option(bool, "--markdown", "Short for --format markdown.", False, last=True)


class MeasuringOptions(Options):
    """How real steps are measured, and where results go."""

    layers = option(
        int,
        "--layers",
        "The model's first N layers only, for one too large to hold.",
        panel="Measurement",
        metavar="N",
        min=1,
    )
    device = option(str, "--device", _devices, "cuda", panel="Measurement", metavar="NAME", choices=known_devices)
    gpu_mem = option(
        str, "--gpu-mem", "Let the process use that much of the GPU only.", panel="Measurement", metavar="SIZE"
    )
    steps = option(
        int,
        "--steps",
        "Steps that are timed, after a first one.",
        3,
        panel="Measurement",
        metavar="N",
        min=1,
        max=1_000_000,
    )
    timeout = option(
        float,
        "--timeout",
        "Give up on a point after so many seconds.",
        panel="Measurement",
        metavar="SECONDS",
        min=1,
        max=1_000_000,
    )
    out = option(
        Path,
        "--out -o",
        "The results file, which is appended to.",
        Path("measurements.jsonl"),
        panel="Measurement",
        metavar="FILE",
    )
    again = option(bool, "--again", "Also points that the results file has already.", False, panel="Measurement")


ONE_RECIPE = (
    'With --like, --checkpoint, --chunks, --no-recompute, --loss, --offload or --recipe, and no --strategy, the options describe one recipe ("custom"), '
    "which starts from --like or --recipe, else from no-checkpointing, in every command alike; all others vary the strategies."
)


# ---- what options make: the library's objects --------------------------------------------------------------------------


def model_of(options: ModelOptions) -> Model:
    from ..spec.catalog import load_model

    return load_model(options.model, options.assume, options.transformers)


def model_or_stand_in(options: TracedOptions) -> Model:
    """The model as the formula reads it; where that does not know it, or not all that is asked, and torch is there, a stand-in for which
    answers are traced."""
    from ..errors import UnreadError

    try:
        model = model_of(options)
        if not getattr(options, "images", None):
            refuse_what_is_not_counted(model, options.assume)
            return model
        assert isinstance(options, RecipesOptions)
        return _with_images(model, options, options.assume)
    except UnreadError as e:
        from .tracing import stand_in

        return stand_in(options, e)


BY_TRACE = "mstplan max-seq, plan and trace answer by the trace where torch is installed (pip install 'mstplan[torch]')"


def refuse_what_is_not_counted(model: Model, assume: str | None = None) -> None:
    """Refuses what the trace alone answers of steps on text: towers without a rule. Raises UnreadError."""
    from ..errors import UnreadError
    from ..spec.config import NO_TOWERS, TEXT_ALONE

    if NO_TOWERS in model.notes and assume is None:
        reason = "its towers are counted by transformers' own code alone."
        raise UnreadError(model.name, reason, f"{BY_TRACE}; --assume {TEXT_ALONE} plans its text part alone.")


def _with_images(model: Model, options: RecipesOptions, assume: str | None) -> Model:
    """The model for steps with images. Raises UnreadError where the trace alone counts them; RecipeError for images of no tower."""
    from ..errors import RecipeError, UnreadError
    from ..spec.config import NO_TOWERS, TEXT_ALONE, waiting
    from ..step.towers import uncounted, with_images

    if assume == TEXT_ALONE or not (model.towers or NO_TOWERS in model.notes):
        whole = f" Its published config.json has the tower: download that of {model.hub_id}, and pass its path."
        is_part = model.model_type.endswith("_text") and model.hub_id
        raise RecipeError(
            f"--images: {model.name} is planned as a model of text alone.\nLeave --images out.{whole if is_part else ''}"
        )
    asked = of_one_gpu(options)[0] if options.sharding == "all" else options
    recipes = list(recipes_of(asked, model=model).values())
    by_trace = "--rung trace" if getattr(options, "rung", None) == "trace" else ""
    if what := next(filter(None, (by_trace, *(uncounted(model, recipe) for recipe in recipes))), ""):
        raise UnreadError(model.name, f"images with {what} are counted by the trace alone.", f"{BY_TRACE}.")
    return with_images(model, recipes[0], waiting(model.towers))


AnyRecipes = TypeVar("AnyRecipes", bound=RecipesOptions)


def of_one_gpu(options: AnyRecipes) -> tuple[AnyRecipes, dict[str, Any]]:
    """Options without those that say how several GPUs are used, all ways of which --sharding all tries; and those of single shardings, by field."""
    from ..plan.several_gpus import OF_SHARDINGS

    of_some = {name for names in OF_SHARDINGS.values() for name in names}
    given = {name: value for name, value in changes_of(options).items() if name in of_some}
    not_given = {name: False if value is True else None for name, value in given.items()}
    not_given |= {"sequence_parallel_norms": False, "loss_parallel": False}
    not_given |= dict.fromkeys(("sharding", "gpus", "sequence_parallel", "tensor_parallel"))
    return options.changed(**not_given), given


def card_of(options: CardOptions) -> Card:
    from ..spec.hardware import EXPANDABLE, NCCL_BYTES, card

    reserve = memory(options.reserve, "--reserve")
    if reserve is None:
        reserve = NCCL_BYTES if _gpus_of(options) > 1 else 0
    sizes = memory(options.gpu_mem, "--gpu-mem"), reserve, memory(options.host_mem, "--host-mem")
    return card(options.gpu, *sizes, allocator=options.allocator or EXPANDABLE, torch=options.torch)


def _gpus_of(options: CardOptions) -> int:
    """GPUs that the command's recipe trains on; 1 where it has none."""
    if not isinstance(options, StepOptions):
        return 1
    if options.recipe is not None and (getattr(options, "strategy", None) is not None or options.like is not None):
        return 1  # which is refused, before the recipe is read
    gpus: int | None = getattr(options, "gpus", None)  # a command may leave it out
    return gpus if gpus is not None else base_recipe(options).gpus


def memory(text: str | None, name: str = "") -> int | None:
    """Bytes; None where nothing was said. name: of the option."""
    from ..units import parse_memory

    return parse_memory(text, name) if text is not None else None


_FIELDS = (
    "precision",
    "optimizer",
    "adamw_kernel",
    "accumulation",
    "batch",
    "pad_to",
    "attention",
    "loss",
    "offload",
    "gpus",
    "sharding",
    "reduce_dtype",
    "quant_storage",
    "backward_prefetch",
    "replicas",
    "gpus_per_node",
    "sequence_parallel",
    "context_parallel",
    "tensor_parallel",
    "expert_parallel",
    "expert_imbalance",
    "rotate_method",
    "kernels",
    "max_grad_norm",
    "lora_dropout",
    "adapter_dtype",
    "quantize",
    "packing",
    "images",
    "image_tokens",
    "image_size",
)
_PATTERNS = ("train", "freeze", "lora_targets", "lora_modules_to_save")


def changes_of(options: StepOptions) -> dict[str, object]:
    """The recipe fields that the options set."""
    from ..step.recipe import SWITCHES

    changes = {name: value for name in _FIELDS if (value := getattr(options, name, None)) is not None}
    for name in _PATTERNS:
        if (patterns := getattr(options, name)) is not None:
            changes[name] = tuple(part.strip() for part in patterns.split(","))
    if options.max_grad_norm == 0:  # as transformers' Trainer takes it
        changes["max_grad_norm"] = None
    if options.lora is not None:
        changes["lora_rank"] = options.lora
    changes.update({name: True for name in SWITCHES if getattr(options, name, False)})
    return {**changes, **_varied(options)} if isinstance(options, VariedOptions) else changes


def _varied(options: VariedOptions) -> dict[str, object]:
    from ..step.recipe import OF_ZERO_3, option_of
    from ..units import parse_count, parse_whole

    changes: dict[str, object] = {}
    if options.no_recompute:
        changes["mlp_recompute"] = False
    for name in ("reduce_bucket_size", *OF_ZERO_3):
        if (size := getattr(options, name)) is not None:
            may_be_auto = name not in ("max_live_parameters", "max_reuse_distance", "sub_group_size")
            changes[name] = size if size == "auto" and may_be_auto else parse_count(size, option_of(name))
    if (groups := options.attention_groups) is not None:
        changes["attention_groups"] = groups if groups == "auto" else parse_whole(groups, "--attention-groups")
    if (how := options.checkpoint) is not None:
        changes["checkpoint"] = parse_whole(how, "--checkpoint") if "0" <= how[:1] <= "9" else how
    return changes


def _chunks(text: str | None) -> dict[str, object]:
    """mlp_chunks and loss_chunks from '8', '8,32' or 'auto'."""
    from ..errors import RecipeError, UnitError, quoted
    from ..units import parse_whole

    if text is None:
        return {}
    parts = [part.strip() for part in text[:100].split(",")]
    try:
        values = ["auto" if part == "auto" else parse_whole(part) for part in parts]
    except UnitError:
        values = []
    if len(values) not in (1, 2) or 0 in values or len(text) > 100:
        raise RecipeError(
            f"cannot read --chunks {quoted(text)}.\nWrite one number for both (8), two (MLP,loss: 8,32), or auto."
        )
    return {"mlp_chunks": values[0], "loss_chunks": values[-1]}


def runs_in_chunks(recipe: Recipe) -> bool:
    return recipe.loss_in_chunks or recipe.mlp_recompute or recipe.mlp_chunks != 1


def applied(
    base: Recipe, options: RecipeOptions, adopt_chunks: bool, model: Model | None = None, some_in_layers: bool = False
) -> Recipe:
    """`base`, as it is for the weights that `model` is published with, and the options' changes. --chunks goes to recipes that run in chunks,
    and with adopt_chunks to any; --attention-groups, with some_in_layers, to recipes whose layers do."""
    from ..step.losses import LOSSES

    changes, chunks = {**as_published(base, options, model), **changes_of(options)}, _chunks(options.chunks)
    if some_in_layers and not base.layer_in_chunks:
        for name in ("attention_groups", "attention_on_host"):
            changes.pop(name, None)
    if chunks and not runs_in_chunks(base) and adopt_chunks:
        changes = {"loss": "chunked", "mlp_recompute": True, **changes}
    if chunks and (runs_in_chunks(base) or adopt_chunks):
        changes.update(chunks)
    loss = LOSSES.get(str(changes.get("loss", base.loss)))
    if loss is None or not loss.in_chunks:
        changes["loss_chunks"] = 1
    elif not base.loss_in_chunks:
        changes.setdefault("loss_chunks", "auto")
    if model is not None:
        _check_ranks(model, base, changes)
    return changed(base, changes)


def _check_ranks(model: Model, base: Recipe, changes: Mapping[str, object]) -> None:
    """Check that GPUs which share sequences, matrices or experts divide all GPUs, and what they share of this model. Raises RecipeError with
    numbers that do, and are taken beside all else."""
    from functools import partial

    from ..errors import RecipeError
    from ..step import tensor_parallel, ulysses
    from ..step.recipe import option_of

    experts = model.experts.number if model.experts is not None else 0
    a, gpus = model.attention, changes.get("gpus", base.gpus)
    if model.stand_in is not None or not isinstance(gpus, int) or not 2 <= gpus <= 65_536:
        return
    for field, can, of in (
        (
            "sequence_parallel",
            ulysses.can_share,
            f"heads of {model.name} ({a.heads:,} of queries, {a.kv_heads:,} of keys)",
        ),
        ("context_parallel", lambda _, n: True, ""),
        ("tensor_parallel", tensor_parallel.can_split, f"matrices of {model.name}"),
        ("expert_parallel", lambda _, n: experts % n == 0, f"{experts:,} experts of {model.name}"),
    ):
        ranks = changes.get(field, getattr(base, field))
        if not isinstance(ranks, int) or ranks < 2 or (gpus % ranks == 0 and can(model, ranks)):
            continue
        ways = _ways_to_share(model, base, changes, field, gpus, ranks, partial(can, model))
        option = option_of(field)
        if not ways and not _is_taken(model, base, {**changes, field: 1}):
            continue  # more is in the way than these numbers
        which = [f"{gpus:,} gpus"] if gpus % ranks else []
        which += [] if can(model, ranks) else [f"the {of}"]
        raise RecipeError(
            f"{option} {ranks:,} does not divide {', nor '.join(which)}"
            + (f": use {' or '.join(ways)}" if ways else f".\nLeave {option} out.")
        )


def _ways_to_share(
    model: Model,
    base: Recipe,
    changes: Mapping[str, object],
    field: str,
    gpus: int,
    ranks: int,
    can: Callable[[int], bool],
) -> list[str]:
    """Options in place of ranks that do not divide: other GPUs, other ranks; where neither does, both."""
    from ..step.recipe import option_of

    option = option_of(field)

    def does(gpus: int, n: int) -> bool:
        return gpus % n == 0 and can(n) and _is_taken(model, base, {**changes, "gpus": gpus, field: n})

    more = -(-gpus // ranks) * ranks
    ways = [f"--gpus {n}" for n in dict.fromkeys((more, ranks)) if n != gpus and does(n, ranks)][:1]
    numbers = ", ".join(str(n) for n in range(2, gpus + 1) if does(gpus, n))
    ways += [f"{option} {numbers}"] if numbers else []
    both = next((n for n in range(min(ranks, gpus), 1, -1) if does(n, n)), None) if not ways else None
    return ways if both is None else [f"--gpus {both} {option} {both}"]


def _is_taken(model: Model, base: Recipe, changes: Mapping[str, object]) -> bool:
    """Whether a recipe with these changes contradicts neither itself nor the model."""
    from ..errors import RecipeError
    from ..plan.layout import check_counted

    try:
        check_counted(model, base.changed(**changes))
    except RecipeError:
        return False
    return True


def changed(base: Recipe, changes: Mapping[str, object]) -> Recipe:
    """A recipe with what options change. Raises RecipeError in the command line's words."""
    with _in_options():
        return base.changed(**changes)


@contextmanager
def _in_options() -> Iterator[None]:
    """Say in options what is wrong with a recipe inside."""
    from ..errors import RecipeError

    try:
        yield
    except RecipeError as e:
        from ..step.names import in_options

        raise RecipeError(in_options(str(e))) from None


DESCRIBING = ("recipe", "like", "checkpoint", "chunks", "no_recompute", "loss", "offload")
"""Options for what a strategy decides. Without --strategy they describe, with all others, one recipe that starts from the standard
strategy; where there are none of them, the others vary every strategy."""


def base_recipe(options: StepOptions) -> Recipe:
    """What a custom recipe starts from: the recipe file or a trainer's defaults, else the standard strategy. Raises RecipeError, and InputError of a
    file, whose fields are said as they stand there."""
    from ..errors import InputError, RecipeError
    from ..step.recipe import Recipe

    if options.like is not None:
        from ..step.trainers import trainer_named

        if options.recipe is not None:
            raise RecipeError(
                "--like and --recipe exclude each other: both say where to start.\nLeave one of the two out."
            )
        recipe = trainer_named(options.like).recipe
        return recipe.changed(**_UNDER_DEEPSPEED) if _runs_deepspeed(options) else recipe
    try:
        return Recipe.read(options.recipe) if options.recipe is not None else Recipe.model_construct()
    except RecipeError as e:
        raise InputError(str(e)) from None


def recipes_of(options: RecipesOptions, usual: str = "usual", model: Model | None = None) -> dict[str, Recipe]:
    """What the options ask for, by name, in every command alike: the strategies that --strategy names, with the options' changes; else
    the one recipe that they describe; else the `usual` strategies. model: one for whose published weights recipes are."""
    from ..errors import RecipeError

    if options.strategy is None and flags_given(options, DESCRIBING):
        return {"custom": applied(base_recipe(options), options, True, model)}
    if options.recipe is not None or options.like is not None:
        name = "--like" if options.recipe is None else "--recipe"
        raise RecipeError(
            f"--strategy and {name} exclude each other: a recipe says what a strategy says.\nLeave one of the two out."
        )
    bases = _bases(options, usual, model)
    none_in_chunks = not any(map(runs_in_chunks, bases.values()))
    some_in_layers = any(base.layer_in_chunks for base in bases.values())
    made = {
        name: partial(applied, base, options, none_in_chunks, model, some_in_layers) for name, base in bases.items()
    }
    recipes = _possible(made, model) if options.strategy == "all" else {name: make() for name, make in made.items()}
    return {_name_of(name, recipe, alone=len(recipes) == 1): recipe for name, recipe in recipes.items()}


def _bases(options: RecipesOptions, usual: str, model: Model | None) -> dict[str, Recipe]:
    """Strategies by name: those that --strategy names; else the usual ones, without pieces of MLPs where the model's do not run so."""
    bases = _named(options, usual)
    experts_whole = model is not None and model.experts is not None and options.sharding == "zero3"
    if options.strategy is None and model is not None and (experts_whole or not model.runs_mlps_in_chunks):
        bases = {name: base for name, base in bases.items() if not base.mlp_recompute}
    return bases


def left_out_notes(options: RecipesOptions, model: Model) -> tuple[str, ...]:
    """Which of the usual strategies an answer leaves out that names none, and why: they do not go with its other options."""
    from ..errors import RecipeError
    from ..plan.layout import check_counted
    from ..step.recipe import STRATEGIES, USUAL_STRATEGIES, strategy_label

    if options.strategy is not None or flags_given(options, DESCRIBING):
        return ()
    given = _bases(options, "usual", model)
    reasons: dict[str, list[str]] = {}
    for name in USUAL_STRATEGIES:
        if name in given:
            continue
        try:
            with _in_options():
                check_counted(model, applied(STRATEGIES[name], options, False, model, False))
        except RecipeError as e:
            reasons.setdefault(str(e).splitlines()[0].rstrip("."), []).append(strategy_label(name))
    return tuple(f"Left out, {'; '.join(names)}: {why}." for why, names in reasons.items())


def _possible(made: Mapping[str, Callable[[], Recipe]], model: Model | None) -> dict[str, Recipe]:
    """Of all strategies those that go with the options, and with the model. Raises the first's RecipeError where none does."""
    from ..errors import RecipeError
    from ..plan.layout import check_counted

    def possible(make: Callable[[], Recipe]) -> Recipe | RecipeError:
        try:
            recipe = make()
            if model is not None and model.stand_in is None:
                check_counted(model, recipe)
        except RecipeError as e:
            return e
        return recipe

    tried = {name: possible(make) for name, make in made.items()}
    recipes = {name: each for name, each in tried.items() if not isinstance(each, RecipeError)}
    if not recipes:
        raise next(each for each in tried.values() if isinstance(each, RecipeError))
    return recipes


def as_published(base: Recipe, options: StepOptions, model: Model | None) -> dict[str, object]:
    """What becomes of a recipe for weights that are published quantised, where options do not say otherwise: adapters beside them."""
    from ..plan.ways import ADAPTER_RANK

    quantised, double = model.published if model is not None else ("", False)
    if not quantised or options.recipe is not None or options.quantize == "none" or options.lora == 0:
        return {}
    as_they_are = options.quantize in (None, quantised)
    return {
        "lora_rank": base.lora_rank or ADAPTER_RANK,
        "quantize": quantised,
        "double_quantize": double and as_they_are,
    }


def assumptions_of(options: StepOptions) -> tuple[str, ...]:
    """What --like assumes, for the notes of an answer."""
    if options.like is None:
        return ()
    from ..step.trainers import trainer_named

    trainer = trainer_named(options.like)
    assumptions = (*trainer.assumptions, *([_DEEPSPEED] if _runs_deepspeed(options) else []))
    return tuple(f"assumed like {trainer.name}: {each}." for each in assumptions)


_UNDER_DEEPSPEED: dict[str, object] = {"precision": "bf16", "autocast": False}
_DEEPSPEED = "under DeepSpeed with bf16 enabled weights are in bf16, with fp32 ones in its optimizer, and nothing runs under autocast"


def _runs_deepspeed(options: StepOptions) -> bool:
    return str(getattr(options, "sharding", "")).startswith("zero")


def plans_of(options: PlannedOptions, model: Model, card: Card, seq_len: str | None = None) -> dict[str, Plan]:
    """What the options ask for, at the length that they say, or at another one."""
    from ..plan.solve import plan_at

    tokens = length(seq_len or options.seq_len)
    return {name: plan_at(model, recipe, card, tokens) for name, recipe in recipes_of(options, model=model).items()}


def simplest(plans: dict[str, Plan]) -> str:
    """The name of the first plan that fits; where none does, of the nearest."""
    from ..plan.ways import nearest_plan

    fitting = next((name for name, plan in plans.items() if plan.fits), None)
    return fitting or next(name for name, plan in plans.items() if plan is nearest_plan(list(plans.values())))


def _named(options: RecipesOptions, usual: str) -> dict[str, Recipe]:
    from ..step.recipe import STRATEGIES, USUAL_STRATEGIES, strategy_name

    named = options.strategy if options.strategy is not None else usual
    several = {"usual": list(USUAL_STRATEGIES), "all": list(STRATEGIES)}
    with _in_options():
        names = several.get(named) or [strategy_name(name.strip()) for name in named.split(",")]
    is_part = options.sharding == "zero3" and bool(options.lora or options.train or options.freeze)
    transformers_alone = (options.tensor_parallel or 1) > 1 or options.sharding == "fsdp1"  # its own code, in one piece
    if options.strategy is None and (transformers_alone or is_part):
        names = ["standard", "checkpoint"]
    elif options.strategy is None and (options.expert_parallel or 1) > 1:
        names = ["standard", "checkpoint", "chunked-loss"]
    return {name: STRATEGIES[name] for name in names}


def _name_of(name: str, recipe: Recipe, alone: bool) -> str:
    """The strategy's while the recipe is one, with any number of chunks."""
    from ..step.recipe import STRATEGIES, STRATEGY_FIELDS

    fields = (field for field in STRATEGY_FIELDS if not field.endswith("_chunks"))
    if all(getattr(recipe, field) == getattr(STRATEGIES[name], field) for field in fields):
        return name
    return "custom" if alone else f"{name}*"


def length(text: str) -> int:
    from ..units import parse_length

    return parse_length(text)


def results_files(options: ResultsOptions) -> list[Path]:
    """Those that stand by themselves, whatever their names, and those of --results."""
    from ..errors import MeasurementError

    parts = [part.strip() for part in options.results.split(",")] if options.results is not None else []
    if "" in [*parts, *(str(path) if path.name else "" for path in options.files)]:
        raise MeasurementError("a results file without a name.\nWrite a.jsonl b.jsonl, or --results a.jsonl,b.jsonl.")
    return [*options.files, *map(Path, parts)]
