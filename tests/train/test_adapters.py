"""Adapters and quantised weights in mini-sequences: in float64 the plain model's gradients, in bf16 as near to the truth as it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from mstplan.step.recipe import Recipe
from mstplan.train import minisequence
from mstplan.train.adapters import add_adapters, is_adapter, prepare_for_kbit
from mstplan.train.fused import PACKAGES
from mstplan.train.quantise import quantise

from .double import difference, float64
from .families import small_batch, small_model
from .test_exact import MODES, step

pytestmark = pytest.mark.filterwarnings("ignore:::(peft|transformers)")

FAMILIES = ("llama", "gemma2", "phi3", "gpt2", "gpt_neox")
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
WITH_HEAD = ("lm_head", "embed_tokens")
ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "attention only": {"lora_targets": ("attention",)},
    "modules to save": {"lora_modules_to_save": WITH_HEAD},
}
NOISE = 1.001
"""So much of the plain error at most: sums of chunks round elsewhere than the plain ones do."""


def adapted(family: str, recipe: Recipe, dtype: torch.dtype) -> nn.Module:
    """A small model with the recipe's adapters, none of which is 0, and weights as the recipe keeps them."""
    model = small_model(family).to(dtype)
    if recipe.quantize != "none":
        quantise(model, recipe)
    if recipe.kbit_preparation:
        prepare_for_kbit(model)
    torch.manual_seed(3)
    add_adapters(model, recipe)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.train()


def lora(**more: Any) -> Recipe:
    return Recipe(lora_rank=8, **more)


def assert_adapters_alone(gradients: dict[str, torch.Tensor]) -> None:
    assert gradients and all(is_adapter(name) for name in gradients)
    assert all(gradient.any() for gradient in gradients.values())


# ---- float64 --------------------------------------------------------------------------------------------------------------


def want_input_gradients(model: torch.nn.Module, mode: str) -> None:
    """As Trainer and peft do it, without which reentrant checkpoints give frozen layers' adapters no gradients."""
    if mode == "reentrant":
        model.enable_input_require_grads()  # type: ignore[operator]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_every_kind_of_adapter(family, kind, mode):
    fields = dict(ADAPTERS[kind])
    if family == "gpt_neox" and kind == "modules to save":
        fields = {"lora_modules_to_save": ("embed_out",)}
    if family == "gemma2" and kind == "modules to save":
        fields = {"lora_modules_to_save": ("embed_tokens",)}  # its head is tied
    model = adapted(family, lora(**fields), torch.float64)
    assert all(w.dtype == torch.float64 for w in model.parameters())
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    assert_adapters_alone(wanted[1])
    want_input_gradients(model, mode)
    minisequence(model, mlp_chunks=3, loss_chunks=4, **MODES[mode])
    for _ in range(2):
        assert difference(step(model, ids, labels), wanted) == ""
    minisequence.undo(model)
    assert difference(step(model, ids, labels), wanted) == ""


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, kind):
    model = adapted(family, lora(**ADAPTERS[kind]), torch.float64)
    for (sequences, tokens), chunks in (((1, 8), (2, 3)), ((2, 13), (5, 4)), ((2, 13), (50, 50))):
        ids, labels = small_batch(sequences, tokens)
        wanted = step(model, ids, labels)
        in_layers = {"layer_in_chunks": True, "attention_groups": 1}
        from_host = {**in_layers, "attention_on_host": True}
        for layers in ({}, in_layers, from_host):
            minisequence(model, mlp_chunks=chunks[0], loss_chunks=chunks[1], offload=True, **layers)
            assert difference(step(model, ids, labels), wanted) == ""
            minisequence.undo(model)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", EXPERTS)
def test_experts_and_routers_as_parameters(family, mode):
    model = adapted(family, lora(), torch.float64)
    wrapped = {module.parameter_name for module in model.modules() if isinstance(module, ParamWrapper)}
    assert wrapped == {"gate_up_proj", "down_proj", "weight"}
    assert all(w.dtype == torch.float64 for w in model.parameters())
    ids, labels = small_batch(2, 13)
    wanted = step(model, ids, labels)
    assert_adapters_alone(wanted[1])
    want_input_gradients(model, mode)
    in_chunks = {"layer_in_chunks": True, "attention_groups": 2}
    for layers in ({}, in_chunks) if mode != "reentrant" else ({},):
        minisequence(model, mlp_chunks=3, loss_chunks=4, **MODES[mode], **layers)
        for _ in range(2):
            assert difference(step(model, ids, labels), wanted) == ""
        minisequence.undo(model)
    assert difference(step(model, ids, labels), wanted) == ""


@pytest.mark.parametrize("checkpoint", ["none", "layer", "selective"])
@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "LoRA"])
def test_trls_loss_beside_mlp_chunks(adapters, checkpoint):
    """TRL's loss alone, and beside MLPs in chunks: the same bit for bit or nearly, and the plain model's to fp32's rounding."""
    ids, labels = small_batch(2, 13)
    plain = adapted("llama", lora(), torch.float32) if adapters else small_model("llama").float()
    model = copy.deepcopy(plain)
    truth = copy.deepcopy(plain).double()
    wanted = step(truth, ids, labels)
    PACKAGES.install_loss(model, "trl")
    alone = fp32_step(model, ids, labels)
    minisequence(model, mlp_chunks=3, loss_chunks=1, checkpoint=checkpoint)
    beside = fp32_step(model, ids, labels)
    assert beside[0] == alone[0] == pytest.approx(wanted[0], rel=1e-5)
    assert distance(alone[1], wanted[1]) < 1e-5
    assert distance(beside[1], wanted[1]) < 1e-5


# ---- bf16, and quantised weights ------------------------------------------------------------------------------------------


def fp32_step(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor, autocast: bool = False) -> Any:
    """Loss and gradients as the weights' own dtypes give them."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    return loss.item(), {n: w.grad.double() for n, w in model.named_parameters() if w.grad is not None}


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Of all gradients together, as a share of them."""
    assert found.keys() == truth.keys()
    off = sum(float((found[n] - truth[n]).norm()) ** 2 for n in truth)
    return (off / sum(float(g.norm()) ** 2 for g in truth.values())) ** 0.5


def in_float64(model: nn.Module) -> nn.Module:
    """The model with what quantised weights stand for, and all else in float64."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "lora_A") or not quantised(child):
                continue
            setattr(module, name, dequantised(child))
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LoraLayer) and hasattr(child, "base_layer"):
                setattr(module, name, Adapted(child))
    return model.double()


def quantised(module: nn.Module) -> bool:
    return any(not weight.is_floating_point() for weight in module.parameters(recurse=False))


def dequantised(module: Any) -> nn.Module:
    """A linear layer of what the quantised weight stands for."""
    from bitsandbytes import functional

    linear = nn.Linear(module.in_features, module.out_features, module.bias is not None)
    if module.weight.dtype == torch.int8:
        values = module.weight.data.double() * module.weight.SCB.double()[:, None] / 127
    else:
        values = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    linear.weight, linear.bias = nn.Parameter(values.double(), requires_grad=False), module.bias
    return linear


class Adapted(nn.Module):
    """W x + B A x times the scale, under peft's names."""

    def __init__(self, layer: Any):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
        self.scale = layer.scaling["default"]
        self.in_features, self.out_features = layer.in_features, layer.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low: torch.Tensor = self.lora_B["default"](self.lora_A["default"](x))
        return self.base_layer(x) + low * self.scale  # type: ignore[no-any-return]


CHUNKED: list[dict[str, Any]] = [
    {"mlp_chunks": 3, "loss_chunks": 4},
    {"mlp_chunks": 5, "loss_chunks": 13, "checkpoint": "layer", "offload": True},
    {"mlp_chunks": 3, "loss_chunks": 1, "checkpoint": "selective"},
]


def assert_as_near_as_plain(model: nn.Module, autocast: bool = False) -> None:
    ids, labels = small_batch(2, 48)
    truth = step(in_float64(model), ids, labels)[1]
    assert_adapters_alone(truth)
    plain = fp32_step(model, ids, labels, autocast)
    for settings in CHUNKED:
        minisequence(model, **settings)
        found = fp32_step(model, ids, labels, autocast)
        minisequence.undo(model)
        assert found[0] == pytest.approx(plain[0], rel=2**-20)
        assert distance(found[1], truth) <= NOISE * distance(plain[1], truth)
    again = fp32_step(model, ids, labels, autocast)
    assert again[0] == plain[0] and distance(again[1], plain[1]) == 0  # weights are what they were


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_bfloat16(family, dtype):
    assert_as_near_as_plain(adapted(family, lora(adapter_dtype=dtype), torch.bfloat16))


@pytest.mark.parametrize("double", [False, True], ids=["", "double"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_lora_on_four_bits(family, kind, double):
    assert_as_near_as_plain(adapted(family, lora(quantize=kind, double_quantize=double), torch.bfloat16))


def test_lora_on_eight_bits():
    assert_as_near_as_plain(adapted("llama", lora(quantize="int8"), torch.bfloat16))


def test_as_peft_prepares_a_quantised_model():
    model = adapted("llama", lora(quantize="nf4", double_quantize=True, kbit_preparation=True), torch.bfloat16)
    assert_as_near_as_plain(model, autocast=True)


def test_four_bits_are_not_packed_anew():
    """Trying the MLP out on a few tokens leaves bitsandbytes' weights as they are, also on CPUs where it would pack them for inference."""
    model = adapted("llama", lora(quantize="nf4", double_quantize=True), torch.bfloat16)
    layers = [m for m in model.modules() if quantised(m)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = [m.weight.data.clone() for m in layers]
    ids, labels = small_batch(2, 13)
    minisequence(model, mlp_chunks=3, loss_chunks=4)
    fp32_step(model, ids, labels)
    assert len(layers) == 14 and all(m.weight.quant_state.nested for m in layers)
    assert all(torch.equal(m.weight.data, data) for m, data in zip(layers, before, strict=True))


def test_the_comparison_notices_a_wrong_adapter():
    """What is near is at most three of bf16's roundings off, 2**-8 each: which ones is up to the CPU (0.0102 on one without instructions for bf16)."""
    model = adapted("llama", lora(quantize="nf4"), torch.bfloat16)
    ids, labels = small_batch(2, 48)
    truth = step(in_float64(model), ids, labels)[1]
    near = distance(fp32_step(model, ids, labels)[1], truth)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.lora_B["default"].weight.mul_(1.5)
    assert near < 3 * 2**-8 and distance(fp32_step(model, ids, labels)[1], truth) > 3 * near


def test_float64_reaches_adapters():
    model = adapted("llama", lora(), torch.float64)
    with float64():
        assert model(input_ids=small_batch(1, 4)[0]).logits.dtype == torch.float64
