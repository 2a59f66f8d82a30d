"""Floats in compressed-tensors whose scales rows share or are of 8 bits: NVFP4, MXFP4, MXFP8, E4M3 by block or tensor.

E2M1 codes lie two to a byte along the columns, the first in the lower half (``nvfp4-pack-quantized``,
``mxfp4-pack-quantized``), E4M3 codes one by one (``mxfp8-quantized``, ``float-quantized``). What calibration has fixed
for a linear's inputs lies beside it: ``input_scale`` for one scale, ``input_global_scale`` for a divisor.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import model_dtype, require_shape
from llmconvert.quantize.formats.compressed.config import Config
from llmconvert.quantize.formats.released.scaled import ScaledLinear, require_scales
from llmconvert.quantize.numbers import E4M3
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["find_floats", "float_specs", "holds_floats", "pack_floats", "unpack_floats"]

_PACKED, _PLAIN, _SCALE, _DIVISOR = "weight_packed", "weight", "weight_scale", "weight_global_scale"
_INPUTS = ("input_scale", "input_global_scale")
_ZEROS = "weight_zero_point"


def holds_floats(scheme: Scheme) -> bool:
    """Whether weights of a scheme are stored in these ways."""
    return scheme.rows != 1 or scheme.number.scales is not None


def float_specs(linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
    """What :func:`pack_floats` will write."""
    rows, columns = shape
    scales = scheme.number.scales
    grid = (1,) if scheme.rows is None else scheme.scale_shape(rows, columns)
    codes = TensorSpec(f"{linear}.{_PLAIN}", scheme.number.code_dtype, shape)
    if scheme.bits == 4:
        codes = TensorSpec(f"{linear}.{_PACKED}", torch.uint8, (rows, columns // 2))
    specs = [codes, TensorSpec(f"{linear}.{_SCALE}", scale_dtype if scales is None else scales.dtype, grid)]
    if scales is not None and scales.shared:
        specs.append(TensorSpec(f"{linear}.{_DIVISOR}", torch.float32, (1,)))
    kind = scheme.input_kind
    if kind is not None and kind.calibrated:
        name = _INPUTS[0] if kind.static else _INPUTS[1]
        specs.append(TensorSpec(f"{linear}.{name}", scale_dtype if kind.static else torch.float32, (1,)))
    return specs


def pack_floats(linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
    """The tensors to store, by name.

    Raises:
        UnsupportedError: the scheme fixes how inputs are quantized, and nothing did so for this weight.
    """
    scheme, scales = tensor.scheme, tensor.scheme.number.scales
    if scheme.bits == 4:
        halves = tensor.codes.view(torch.uint8)
        stored = {f"{linear}.{_PACKED}": halves[:, ::2] | (halves[:, 1::2] << 4)}
    else:
        stored = {f"{linear}.{_PLAIN}": tensor.codes}
    scale = tensor.scale.reshape(1) if scheme.rows is None else tensor.scale
    stored[f"{linear}.{_SCALE}"] = scale if scales is None else scales.nearest(scale)
    if tensor.divisor is not None:
        stored[f"{linear}.{_DIVISOR}"] = tensor.divisor.reshape(1)
    kind = scheme.input_kind
    if kind is not None and kind.calibrated:
        if tensor.input_scale is None:
            raise UnsupportedError(
                f"{linear}: {scheme} quantizes inputs to {kind}, which calibration text has to fix, and there is none "
                "here; quantize with calibration text"
            )
        stored[f"{linear}.{_INPUTS[0] if kind.static else _INPUTS[1]}"] = tensor.input_scale
    return stored


def unpack_floats(linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
    """The inverse of :func:`pack_floats`."""
    if scheme.bits == 4:
        halves = stored[f"{linear}.{_PACKED}"]
        codes = torch.stack((halves & 15, halves >> 4), -1).flatten(1).view(torch.int8)
    else:
        codes = stored[f"{linear}.{_PLAIN}"]
    scales, scale = scheme.number.scales, stored[f"{linear}.{_SCALE}"]
    scale = scale.reshape(scheme.scale_shape(*codes.shape))
    divisor = stored.get(f"{linear}.{_DIVISOR}")
    inputs = next((stored[name] for part in _INPUTS if (name := f"{linear}.{part}") in stored), None)
    return QuantizedTensor(
        codes,
        scale if scales is None else scales.values(scale),
        None,
        scheme,
        divisor=None if divisor is None else divisor.reshape(()),
        input_scale=inputs,
    )


def find_floats(checkpoint: Checkpoint, linear: str, config: Config) -> ScaledLinear:
    """A linear that is stored in such a way, whoever wrote it.

    Raises:
        UnsupportedError, CheckpointError: see :meth:`llmconvert.quantize.formats.base.Reader.find`.
    """
    group = config.group_of(linear)
    number = group.scheme.number
    part, dtype, per_byte = (_PACKED, torch.uint8, 2) if number.bits == 4 else (_PLAIN, E4M3.code_dtype, 1)
    codes = require_shape(checkpoint, linear, part, dtypes=(dtype,))
    if len(checkpoint.infos[codes].shape) != 2 or 0 in checkpoint.infos[codes].shape:
        raise UnsupportedError(
            f"tensor {codes!r} has shape {list(checkpoint.infos[codes].shape)}; this reader knows matrices"
        )
    rows, columns = checkpoint.infos[codes].shape
    shape = (rows, per_byte * columns)
    if number.scales is not None and shape[1] % group.scheme.columns_per_group(shape[1]):
        raise CheckpointError(
            f"quantized linear {linear!r}: a weight of shape {list(shape)} can't be in {group.scheme}"
        )
    scale, divisor = f"{linear}.{_SCALE}", ""
    require_scales(checkpoint, scale, codes, group.scheme, shape)
    if number.scales is not None and number.scales.shared:
        divisor = f"{linear}.{_DIVISOR}"
        require_scales(checkpoint, divisor, codes, Scheme(E4M3, rows=None), shape)
    zeros = f"{linear}.{_ZEROS}"
    if zeros in checkpoint and bool(checkpoint[zeros].float().any()):
        raise CheckpointError(f"{linear}: config.json says symmetric, tensor {zeros!r} says otherwise")
    kind, fixed = group.input_kind, ""
    if kind is not None and kind.calibrated:
        fixed = f"{linear}.{_INPUTS[0] if kind.static else _INPUTS[1]}"
        require_scales(checkpoint, fixed, codes, Scheme(E4M3, rows=None), shape)
        if kind.group is not None and shape[1] % kind.group:
            raise CheckpointError(f"quantized linear {linear!r}: inputs of {shape[1]} columns can't be in {kind}")
    beside = (f"{linear}.{name}" for name in (_ZEROS, "input_zero_point", *_INPUTS))
    parts = (codes, scale, *([divisor] if divisor else []), *(name for name in beside if name in checkpoint))
    return ScaledLinear(
        linear,
        shape,
        model_dtype(checkpoint, torch.bfloat16),
        group.scheme,
        parts,
        f"{linear}.weight",
        codes,
        scale,
        divisor=divisor,
        inputs_in_words=group.unmeasured,
        kind=kind,
        input_scale=fixed,
    )
