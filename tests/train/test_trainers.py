"""A wrapped model under what people train with, unchanged: transformers' Trainer, TRL's SFTTrainer, PEFT, accelerate."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from dataclasses import fields
from typing import Any
from unittest.mock import patch

import datasets
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.training_args import OptimizerNames
from trl import ModelConfig, SFTConfig, SFTTrainer

from mstplan.errors import ModelError, RecipeError
from mstplan.step.names import find_option
from mstplan.step.recipe import Recipe, planned
from mstplan.train import minisequence

from .llama import CHUNKS, VOCABULARY, difference, head_rows, small_llama, step, tokens
from .text import byte_batches

EXACT = 1e-10  # float64
LENGTH = 24
CHUNK = 2 * LENGTH // CHUNKS["loss_chunks"]  # tokens, of a batch of two
pytestmark = pytest.mark.filterwarnings("default:::(trl|peft|accelerate|datasets)")

# In float32 a chunked sum is rounded in another order: 6e-8 of each gradient. AdamW hands a relative difference of a
# gradient on to the weights as it is, and a few steps do not let it grow: measured are 1.2e-7 at the most.
FLOAT32 = 2e-6
# In bf16 every product is rounded by up to 2^-9, in each chunk anew: gradients differ by 1%, as plain ones do from float32,
# and AdamW, which looks at signs at first, makes up to 1e-3 of a loss of it in some steps. Gradients' norms, which drift
# with the weights, are not compared.
BFLOAT16 = 2e-3


@pytest.fixture(autouse=True)
def _own_state() -> Iterator[None]:
    """accelerate keeps its settings in globals and in the environment, from one trainer to the next."""
    with patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": "no"}):
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
        AcceleratorState._reset_state(reset_partial_state=True)


def assert_together(found: dict[str, list[float]], wanted: dict[str, list[float]], bound: float) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        margin = (
            5 * bound if name == "grad_norm" else bound
        )  # plain SFT from weights one rounding away is off by 9e-6 there, 2e-7 elsewhere
        assert len(values) > 0 and found[name] == pytest.approx(values, rel=margin, abs=1e-9), name


def logged(trainer: Trainer, *names: str) -> dict[str, list[float]]:
    return {name: [entry[name] for entry in trainer.state.log_history if name in entry] for name in names}


# ---- transformers -------------------------------------------------------------------------------------------------------


def rows(sequences: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in tokens(sequences, LENGTH, seed)]


def trainer_of(model: nn.Module, folder: Any, **more: Any) -> Trainer:
    settings = {
        "seed": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **more,
    }
    compute_loss = settings.pop("compute_loss_func", None)
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model, arguments, train_dataset=rows(24, 1), eval_dataset=rows(4, 2), compute_loss_func=compute_loss)


def trained(model: nn.Module, folder: Any, **more: Any) -> dict[str, list[float]]:
    trainer = trainer_of(model, folder, **more)
    trainer.train()
    return logged(trainer, "loss", "grad_norm", "eval_loss")


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["", "checkpointing"])
@pytest.mark.parametrize("checkpoint", ["none", "layer", "offload", "layers"])
def test_trainer(tmp_path, checkpoint, settings):
    wanted = trained(small_llama(torch.float32), tmp_path, **settings)
    with head_rows() as together:
        model = wrapped(small_llama(torch.float32), checkpoint)
        assert_together(trained(model, tmp_path, **settings), wanted, FLOAT32)
    assert max(together) == CHUNK and len(together) == 6 * 2 * CHUNKS["loss_chunks"]


def wrapped(model: Any, checkpoint: str) -> Any:
    """checkpoint: "offload" means "layer" with offload, "layers" that with layers in chunks as well."""
    offload, layers = checkpoint in ("offload", "layers"), checkpoint == "layers"
    more = {"layer_in_chunks": True, "attention_groups": 1} if layers else {}
    return minisequence(model, **CHUNKS, checkpoint="layer" if offload else checkpoint, offload=offload, **more)


def test_trainer_in_bf16(tmp_path):
    wanted, found = (
        trained(model, tmp_path, bf16=True)
        for model in (small_llama(torch.float32), wrapped(small_llama(torch.float32), "layer"))
    )
    for name in ("loss", "eval_loss"):
        assert found[name] == pytest.approx(wanted[name], rel=BFLOAT16)


def test_trainer_saves_loads_resumes_and_predicts(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(wrapped(small_llama(torch.float32), "layer"), tmp_path / "whole", **settings)
    trainer.train()
    wanted = logged(trainer, "loss")
    resumed = trainer_of(wrapped(small_llama(torch.float32), "layer"), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_together(logged(resumed, "loss"), wanted, 0.0)

    trainer.save_model(str(tmp_path / "saved"))
    plain = trainer_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), tmp_path)
    expected, found = plain.predict(rows(4, 2)), trainer.predict(rows(4, 2))
    assert found.predictions.shape == (4, LENGTH, VOCABULARY)
    assert (found.predictions == expected.predictions).all()
    assert found.metrics["test_loss"] == expected.metrics["test_loss"]


def sum_of_squares(outputs: Any, _labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.square().mean()


@pytest.mark.parametrize(
    "settings", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": sum_of_squares}], ids=["smoothing", "own loss"]
)
def test_losses_that_need_all_logits_are_refused(tmp_path, settings):
    with pytest.raises(ModelError, match="label_smoothing_factor"):
        trained(wrapped(small_llama(torch.float32), "layer"), tmp_path, **settings)
    losses = trained(minisequence(small_llama(torch.float32), mlp_chunks=3, loss_chunks=1), tmp_path, **settings)
    assert_together(losses, trained(small_llama(torch.float32), tmp_path, **settings), FLOAT32)


# ---- TRL ------------------------------------------------------------------------------------------------------------------


def words_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {
        word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, VOCABULARY))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def documents(count: int, seed: int) -> datasets.Dataset:
    """Texts of 10 to 16 words."""
    return datasets.Dataset.from_dict(
        {
            "text": [
                " ".join(f"w{max(4, word)}" for word in ids[: 10 + i % 7].tolist())
                for i, ids in enumerate(tokens(count, LENGTH, seed))
            ]
        }
    )


def lora(**more: Any) -> LoraConfig:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **more,
    }
    return LoraConfig(**settings)


def tuned(model: nn.Module, folder: Any, peft_config: LoraConfig | None = None, **more: Any) -> dict[str, list[float]]:
    settings = {
        "seed": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **more,
    }
    datasets.disable_progress_bars()
    torch.manual_seed(5)  # of the adapters
    trainer = SFTTrainer(
        model,
        SFTConfig(output_dir=str(folder), **settings),
        train_dataset=documents(24, 1),
        eval_dataset=documents(4, 2),
        processing_class=words_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return logged(trainer, "loss", "grad_norm", "eval_loss", "entropy", "mean_token_accuracy")


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": False}, {"packing": True, "max_length": LENGTH}],
    ids=["", "no checkpointing", "packing"],
)
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
def test_sft_trainer(tmp_path, adapters, settings):
    peft_config = lora() if adapters else None
    wanted = tuned(small_llama(torch.float32), tmp_path, peft_config, **settings)
    for checkpoint in ("none", "offload", "layers"):
        model = wrapped(small_llama(torch.float32), checkpoint)
        assert_together(tuned(model, tmp_path, peft_config, **settings), wanted, FLOAT32)


def test_sft_trainers_label_smoothing_is_said_to_need_all_logits(tmp_path):
    """SFTTrainer then asks for logits as anybody may, without saying what for: nothing to refuse."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tuned(wrapped(small_llama(torch.float32), "none"), tmp_path, label_smoothing_factor=0.1)
    messages = [str(warning.message) for warning in said]
    assert sum("label_smoothing_factor" in message for message in messages) >= 1  # TRL's own
    assert sum("loss_chunks had no effect" in message for message in messages) == 1


# ---- PEFT -----------------------------------------------------------------------------------------------------------------


def with_adapters(model: nn.Module, **more: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(model, lora(**more), autocast_adapter_dtype=False)


def both_orders(checkpoint: str, **more: Any) -> list[PeftModel]:
    """Adapters around a wrapped model, and a wrapped model with adapters."""
    return [
        with_adapters(wrapped(small_llama(), checkpoint), **more),
        wrapped(with_adapters(small_llama(), **more), checkpoint),
    ]


ADAPTED = {
    "all linear": {},
    "the head too": {"target_modules": ["q_proj", "up_proj", "lm_head"]},
    "a trained head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("checkpoint", ["none", "layer", "offload", "layers"])
@pytest.mark.parametrize("adapted", ADAPTED)
def test_adapters_get_the_same_gradients(adapted, checkpoint):
    ids = tokens(2, 13)
    wanted = step(with_adapters(small_llama(), **ADAPTED[adapted]), ids)
    assert all("lora" in name or "modules_to_save" in name for name in wanted[1])
    for model in both_orders(checkpoint, **ADAPTED[adapted]):
        assert difference(step(model, ids), wanted) < EXACT
        minisequence.undo(model)
        assert difference(step(model, ids), wanted) < EXACT


@pytest.mark.parametrize("order", [0, 1], ids=["adapters around", "adapters inside"])
def test_adapters_dropout_draws_the_same_numbers_again(order):
    """The gradient of a fixed seed is the slope of the loss of that seed."""
    model = both_orders("layer", lora_dropout=0.3)[order]
    weight = dict(model.named_parameters())["base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"]
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    ids = tokens(2, 13)

    def loss_at(shift: float) -> torch.Tensor:
        torch.manual_seed(7)
        with torch.no_grad():
            weight.add_(shift * direction)
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            weight.sub_(shift * direction)
        return loss

    width = 3e-3  # the norms round to fp32: no less
    slope = (loss_at(width).item() - loss_at(-width).item()) / (2 * width)
    loss_at(0.0).backward()
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=1e-3)


def test_adapters_are_saved_and_merged(tmp_path):
    model = with_adapters(wrapped(small_llama(), "layer"))
    ids = tokens(2, 13)
    optimizer = torch.optim.SGD([w for w in model.parameters() if w.requires_grad], lr=0.1)
    step(model, ids)
    optimizer.step()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(small_llama(), tmp_path, autocast_adapter_dtype=False).train()
    loss = again(input_ids=ids, labels=ids).loss.item()
    assert step(model, ids)[0] == pytest.approx(loss, rel=1e-6)  # saved in fp32
    merged = model.merge_and_unload()
    assert merged(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, rel=1e-6)
    assert not torch.is_tensor(merged(input_ids=ids, labels=ids).logits)  # in chunks still


# ---- accelerate -----------------------------------------------------------------------------------------------------------


def accelerated(model: nn.Module, precision: str) -> tuple[list[float], nn.Module, Accelerator]:
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batches = torch.utils.data.DataLoader(tokens(16, LENGTH), batch_size=2)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model, accelerator


@pytest.mark.parametrize("checkpoint", ["none", "layer", "offload"])
@pytest.mark.parametrize(("precision", "bound"), [("no", FLOAT32), ("bf16", BFLOAT16)])
def test_accelerate(precision, bound, checkpoint):
    wanted = accelerated(small_llama(torch.float32), precision)[0]
    with head_rows() as together:
        losses, prepared, accelerator = accelerated(wrapped(small_llama(torch.float32), checkpoint), precision)
        assert losses == pytest.approx(wanted, rel=bound)
        for keep in (True, False):  # the wrapper that casts outputs to fp32
            model = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
            assert type(model) is type(small_llama())
            model(input_ids=tokens(2, LENGTH), labels=tokens(2, LENGTH)).loss.backward()
    assert max(together) == CHUNK


def gradients(
    model: nn.Module, ids: torch.Tensor, dtype: torch.dtype, scale: float = 1.0, **more: Any
) -> dict[str, torch.Tensor]:
    """Those of a step with autocast to dtype, float32 for none, and with a loss scale."""
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = model(input_ids=ids, labels=ids, **more).loss
    (loss * scale).backward()
    return {name: weight.grad / scale for name, weight in model.named_parameters()}


def test_bf16_gradients_are_as_good_as_plain_ones():
    ids = tokens(2, LENGTH)
    exact = gradients(small_llama(torch.float32), ids, torch.float32)
    plain = gradients(small_llama(torch.float32), ids, torch.bfloat16)
    chunked = gradients(wrapped(small_llama(torch.float32), "layer"), ids, torch.bfloat16)
    assert difference((1.0, chunked), (1.0, exact)) < 1.5 * difference((1.0, plain), (1.0, exact)) < 0.02


def test_autocast_keeps_one_copy_of_the_head():
    """Autocast caches the casts of leaves till it ends; a copy of the LM head for every chunk must not pile up."""
    casts: list[torch.UntypedStorage] = []
    alive = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if (
                func is torch.ops.aten._to_copy.default
                and out.dtype == torch.bfloat16
                and out.shape == (VOCABULARY, 32)
            ):
                casts.append(torch.multiprocessing.reductions.StorageWeakRef(out.untyped_storage()))
                alive.append(sum(not cast.expired() for cast in casts))
            return out

    model = minisequence(small_llama(torch.float32), mlp_chunks=1, loss_chunks=6)
    ids = tokens(2, LENGTH)
    with Watch(), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(casts) >= 1 and max(alive) <= 2


def test_a_loss_scale_comes_before_underflow_in_fp16():
    """fp16 with a loss scale, as accelerate's and Trainer's fp16 do it: gradients that fp16 cannot hold unscaled survive."""
    ids, items = tokens(2, LENGTH), torch.tensor(1_000_000)
    exact = gradients(small_llama(torch.float32), ids, torch.float32, num_items_in_batch=items)
    for checkpoint in ("none", "layer"):
        model = wrapped(small_llama(torch.float32), checkpoint)
        found = gradients(model, ids, torch.float16, scale=65536.0, num_items_in_batch=items)
        assert difference((1.0, found), (1.0, exact)) < 0.01


def test_a_copy_trains_its_own_weights():
    """As reference models and moving averages are made."""
    model = wrapped(small_llama(), "layer")
    ids = tokens(2, 13)
    wanted = step(small_llama(), ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert difference(step(twin, ids), wanted) < EXACT
    assert all(weight.grad is None for weight in model.parameters())


# ---- a short training run ---------------------------------------------------------------------------------------------------


def test_training_on_text():
    """A model of 0.9 M parameters on the bytes of a text, 50 steps of AdamW in float32: the losses of plain and wrapped stay
    together, and fall. (Measured: 1.5e-6 apart; plain training that begins with weights one rounding off ends 4e-5 apart.)"""
    sizes = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
    }
    plain, chunked = (small_llama(torch.float32, **sizes) for _ in range(2))
    assert 0.8e6 < sum(weight.numel() for weight in plain.parameters()) < 1.2e6
    minisequence(chunked, mlp_chunks=5, loss_chunks=7)
    wanted, found = (losses_on_text(model) for model in (plain, chunked))
    assert found == pytest.approx(wanted, rel=1e-4)
    assert sum(found[:3]) / 3 > 5.0 and sum(found[-3:]) / 3 < 3.0  # from log(256) = 5.5 nats a byte


def losses_on_text(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for ids in byte_batches(steps=50, sequences=2, length=96):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_what_trainers_call_things_is_known_to_the_planner() -> None:
    """Every optimizer and attention of transformers, every setting of TRL that decides memory: planned, or known by name."""
    every = ((name, ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS.keys())  # noqa: SIM118  it is no mapping of the usual kind
    attentions = [
        name for name, function in every if function.__module__.startswith("transformers.")
    ]  # others are the tests' own
    typed = {"optimizer": [one.value for one in OptimizerNames], "attention": attentions}
    for field, values in typed.items():
        for value in set(values) - set(planned(field)[0]):
            with pytest.raises(RecipeError, match="is") as e:
                Recipe(**{field: value})
            assert not str(e.value).startswith("unknown"), value
    settings = [one.name for one in fields(ModelConfig) if one.name not in ("model_revision", "trust_remote_code")]
    settings += [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "optim",
        "bf16",
        "fp16",
        "tf32",
        "gradient_checkpointing",
        "activation_checkpointing",
        "activation_offloading",
        "torch_compile",
        "use_liger_kernel",
        "fsdp",
        "deepspeed",
        "max_length",
        "packing",
        "loss_type",
        "learning_rate",
    ]
    assert set(settings) <= {one.name for one in (*fields(SFTConfig), *fields(ModelConfig))}
    assert [name for name in settings if name not in Recipe.model_fields and find_option(f"--{name}") is None] == []
