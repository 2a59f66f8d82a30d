"""A checkpoint with tensors in one that it keeps apart: those that transformers joins as it loads.

transformers 5 loads the kernels of a layer's short convolutions (of queries, keys and values) as one parameter. In a
quantized checkpoint it takes the parts for quantized weights and fails. The whole, under the parameter's own name, it
takes as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from llmconvert.errors import CheckpointError
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, TensorInfo

__all__ = ["JoinedTensors"]


class JoinedTensors(CheckpointView):
    """``base`` with some of its tensors one behind the other, by their first dimension.

    Args:
        base: that has them apart.
        joined: name of each whole → its parts, in order.

    Attributes:
        joined: the same.

    Raises:
        CheckpointError: parts differ in more than their first dimension.
    """

    def __init__(self, base: Checkpoint, joined: Mapping[str, Sequence[str]]) -> None:
        super().__init__(base)
        self.joined = {name: tuple(parts) for name, parts in joined.items()}
        first = {parts[0]: name for name, parts in self.joined.items()}
        others = {part for parts in self.joined.values() for part in parts[1:]}
        infos: dict[str, TensorInfo] = {}
        for name, info in base.infos.items():
            if name in first:
                infos[first[name]] = self._whole(first[name], [base.infos[part] for part in self.joined[first[name]]])
            elif name not in others:
                infos[name] = info
        self.infos = infos

    @staticmethod
    def _whole(name: str, parts: Sequence[TensorInfo]) -> TensorInfo:
        if len({(info.dtype, info.shape[1:]) for info in parts}) > 1:
            found = ", ".join(
                f"{info.name} {str(info.dtype).removeprefix('torch.')} {list(info.shape)}" for info in parts
            )
            raise CheckpointError(f"{name!r} is made of tensors that do not fit behind each other: {found}")
        rows = sum(info.shape[0] for info in parts)
        return TensorInfo(name, parts[0].dtype, (rows, *parts[0].shape[1:]), parts[0].shard)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name not in self.joined:
            return super().read_rows(name, start, stop)
        pieces: list[torch.Tensor] = []
        offset = 0
        for part in self.joined[name]:
            rows = self.base.infos[part].shape[0]
            begin, end = max(start - offset, 0), min(stop - offset, rows)
            if begin < end or not pieces:
                pieces.append(self.base.read_rows(part, begin, max(begin, end)))
            offset += rows
        return torch.cat(pieces)
