"""What dense weights are stored in; refusing those that are quantized already, which casting would destroy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo

__all__ = ["holds_codes", "main_dtype", "require_dense"]

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.int64)
# What matrices of codes are called.
_CODES = (".weight", "_blocks", "_packed")
# What stands beside or instead of a weight: GPTQ/AWQ, compressed-tensors, DeepSeek's fp8, bitsandbytes (8 and 4 bit).
_COMPANIONS = (
    ".qweight",
    ".qzeros",
    ".scales",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_zero_point",
    ".SCB",
    ".weight.absmax",
    ".weight.quant_map",
)


def require_dense(
    checkpoint: Checkpoint, origin: str, advice: str = "start from the original, unquantized model"
) -> None:
    """Refuse a quantized checkpoint before any work; nothing but headers and config is looked at.

    Args:
        checkpoint: the checkpoint.
        origin: what to call it in the error.
        advice: what to do instead.

    Raises:
        UnsupportedError: the config declares a quantization, or a tensor holds or accompanies quantized weights.
    """
    method = _declared(checkpoint.config)
    if method is not None:
        raise UnsupportedError(f"{origin}: is already quantized ({method}, says config.json); {advice}")
    for name, info in checkpoint.infos.items():
        if holds_codes(info) or name.endswith(_COMPANIONS):
            raise UnsupportedError(
                f"{origin}: is already quantized (tensor {name} is {info.dtype} {list(info.shape)}); {advice}"
            )


def holds_codes(info: TensorInfo) -> bool:
    """Whether a tensor's values are codes: 8-bit floats, or a weight matrix of integers."""
    if info.dtype in _FLOAT8:
        return True
    return info.dtype in _INTEGERS and len(info.shape) >= 2 and info.name.endswith(_CODES)


def _declared(config: Mapping[str, Any]) -> str | None:
    """The quantization method that the config, or that of a submodel, names."""
    for key in ("quantization_config", "compression_config", "quantization"):
        declared = config.get(key)
        if declared:
            return str(declared.get("quant_method", key)) if isinstance(declared, Mapping) else key
    nested = (_declared(value) for value in config.values() if isinstance(value, Mapping))
    return next((method for method in nested if method is not None), None)


def main_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that most of a checkpoint's bytes are stored in.

    Raises:
        CheckpointError: no tensor has one.
    """
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.infos.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    if not sizes:
        raise CheckpointError("the checkpoint holds no floating-point tensor")
    return max(sizes, key=lambda dtype: sizes[dtype])
