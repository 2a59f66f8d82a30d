"""Checkpoints of NVIDIA's ModelOpt in FP8 and NVFP4 (``quant_method: modelopt``).

FP8 is E4M3 with a scale per tensor, channel or block (``weight_scale``). NVFP4 is two E2M1 codes to a byte, an E4M3
scale for 16 columns (``weight_scale``), and one float32 number that these are multiplied by (``weight_scale_2``), where
compressed-tensors divides. Source: https://github.com/NVIDIA/TensorRT-Model-Optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import StoredLinear, model_dtype
from llmconvert.quantize.formats.reading import Declared, spell
from llmconvert.quantize.formats.released.scaled import ScaledLinear, require_scales
from llmconvert.quantize.numbers import E4M3, NVFP4
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo

__all__ = ["ModelOpt"]

_WEIGHT, _GROUP, _BLOCK = ".weight", 16, 128
# What its algorithms make of weights is told from the tensors; others multiply inputs too, or have integers.
_ALGORITHMS: Final = (
    *("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_PB_REAL", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"),
)
_INPUTS = ("input_scale", "input_quantizer._amax")


class _Config(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "ignore", "exclude_modules", "producer", "kv_cache_scheme", "kv_cache_quant_algo"),
            # Groups and layers by name: which weights are quantized and how is told from the tensors, all of them.
            *("config_groups", "quantized_layers", "group_size", "modules_to_not_convert"),
        )
    )

    quant_algo: str


class ModelOpt:
    """``quant_method: modelopt``."""

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        algorithm = _Config.read(declared).quant_algo
        if algorithm not in _ALGORITHMS:
            raise UnsupportedError(
                f"config.json: quantization_config.quant_algo is {spell(algorithm)}; of ModelOpt's this reader knows "
                f"{', '.join(_ALGORITHMS)}"
            )
        dtype = model_dtype(checkpoint, torch.bfloat16)
        for info in checkpoint.infos.values():
            if not info.name.endswith(_WEIGHT):
                continue
            if info.dtype == torch.float8_e4m3fn:
                yield _fp8(checkpoint, info, dtype)
            elif info.dtype == torch.uint8:
                yield _nvfp4(checkpoint, info, dtype)


def _fp8(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> ScaledLinear:
    scale = f"{info.name}_scale"
    _require_matrix(info)
    rows, columns = info.shape
    found = [side for side in checkpoint.infos[scale].shape if side != 1] if scale in checkpoint else []
    if not found:
        scheme = Scheme(E4M3, None, 8, rows=None)
    elif found == [rows]:
        scheme = Scheme(E4M3, None, 8)
    else:
        scheme = Scheme(E4M3, _BLOCK, 8, rows=_BLOCK)
    require_scales(checkpoint, scale, info.name, scheme, (rows, columns))
    return _linear(checkpoint, info.name, (rows, columns), dtype, scheme, scale, "8-bit floats")


def _nvfp4(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> ScaledLinear:
    scale, factor = f"{info.name}_scale", f"{info.name}_scale_2"
    _require_matrix(info)
    rows, columns = info.shape[0], 2 * info.shape[1]
    scheme = Scheme(NVFP4, _GROUP, 4 if f"{info.name.removesuffix(_WEIGHT)}.input_scale" in checkpoint else 16)
    require_scales(checkpoint, scale, info.name, scheme, (rows, columns))
    require_scales(checkpoint, factor, info.name, Scheme(E4M3, None, rows=None), (rows, columns))
    how = "4-bit floats in groups of 16" if scheme.activation_bits == 4 else ""
    return _linear(checkpoint, info.name, (rows, columns), dtype, scheme, scale, how, factor)


def _linear(
    checkpoint: Checkpoint,
    name: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    scheme: Scheme,
    scale: str,
    inputs: str,
    factor: str = "",
) -> ScaledLinear:
    linear = name.removesuffix(_WEIGHT)
    beside = (f"{linear}.{part}" for part in _INPUTS)
    parts = (name, scale, *([factor] if factor else []), *(part for part in beside if part in checkpoint))
    return ScaledLinear(linear, shape, dtype, scheme, parts, name, name, scale, factor, inputs_in_words=inputs)


def _require_matrix(info: TensorInfo) -> None:
    if len(info.shape) != 2 or 0 in info.shape:
        raise UnsupportedError(f"tensor {info.name!r} has shape {list(info.shape)}; this reader knows matrices")
