"""What the planner knows about a model: the sizes and switches of its config.json that decide memory.

Everything else (weights, intermediates, what autograd keeps) follows from these facts in `layers.py`.
All sizes are counts of elements; tokens and bytes appear nowhere here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from .releases import Release
from .towers import Tower
from .vision import Vision

Norm = Literal["rms", "rms-fp32-weight", "rms-fp32", "rms-wide-weight", "gemma", "layer", "layer-1p", "centred"]
"""rms-fp32-weight: normed in fp32 times the weight as it is, cast last. rms-fp32: times a copy of the weight in fp32 (Gemma 4)."""
Block = Literal["pre", "sandwich", "post", "parallel", "one-norm"]
"""one-norm: attention and MLP run on the same input, of one norm."""
Router = Literal["softmax", "softmax-groups", "topk-softmax", "sigmoid", "sigmoid-groups", "sigmoid-all"]
"""sigmoid-all: every expert sees every token, times its score, which is 0 for those that are not chosen."""
QkNorm = Literal["none", "head", "full", "unweighted"]
"""Of each head (Qwen3, Gemma 3), over the whole width (OLMo 2), of each head when it is turned, without a weight (Llama 4)."""


Keys = Literal["shared", "copied", "broadcast"]
"""Where several queries share a head of keys and values. copied: for every query when they are made (Falcon-40B). broadcast: by
products, which no fused kernel does (Falcon-7B)."""
Values = Literal["projected", "normed", "keys"]
"""normed: each head of values is normalised, without a weight (Gemma 4). keys: so are values that are keys before their norm."""
Mixer = Literal["attention", "short conv", "gated delta", "mamba2", "attention and mamba2", "none"]
"""What mixes a layer's tokens; attention and mamba2: both do, of the same hidden states (Falcon-H1)."""
GatedNorm = Literal["after the gate", "before the gate", "none"]
"""Norm of what a state space model gives, and of it times its gate."""


Lends = Literal["", "lends", "borrows"]
"""Whether a layer's keys and values are those of later layers as well, or are an earlier one's: the last of its kind that lends."""


class Indexer(NamedTuple):
    """What chooses the keys that a query sees (DeepSeek-V3.2's lightning indexer): queries of its own of the low rank, and one head of keys."""

    heads: int
    head_dim: int
    keys: int  # chosen for a query


class Latent(NamedTuple):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): low-rank queries, keys and values."""

    q_rank: int | None  # None: queries are projected directly
    kv_rank: int
    nope_dim: int  # per head, without position
    rope_dim: int  # per head, rotary; one key shared by all heads
    indexer: Indexer | None = None


class Attention(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int  # of queries and keys
    v_head_dim: int
    rotary_dim: int  # of each head; 0: no rotary embedding
    qkv_bias: bool = False
    out_bias: bool = False
    fused_qkv: bool = False  # one projection makes queries, keys and values (Phi-3, GPT-2, GPT-NeoX)
    qk_norm: QkNorm = "none"
    keys: Keys = "shared"
    dropout: float = 0.0
    softcap: bool = False  # attention scores are soft-capped (Gemma 2)
    sinks: bool = False  # a learned sink per head (gpt-oss)
    tempered: bool = False  # queries that are not turned are multiplied by factors of their positions (Llama 4)
    latent: Latent | None = None
    gated_output: bool = (
        False  # queries come with as many numbers, whose sigmoids attention's output is multiplied by (Qwen3-Next)
    )
    values: Values = "projected"


class Mlp(NamedTuple):
    width: int
    activation: str  # as in transformers' ACT2FN: silu, gelu, gelu_new, gelu_pytorch_tanh, ...
    gated: bool = True
    fused: bool = False  # gate and up in one matrix (Phi-3)
    bias: bool = False


class Experts(NamedTuple):
    """A mixture of experts. Weights are two fused tensors, gate_up and down, as in current transformers."""

    number: int
    per_token: int
    width: int
    activation: str
    shared_width: int = 0  # of the experts that every token visits, together
    shared_bias: bool = False  # biases on these
    gated: bool = True  # False: an expert has two matrices, the shared one, too (Nemotron-H)
    latent: int | None = None  # width to which tokens are projected before the experts, and from which after them
    bias: bool = False  # gpt-oss: biases on experts and router
    router: Router = "softmax"
    router_fp32: bool = False  # the router's product runs in fp32 (DeepSeek)
    normalised: bool = True  # the chosen scores are divided by their sum
    clamped: bool = False  # gpt-oss' clamped, interleaved activation
    beside_mlp: bool = (
        False  # the layer has its MLP as well: both see the same hidden states, and their sum is normalised (Gemma 4)
    )


class PerLayerInputs(NamedTuple):
    """A second embedding, a part of which each layer adds a product with to its output (Gemma 3n, Gemma 4)."""

    width: int  # of a layer's part
    vocab: int


class AltUp(NamedTuple):
    """Several streams of hidden states, of which one goes through attention and the MLP, and a product of low rank beside attention (Gemma 3n)."""

    streams: int
    rank: int  # of the product (Laurel)
    scaled: bool = (
        True  # the corrected stream is multiplied by a weight, which else waits, before the layer's own input
    )


class ShortConv(NamedTuple):
    """A convolution over a few tokens between two products with gates (LFM2)."""

    kernel: int  # tokens
    bias: bool = False


class GatedDelta(NamedTuple):
    """Linear attention by the gated delta rule (arXiv 2412.06464; Qwen3-Next)."""

    key_heads: int
    value_heads: int
    key_dim: int  # of a head, of queries too
    value_dim: int
    kernel: int  # tokens that the convolution before it reaches over
    apart: bool = False  # products for values' gates, decays and learning rates of their own (Qwen3.5)


class Mamba2(NamedTuple):
    """A state space model whose scan runs over chunks (Mamba-2, arXiv 2405.21060)."""

    heads: int
    head_dim: int
    groups: int  # of heads with the same B and C
    state: int
    kernel: int  # tokens that the convolution before it reaches over
    chunk: int  # tokens of a chunk
    bias: bool = False  # on the product before the scan
    conv_bias: bool = True
    out_bias: bool = False  # on the product after it
    norm: GatedNorm = "after the gate"
    scaled: bool = False  # its input and what its first product gives are multiplied by numbers (Falcon-H1)

    @property
    def projected(self) -> int:
        """Width of what the product before it gives: gate, x, B, C and dt."""
        return 2 * self.heads * self.head_dim + 2 * self.groups * self.state + self.heads


Mixing = ShortConv | GatedDelta | Mamba2


class LayerKind(NamedTuple):
    window: int | None = None  # tokens of a sliding window; None: full attention
    experts: bool = False  # a mixture of experts instead of the dense MLP
    rotary: bool = True  # False: its queries and keys are not turned, though the model has rotary positions
    causal_mask: bool = False  # sdpa is given an explicit mask, though attention is full
    mixer: Mixer = "attention"
    attention: Attention | None = None  # its own, where the model's is another
    mlp_width: int | None = None  # its own, where the model's is another
    keys: Lends = ""
    feed_forward: bool = True  # False: neither an MLP nor experts follow what mixes tokens
    widens: bool = (
        False  # its input has the weights' dtype, though hidden states are in fp32 from here on (Mamba-2's first)
    )
    cuts_gates: bool = False  # its MLP's gates count only beyond a multiple of their deviation (Gemma 3n)

    @property
    def attends(self) -> bool:
        return self.mixer in ("attention", "attention and mamba2")

    @property
    def asks_mask(self) -> bool:
        return self.window is not None or self.causal_mask


class StandIn(NamedTuple):
    """Marks a model whose sizes only stand in for those of a module that the formula does not know: a search by trace begins with
    them, and no answer is counted from them. The first of its notes says why."""

    parameters: int  # of the module
    why: str  # the formula's refusal, in a line
    shortest: int = 1  # tokens that a sequence has at least: those of its images, and one of text


class Model(NamedTuple):
    name: str
    model_type: str
    hidden: int
    vocab: int
    context: int | None  # max_position_embeddings; None: the file does not say
    layer_kinds: tuple[LayerKind, ...]  # one a layer, in order
    attention: Attention
    mlp: Mlp | None  # of the dense layers; None: there are none
    experts: Experts | None = None
    per_layer: PerLayerInputs | None = None
    altup: AltUp | None = None
    mixer: Mixing | None = None  # of the layers that mix tokens otherwise than by attention
    norm: Norm = "rms"
    norm_bias: bool = False
    block: Block = "pre"
    tied: bool = False  # the LM head is the embedding
    head_bias: bool = False
    learned_positions: int = 0  # rows of a learned position table (GPT-2)
    causality: int = 0  # positions, for each pair of which a buffer has a boolean (GPT-BigCode)
    sinusoids: int = 0  # numbers in fp32 of each layer's buffer of positions (GPT-J)
    logit_softcap: bool = False
    alibi: bool = False  # scores begin as biases of positions (BLOOM)
    embedding_norm: bool = False
    scaled_embedding: bool = False  # embeddings are multiplied by sqrt(hidden) (Gemma)
    dropout: float = 0.0  # after embedding, attention and MLP (GPT-2)
    embedding_dropout: float | None = None  # after embedding; None: as elsewhere
    dtype: str = "bfloat16"  # of the published weights
    has_sdpa: bool = True  # transformers offers attn_implementation="sdpa" for it
    eager_only: bool = (
        False  # transformers has eager attention alone for it, and maybe FlashAttention in code of its own
    )
    own_flash: bool = False
    hub_id: str | None = None
    published: tuple[str, bool] = (
        "",
        False,
    )  # in which quantisation by bitsandbytes, if any; whether its scales are quantised, too
    notes: tuple[str, ...] = ()  # what the reader should know about how the file was read
    stand_in: StandIn | None = None
    wide_residual: bool = False  # hidden states go from layer to layer in fp32
    idle_window: int | None = None  # the length from which a mask is made that no layer uses (Qwen2-MoE)
    release: Release | None = None  # of transformers, where what is planned depends on it
    towers: tuple[Tower, ...] = ()  # what text does not go through, where it is counted
    vision: Vision | None = None  # the tower whose step is laid out, where images come

    def __repr__(self) -> str:
        return f"<Model {self.name}: {self.model_type}, {self.layers} layers of {self.hidden}>"

    def listed(self) -> str:
        """Every fact with its name."""
        return f"Model({', '.join(f'{name}={value!r}' for name, value in zip(self._fields, self, strict=True))})"

    @property
    def mlp_width(self) -> int | None:
        """Width of the dense layers' MLP, else of one expert."""
        return self.mlp.width if self.mlp is not None else self.experts.width if self.experts is not None else None

    @property
    def layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def runs_mlps_in_chunks(self) -> bool:
        """Whether the runtime finds an MLP that is given hidden states alone."""
        return self.experts is None or not self.experts.beside_mlp

    def of_kind(self, kind: LayerKind) -> Model:
        """Model whose attention and MLP are those of a kind of layers."""
        attention, mlp = kind.attention or self.attention, self.mlp
        if mlp is not None and kind.mlp_width is not None:
            mlp = mlp._replace(width=kind.mlp_width)
        return self if (attention, mlp) == (self.attention, self.mlp) else self._replace(attention=attention, mlp=mlp)

    @property
    def attends(self) -> bool:
        """Whether any layer has attention."""
        return any(kind.attends for kind in self.layer_kinds)

    @property
    def feeds_forward(self) -> bool:
        """Whether any layer has an MLP or experts."""
        return any(kind.feed_forward for kind in self.layer_kinds)

    def first(self, layers: int) -> Model:
        """Model of the first layers, with all that is beside them."""
        return self._replace(layer_kinds=self.layer_kinds[:layers])
