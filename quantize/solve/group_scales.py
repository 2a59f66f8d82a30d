"""Scales of a weight's groups as solvers take them: chosen before any code is, and rounded to what is stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmconvert.compute.narrowing import bounds
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.ggml.blocks import BlockCodec, Blocks, load_codec
from llmconvert.quantize.narrow import check_held
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor, SuperBlockScales

__all__ = ["GroupScales", "block_scales", "block_scales_nbytes", "divisors", "nested_scales"]


@dataclass(frozen=True, slots=True)
class GroupScales:
    """What the codes of each group are multiplied by, and moved.

    Attributes:
        scale: ``[rows, groups]`` in its stored dtype; float32 where numbers of 8 bits are stored.
        zero: int8 of the same shape; None when symmetric.
        offset: as ``scale``, what is added to the values, for numbers with minima; None for others.
        nested: what the scales and offsets of super-blocks are stored as; None for other schemes.
        divisor: float32, one number: what all scales are divided by; None for other numbers.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested: SuperBlockScales | None = None
    divisor: torch.Tensor | None = None

    @property
    def factors(self) -> torch.Tensor:
        """What codes are multiplied by, ``[rows, groups]``."""
        return self.scale if self.divisor is None else self.scale / self.divisor

    def tensor(self, codes: torch.Tensor, scheme: Scheme) -> QuantizedTensor:
        """A weight with these scales."""
        return QuantizedTensor(codes, self.scale, self.zero, scheme, self.nested, self.divisor, self.offset)

    def without_offsets(self, weight: torch.Tensor) -> torch.Tensor:
        """What of a weight ``[rows, columns]`` is left for codes: its groups' offsets are taken off."""
        if self.offset is None:
            return weight
        rows, columns = weight.shape
        grouped = weight.reshape(rows, self.offset.shape[1], -1) - self.offset.unsqueeze(-1).to(weight.dtype)
        return grouped.reshape(rows, columns)


def block_scales(name: str, weight: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> GroupScales:
    """Scales of GGML's blocks with the least weighted error, as the type stores them: those of an importance matrix.

    Args:
        name: of the weight, for errors.
        weight: ``[rows, columns]``.
        importance: ``[columns]``, what a squared error in each column costs.
        scheme: of a GGML type.

    Raises:
        CheckpointError: the weight has values that are not finite.
        UnsupportedError: they are so small, or so large, that float16 holds no scales for them.
    """
    from llmconvert.compute.peaks import block_peaks  # compiled loops, which a plan has no use for

    codec = _codec(scheme)
    rows = len(weight)
    blocks = weight.reshape(rows, -1, codec.size)
    largest = block_peaks(weight, codec.size)
    if not bool(torch.isfinite(largest).all()):
        raise CheckpointError(f"tensor {name!r} has values that are not finite; the checkpoint is damaged")
    # A part of the largest weight that the smallest scale of a type is (a 4,096th in Q6_K) is no scale of others.
    steps = (1 << (codec.bits - 1)) * (1 if codec.sub_range is None else codec.sub_range[1] + 1)
    check_held(name, largest / steps, torch.float16, lambda: blocks.double().square().sum(-1))
    values = np.ascontiguousarray(weight.float().cpu().numpy())
    with np.errstate(over="ignore"):  # what is beyond float16 is refused below
        found = codec.fit(values, importance.float().cpu().numpy())
    for part, what in ((found.scale, "scales"), (found.minimum, "minima")):
        if part is not None and not np.isfinite(part).all():
            raise UnsupportedError(
                f"{name}: one of its {what} in {codec.name} is beyond float16 (its weights reach "
                f"{largest.max().item():g}); {bounds(torch.float16)}. Write bf16, or leave the layer dense with an "
                "override (scheme: none)"
            )
    steps_found = torch.from_numpy(found.steps).reshape(rows, -1)
    offsets = None if found.offsets is None else torch.from_numpy(found.offsets).reshape(rows, -1)
    if codec.sub_range is None:
        steps_found = steps_found.to(torch.float16)
        offsets = None if offsets is None else offsets.to(torch.float16)
    device = weight.device
    nested = nested_scales(found, codec, rows, device)
    return GroupScales(steps_found.to(device), None, None if offsets is None else offsets.to(device), nested)


def block_scales_nbytes(scheme: Scheme, rows: int, columns: int) -> int:
    """Bytes of what :func:`block_scales` gives for a weight: for super-blocks in float32 beside what is stored of them.

    0 for schemes of other formats, whose scales are few and in 16 bits.
    """
    if scheme.block is None:
        return 0
    codec = _codec(scheme)
    groups, blocks = rows * columns // codec.group, rows * columns // codec.size
    terms = 2 if codec.minima else 1
    return terms * (2 * groups if codec.sub_range is None else (4 + 2) * groups + 2 * blocks)


def divisors(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales to divide weights by: those that are zero, as GGML's may be, are next to it, and any code is as good."""
    scale = scale.to(dtype)
    return scale.where(scale != 0, torch.finfo(torch.float32).tiny)


def nested_scales(
    blocks: Blocks, codec: BlockCodec, rows: int, device: torch.device | None = None
) -> SuperBlockScales | None:
    """The scales of unpacked super-blocks; None for types without."""
    if codec.sub_range is None or blocks.sub_scales is None:
        return None

    def of(values: np.ndarray | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(values).reshape(rows, -1).to(device, dtype)

    scale, subs = of(blocks.scale, torch.float16), of(blocks.sub_scales, torch.int16)
    assert scale is not None and subs is not None
    return SuperBlockScales(
        scale, subs, codec.sub_range, of(blocks.minimum, torch.float16), of(blocks.sub_minima, torch.int16)
    )


def _codec(scheme: Scheme) -> BlockCodec:
    codec = load_codec(scheme.block or "")
    assert isinstance(codec, BlockCodec)
    return codec
