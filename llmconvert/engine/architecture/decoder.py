"""What a decoder's config says, under one name for all families: heads, widths, layers, positions, experts.

Everything that depends on the kind of model is asked here. The families' own names and exceptions are data in
:mod:`~llmconvert.engine.architecture.families`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmconvert.engine.architecture.boundary import WHOLE
from llmconvert.engine.architecture.config import read_config
from llmconvert.engine.architecture.families import CONTEXT, EXPERTS, IMAGE_LAYERS, INNER_SIZES, QUIRKS, Quirks
from llmconvert.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder, seen through its config; what it lacks is missed only when it is asked for.

    Every property raises :class:`~llmconvert.errors.CheckpointError` if the config has no such setting, or another
    kind of value there.

    Attributes:
        config: the language model's, of transformers' own class, which knows the defaults.
    """

    config: PretrainedConfig

    @classmethod
    def of(cls, config: Mapping[str, Any] | PretrainedConfig) -> Architecture:
        """Of a parsed ``config.json``, or of a config that was built already; of a model with parts, the decoder's.

        Raises:
            UnsupportedError: transformers does not know the model type, or refuses its settings.
        """
        built = read_config(config) if isinstance(config, Mapping) else config
        return cls(built.get_text_config())

    def check_layers(self, tensors: Sized) -> None:
        """Hold the number of layers against a checkpoint's tensors, before as many modules are made.

        Raises:
            CheckpointError: there are fewer tensors than that.
        """
        if self.layers > len(tensors):
            raise CheckpointError(
                f"config.json says {self.layers:,} layers, the checkpoint has {len(tensors):,} tensors; they do not "
                "belong together"
            )

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return str(self.config.model_type)

    @property
    def layers(self) -> int:
        """Decoder layers; each attends once, or does what its kind has instead."""
        return self._number("num_hidden_layers")

    @property
    def blocks(self) -> int:
        """Modules that the decoder passes one after the other; some families have several layers in one."""
        return self.layers // self._quirks.layers_per_block

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._number("hidden_size")

    @property
    def streams(self) -> int:
        """Hidden states of a token that blocks hand on side by side: hyper-connections (arXiv 2409.19606), AltUp."""
        name = self._quirks.streams
        return 1 if name is None else self._number(name) + self._quirks.streams_beside

    @property
    def inner_size(self) -> int:
        """Neurons of an MLP that a token passes; of a mixture, those of all experts that it is sent to."""
        for name in INNER_SIZES:
            width = self._get(name)
            if isinstance(width, int):
                active = self._get("num_experts_per_tok") if name.startswith("moe") else None
                return width * int(active or 1)
        return 4 * self.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self._number("vocab_size")

    @property
    def has_attention(self) -> bool:
        """Whether any layer attends; models of state spaces or recurrences alone have no heads of this kind."""
        return self._get("num_attention_heads") is not None

    @property
    def query_heads(self) -> int:
        """Query heads per layer."""
        return self._number("num_attention_heads")

    @property
    def kv_heads(self) -> int:
        """Key-value heads per layer."""
        if self.multi_query_only:
            return 1 if self._get("multi_query") else self.query_heads
        found = self._get(self._quirks.kv_heads) or self._get("num_kv_heads")
        return int(found or self.query_heads)

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return int(self._get("head_dim") or self.hidden_size // self.query_heads)

    @property
    def has_kv_heads_setting(self) -> bool:
        """Whether a config of this family can declare fewer key-value than query heads."""
        return self.multi_query_only or hasattr(self.config, self._quirks.kv_heads)

    @property
    def multi_query_only(self) -> bool:
        """Whether the layout holds one key-value head or as many as query heads: GPTBigCode's, and Falcon's old one."""
        grouped_by = self._quirks.grouped_by
        return self._quirks.multi_query and not (grouped_by and self._get(grouped_by))

    @property
    def latent_size(self) -> int | None:
        """Numbers that a layer caches per token in place of keys and values (MLA, arXiv 2405.04434), or None."""
        rank = self._get("kv_lora_rank")
        return int(rank) + self._number("qk_rope_head_dim") if rank else None

    @property
    def layer_kinds(self) -> tuple[str, ...]:
        """transformers' name of each layer's kind, ``full_attention`` or ``sliding_attention``, for example.

        Layers that attend to images, and to no token of the text, are ``cross_attention``.
        """
        kinds: Sequence[str] | None = self._get("layer_types")
        if kinds:
            return tuple(kinds)
        usual, images = "sliding_attention" if self.window else "full_attention", self._get(IMAGE_LAYERS) or ()
        return tuple("cross_attention" if layer in images else usual for layer in range(self.layers))

    @property
    def window(self) -> int | None:
        """Tokens that a layer with a sliding window looks back at, itself included; None without such layers."""
        window = self._get("sliding_window")
        return int(window) if window and self._get("use_sliding_window", True) is not False else None

    def reach(self, kind: str) -> int | None:
        """Tokens that a layer of a kind attends to at most, the newest included; None: all."""
        if kind not in ("sliding_attention", "chunked_attention"):
            return None
        found = self._get("sliding_window") or self._get("attention_chunk_size")
        return int(found) if found else None

    @property
    def caching_layers(self) -> int:
        """How many of the first layers keep a cache; the others read theirs."""
        return self.layers - int(self._get("num_kv_shared_layers") or 0)

    @property
    def hands_over(self) -> bool:
        """Whether layers use keys and values that others have made, so that blocks hand on more than hidden states."""
        return self.caching_layers < self.layers

    @property
    def context(self) -> int | None:
        """The longest input that the config allows, in tokens; None if it doesn't say."""
        found = self._get(CONTEXT)
        return int(found) if isinstance(found, int) else None

    @property
    def trained_length(self) -> int | None:
        """Tokens per input in training, as far as the config says: what it allows, or allowed before it was scaled."""
        original = self.rope.get("original_max_position_embeddings")
        if isinstance(original, int):
            return int(original)
        if self.rope.get("rope_type") == "linear" and self.context:
            return int(self.context / float(self.rope["factor"]) + 0.5)
        return self.context

    @property
    def rope_sets(self) -> Mapping[str, Any]:
        """RoPE's parameters, or in some models a set of them for each kind of layer; empty without RoPE."""
        return self._get("rope_parameters") or {}

    @property
    def rope(self) -> Mapping[str, Any]:
        """RoPE's parameters; those of full attention in models that have a set for each kind of layer."""
        sets = {kind: value for kind, value in self.rope_sets.items() if isinstance(value, Mapping)}
        return sets.get("full_attention") or next(iter(sets.values()), self.rope_sets)

    @property
    def rope_theta(self) -> float | None:
        """RoPE's base; None without rotary positions."""
        theta = self.rope.get("rope_theta", self._get("rope_theta"))
        if not isinstance(theta, int | float):
            theta = None
        return theta or (10000.0 if self._get("rotary_dim") else None)

    @property
    def rotary_share(self) -> float:
        """Share of a head's dimensions that RoPE turns."""
        if self._get("rotary_dim"):
            return float(self._number("rotary_dim") * self.query_heads / self.hidden_size)
        return float(self.rope.get("partial_rotary_factor") or self._get("partial_rotary_factor") or 1.0)

    def has_rotary(self, layer: int) -> bool:
        """Whether a layer turns queries and keys, in a model with rotary positions."""
        quirks = self._quirks
        if self.uses_alibi:
            return False
        flags = self._get(quirks.rotary_flags) if quirks.rotary_flags else None
        if flags is not None:
            return bool(flags[layer])
        if quirks.rotary_kind is None or (quirks.rotary_window and not self._get("sliding_window")):
            return True
        return self.layer_kinds[layer] == quirks.rotary_kind

    @property
    def uses_alibi(self) -> bool:
        """Whether positions enter as ALiBi biases (Press et al. 2021, arXiv 2108.12409)."""
        if self._quirks.alibi or self._get("alibi"):
            return True
        attention = self._get("attn_config")
        if isinstance(attention, Mapping):
            return bool(attention.get("alibi"))
        return bool(getattr(attention, "alibi", False))

    @property
    def softcap(self) -> float | None:
        """What attention scores are soft-capped at; None without."""
        cap = self._get("attn_logit_softcapping")
        return float(cap) if cap else None

    @property
    def eager_only(self) -> bool:
        """Whether only eager attention gives the reference result."""
        return self._quirks.eager

    @property
    def experts(self) -> int:
        """Experts per layer; 0 for a dense model."""
        return next((int(value) for name in EXPERTS if (value := self._get(name))), 0)

    @property
    def experts_per_token(self) -> int:
        """How many of its layer's experts a token goes to; 0 for a dense model."""
        return int(self._get("num_experts_per_tok") or 0) if self.experts else 0

    @property
    def tied(self) -> bool:
        """Whether input and output embedding are one tensor."""
        return bool(self._get("tie_word_embeddings"))

    def switch(self, name: str) -> bool:
        """Whether a setting of one family is there and on, ``clip_qkv`` for example."""
        return bool(self._get(name))

    @property
    def _quirks(self) -> Quirks:
        return QUIRKS.get(self.model_type, Quirks())

    def layer(self, index: int) -> Architecture:
        """The decoder as one of its layers has it, where layers differ in their heads or widths."""
        layers = getattr(self.config, "per_layer_config", None)
        return self if layers is None else Architecture(layers[index])

    def _get(self, name: str, default: Any = None) -> Any:
        try:
            return getattr(self.config, name, default)
        except RuntimeError:  # layers differ in it: the first one's
            return getattr(self.config.per_layer_config[0], name, default)

    def _number(self, name: str) -> int:
        value = self._get(name)
        parts = [key for key, part in vars(self.config).items() if hasattr(part, name)]
        if parts and not hasattr(self.config, name):
            raise UnsupportedError(
                f"architecture {self.model_type!r} is several models in one, each with a {name} of its own "
                f"({', '.join(parts)}), and only one list of decoder blocks can be run block by block; {WHOLE}"
            )
        if not isinstance(value, int):
            found = "missing" if value is None else f"{value!r:.40}"
            raise CheckpointError(
                f"config.json of model type {self.model_type!r}: {name} is {found}, expected a whole number, without "
                f"which it cannot be run block by block; {WHOLE}"
            )
        return value
