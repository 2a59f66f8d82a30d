"""What an artifact's tensors are written into: a directory of safetensors, or what another format has instead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from llmconvert.quantize.formats.encoded import Encoded
from llmconvert.quantize.methods.base import Method
from llmconvert.quantize.scheme import SchemeOrMix
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.artifact import copy_tensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, TensorWriter, plan_layout

__all__ = ["CheckpointContainer", "Container", "ContainerRequest", "Packed"]


@dataclass(frozen=True, slots=True)
class Packed:
    """What a part of a linear is stored as: rows of one of the layout's tensors, from row ``start`` on."""

    name: str
    rows: torch.Tensor
    start: int = 0


@dataclass(frozen=True, slots=True)
class ContainerRequest:
    """What a job has decided, for the container of its artifact.

    Attributes:
        method: what chooses codes.
        scheme: what was asked for; single linears may have others.
        specs: every tensor of the artifact as the format gives them, in the order of the source.
        declared: what ``config.json`` says of how it is quantized.
        name: of the model.
        max_shard_bytes: size at which a new shard is begun.
        types: of each tensor by its name in the file, in formats that hold GGML's.
        split_nbytes: of a file, in formats that are one file unless they are split.
        text: what calibration windows are of, and how many there are.
    """

    method: Method
    scheme: SchemeOrMix
    specs: Sequence[TensorSpec]
    declared: Mapping[str, Any]
    name: str
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    types: Mapping[str, str] | None = None
    split_nbytes: int | None = None
    text: tuple[str, int] = ("", 0)


class Container(Protocol):
    """The files of an artifact, filled tensor by tensor in any order. Names are those of the source."""

    #: Of the weight files.
    layout: Layout
    #: ``config.json``; None if there is none.
    config: Mapping[str, Any] | None
    #: Small files beside the weights: file name → a path to copy, or the bytes themselves.
    files: Mapping[str, Path | bytes]
    #: Whether the artifact is the layout's one file, without a directory around it.
    single: bool
    #: Tensor type → how many tensors have it, where the file says it of each.
    types: Mapping[str, int]
    #: What is otherwise than asked for, or otherwise in the runtime than in transformers, a sentence each.
    notes: tuple[str, ...]

    def begin(self, writer: TensorWriter) -> None:
        """Store what stands for no tensor of the source."""

    def pack(self, linear: str, tensor: QuantizedTensor) -> Iterable[Packed]:
        """What a linear's codes are stored as. ``linear`` is its name without ``.weight``."""

    def write_values(self, writer: TensorWriter, name: str, values: torch.Tensor) -> None:
        """Store new values for a tensor that is not quantized."""

    def copy(
        self,
        writer: TensorWriter,
        name: str,
        squares: Mapping[str, torch.Tensor] | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        """Store a tensor of the source that nothing was said of.

        Args:
            squares: float32 ``[columns]``, the mean squares of the inputs of the matrices in it where they were
                measured, by what artifacts call these, for containers that encode it.
            encoded: what was encoded for other artifacts of the same pass, for containers that encode it.
        """


class CheckpointContainer:
    """Safetensors in Hugging Face layout, with a ``config.json`` that says how they are quantized.

    Args:
        source: whose other tensors, config and files are taken over.
        specs: every tensor, in order.
        pack: see :meth:`llmconvert.quantize.formats.base.Format.pack`.
        config: see :meth:`llmconvert.quantize.formats.base.Format.config`.
        notes: see :attr:`Container.notes`.
        files: what the format wants beside the source's files.
        max_shard_bytes: size at which a new shard is begun.
    """

    single = False
    types: Mapping[str, int] = {}

    def __init__(
        self,
        source: Checkpoint,
        specs: Sequence[TensorSpec],
        pack: Callable[[str, QuantizedTensor], Mapping[str, torch.Tensor]],
        config: Mapping[str, Any],
        files: Mapping[str, bytes],
        max_shard_bytes: int,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._source = source
        self._pack = pack
        self.notes = notes
        self.layout = plan_layout(specs, max_shard_bytes)
        self.config: Mapping[str, Any] | None = config
        self.files: Mapping[str, Path | bytes] = {**source.files, **files}

    def begin(self, writer: TensorWriter) -> None:
        """There is nothing."""

    def pack(self, linear: str, tensor: QuantizedTensor) -> Iterable[Packed]:
        return [Packed(name, stored) for name, stored in self._pack(linear, tensor).items()]

    def write_values(self, writer: TensorWriter, name: str, values: torch.Tensor) -> None:
        writer.write(name, values.to(self._source.infos[name].dtype))

    def copy(
        self,
        writer: TensorWriter,
        name: str,
        squares: Mapping[str, torch.Tensor] | None = None,
        encoded: Encoded | None = None,
    ) -> None:
        copy_tensor(writer, self._source, name)
