"""One GGUF architecture as data: which of transformers' classes it is, its tensors, and its settings both ways."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, Literal

from llmconvert.gguf.architectures.entries import Config, Entry, entries, stored_name
from llmconvert.gguf.architectures.orders import head_dim
from llmconvert.gguf.header import GgufHeader

__all__ = ["SIZES", "GgufArchitecture", "Reading", "Setting", "Windows", "lengths", "outer"]

#: What a sliding window is to llama.cpp's class: it has none; it is told of one and attends to everything; it keeps it.
Windows = Literal["none", "ignored", "kept"]


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that a file has under a key and a config under a name.

    Attributes:
        key: in the metadata, without the architecture before it.
        name: in ``config.json``.
        kind: of the value.
        default: what llama.cpp takes where a file has none; None where it needs one.
        zero: whether a config without a value has a zero in the file, and back.
        least: of a whole number.
    """

    key: str
    name: str
    kind: type[int] | type[float] | type[bool] = int
    default: Any = None
    zero: bool = False
    least: int = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """What an architecture reads the rest of its config from.

    Attributes:
        header: of the file.
        arch: its ``general.architecture``.
        config: as far as it is known.
        tensor: the float32 values of a tensor that holds settings, by its name in the file.
    """

    header: GgufHeader
    arch: str
    config: Config
    tensor: Callable[[str], Any]

    @property
    def layers(self) -> int:
        """Decoder blocks."""
        return int(self.header.metadata[f"{self.arch}.block_count"])

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata's value under a key of the architecture's."""
        return self.header.metadata.get(f"{self.arch}.{key}", default)

    def flags(self, key: str) -> list[bool]:
        """A value for each layer."""
        value = self.get(key)
        return [bool(one) for one in value] if hasattr(value, "__len__") else [bool(value)] * self.layers

    def has(self, stem: str) -> bool:
        """Whether the first layer has a tensor, or any layer."""
        return any(name.endswith(f".{stem}") for name in self.header.tensors)


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """One class of transformers', as a GGUF file has it.

    Attributes:
        name: ``general.architecture``.
        model_type: as in ``config.json``.
        model_class: as in ``config.json``'s ``architectures``.
        outer: tensors outside the layers.
        layer: tensors of a layer.
        settings: what file and config both have.
        always: settings that llama.cpp computes so whatever a file says; of a config a file has these.
        write: the metadata that is made of a config otherwise, without the architecture's name before its keys.
        read: what is read otherwise, for the config.
        tensors: float32 tensors that llama.cpp keeps settings in, of a config, beside those of RoPE's scalings.
        inert: settings that change nothing in what is computed.
        scalings: kinds of scaled positions that llama.cpp's class knows.
        windows: see :data:`Windows`.
        attention: whether there are heads, whose lengths are stored and checked.
        rotary: whether heads are turned by their positions, and whether all of their dimensions must be.
        activation: what llama.cpp computes between an MLP's matrices.
        consumed: tensors that carry settings of the config rather than weights.
        unquantized: ends of names of matrices that stay F32, as llama.cpp's own tools keep them.
        described: whether a file of that name is of this class.
        chosen: whether a model of that type is written so, where a class has several layouts.
        vocabulary: the setting that counts the embedding's rows.
        experts: the setting that counts a layer's experts, or what counts other matrices that lie in one tensor.
        kv_heads: the setting that counts key-value heads; "" where there are as many as queries.
        stated_heads: whether a config says how long heads are, always or where they don't add up to the width; "" where
            they must.
        known: keys of the metadata that are read by themselves, and would be refused of other classes.
        base: ``general.basename`` of files that are written.
        read_type: the model type that a file is read as, where transformers has no class of a decoder alone; the same
            by default.
        inside: tensors of a layer as files are read of decoders inside models with parts for images, where these have
            them otherwise; empty where they don't.
        notes: given the config, a sentence on each thing that llama.cpp computes a little otherwise.
        gap: what llama.cpp computes otherwise, so that no file is written; "" if nothing.
    """

    name: str
    model_type: str
    model_class: str
    outer: tuple[Entry, ...]
    layer: tuple[Entry, ...]
    settings: tuple[Setting, ...] = ()
    always: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[Config], Mapping[str, Any]] = _nothing
    read: Callable[[Reading], Mapping[str, Any]] = _nothing
    tensors: Callable[[Config], Mapping[str, Any]] = _nothing
    inert: frozenset[str] = frozenset()
    scalings: frozenset[str] = frozenset({"linear", "yarn"})
    windows: Windows = "none"
    attention: bool = True
    rotary: Literal["all", "part", "none", "own"] = "all"
    activation: str = "silu"
    consumed: frozenset[str] = frozenset()
    unquantized: tuple[str, ...] = ()
    described: Callable[[GgufHeader], bool] = lambda header: True
    chosen: Callable[[Config], bool] = lambda config: True
    vocabulary: str = "vocab_size"
    experts: str | Callable[[Config], int] = "num_experts"
    kv_heads: str = "num_key_value_heads"
    stated_heads: Literal["", "always", "other"] = "always"
    known: frozenset[str] = frozenset()
    base: str = ""
    read_type: str = ""
    inside: tuple[Entry, ...] = ()
    notes: Callable[[Config], tuple[str, ...]] = lambda config: ()
    gap: str = ""

    def entries(self, layers: int) -> Iterator[tuple[str, Entry, int]]:
        """Stored name, entry and layer of every tensor that a model of so many layers may have, in a file's order."""
        for entry in self.outer:
            yield stored_name(self.name, entry), entry, 0
        for layer in range(layers):
            for entry in self.layer:
                yield stored_name(self.name, entry).replace("*", str(layer)), entry, layer

    @property
    def keys(self) -> set[str]:
        """The metadata's keys that settings are read from."""
        return {setting.key for setting in self.settings} | self.known


#: Sizes that most classes have under these names.
SIZES: Final = (
    Setting("context_length", "max_position_embeddings"),
    Setting("embedding_length", "hidden_size"),
    Setting("block_count", "num_hidden_layers"),
    Setting("feed_forward_length", "intermediate_size"),
    Setting("attention.head_count", "num_attention_heads"),
)


def renamed(settings: Sequence[Setting], names: Mapping[str, str]) -> tuple[Setting, ...]:
    """Settings under other names in a config."""
    from dataclasses import replace

    return tuple(replace(setting, name=names.get(setting.name, setting.name)) for setting in settings)


def outer(*, head: bool = True, norm: Any = None, bias: bool = False) -> tuple[Entry, ...]:
    """Embedding, last norm and head, by the names that most classes have.

    Args:
        head: whether llama.cpp's class has a head of its own.
        norm: how the last norm is stored.
        bias: whether the last norm has one.
    """
    text = "model.embed_tokens.weight vocab hidden\nmodel.norm.weight hidden\n"
    text += "model.norm.bias hidden\n" * bias + "lm_head.weight? vocab hidden\n" * head
    return entries(text, {"model.norm": norm} if norm is not None else None, prefix="")


def lengths(config: Config) -> Mapping[str, int]:
    """What the lengths in tables of tensors are called."""
    heads = config.get("num_attention_heads") or 1
    size = head_dim(config) if config.get("num_attention_heads") else 0
    query, key = heads * size, (config.get("num_key_value_heads") or heads) * size
    inner = config.get("intermediate_size") or 0
    return MappingProxyType(
        {
            "vocab": config.get("vocab_size", 0),
            "hidden": config.get("hidden_size", 0),
            "inner": inner,
            "fused_inner": 2 * inner if isinstance(inner, int) else 0,
            "head": size,
            "query": query,
            "key": key,
            "fused_qkv": query + 2 * key,
        }
    )
