"""What mstplan asks of a family of models: what its config.json leaves out, what it does otherwise than Llama, its weights' names.

A new family is a file in this folder and a line in `__init__.py`; most are a row of switches that `layers.py` knows. What no
switch says is refused (`config.py`), never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from ..model import Block, Keys, Mixer, Norm, QkNorm, Router, Values
from ..releases import Number

LAYER = "layer"
"""What the names of a layer's weights begin with; {} stands for the layer's number."""

_USUAL_NAMES = {
    LAYER: "model.layers.{}.",
    "embed_tokens": "model.embed_tokens",
    "final norm": "model.norm",
    "lm_head": "lm_head",
    "input norm": "input_layernorm",
    "post-attention norm": "post_attention_layernorm",
    "pre-MLP norm": "pre_feedforward_layernorm",
    "post-MLP norm": "post_feedforward_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "sinks": "self_attn.sinks",
    "q_a_proj": "self_attn.q_a_proj",
    "q_a_layernorm": "self_attn.q_a_layernorm",
    "q_b_proj": "self_attn.q_b_proj",
    "kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "kv_a_layernorm": "self_attn.kv_a_layernorm",
    "kv_b_proj": "self_attn.kv_b_proj",
    "indexer.wq_b": "self_attn.indexer.wq_b",
    "indexer.wk": "self_attn.indexer.wk",
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.weights_proj": "self_attn.indexer.weights_proj",
    "router": "mlp.gate",
    "experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "experts.down_proj": "mlp.experts.down_proj",
    "shared_experts.gate_proj": "mlp.shared_experts.gate_proj",
    "shared_experts.up_proj": "mlp.shared_experts.up_proj",
    "shared_experts.down_proj": "mlp.shared_experts.down_proj",
}

LATENT: Mapping[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
"""Defaults of multi-head latent attention."""
TINY: Mapping[str, object] = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 65536,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Sizes with which tests run a family's own code; `Family.tiny` adds to them."""


def defaults(
    hidden: int, layers: int, heads: int, kv_heads: int | None, vocab: int, width: int | None, **more: object
) -> dict[str, object]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "intermediate_size": width,
        **more,
    }


LINEARS = ("gate_proj", "up_proj", "down_proj")
"""`Routed.linears` of most families (peft utils/transformers_weight_conversion.py, _MOE_TARGET_MODULE_MAPPING)."""


def names_of_linears(part: str, module: str) -> dict[str, str]:
    """Names of the three matrices of a gated MLP, a part of the step, where its module has another name."""
    return {f"{part}.{linear}": f"{module}.{linear}" for linear in LINEARS}


class Routed(NamedTuple):
    """Routing of tokens to a family's experts."""

    width: str = "moe_intermediate_size"  # the field that holds an expert's width
    router: Router = "softmax"
    method: str | None = None  # the field that says whether experts are chosen among those of the best groups
    fp32: bool = False
    normalised: bool | str = True  # the chosen scores are divided by their sum
    bias: bool = False
    clamped: bool = False
    may_be_none: bool = False  # 0 experts: a dense model
    switch: str | None = None  # where this is false, it is dense as well
    beside_mlp: bool = False
    shared_width: str | None = (
        None  # the field that holds the width of the shared expert; None: the file says how many there are
    )
    listed: bool = False  # mlp_layer_types says which layers have experts, where the file has it
    dense_first: int = 0  # where it has not, so many layers have none
    latent: str | None = None  # the field that holds the width to which tokens are projected before the experts
    fields: tuple[str, ...] = ()  # names in its files that no other family has
    linear_router: bool = (
        False  # its router is a linear layer that gives more than its product: peft's adapter breaks it
    )
    experts_first: bool = False  # they are registered before their router
    linears: tuple[str, ...] = ()
    """Gate, up and down as transformers 4 called an expert's linear layers, by which names peft adapts them still."""


class Code(NamedTuple):
    """Deviations of a family's modelling code from Llama's, where it decides which tensors are made and held."""

    rotary: Literal["rotate half", "halves", "complex", "every two"] = "rotate half"
    """x cos + rotate_half(x) sin; (x1 cos - x2 sin, x2 cos + x1 sin); pairs as complex numbers times a rotation; x cos + rotate_every_two(x) sin, of a
    layer's own table."""
    rotary_in_fp32: bool = False  # cos and sin stay in fp32; queries and keys are cast back
    widens_before_rotary: bool = False  # queries and keys are cast to fp32 before they are turned, and back
    widened_rotary: bool = False  # before they are multiplied queries and keys are cast to it, too
    interleaved_tables: bool = False  # each layer makes its own cos and sin, every number twice
    half_tables: bool = False  # cos and sin have one entry for both halves
    joins_rotary: bool = False  # torch.cat joins the turned part and the rest of queries and keys, be there no rest
    turns_by_row: bool = False  # cos and sin are made for each sequence of a batch, be their positions the same or not
    local_rotary: bool = False  # layers with a window have frequencies of their own
    attends_itself: bool = (
        False  # it does not call attention by transformers' interface: layers in pieces run all of it whole
    )
    scales_in_place: bool = False  # eager attention scales its scores in place
    returns_weights: bool = (
        False  # a layer returns the attention matrix, which the model's loop holds until the next has run
    )
    multiplies_views: bool = (
        False  # layers multiply by views of weights: autocast keeps no copies, pieces add up whole gradients
    )
    slices_qkv: bool = False  # a fused projection is sliced: each gradient lies in zeros of the whole
    qk_norm_last: bool = False  # queries and keys are normalised when values are made, too
    late_qk_norm: bool = False  # queries and keys are normalised after they are turned
    drops_mlp_only: bool = False  # no dropout follows attention
    holds_parts: bool = False  # variables hold the turned part and the rest of queries and keys until attention is done
    holds_qkv: bool = False  # variables hold input, queries, keys and values until dropout after attention is done
    norms_first: bool = False  # the MLP's norm runs before attention
    adds_within: bool = (
        False  # attention and the MLP add the residual themselves, while their variables hold what they made
    )
    adds_in_place: bool = False  # attention's output is added to the MLP's in place
    adds_branches_first: bool = False  # attention's output and the MLP's are added before the layer's input is
    holds_normed: bool = False  # the block's variables hold attention's input and output
    frees_normed: bool = False  # no variable of a norm holds what it makes in fp32
    withholds_ids: bool = False  # layers are not given position ids
    mixes_samples: bool = False  # packed samples are not told apart by their positions
    shared_apart: bool = (
        False  # the shared expert is an MLP of its own, and the block, which holds what experts gave, adds the two
    )
    holds_attended: bool = False  # the block's variables hold attention's output
    holds_block: bool = False  # the block's variables hold attention's output and the MLP's input
    copies_heads: bool = False  # heads are copied out of a fused product
    indexes_sinusoids: bool = False  # of a layer's own table, which makes queries and keys fp32
    fp32_scores: bool = False  # eager attention widens queries and keys before their product
    softmax_as_scores: bool = False  # eager attention's softmax stays in the scores' dtype
    fp32_expert_scores: bool = False
    counts_positions: bool = False  # position ids are counted from a mask of ones, (b, s)
    scales_queries: bool = False  # queries are multiplied by a number as soon as they are made
    frees_mlp_input: bool = False  # no variable holds the MLP's input while its second matrix runs
    scales_branches: bool = False  # what attention and MLP give is multiplied by a number before it is added
    scales_logits: bool = False  # so are the logits
    scales_output: bool = False  # a layer's output is multiplied in place by a number of its own
    scales_mixers: bool = False
    """So are inputs and outputs of attention and of the mixer beside it, keys, and gate and output of the MLP, whose up comes first."""
    widens_logits: bool = False  # the model itself casts logits to fp32
    bars_out_proj: bool = False  # peft refuses adapters on out_proj (tuners/tuners_utils.py, mamba_model_types)
    fp32_router_logits: bool = False  # what chooses experts is cast to fp32
    fp32_router: bool = False  # the router's weight stays in fp32
    scaled_router: bool = False  # the router has a norm, a weight on its input and a number for each expert (Gemma 4)
    plain_router: bool = False  # probabilities of experts stay in the router's dtype
    corrected: bool = False  # experts are chosen by probabilities with a correction
    apart_products: bool = False  # what linear attention makes of its input comes of several products
    shared_first: bool = False  # the shared expert runs before the router
    fused_shared: bool = False  # it has gate and up in one matrix
    shared_gate: bool = False  # and is weighed by a gate of its own


class Family(NamedTuple):  # quicker to import than a dataclass of so many fields
    """Family of models, as it differs from Llama. A switch is a constant, or the name of the field that holds it."""

    defaults: Mapping[str, object] = MappingProxyType({})  # of the configuration class in transformers
    registered: bool = True  # False: the family of all model types without a row
    norm: Norm = "rms"
    norm_bias: bool = False
    block: Block = "pre"
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = False
    head_bias: bool | str = False
    fused_qkv: bool = False
    fused_mlp: bool = False
    gated: bool = True
    qk_norm: QkNorm = "none"
    square_output: bool = False  # attention's output projection is as wide as hidden states: heads must be, too
    qk_norm_switch: str | None = None  # where this is false, there is none
    own_heads: bool | str = (
        True  # heads of keys and head_dim may differ from num_attention_heads and hidden / heads; a switch: the former
    )
    kv_heads: str = "num_key_value_heads"  # the field that holds it
    multi_query: str | None = (
        None  # the switch under which, where there are no own heads, all queries share one head of keys
    )
    keys: Keys = "shared"
    latent: bool = False
    indexed: bool = False  # an indexer chooses the keys that a query sees
    # every: each layer; listed: by layer_types; late: from max_window_layers on; found: by what the file holds; chunked: of
    # attention_chunk_size, the layers whose queries and keys are turned
    windows: Literal["none", "every", "listed", "late", "found", "chunked"] = "none"
    full_last: bool = False  # the last layer has full attention, whatever layer_types says
    period: int = 0  # without layer_types, each period-th layer has full attention; 0: none has
    full_first: bool = False  # so has the first layer of each period, not the last
    idle_mask: bool = False  # a mask of a window is always made, and no layer uses it
    window_switch: bool = False  # sliding_window counts only under use_sliding_window
    # of which layers queries and keys are not turned. listed: by no_rope_layers; full: those without a window
    unturned: Literal["none", "listed", "full", "full beside windows"] = "none"
    tempered: str | None = None  # the switch of factors on queries that are not turned, of their positions
    mlp_width: str = "intermediate_size"  # the field that holds it; where its default is null, four times the hidden size; "": no layer has an MLP
    adjusted_width: bool = False  # two thirds of it, in whole blocks (block_auto_adjust_ff_dim)
    mixer: Mixer = "attention"  # of the layers whose layer_types entry names no attention
    # what tells, where there are no layer_types, which layers have attention; layer_types: nothing does
    gated_attention: bool = False
    values: Values = "projected"
    per_layer_inputs: bool = False
    shared_keys: bool = False  # the last num_kv_shared_layers take keys and values of earlier ones
    streams: bool = False  # hidden states are several streams, with what else Gemma 3n has of its own
    wide_borrowers: str | None = None  # the switch under which MLPs of these are twice as wide
    global_attention: bool = False  # layers without a window have heads of their own (spec/own_sizes.py)
    attention_by: Literal[
        "layer_types", "full_attn_idxs", "attn_layer_indices", "full_attention_interval", "none has"
    ] = "layer_types"
    mixer_fields: Mapping[str, str] = MappingProxyType(
        {}
    )  # names of fields for Mamba-2's sizes, where they are not mamba_ and the size
    inner_width: str | None = (
        None  # the field that holds how many numbers Mamba-2 has of a token; "heads": those of its heads
    )
    parted: bool = False  # each layer is attention, another mixer, an MLP or experts alone, as it lists them
    residual_in_fp32: bool = False  # the switch of that name acts
    experts: Routed | None = None
    activation: str = "hidden_act"
    fixed_activation: str | None = None  # what all its files mean, which do not say it
    attention_dropout: str = "attention_dropout"
    dropout: str | None = None  # the field of the dropout after attention and MLP
    embedding_dropout: str | None = (
        None  # that of the dropout after the embedding, where it is not the same; "": there is none
    )
    softcap: bool = False  # attn_logit_softcapping acts
    sinks: bool = False
    rotary_switch: str | None = None  # the field that says "rope" where queries and keys are turned
    rotary_width: str | None = None  # the field that holds how many numbers of a head are turned
    positions: Literal["rotary", "learned", "alibi", "none"] = (
        "rotary"  # learned: a table of them; alibi: biases of scores
    )
    first_position: int = 0  # row of the first token in the table of learned positions
    scaled_embedding: bool = False
    embedding_norm: bool = False
    has_sdpa: bool = True
    eager_only: bool = False  # nor FlashAttention that goes by transformers' interface
    own_flash: bool = False  # its FlashAttention is code of its own, which is not counted
    always_masked: bool = False  # sdpa is given an explicit causal mask
    no_sdpa_from: Number | None = None  # the release of transformers from which it has none
    buffers: Literal["none", "causality", "sinusoids"] = (
        "none"  # for all positions: of pairs of them, once; of each, in every layer
    )
    uncounted: tuple[str, ...] = ()  # switches whose tensors the planner does not know
    only: Mapping[str, object] = MappingProxyType({})
    """Values that alone are counted, by field; text: the name of the field that holds it; a tuple: any of these."""
    norms: str | None = (
        None  # the field that holds how many norms parallel branches have; with own heads two, where it is null
    )
    parallel_switch: str | None = None  # where this is false, the block is a plain one
    gelu_is_tanh: bool = False  # its first files say gelu and mean the tanh approximation, as transformers corrects
    code: Code = Code()
    names: Mapping[str, str] = MappingProxyType({})  # of weights, where they are not Llama's
    tiny: Mapping[str, object] = MappingProxyType({})  # fields of a small config, beside TINY

    @property
    def weight_names(self) -> Mapping[str, str]:
        """Names by the part of a step: the weight's, or its module's, within its layer or else within the model."""
        return {**_USUAL_NAMES, **self.names}
