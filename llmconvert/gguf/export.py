"""GGUF export: a Hugging Face checkpoint in llama.cpp's tensor names, layout and metadata, the inverse of reading.

What llama.cpp computes from a file must be what transformers computes from the checkpoint. Settings that its code for
the architecture does not know are refused by name before anything is written.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.gguf.architectures.architecture import GgufArchitecture
from llmconvert.gguf.architectures.decoder import EMBEDDING, HEAD, Decoder, find_decoder
from llmconvert.gguf.architectures.placing import StoredTensor, plan_tensors
from llmconvert.gguf.architectures.writing import window_notes, write_metadata
from llmconvert.gguf.export_tokenizer import export_tokenizer
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.gguf.ggml.overrides import Matrix, TypeOverride, override_types
from llmconvert.gguf.records.general import general_metadata
from llmconvert.gguf.rope import export_rope_tensors
from llmconvert.memory import row_slices
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["GgufExport", "TensorTypes", "check_exportable", "export_checkpoint", "tensor_types"]

_COMPARED_AT_ONCE = 1 << 24
# Buffers that old checkpoints hold and every runtime computes for itself.
_COMPUTED: Final = re.compile(r".*\.rotary_emb\.inv_freq|.*\.masked_bias")


@dataclass(frozen=True, slots=True)
class GgufExport:
    """What will be in a file, but for the weights themselves.

    Attributes:
        arch: the file's architecture.
        config: the model's, with transformers' defaults filled in.
        metadata: all of it, in order, without ``general.file_type``.
        tensors: in file order.
        settings: float32 tensors that llama.cpp keeps settings in, by name.
        layers: decoder blocks.
        tied: the embedding is the output matrix too.
        queries_per_key: query heads that share a key-value head.
        notes: what llama.cpp does otherwise although the model can be used, a sentence each.
        beside: the checkpoint's tensors of parts for images or sound, which the file has no place for.
    """

    arch: GgufArchitecture
    config: Mapping[str, Any]
    metadata: Mapping[str, Any]
    tensors: tuple[StoredTensor, ...]
    settings: Mapping[str, np.ndarray]
    layers: int
    tied: bool
    queries_per_key: int
    notes: tuple[str, ...]
    beside: tuple[str, ...] = ()

    def types(self, mix: GgmlMix, *, importance: bool) -> dict[str, str]:
        """Name of each tensor in the file → the type that a mix gives it."""
        return _types(self.tensors, mix, self.context(importance=importance))

    def context(self, *, importance: bool) -> MixContext:
        """What a mix looks at beside a tensor."""
        return MixContext(self.layers, self.tied, importance, self.queries_per_key)


def export_checkpoint(source: Checkpoint, name: str) -> GgufExport:
    """Translate everything about a checkpoint but its weights.

    Args:
        source: dense weights under Hugging Face names.
        name: of the model, for ``general.name``.

    Raises:
        UnsupportedError: an architecture, setting, tensor or tokenizer that llama.cpp's class cannot express.
        CheckpointError: tensors are missing.
    """
    decoder = find_decoder(source)
    arch, model, values = decoder.arch, decoder.model, decoder.values
    settings = write_metadata(values, model, arch)
    tied = decoder.declared_tied and not _has_own_head(source, decoder)
    tensors = _tensors(source, decoder, tied=tied)
    tokenizer = export_tokenizer(source, values, name)
    general = {"general.architecture": arch.name, "general.type": "model", "general.name": tokenizer.name}
    if arch.base:
        general["general.basename"] = arch.base
    return GgufExport(
        arch=arch,
        config=values,
        metadata={**general, **_said_of(source, tensors), **settings, **tokenizer.metadata},
        tensors=tensors,
        settings={**export_rope_tensors(values), **arch.tensors(values)},
        layers=model.layers,
        tied=tied,
        queries_per_key=_queries_per_key(model),
        notes=(*window_notes(model, arch), *arch.notes(values), *decoder.left_out, *tokenizer.notes),
        beside=decoder.beside,
    )


def _said_of(source: Checkpoint, tensors: Sequence[StoredTensor]) -> dict[str, Any]:
    """What the file says of the model: its size, and what its card says."""
    sizes = {tensor.name: math.prod(tensor.shape) for tensor in tensors}
    inside = {tensor.name: tensor.shape[0] for tensor in tensors if "_exps." in tensor.name}
    experts = max(inside.values(), default=0)
    return general_metadata(source, sizes.values(), (experts, sum(sizes[name] for name in inside)))


def check_exportable(source: Checkpoint) -> None:
    """Refuse what :func:`export_checkpoint` would, as far as config and names of tensors tell; it costs nothing.

    Raises:
        UnsupportedError, CheckpointError: see there.
    """
    decoder = find_decoder(source)
    write_metadata(decoder.values, decoder.model, decoder.arch)
    _tensors(source, decoder, tied=decoder.declared_tied)


@dataclass(frozen=True, slots=True)
class TensorTypes:
    """The types of a file's tensors.

    Attributes:
        stored: by the name in the file.
        linears: by the checkpoint's tensor; of those whose rows are not the file's nothing is said, since codes would
            not go along.
    """

    stored: Mapping[str, str]
    linears: Mapping[str, str]


def tensor_types(
    source: Checkpoint, mix: GgmlMix, overrides: Sequence[TypeOverride] = (), *, importance: bool
) -> TensorTypes:
    """The types that a mix gives a model's tensors, unless an override says otherwise.

    Raises:
        UnsupportedError, CheckpointError: see :func:`export_checkpoint`.
        SchemeError: see :func:`~llmconvert.gguf.ggml.overrides.override_types`.
    """
    decoder = find_decoder(source)
    tied = decoder.declared_tied and not _has_own_head(source, decoder)
    tensors = _tensors(source, decoder, tied=tied)
    model = decoder.model
    types = _types(tensors, mix, MixContext(model.layers, tied, importance, _queries_per_key(model)))
    matrices = [_matrix(source, tensor) for tensor in tensors if not tensor.kept]
    types = override_types(types, matrices, overrides, tied=tied)
    linears: dict[str, str] = {}
    for tensor in tensors:
        for piece in tensor.pieces if tensor.by_rows else ():
            kind = types[tensor.name]
            if linears.setdefault(piece.name, kind) != kind and overrides:
                raise SchemeError(
                    f"overrides: {piece.name} becomes several tensors, {tensor.name} for one, which need one type: "
                    f"{linears[piece.name].lower()} and {kind.lower()}"
                )
    return TensorTypes(types, linears)


def _matrix(source: Checkpoint, tensor: StoredTensor) -> Matrix:
    names = [name for piece in tensor.pieces for name in (piece.name, piece.linear)]
    dtype = source.infos[tensor.source].dtype
    dense = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype, "F32")
    return Matrix(tensor.name, tuple(dict.fromkeys(names)), tensor.shape, dense)


def _queries_per_key(model: Architecture) -> int:
    return model.query_heads // model.kv_heads if model.has_attention else 1


def _types(tensors: Iterable[StoredTensor], mix: GgmlMix, context: MixContext) -> dict[str, str]:
    return {
        tensor.name: "F32" if tensor.kept else mix.type_of(tensor.name, tensor.shape, context) for tensor in tensors
    }


def _has_own_head(source: Checkpoint, decoder: Decoder) -> bool:
    """Whether a head is stored that is not the embedding, though the config says that both are one.

    transformers then computes with the stored one. Equal rows are read to the end, others to the first that differs.
    """
    head, embedding = (decoder.names.get(name, "") for name in (decoder.head, decoder.outer_name(EMBEDDING)))
    if head not in source.infos or embedding not in source.infos:
        return False
    shape = source.infos[head].shape
    if shape != source.infos[embedding].shape:
        return True
    return not all(
        torch.equal(source.read_rows(head, part.start, part.stop), source.read_rows(embedding, part.start, part.stop))
        for part in row_slices(shape, _COMPARED_AT_ONCE)
    )


def _tensors(source: Checkpoint, decoder: Decoder, *, tied: bool) -> tuple[StoredTensor, ...]:
    names, arch = decoder.names, decoder.arch
    shapes = {name: source.infos[actual].shape for name, actual in names.items()}
    tensors = tuple(
        replace(tensor, pieces=tuple(map(decoder.located, tensor.pieces)))
        for tensor in plan_tensors(shapes, arch, decoder.values, tied=tied)
    )
    used = {piece.name for tensor in tensors for piece in tensor.pieces} | set(decoder.ahead)
    used |= {names.get(decoder.head, "")} if tied else set()
    for name, actual in names.items():
        if actual in used or _COMPUTED.fullmatch(actual):
            continue
        if name == HEAD:
            raise UnsupportedError(
                f"tensor {actual!r} is not the embedding; llama.cpp's {arch.name} has no head of its own and would "
                "differ"
            )
        raise UnsupportedError(
            f"tensor {actual!r} has no place in a GGUF file of architecture {arch.name!r}, and cannot be left out"
        )
    return tensors
