"""A recipe: how one trains. One validated object, readable from and writable to JSON, and the five named strategies."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .. import files
from ..errors import RecipeError, did_you_mean, quoted
from .kernels import KERNELS, SDPA, attentions
from .losses import LOSSES
from .optimizers import OPTIMIZERS

REGISTRIES: dict[str, Callable[[], list[str]]] = {
    "optimizer": lambda: list(OPTIMIZERS),
    "loss": lambda: list(LOSSES),
    "attention": attentions,
}
"""Fields whose values are the names of what is registered."""
ChunkCount = Literal["auto"] | int
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Patterns = Annotated[tuple[Pattern, ...], Field(max_length=100, strict=False)]
_LARGEST_FILE = 1_000_000  # bytes; a recipe has some hundred


class Recipe(BaseModel):
    """Recipe by which a model is fine-tuned, as the step model sees it. `print` shows the fields that are not as usual."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    precision: Literal["bf16", "mixed", "fp32"] = "bf16"
    """bf16: weights, gradients and moments in bf16. mixed: fp32 weights under bf16 autocast. fp32: fp32 throughout."""
    optimizer: str = "adamw"
    """One of `optimizers.OPTIMIZERS`: adamw (torch's), adamw-8bit (bitsandbytes'), adafactor (transformers'), sgd (torch's)."""
    adamw_kernel: Literal["foreach", "fused", "for-loop"] = "foreach"
    """How torch's AdamW steps: foreach (CUDA's default) makes a temporary as large as the weights."""
    optimizer_in_backward: bool = False
    """Step each weight as soon as its gradient is made, then free the gradient."""
    optimizer_on_host: bool = False
    """Optimizer states and step on the host; gradients travel there, updated weights back."""
    weights_on_host: bool = False
    """Weights on the host as well, gathered layer by layer (ZeRO-3 parameter offload); needs optimizer_on_host."""
    accumulation: int = Field(default=1, ge=1, le=1_000_000)
    """Micro-batches per optimizer step; beyond 1, gradients exist during every forward."""
    batch: int = Field(default=1, ge=1, le=1_000_000)
    """Sequences per micro-batch."""
    pad_to: int = Field(default=1, ge=1, le=1_000_000)
    """Tokens that batches are padded to a multiple of (a collator's pad_to_multiple_of)."""
    checkpoint: Literal["none", "layer", "sqrt"] | int = "none"
    """Checkpointing: none, every layer, every sqrt(L) layers, or every k layers (an integer)."""
    mlp_chunks: ChunkCount = 1
    """Pieces of the sequence the MLP runs over; "auto": as recommended for model, card and length."""
    mlp_recompute: bool = False
    """Recompute each MLP chunk by itself in backward, so that its intermediates live for one chunk in both passes."""
    loss_chunks: ChunkCount = 1
    """Pieces for the LM head and the chunked loss; "auto": as recommended."""
    loss: str = "transformers"
    """One of `losses.LOSSES`: the loss of current transformers, that of releases before 4.45 (one more fp32 copy of the logits), or MsT's."""
    offload_layer_inputs: bool = False
    """Keep checkpointed layers' inputs in CPU RAM."""
    attention: str = "sdpa"
    """One of `kernels.attentions()`: sdpa (the kernel that torch chooses, explicit masks for sliding windows), cudnn or efficient (sdpa with
    that kernel only), flash (attn_implementation flash_attention_2), or eager."""
    train: Patterns = ()
    """The weights that are trained, by patterns over their names or words (`selection.py`); none: all of them."""
    freeze: Patterns = ()
    """Weights that are not."""
    input_gradients: bool = False
    """Backward goes down to the embeddings' output even where nothing below is trained: transformers' enable_input_require_grads,
    which its gradient_checkpointing_enable and peft call. `minisequence` does without."""
    gpus: int = Field(default=1, ge=1, le=65_536)
    """Cards that train together, each with `batch` sequences of its own."""
    sharding: Literal["none", "fsdp"] = "none"
    """fsdp: weights, gradients and optimizer states in shards over all cards, each decoder layer gathered while it runs
    (PyTorch's fully_shard of every layer, then of the model; ZeRO-3). mixed is then its MixedPrecisionPolicy: fp32 shards,
    gathered in bf16, gradients reduced in fp32, and no autocast."""

    if not TYPE_CHECKING:  # type checkers know the fields better than this signature does

        def __init__(self, **fields: object) -> None:
            try:
                super().__init__(**fields)
            except ValidationError as e:
                raise RecipeError(first_problem(e)) from None

        __init__.__pydantic_base_init__ = True  # so that model_validate, which raises ValidationError, does not come by

    def model_post_init(self, _context: object) -> None:
        for name, list_names in REGISTRIES.items():
            if getattr(self, name) not in (planned_names := list_names()):
                from . import names

                raise ValueError(names.unknown_value(name, getattr(self, name), planned_names))
        for name in ("mlp_chunks", "loss_chunks"):
            value = getattr(self, name)
            if value != "auto" and not 1 <= value <= 1 << 32:
                raise ValueError(f"{name}: {_MUST_BE[name]} (got {quoted(value)})")
        if self.checkpoint not in ("none", "layer", "sqrt") and not 1 <= int(self.checkpoint) <= 100_000:
            raise ValueError(f"checkpoint: {_MUST_BE['checkpoint']} (got {quoted(self.checkpoint)})")
        for bad, message in (
            (not self.loss_in_chunks and self.loss_chunks != 1, "loss_chunks needs loss='chunked' (--loss chunked)"),
            (
                self.offload_layer_inputs and self.checkpoint == "none",
                "offload_layer_inputs needs checkpointing, or there are no layer inputs to move: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                self.optimizer_in_backward and self.accumulation > 1,
                "optimizer_in_backward uses up each gradient at once, so it cannot accumulate: set accumulation to 1",
            ),
            (
                self.optimizer_in_backward and self.optimizer_on_host,
                "optimizer_in_backward and optimizer_on_host exclude each other: leave one of the two out",
            ),
            (
                self.attention != SDPA and KERNELS[self.attention].sixteen_bit_only and self.precision == "fp32",
                f"attention {self.attention} computes in bf16 or fp16 only: use precision bf16 or mixed",
            ),
            (
                self.weights_on_host and not self.optimizer_on_host,
                "weights_on_host needs optimizer_on_host (--optimizer-on-host)",
            ),
            *self._bad_sharding(),
            (
                bool(self.train or self.freeze) and self.sharded,
                "fsdp with frozen weights is not planned yet: leave --train and --freeze out, or --sharding",
            ),
        ):
            if bad:
                raise ValueError(message)

    def _bad_sharding(self) -> tuple[tuple[bool, str], ...]:
        if self.sharding == "none":
            return (
                (
                    self.gpus > 1,
                    "several gpus are planned in shards alone: add sharding='fsdp' (--sharding fsdp), FSDP2 as ZeRO-3",
                ),
            )
        stepping = " or ".join(name for name, each in OPTIMIZERS.items() if each.steps_shards)
        return (
            (self.gpus < 2, "sharding='fsdp' (--sharding fsdp) needs 2 gpus or more: add gpus=8 (--gpus 8)"),
            (
                self.checkpoint not in ("none", "layer", 1),
                "fsdp gathers one layer at a time, so a checkpoint cannot span several: set checkpoint='layer' (--checkpoint layer)",
            ),
            (
                not OPTIMIZERS[self.optimizer].steps_shards,
                f"{OPTIMIZERS[self.optimizer].label} cannot step fsdp's shards: use {stepping}",
            ),
            (
                self.optimizer_on_host or self.weights_on_host,
                "fsdp with weights or optimizer in CPU RAM is not planned",
            ),
        )

    def __repr__(self) -> str:
        usual = ((name, field.default) for name, field in type(self).model_fields.items())
        fields = [f"{name}={getattr(self, name)!r}" for name, default in usual if getattr(self, name) != default]
        return f"Recipe({', '.join(fields)})"

    __str__ = __repr__

    @property
    def sharded(self) -> bool:
        return self.sharding == "fsdp"

    @property
    def loss_in_chunks(self) -> bool:
        return LOSSES[self.loss].in_chunks

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight on the device."""
        return 2 if self.precision == "bf16" else 4

    @property
    def weight_dtype(self) -> str:
        """Dtype of one weight on the device."""
        return "bfloat16" if self.precision == "bf16" else "float32"

    @property
    def autocast(self) -> bool:
        """Whether weights are cast to bf16 where they are used."""
        return self.precision == "mixed" and not self.sharded

    @property
    def used_dtype(self) -> str:
        """Dtype of weights in layers and of hidden states between them: under fsdp, what shards are gathered in."""
        return "float32" if self.precision == "fp32" or self.autocast else "bfloat16"

    def padded(self, tokens: int) -> int:
        """The length that a batch of so many tokens is run at."""
        return -(-tokens // self.pad_to) * self.pad_to

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Recipe:
        """A recipe from a JSON file. Raises RecipeError."""
        return cls.from_json(files.read_text(path, "a recipe in JSON", _LARGEST_FILE, RecipeError), quoted(path))

    @classmethod
    def from_json(cls, text: str, source: str = "recipe") -> Recipe:
        """A recipe from JSON text; `source` says in messages where it is from. Raises RecipeError."""
        if (key := files.repeated_key(text)) is not None:
            raise RecipeError(f"{source}: {quoted(key)} is given twice.\nLeave one of the two out.")
        try:
            return cls.model_validate_json(text)
        except ValidationError as e:
            message = first_problem(e)
            raise RecipeError(f"{source}: {message}" + ("" if "\n" in message else f"\n{_WRITES_ONE}")) from None
        except UnicodeError:
            raise RecipeError(f"{source}: holds what is no Unicode text.\n{_WRITES_ONE}") from None

    def write(self, path: str | os.PathLike[str], force: bool = False) -> None:
        """Write the recipe as JSON; over a file that is there only with `force`. Raises OutputError."""
        files.check_writable(path, force)
        files.write(path, (self.model_dump_json(indent=1) + "\n").encode())

    def changed(self, /, **fields: object) -> Recipe:
        """A copy with other values, validated. Raises RecipeError."""
        if all(repr(getattr(self, name, self)) == repr(value) for name, value in fields.items()):  # 1 is not True
            return self
        try:
            return Recipe.model_validate({**self.model_dump(), **fields})
        except ValidationError as e:
            raise RecipeError(first_problem(e)) from None


_MUST_BE = {
    "checkpoint": "must be none, layer, sqrt, or a number of layers from 1",
    "mlp_chunks": "must be 'auto' or a whole number from 1",
    "loss_chunks": "must be 'auto' or a whole number from 1",
}
_WRITES_ONE = "`mstplan plan ... --write-recipe FILE` writes one to start from."


def planned(field: str) -> tuple[list[str], str]:
    """The names that a field of a recipe can have as its value; and what else, in words."""
    if field in REGISTRIES:
        return REGISTRIES[field](), ""
    kinds = get_args(Recipe.model_fields[field].annotation)
    names = [name for kind in kinds for name in get_args(kind) or (kind,) if isinstance(name, str)]
    return names, " or a number of layers from 1" if int in kinds else ""


def first_problem(error: ValidationError) -> str:
    """One or two lines for the first thing pydantic found wrong."""
    from . import names

    problem = error.errors(include_url=False)[0]
    where = str(problem["loc"][0]) if problem["loc"] else ""
    message = _MUST_BE.get(where) or problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if problem["type"] == "extra_forbidden":
        return (
            names.unknown_field(where)
            or f"a recipe has no field {quoted(where)}.{did_you_mean(where, Recipe.model_fields)}"
        )
    if problem["type"] in ("literal_error", "string_type") and where in names.VALUES:
        return names.unknown_value(where, problem["input"], *planned(where))
    if problem["type"] == "json_invalid":
        return f"{message.replace('Invalid JSON', 'not valid JSON')}\n{_WRITES_ONE}"
    if where:
        return f"{where}: {message} (got {quoted(problem['input'])})"
    return message if problem["type"] == "value_error" else f"{message}\n{_WRITES_ONE}"


_MST: dict[str, Any] = {
    "checkpoint": "layer",
    "mlp_chunks": "auto",
    "mlp_recompute": True,
    "loss": "chunked",
    "loss_chunks": "auto",
}
# Constructed without validation: that would build pydantic's validators at every start (a test validates them).
STRATEGIES: dict[str, Recipe] = {
    "standard": Recipe.model_construct(),
    "checkpoint": Recipe.model_construct(checkpoint="layer"),
    "checkpoint-sqrt": Recipe.model_construct(checkpoint="sqrt"),
    "mst": Recipe.model_construct(**_MST),
    "mst-offload": Recipe.model_construct(**_MST, offload_layer_inputs=True),
}
LABELS = {"standard": "no-checkpointing", "checkpoint": "checkpointing", "checkpoint-sqrt": "checkpointing-sqrt"}
"""What people read and type for a strategy whose name, in JSON and in results files, says something else in the field."""
STRATEGY_FIELDS = ("checkpoint", "mlp_chunks", "mlp_recompute", "loss_chunks", "loss", "offload_layer_inputs")
"""What a strategy decides; everything else about a recipe is the user's choice."""


def strategy(name: str, **fields: object) -> Recipe:
    """The named strategy, with some fields changed. Raises RecipeError."""
    named = STRATEGIES[strategy_name(name)]
    return named.changed(**fields) if fields else named


def strategy_name(typed: str) -> str:
    """The name of the strategy that is called so, by its name or its label. Raises RecipeError."""
    if isinstance(typed, str):
        name = next((name for name, label in LABELS.items() if label == typed), typed)
        if name in STRATEGIES:
            return name
    from . import names

    raise RecipeError(names.unknown_value("strategy", typed, strategy_labels(), older=list(LABELS)))


def strategy_label(name: str) -> str:
    """What people read for a strategy, also for one with changes ('checkpoint*')."""
    changed = name.endswith("*")
    return LABELS.get(name.removesuffix("*"), name.removesuffix("*")) + "*" * changed


def strategy_labels() -> list[str]:
    return [strategy_label(name) for name in STRATEGIES]


# ---- a recipe in words ----------------------------------------------------------------------------------------------------

_WEIGHTS = {"bf16": "bf16 weights", "mixed": "fp32 weights under bf16 autocast", "fp32": "fp32 weights"}
_SHORT = {"bfloat16": "bf16", "float32": "fp32", "uint8": "8-bit"}


def recipe_in_words(recipe: Recipe, kernel: str = "") -> str:
    """How one trains, but for what a strategy decides, in a line. kernel: what the recipe's attention comes to, in words."""
    optimizer = OPTIMIZERS[recipe.optimizer]
    how: list[str] = [recipe.adamw_kernel] if optimizer.has_kernels else []
    states = " and ".join(_dtypes_of_states(recipe))
    how += ["in CPU RAM"] if recipe.optimizer_on_host else [f"{states} states"] if states else []
    how += ["in backward"] if recipe.optimizer_in_backward else []
    shards = recipe.sharded and recipe.precision == "mixed"
    words = [
        "a part of the weights trained" if recipe.train or recipe.freeze else "full fine-tuning",
        "fp32 shards, gathered in bf16" if shards else _WEIGHTS[recipe.precision],
        optimizer.short + (f" ({', '.join(how)})" if how else ""),
        f"batch {recipe.batch}" + (f" x accumulation {recipe.accumulation}" if recipe.accumulation > 1 else ""),
        f"{recipe.attention} by {kernel}" if kernel else recipe.attention,
    ]
    return ", ".join([*words, *([f"FSDP2 over {recipe.gpus:,} GPUs"] if recipe.sharded else [])])


def _dtypes_of_states(recipe: Recipe) -> list[str]:
    from .tape import Weight

    rows = OPTIMIZERS[recipe.optimizer].memory(recipe, [(Weight("of any size", (4096, 4096)), 1)]).states
    return list(dict.fromkeys(_SHORT.get(state.dtype, state.dtype) for state in rows if state.bytes > 1 << 20))


# ---- a recipe as options --------------------------------------------------------------------------------------------------

_SWITCHES = {
    "optimizer_in_backward": "--optimizer-in-backward",
    "optimizer_on_host": "--optimizer-on-host",
    "weights_on_host": "--weights-on-host",
    "input_gradients": "--input-gradients",
}


def options_of(recipe: Recipe) -> str:
    """The options of the command line that describe a recipe, ready to paste: --strategy where it is a strategy's, else its own."""
    usual, words = STRATEGIES["standard"], _strategy_options(recipe)
    for name in Recipe.model_fields:
        value = getattr(recipe, name)
        if name in STRATEGY_FIELDS or value == getattr(usual, name):
            continue
        text = ",".join(value) if name in ("train", "freeze") else str(value)
        words += [_SWITCHES[name]] if name in _SWITCHES else [f"--{name.replace('_', '-')}", text]
    return shlex.join(words)


def _strategy_options(recipe: Recipe) -> list[str]:
    """Options for what a strategy decides."""
    chunks = {"mlp_chunks", "loss_chunks"}

    def same(name: str, fields: Iterable[str]) -> bool:
        return all(getattr(recipe, field) == getattr(STRATEGIES[name], field) for field in fields)

    if matching_name := next((name for name in STRATEGIES if same(name, STRATEGY_FIELDS)), None):
        return ["--strategy", strategy_label(matching_name)]
    counts = ["--chunks", ",".join(dict.fromkeys((str(recipe.mlp_chunks), str(recipe.loss_chunks))))]
    in_chunks = (name for name in STRATEGIES if STRATEGIES[name].loss_in_chunks)
    if matching_name := next((name for name in in_chunks if same(name, set(STRATEGY_FIELDS) - chunks)), None):
        return ["--strategy", strategy_label(matching_name), *counts]
    words = ["--checkpoint", str(recipe.checkpoint)] if recipe.checkpoint != "none" else []
    words += ["--offload"] if recipe.offload_layer_inputs else []
    if (
        recipe.mlp_chunks == 1
        and not recipe.mlp_recompute
        and recipe.loss_chunks == ("auto" if recipe.loss_in_chunks else 1)
    ):
        return words + (["--loss", recipe.loss] if recipe.loss != "transformers" else [])
    words += counts + (["--loss", recipe.loss] if recipe.loss != "chunked" else [])
    return words + ([] if recipe.mlp_recompute else ["--no-recompute"])
