"""Model summary: parameters, attention, KV cache and bytes by dtype, from the config and the tensors' headers alone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import torch

from llmconvert.convert.facts import (
    chat_template,
    chat_template_fault,
    devices,
    licence,
    parameters_by_kind,
    parts_beside,
)
from llmconvert.convert.kv_cache import cache_layout
from llmconvert.convert.pickle import PickleCheckpoint
from llmconvert.convert.quantized import stored_as
from llmconvert.convert.source import open_source, parse_hub_id
from llmconvert.engine.architecture.auto import auto_class, has_parts
from llmconvert.engine.architecture.config import declared_class
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.families import EMBEDDINGS, HEADS, LEARNED_POSITIONS
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.reading import declared_quantization
from llmconvert.quantize.job import Verdict, judge_model
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo
from llmconvert.storage.remote import RemoteCheckpoint, describing_files
from llmconvert.text.files import local_path
from llmconvert.text.tokenizer import has_tokenizer

__all__ = ["ModelSummary", "Stored", "describe_model", "inspect_model"]

_FLOATS = {name.lower() for name in FLOATS}
# Weights of these schemes are estimated besides the plain dtypes; scales are 16-bit.
_SCHEMES = (Scheme(Int(8)), Scheme(Int(4), 128))


@dataclass(frozen=True, slots=True)
class Stored:
    """What is stored in one way.

    Attributes:
        tensors: dense ones, as the model has them, however many each is stored in.
        weights: numbers in them.
        where: what they are called, with ``*`` for the layer → the layers, none for what is in no layer.
    """

    tensors: int
    weights: int
    where: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """What :func:`inspect_model` finds.

    Attributes:
        architecture: class name in the config, or its model type.
        layers: decoder blocks.
        hidden_size: width of the residual stream.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: of keys and values.
        attention: ``MHA``, ``GQA``, ``MQA`` or ``MLA`` (a compressed cache).
        positions: ``RoPE …``, ``ALiBi``, ``learned, 1024`` or ``none``.
        windows: layers with sliding-window attention and the window in tokens, or None.
        experts: per layer; 0 for a dense model.
        experts_per_token: of a layer's, how many a token goes to.
        vocabulary: rows of the embedding.
        context: longest sequence the config allows, in tokens; None if it doesn't say.
        tied: whether input and output embedding are one tensor.
        parameters: numbers in all tensors, of quantized ones those that they stand for; None if they can't be read.
        beside: how many of them text never meets: towers for images and sound, what joins them to the decoder, and what
            the model's class has no place for; 0 of a decoder.
        loader: transformers' class that loads the whole of it, for example ``AutoModelForCausalLM``.
        kv_bytes_per_token: of a 16-bit cache, all layers; sliding windows bound it but are not in it.
        stored_bytes: of all tensors as they are.
        mixture: scheme, GGUF type or dtype → what is stored in it; most weights first. Empty if they can't be read.
        weight_bytes: dtype or scheme → size of all weights in it, in bytes; schemes apply to the blocks' linears and
            leave the rest in 16 bits. Empty for a model that is already quantized.
        quantization: the method of a model that is already quantized, or None.
        released: whether models are released in this; quantizing others anew has to be asked for. None of what is dense
            or can't be read.
        quantizable: whether ``quantize`` takes it, or why not; None where that was not asked, or its weights can't be
            read.
        unread: why the quantized weights can't be read here; None if they can.
        parts: those beside the text, by the name of each tower or projector → how many parameters they have.
        kinds: what parameters are for → how many of them there are: embeddings, attention, experts, …
        chat_template: whether the tokenizer has one; None where that was not looked at.
        chat_template_fault: why it renders no user's message, so that a run refuses it too; empty where it does, or
            that was not asked.
        license: identifier, as the card or the file says it; None if nothing does.
        devices: over how many it can be split where it is served; empty where that is not known.
    """

    architecture: str
    layers: int
    hidden_size: int
    query_heads: int
    kv_heads: int
    head_dim: int
    attention: str
    positions: str
    windows: tuple[int, int] | None
    experts: int
    vocabulary: int
    context: int | None
    tied: bool
    parameters: int | None
    beside: int
    loader: str
    kv_bytes_per_token: int
    stored_bytes: int
    mixture: Mapping[str, Stored]
    weight_bytes: Mapping[str, int]
    quantization: str | None
    unread: str | None = None
    released: bool | None = None
    quantizable: Verdict | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    chat_template: bool | None = None
    chat_template_fault: str = ""
    license: str | None = None
    devices: str = ""
    experts_per_token: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def bits_per_weight(self) -> float | None:
        """Of everything that is stored, scales and what is not quantized included; None if it can't be read."""
        return 8 * self.stored_bytes / self.parameters if self.parameters else None

    @property
    def position_limit(self) -> int | None:
        """Tokens that learned positions end after; None for other positions, which end nowhere."""
        return self.context if self.positions.startswith("learned") else None


def inspect_model(model: str) -> ModelSummary:
    """Summarize ``MODEL`` (any of its four forms), and say whether it can be quantized; of a Hub model only headers are
    fetched.

    Raises:
        SourceError: it does not exist or cannot be read.
        UnsupportedError: the config names no architecture that transformers knows.
    """
    hub = parse_hub_id(model) if not local_path(model).exists() else None
    if hub is not None:
        with RemoteCheckpoint(*hub) as remote:
            remote.files = describing_files(hub[0], remote.commit_hash)
            return _judged(remote)
    with open_source(model, allow_pickle=True).checkpoint as checkpoint:
        return _judged(checkpoint)


def _judged(checkpoint: Checkpoint) -> ModelSummary:
    summary = replace(describe_model(checkpoint), chat_template_fault=chat_template_fault(checkpoint))
    if summary.unread is not None:
        return summary
    verdict = judge_model(open_dense(checkpoint, weights_only=True))
    notes = (*verdict.notes, *_without_text(checkpoint, verdict))
    if isinstance(checkpoint, PickleCheckpoint):
        notes += ("its weights are pickle, which is read with --allow-pickle (allow_pickle: true) alone",)
    return replace(summary, quantizable=replace(verdict, notes=notes))


def _without_text(checkpoint: Checkpoint, verdict: Verdict) -> tuple[str, ...]:
    """What is said of a model that ``quantize`` takes, and whose text it can't make tokens of; else nothing."""
    if verdict.scheme is None or isinstance(checkpoint, RemoteCheckpoint):  # of a Hub's files few are looked at
        return ()
    if checkpoint.without_tokenizer or not has_tokenizer(checkpoint):
        why = checkpoint.without_tokenizer or "it has no tokenizer beside its weights (tokenizer.json, for example)"
        return (f"{why}: of the methods rtn and hqq alone take it so, which need no text",)
    return ()


def describe_model(checkpoint: Checkpoint) -> ModelSummary:
    """Summarize a checkpoint without reading a weight: of quantized ones, their shapes alone where they are stored.

    Raises:
        CheckpointError: the config lacks sizes that every decoder has.
        UnsupportedError: transformers does not know its ``model_type``.
    """
    found = Architecture.of(checkpoint.config)
    found.check_layers(checkpoint.infos)
    declared = declared_quantization(checkpoint)
    dense, unread = checkpoint, None
    try:
        dense = open_dense(checkpoint)
    except (UnsupportedError, CheckpointError) as error:
        unread = str(error)
    stored = stored_as(checkpoint) if unread is None else None
    mixture = {} if unread is not None else _mixture(dense)
    quantization = str(declared.get("quant_method", "unknown")) if declared else None
    if isinstance(checkpoint, GgufCheckpoint) and mixture.keys() - _FLOATS:
        quantization = "gguf"
    beside = _beside(dense)
    met = [info for info in _matrices(dense) if info.name not in beside]
    embedding = max((info.shape[0] for info in met if _is_embedding(info.name)), default=0)
    return ModelSummary(
        architecture=declared_class(checkpoint.config) or found.model_type,
        layers=found.layers,
        hidden_size=found.hidden_size,
        query_heads=found.query_heads if found.has_attention else 0,
        kv_heads=found.kv_heads if found.has_attention else 0,
        head_dim=found.head_dim if found.has_attention else 0,
        attention=_attention_kind(found),
        positions=_positions(found, dense),
        windows=_windows(found),
        experts=found.experts,
        vocabulary=embedding or found.vocab_size,
        context=found.context,
        tied=not any(name.endswith(HEADS) for name in dense.infos),
        parameters=sum(stored.weights for stored in mixture.values()) if unread is None else None,
        beside=sum(math.prod(dense.infos[name].shape) for name in beside),
        loader=auto_class(checkpoint.config),
        kv_bytes_per_token=cache_layout(found).bytes_per_token(),
        stored_bytes=checkpoint.stored_nbytes,
        mixture=mixture,
        weight_bytes={} if declared else _weight_bytes(checkpoint, beside),
        quantization=quantization,
        unread=unread,
        released=stored.released if stored is not None else None,
        kinds=parameters_by_kind(dense, beside) if unread is None else {},
        chat_template=chat_template(checkpoint),
        license=licence(checkpoint),
        devices=devices(found, dense) if unread is None else "",
        experts_per_token=found.experts_per_token,
        parts=parts_beside(dense, beside),
    )


def _beside(dense: Checkpoint) -> frozenset[str]:
    """The tensors that text never meets; none of a model that can't be run, of which that isn't known."""
    if not has_parts(dense.config):
        return frozenset()
    from llmconvert.engine.skeleton import Skeleton

    try:
        skeleton = Skeleton(dense, torch.device("cpu"))
    except (UnsupportedError, CheckpointError):
        return frozenset()
    met = {stored for name, stored in skeleton.names.items() if skeleton.reach.needs(name)}
    return frozenset(dense.infos.keys() - met)


def _mixture(dense: Checkpoint) -> dict[str, Stored]:
    """Way of storing → what is stored so, most weights first."""
    found: dict[str, Stored] = {}
    layers: dict[str, dict[str, set[int]]] = {}
    for name, info in dense.infos.items():
        way = _way(dense, name)
        before = found.get(way, Stored(0, 0))
        found[way] = Stored(before.tensors + 1, before.weights + math.prod(info.shape))
        # The first number in a name is that of its layer; a second one is an expert's.
        numbers = [int(word) for word in name.split(".") if word.isdecimal()]
        called = ".".join("*" if word.isdecimal() else word for word in name.removesuffix(".weight").split("."))
        layers.setdefault(way, {}).setdefault(called, set()).update(numbers[:1])
    found = {
        way: replace(one, where={called: tuple(sorted(at)) for called, at in layers[way].items()})
        for way, one in found.items()
    }
    return dict(sorted(found.items(), key=lambda item: -item[1].weights))


def _way(dense: Checkpoint, name: str) -> str:
    if isinstance(dense, GgufCheckpoint):
        return dense.type_of(name)
    if isinstance(dense, QuantizedView):
        scheme, stored = dense.scheme_of(name), dense.base.infos.get(name)
        # A weight that was decompressed is as dense as any.
        if scheme is not None and (stored is None or stored.dtype != dense.infos[name].dtype):
            return str(scheme)
    return str(dense.infos[name].dtype).removeprefix("torch.")


def _attention_kind(architecture: Architecture) -> str:
    if not architecture.has_attention:
        return "none"
    if architecture.latent_size:
        return "MLA"
    if architecture.kv_heads == architecture.query_heads:
        return "MHA"
    return "MQA" if architecture.kv_heads == 1 else "GQA"


def _positions(architecture: Architecture, checkpoint: Checkpoint) -> str:
    if architecture.uses_alibi:
        return "ALiBi"
    for info in _matrices(checkpoint):
        if info.name.endswith(LEARNED_POSITIONS):
            return f"learned, {info.shape[0]:,}"
    theta, share, rope = architecture.rope_theta, architecture.rotary_share, architecture.rope
    if theta is None:
        return "none"
    kind = rope.get("rope_type", "default")
    scaling = "" if kind == "default" else f", {kind} ×{rope.get('factor') or 1:g}"
    return f"RoPE, θ = {theta:,.0f}{'' if share == 1 else f', {share:.0%} of each head'}{scaling}"


def _windows(architecture: Architecture) -> tuple[int, int] | None:
    count = architecture.layer_kinds.count("sliding_attention")
    return (count, architecture.window) if architecture.window and count else None


def _matrices(checkpoint: Checkpoint) -> list[TensorInfo]:
    return [info for info in checkpoint.infos.values() if len(info.shape) >= 2]


def _is_embedding(name: str) -> bool:
    return any(part in name for part in EMBEDDINGS)


def _weight_bytes(checkpoint: Checkpoint, beside: Collection[str]) -> dict[str, int]:
    count = sum(math.prod(info.shape) for info in checkpoint.infos.values() if info.dtype.is_floating_point)
    linear = [info for info in _matrices(checkpoint) if not _is_embedding(info.name) and info.name not in beside]
    quantized = sum(math.prod(info.shape) for info in linear)
    sizes = {"float32": 4 * count, "bfloat16": 2 * count}
    for scheme in _SCHEMES:
        codes = quantized * scheme.bits // 8
        scales = sum(
            math.prod(info.shape[:-1]) * math.ceil(info.shape[-1] / scheme.columns_per_group(info.shape[-1]))
            for info in linear
        )
        sizes[str(scheme)] = codes + 2 * scales + 2 * (count - quantized)
    return sizes
