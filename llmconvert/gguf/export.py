"""GGUF export: a Hugging Face checkpoint in llama.cpp's tensor names, layout and metadata, the inverse of reading.

What llama.cpp computes from a file must be what transformers computes from the checkpoint. Settings that its code for
the architecture does not know are refused by name before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.config import Geometry
from llmconvert.gguf.export_config import export_config, export_geometry, window_notes
from llmconvert.gguf.export_tokenizer import export_tokenizer
from llmconvert.gguf.ggml.mix import GgmlMix, MixContext
from llmconvert.gguf.names import ARCHITECTURES, Storage
from llmconvert.gguf.rope import export_rope_tensors
from llmconvert.memory import row_slices
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["ExportedTensor", "GgufExport", "check_exportable", "export_checkpoint", "tensor_types"]

#: transformers' ``model_type`` → GGUF architecture.
GGUF_ARCHITECTURES: Final[Mapping[str, str]] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "phi3": "phi3",
    "gemma2": "gemma2",
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_COMPARED_AT_ONCE = 1 << 24
# Buffers that old checkpoints hold and every runtime computes for itself.
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.masked_bias")


@dataclass(frozen=True, slots=True)
class ExportedTensor:
    """A tensor of the file: its name there, the checkpoint's tensor it comes from, and how it is stored."""

    name: str
    source: str
    shape: tuple[int, ...]
    storage: Storage
    heads: int = 0

    @property
    def rows_together(self) -> int:
        """Rows that must be read together: those of a head, where they change places."""
        return self.shape[0] // self.heads if self.heads else 1

    def store(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the checkpoint (whole heads) as rows of the file, in float32."""
        rows = rows.float()
        return rows + 1 if self.storage is Storage.PLUS_ONE else self.arrange(rows)

    def arrange(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the checkpoint (whole heads), in values or encoded, in the file's order."""
        if not self.heads:
            return rows
        halves = rows.reshape(-1, 2, self.rows_together // 2, *rows.shape[1:])
        return halves.transpose(1, 2).reshape(rows.shape)


@dataclass(frozen=True, slots=True)
class GgufExport:
    """What will be in a file, but for the weights themselves.

    Attributes:
        metadata: all of it, in order, without ``general.file_type``.
        tensors: in file order.
        settings: float32 tensors that llama.cpp keeps settings in, by name.
        layers: decoder blocks.
        tied: the embedding is the output matrix too.
        queries_per_key: query heads that share a key-value head.
        notes: what llama.cpp does otherwise although the model can be used, a sentence each.
    """

    metadata: Mapping[str, Any]
    tensors: tuple[ExportedTensor, ...]
    settings: Mapping[str, np.ndarray]
    layers: int
    tied: bool
    queries_per_key: int
    notes: tuple[str, ...]

    def types(self, mix: GgmlMix, *, importance: bool) -> dict[str, str]:
        """Source of each tensor → the type that a mix gives it."""
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
    arch, model, values = _architecture(source)
    settings = export_config(values, model, arch)
    sizes = export_geometry(values, model)
    tied = model.tied and not _has_own_head(source)
    tensors = _tensors(source, arch, sizes, tied=tied)
    tokenizer = export_tokenizer(source, values, name)
    general = {"general.architecture": arch, "general.type": "model", "general.name": tokenizer.name}
    if source.config["model_type"] == "mistral":
        general["general.basename"] = "Mistral"
    return GgufExport(
        metadata={**general, **settings, **tokenizer.metadata},
        tensors=tensors,
        settings=export_rope_tensors(values, arch),
        layers=model.layers,
        tied=tied,
        queries_per_key=sizes.heads // sizes.kv_heads,
        notes=(*window_notes(model, arch), *tokenizer.notes),
    )


def check_exportable(source: Checkpoint) -> None:
    """Refuse what :func:`export_checkpoint` would, as far as config and names of tensors tell; it costs nothing.

    Raises:
        UnsupportedError, CheckpointError: see there.
    """
    arch, model, values = _architecture(source)
    export_config(values, model, arch)
    _tensors(source, arch, export_geometry(values, model), tied=model.tied)


def tensor_types(source: Checkpoint, mix: GgmlMix, *, importance: bool) -> dict[str, str]:
    """Tensor of a checkpoint → the type that a mix gives it: :meth:`GgufExport.types` without the rest of an export.

    Raises:
        UnsupportedError, CheckpointError: see :func:`export_checkpoint`.
    """
    arch, model, values = _architecture(source)
    sizes = export_geometry(values, model)
    tied = model.tied and not _has_own_head(source)
    tensors = _tensors(source, arch, sizes, tied=tied)
    return _types(tensors, mix, MixContext(model.layers, tied, importance, sizes.heads // sizes.kv_heads))


def _types(tensors: Iterable[ExportedTensor], mix: GgmlMix, context: MixContext) -> dict[str, str]:
    return {tensor.source: mix.type_of(tensor.name, tensor.shape, context) for tensor in tensors}


def _architecture(source: Checkpoint) -> tuple[str, Architecture, dict[str, Any]]:
    """GGUF's name of the architecture, and the config as transformers completes it: llama.cpp is told all of it."""
    model_type: str = source.config.get("model_type", "")
    if model_type not in GGUF_ARCHITECTURES:
        raise UnsupportedError(
            f"architecture {model_type!r} cannot be written as GGUF; supported are {', '.join(GGUF_ARCHITECTURES)}"
        )
    config = build_config(source.config)
    values: dict[str, Any] = config.to_dict()
    return GGUF_ARCHITECTURES[model_type], Architecture.of(config), values


def _has_own_head(source: Checkpoint) -> bool:
    """Whether a head is stored that is not the embedding, though the config says that both are one.

    transformers then computes with the stored one. Equal rows are read to the end, others to the first that differs.
    """
    head, embedding = source.infos.get(_HEAD), source.infos.get(_EMBEDDING)
    if head is None or embedding is None:
        return False
    if head.shape != embedding.shape:
        return True
    return not all(
        torch.equal(source.read_rows(_HEAD, part.start, part.stop), source.read_rows(_EMBEDDING, part.start, part.stop))
        for part in row_slices(head.shape, _COMPARED_AT_ONCE)
    )


def _tensors(source: Checkpoint, arch: str, sizes: Geometry, *, tied: bool) -> tuple[ExportedTensor, ...]:
    symbols = sizes.symbols
    found: list[ExportedTensor] = []
    for stored, place in ARCHITECTURES[arch].places(sizes.layers):
        info = source.infos.get(place.name)
        if stored == "output.weight" and tied:
            continue
        if info is None:
            if place.required or stored == "output.weight":
                raise CheckpointError(f"the checkpoint has no tensor {place.name!r}, which {arch} models need")
            continue
        expected = tuple(symbols[symbol] for symbol in place.shape)
        if info.shape != expected:
            raise CheckpointError(
                f"tensor {place.name!r} has shape {list(info.shape)}, config.json asks for {list(expected)} "
                f"({' × '.join(place.shape)})"
            )
        heads = {Storage.QUERY_ROWS: sizes.heads, Storage.KEY_ROWS: sizes.kv_heads}.get(place.storage, 0)
        found.append(ExportedTensor(stored, place.name, info.shape, place.storage, heads))
    _check_all_placed(source, found, arch, tied=tied)
    return tuple(found)


def _check_all_placed(source: Checkpoint, found: list[ExportedTensor], arch: str, *, tied: bool) -> None:
    used = {tensor.source for tensor in found}
    if tied:
        used.add(_HEAD)
    for name in source:
        if name == _HEAD and name not in used:
            raise UnsupportedError(
                f"tensor {name!r} is not the embedding; llama.cpp's {arch} has no head of its own and would differ"
            )
        if name not in used and not _COMPUTED.fullmatch(name):
            raise UnsupportedError(
                f"tensor {name!r} has no place in a GGUF file of architecture {arch!r}, and cannot be left out"
            )
