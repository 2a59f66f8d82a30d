"""GGUF tensor names by architecture: what they are called, and how shaped and stored, in Hugging Face checkpoints.

The names on the left are llama.cpp's (``gguf.constants.TENSOR_NAMES``), without ``blk.<layer>.`` and ``.weight``.
llama.cpp stores two things differently from transformers, both undone on reading (``convert_hf_to_gguf.py``):
the rows of Llama's query and key projections are reordered for interleaved RoPE, and one is added to Gemma's norms.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.header import GgufHeader

__all__ = ["ARCHITECTURES", "Architecture", "Place", "Storage", "place_tensors"]


class Storage(Enum):
    """How a stored tensor becomes the one transformers expects."""

    PLAIN = "as it is"
    #: Query rows: within each of ``num_attention_heads`` heads, pairs (i, i + half) were stored side by side.
    QUERY_ROWS = "query rows interleaved"
    #: The same for keys, ``num_key_value_heads`` heads.
    KEY_ROWS = "key rows interleaved"
    #: Stored plus one.
    PLUS_ONE = "plus one"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stored tensor goes: its Hugging Face name, its shape in symbols, and what has to be undone."""

    name: str
    shape: tuple[str, ...]
    storage: Storage = Storage.PLAIN
    required: bool = True


@dataclass(frozen=True, slots=True)
class Architecture:
    """One GGUF architecture.

    Attributes:
        model_type: as in ``config.json``.
        model_class: as in ``config.json``'s ``architectures``.
        outer: places of the tensors outside the layers, by GGUF name.
        layer: places of one layer's tensors, by GGUF name without ``blk.<layer>.``; ``{}`` stands for the layer.
        consumed: tensors that carry settings of the config rather than weights.
    """

    model_type: str
    model_class: str
    outer: Mapping[str, Place]
    layer: Mapping[str, Place]
    consumed: frozenset[str] = field(default_factory=frozenset)

    def places(self, layers: int) -> Iterator[tuple[str, Place]]:
        """GGUF name and place of every tensor that a model of so many layers may have, in file order."""
        yield from self.outer.items()
        for layer in range(layers):
            for stem, place in self.layer.items():
                yield f"blk.{layer}.{stem}", replace(place, name=place.name.format(layer))


def _outer(norm: Storage = Storage.PLAIN, *, head: bool = True) -> dict[str, Place]:
    places = {
        "token_embd.weight": Place("model.embed_tokens.weight", ("vocab", "hidden")),
        "output_norm.weight": Place("model.norm.weight", ("hidden",), norm),
    }
    if head:
        places["output.weight"] = Place("lm_head.weight", ("vocab", "hidden"), required=False)
    return places


def _layer(entries: Mapping[str, tuple[str, tuple[str, ...]]], **changes: Storage) -> dict[str, Place]:
    """Places of a layer's tensors; ``changes`` gives the storage of those that are not plain."""
    return {
        f"{stem}.weight": Place(f"model.layers.{{}}.{name}.weight", shape, changes.get(stem, Storage.PLAIN))
        for stem, (name, shape) in entries.items()
    }


def _bias(stem: str, name: str, rows: str, storage: Storage = Storage.PLAIN, *, required: bool) -> dict[str, Place]:
    return {f"{stem}.bias": Place(f"model.layers.{{}}.{name}.bias", (rows,), storage, required)}


_Entries = dict[str, tuple[str, tuple[str, ...]]]

_QKV: _Entries = {
    "attn_q": ("self_attn.q_proj", ("query", "hidden")),
    "attn_k": ("self_attn.k_proj", ("key", "hidden")),
    "attn_v": ("self_attn.v_proj", ("key", "hidden")),
}
_OUT: _Entries = {"attn_output": ("self_attn.o_proj", ("hidden", "query"))}
_DOWN: _Entries = {"ffn_down": ("mlp.down_proj", ("hidden", "inner"))}
_MLP: _Entries = {
    "ffn_gate": ("mlp.gate_proj", ("inner", "hidden")),
    "ffn_up": ("mlp.up_proj", ("inner", "hidden")),
} | _DOWN
_NORMS: _Entries = {
    "attn_norm": ("input_layernorm", ("hidden",)),
    "ffn_norm": ("post_attention_layernorm", ("hidden",)),
}

_LLAMA_LAYER = (
    _layer(_NORMS | _QKV | _OUT | _MLP, attn_q=Storage.QUERY_ROWS, attn_k=Storage.KEY_ROWS)
    | _bias("attn_q", "self_attn.q_proj", "query", Storage.QUERY_ROWS, required=False)
    | _bias("attn_k", "self_attn.k_proj", "key", Storage.KEY_ROWS, required=False)
    | _bias("attn_v", "self_attn.v_proj", "key", required=False)
    | _bias("attn_output", "self_attn.o_proj", "hidden", required=False)
    | _bias("ffn_gate", "mlp.gate_proj", "inner", required=False)
    | _bias("ffn_up", "mlp.up_proj", "inner", required=False)
    | _bias("ffn_down", "mlp.down_proj", "hidden", required=False)
)

#: GGUF ``general.architecture`` → what it holds. Mistral models are stored as ``llama``.
ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": Architecture("llama", "LlamaForCausalLM", _outer(), _LLAMA_LAYER, frozenset({"rope_freqs.weight"})),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        _outer(),
        _layer(_NORMS | _QKV | _OUT | _MLP)
        | _bias("attn_q", "self_attn.q_proj", "query", required=True)
        | _bias("attn_k", "self_attn.k_proj", "key", required=True)
        | _bias("attn_v", "self_attn.v_proj", "key", required=True),
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        _outer(),
        _layer(
            _NORMS
            | _QKV
            | _OUT
            | _MLP
            | {"attn_q_norm": ("self_attn.q_norm", ("head",)), "attn_k_norm": ("self_attn.k_norm", ("head",))}
        ),
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        _outer(),
        _layer(
            _NORMS
            | _OUT
            | _DOWN
            | {
                "attn_qkv": ("self_attn.qkv_proj", ("fused_qkv", "hidden")),
                "ffn_up": ("mlp.gate_up_proj", ("fused_inner", "hidden")),
            }
        ),
        frozenset({"rope_factors_long.weight", "rope_factors_short.weight"}),
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        # llama.cpp's class always takes the embedding, and does not load a file with a head of its own.
        _outer(Storage.PLUS_ONE, head=False),
        _layer(
            _QKV
            | _OUT
            | _MLP
            | {
                "attn_norm": ("input_layernorm", ("hidden",)),
                "post_attention_norm": ("post_attention_layernorm", ("hidden",)),
                "ffn_norm": ("pre_feedforward_layernorm", ("hidden",)),
                "post_ffw_norm": ("post_feedforward_layernorm", ("hidden",)),
            },
            attn_norm=Storage.PLUS_ONE,
            post_attention_norm=Storage.PLUS_ONE,
            ffn_norm=Storage.PLUS_ONE,
            post_ffw_norm=Storage.PLUS_ONE,
        ),
    ),
}

_LAYER_NAME = re.compile(r"blk\.(0|[1-9]\d*)\.(.+)")


def place_tensors(
    header: GgufHeader, architecture: Architecture, layers: int, sizes: Mapping[str, int]
) -> dict[str, Place]:
    """Find the place of every tensor in the file, in file order, and check that none is missing or misshapen.

    Args:
        header: the file.
        architecture: its architecture.
        layers: how many decoder layers the metadata promises.
        sizes: the length that each symbol of :attr:`Place.shape` stands for.

    Returns:
        GGUF name → place, with the layer's number filled in; tensors in ``architecture.consumed`` are left out.

    Raises:
        CheckpointError: a tensor is missing, or its shape contradicts the metadata.
        UnsupportedError: a tensor that this architecture has no place for.
    """
    places: dict[str, Place] = {}
    for name, tensor in header.tensors.items():
        if name in architecture.consumed:
            continue
        place = _place(architecture, name, layers)
        if place is None:
            raise UnsupportedError(
                f"{header.path}: tensor {name!r} has no place in {architecture.model_class}; "
                "this variant of the architecture is not supported"
            )
        expected = tuple(sizes[symbol] for symbol in place.shape)
        if tensor.shape != expected:
            raise CheckpointError(
                f"{header.path}: tensor {name!r} has shape {list(tensor.shape)}, the metadata asks for "
                f"{list(expected)} ({' × '.join(place.shape)}); the file is inconsistent"
            )
        places[name] = place
    _check_complete(header, architecture, layers, places)
    return places


def _place(architecture: Architecture, name: str, layers: int) -> Place | None:
    match = _LAYER_NAME.fullmatch(name)
    if match is None:
        return architecture.outer.get(name)
    place = architecture.layer.get(match[2])
    if place is None or int(match[1]) >= layers:
        return None
    return replace(place, name=place.name.format(match[1]))


def _check_complete(header: GgufHeader, architecture: Architecture, layers: int, places: Mapping[str, Place]) -> None:
    missing = [name for name, place in architecture.places(layers) if place.required and name not in places]
    if missing:
        raise CheckpointError(
            f"{header.path}: {len(missing)} of {architecture.model_class}'s tensors are missing, first {missing[0]!r}; "
            "the file is incomplete"
        )
    # A bias that only some layers have would leave the others' random in transformers.
    for stem, place in architecture.layer.items():
        having = sum(f"blk.{layer}.{stem}" in places for layer in range(layers))
        if not place.required and having not in (0, layers):
            raise CheckpointError(
                f"{header.path}: only {having} of {layers} layers have {stem!r}; the file is incomplete"
            )
