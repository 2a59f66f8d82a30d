"""What families of models call things, and where they part from the rest, as data.

transformers' config classes give most settings one name for all families; what is left lies here. A family that is not
in :data:`QUIRKS` has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "CONTEXT",
    "EMBEDDINGS",
    "EXPERTS",
    "HEADS",
    "IMAGE_LAYERS",
    "INNER_SIZES",
    "LEARNED_POSITIONS",
    "LINEARS",
    "QUIRKS",
    "Quirks",
]

#: Settings that say how many tokens an input may have.
CONTEXT = "max_position_embeddings"
#: Settings that hold the inner width of an MLP; those of mixtures come first, whose dense layers are wider.
INNER_SIZES = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
#: Settings that hold the number of experts in a layer.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
#: The setting that lists the layers that attend to images alone.
IMAGE_LAYERS = "cross_attention_layers"
#: What the names of tensors with learned positions end with.
LEARNED_POSITIONS = (".wpe.weight", "wpe.weight", "embed_positions.weight", "position_embeddings.weight")
#: What the names of embeddings and output heads contain.
EMBEDDINGS = ("embed", "wte.", "wpe.", "lm_head")
#: What the name of an output head ends with that is not tied to the embedding.
HEADS = ("lm_head.weight", "embed_out.weight")


#: Classes that compute what ``nn.Linear`` computes; others that derive from it (BitNet's, routers) do something else.
LINEARS = ("Linear", "FalconLinear")


@dataclass(frozen=True, slots=True)
class Quirks:
    """Where a family parts from the rest.

    Attributes:
        kv_heads: the setting that holds the number of key-value heads.
        multi_query: whether the layout holds either one key-value head (where the setting ``multi_query`` is true) or
            as many as there are query heads.
        grouped_by: a setting under which it holds any number after all.
        rotary_flags: a setting with a flag for each layer, zero where it has no rotary embedding.
        rotary_kind: the only kind of layer with a rotary embedding, where a model has several kinds.
        rotary_window: whether that applies only to models with a sliding window.
        alibi: whether positions enter as ALiBi biases whatever the config says.
        eager: whether only eager attention gives the reference result.
        layers_per_block: how many of the config's layers a decoder block holds.
        streams: the setting that says how many hidden states of a token blocks hand on side by side; one without.
        streams_beside: how many there are beside those.
    """

    kv_heads: str = "num_key_value_heads"
    multi_query: bool = False
    grouped_by: str | None = None
    rotary_flags: str | None = None
    rotary_kind: str | None = None
    rotary_window: bool = False
    alibi: bool = False
    eager: bool = False
    layers_per_block: int = 1
    streams: str | None = None
    streams_beside: int = 0


QUIRKS: Mapping[str, Quirks] = {
    "bloom": Quirks(alibi=True, eager=True),
    "cohere2": Quirks(rotary_kind="sliding_attention"),
    "deepseek_v4": Quirks(streams="hc_mult"),
    "exaone4": Quirks(rotary_kind="sliding_attention", rotary_window=True),
    "falcon": Quirks(kv_heads="num_kv_heads", multi_query=True, grouped_by="new_decoder_architecture"),
    "gemma2": Quirks(eager=True),
    "gemma3n_text": Quirks(streams="altup_num_inputs"),
    "glm5_next_text": Quirks(streams="hc_mult"),
    "gpt_bigcode": Quirks(multi_query=True),
    "hy_v4": Quirks(streams="hc_mult"),
    "longcat_flash": Quirks(layers_per_block=2),
    "mpt": Quirks(eager=True),
    "prophetnet": Quirks(streams="ngram", streams_beside=1),
    "qwen4_exp_text": Quirks(streams="hc_count"),
    "smollm3": Quirks(rotary_flags="no_rope_layers"),
}
