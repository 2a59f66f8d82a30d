"""Reading GPTQ artifacts: of AutoGPTQ and GPTQModel, versions 1 and 2, activation order included.

The layout is in :mod:`llmconvert.quantize.formats.gptq_v1`. Version 2 stores zero points as they are. ``g_idx`` names
the group of every input; with activation order (``desc_act``) a group's inputs lie scattered. What is stored tells
the width of every linear, so per-layer overrides (``dynamic``) need no looking up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.gptq_v1 import unstored_zeros
from llmconvert.quantize.pack import packed_length, unpack_words
from llmconvert.quantize.readers.base import StoredLinear, model_dtype, require_shape, settings
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["find"]

_WORDS = ".qweight"
_BITS = (2, 3, 4, 8)


def find(checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterator[StoredLinear]:
    """The quantized linears of a GPTQ checkpoint.

    Raises:
        UnsupportedError: another version of the layout.
        CheckpointError: parts are missing or contradict each other.
    """
    version = str(declared.get("checkpoint_format") or declared.get("format") or "gptq").lower()
    if version not in ("gptq", "gptq_v2") or str(declared.get("pack_dtype", "int32")) != "int32":
        raise UnsupportedError(
            f"a GPTQ checkpoint with {settings(declared, 'checkpoint_format', 'format', 'pack_dtype')}; "
            "this reader knows gptq and gptq_v2, packed in int32"
        )
    for name in checkpoint.infos:
        if name.endswith(_WORDS):
            yield _linear(checkpoint, declared, name.removesuffix(_WORDS), plain=version == "gptq_v2")


@dataclass(frozen=True)
class _Gptq(StoredLinear):
    """``plain``: zero points are stored as they are, not minus one. ``indexed``: there is a ``g_idx``."""

    plain: bool
    indexed: bool

    def read_rows(self, checkpoint: Checkpoint, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        codes, zeros, scales = self._stored(checkpoint, slice(start, stop))
        group = self._groups(checkpoint)
        weight = codes.float().sub_(zeros.float()[:, group]).mul_(scales.float()[:, group])
        return weight.to(dtype)

    def read(self, checkpoint: Checkpoint) -> QuantizedTensor:
        codes, zeros, scales = self._stored(checkpoint, slice(None))
        columns, groups = self.shape[1], scales.shape[1]
        expected = torch.arange(columns) // self.scheme.columns_per_group(columns)
        if columns % groups or not torch.equal(self._groups(checkpoint), expected):
            raise UnsupportedError(f"{self.linear}: its groups are scattered columns (activation order)")
        half = -self.scheme.code_min
        if self.scheme.symmetric and not (zeros == half).all():
            raise CheckpointError(f"{self.linear}: config.json says symmetric, {self.linear}.qzeros says otherwise")
        zero = None if self.scheme.symmetric else zeros.sub(half).view(torch.int8)
        return QuantizedTensor(codes.sub(half).view(torch.int8), scales.contiguous(), zero, self.scheme)

    def _stored(self, checkpoint: Checkpoint, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unsigned codes ``[rows, columns]``, and unsigned zero points and scales ``[rows, groups]``."""
        bits = self.scheme.bits
        words = checkpoint[f"{self.linear}.qweight"][:, rows].T.contiguous()
        qzeros, scales = checkpoint[f"{self.linear}.qzeros"], checkpoint[f"{self.linear}.scales"]
        unpack = unpack_words if self.plain else unstored_zeros
        zeros = unpack(qzeros, bits, self.shape[0])[:, rows].T.contiguous()
        return unpack_words(words, bits, self.shape[1]), zeros, scales[:, rows].T

    def _groups(self, checkpoint: Checkpoint) -> torch.Tensor:
        """The group of every column, int64."""
        columns = self.shape[1]
        if not self.indexed:
            return torch.arange(columns) // self.scheme.columns_per_group(columns)
        group, count = checkpoint[f"{self.linear}.g_idx"].long(), checkpoint.infos[f"{self.linear}.scales"].shape[0]
        if not 0 <= int(group.min()) <= int(group.max()) < count:
            raise CheckpointError(f"tensor '{self.linear}.g_idx' names group {int(group.max())}, there are {count}")
        return group


def _linear(checkpoint: Checkpoint, declared: Mapping[str, Any], linear: str, *, plain: bool) -> _Gptq:
    words = checkpoint.infos[f"{linear}{_WORDS}"].shape
    scales = checkpoint.infos[require_shape(checkpoint, linear, "scales")].shape
    indexed = f"{linear}.g_idx" in checkpoint
    bits = int(declared["bits"])
    if indexed:
        (columns,) = checkpoint.infos[f"{linear}.g_idx"].shape
        bits = next((width for width in _BITS if packed_length(columns, width) == words[0]), 0)
    else:
        columns = words[0] * 32 // bits
    if bits not in _BITS or len(scales) != 2 or scales[1] != words[1]:
        raise CheckpointError(
            f"quantized linear {linear!r}: qweight {list(words)}, scales {list(scales)} and {columns} inputs do not "
            f"belong together in any of {', '.join(map(str, _BITS))} bits"
        )
    rows, groups = words[1], scales[0]
    require_shape(checkpoint, linear, "qzeros", (groups, packed_length(rows, bits)))
    size = None if groups == 1 else -(-columns // groups)
    scheme = Scheme(bits, size, bool(declared.get("sym", True)))
    parts = tuple(f"{linear}.{part}" for part in ("qweight", "qzeros", "scales", *(["g_idx"] if indexed else [])))
    return _Gptq(linear, (rows, columns), model_dtype(checkpoint), scheme, parts, plain, indexed)
