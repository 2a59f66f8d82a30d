"""Checkpoints released in FP8: in blocks or per tensor (``quant_method: fp8``, ``mxfp8``), and per channel of FBGEMM.

``fp8`` is DeepSeek V3's format, which Qwen, MiniMax, Mistral and others took over: E4M3 codes under the weight's own
name, and what they are multiplied by as ``weight_scale_inv``, one float32 number per 128 × 128 block or for the whole
tensor. ``mxfp8`` has powers of two for 32 columns each in its place. Experts may be packed E2M1 in groups of 32
(``expert_dtype: fp4``). Source: https://huggingface.co/deepseek-ai/DeepSeek-V3 (``fp8_cast_bf16.py``); transformers'
``finegrained_fp8``; FBGEMM's from https://huggingface.co/meta-llama/Llama-3.1-405B-Instruct-FP8.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import StoredLinear, model_dtype
from llmconvert.quantize.formats.reading import Declared
from llmconvert.quantize.formats.released.scaled import ScaledLinear, require_scales
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo

__all__ = ["FbgemmFp8", "FineGrainedFp8"]

_WEIGHT = ".weight"
# What scales of a weight are called: DeepSeek's name of the published checkpoint, that of its own code, Mistral's.
_SCALES = ("{weight}_scale_inv", "{linear}.scale", "{linear}.qscale_weight")
# Scales of inputs, which are quantized while the model runs.
_INPUTS = ("{linear}.activation_scale", "{linear}.input_scale", "{linear}.qscale_act", "{weight}_activation_scale")
_GROUP = 32


class _FineGrained(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "modules_to_not_convert", "ignored_layers", "modules_to_convert", "ignore"),
            # How inputs are quantized, and what transformers was asked to do. What codes and scales are, tensors say.
            *("activation_scheme", "fmt", "scale_fmt", "expert_dtype", "dequantize", "kv_cache_scheme"),
        )
    )

    weight_block_size: tuple[int, int] | None = None


class FineGrainedFp8:
    """``quant_method: fp8`` and ``mxfp8``."""

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        block = _FineGrained.read(declared).weight_block_size
        if declared.get("quant_method") == "mxfp8" and block is None:
            block = (1, _GROUP)
        dtype = model_dtype(checkpoint, torch.bfloat16)
        for info in checkpoint.infos.values():
            if info.dtype == torch.float8_e4m3fn:
                yield _fine_grained(checkpoint, info, block, dtype)
            elif info.dtype == torch.int8 and info.name.endswith(_WEIGHT) and _scale_of(checkpoint, info.name):
                yield _packed(checkpoint, info, dtype)
            elif info.dtype == torch.float8_e5m2:
                raise UnsupportedError(
                    f"tensor {info.name!r} is float8_e5m2; this reader knows weights in float8_e4m3fn"
                )


def _fine_grained(
    checkpoint: Checkpoint, info: TensorInfo, block: tuple[int, int] | None, dtype: torch.dtype
) -> ScaledLinear:
    scale = _scale_of(checkpoint, info.name) or _SCALES[0].format(weight=info.name)
    _require_matrices(info)
    if scale in checkpoint and block == (1, _GROUP):
        scheme = Scheme(MXFP8, _GROUP, 8)
    else:
        rows, columns = block or (None, None)
        if block is not None and min(block) < 1:
            raise CheckpointError(f"config.json: quantization_config.weight_block_size: found {list(block)}")
        scheme = Scheme(E4M3, columns, 8, rows=rows)
    require_scales(checkpoint, scale, info.name, scheme, info.shape)
    return _linear(checkpoint, info.name, info.shape, dtype, scheme, scale)


def _packed(checkpoint: Checkpoint, info: TensorInfo, dtype: torch.dtype) -> ScaledLinear:
    """An expert in E2M1, two codes to a byte."""
    _require_matrices(info)
    scale, shape = _scale_of(checkpoint, info.name), (*info.shape[:-1], 2 * info.shape[-1])
    scheme = Scheme(MXFP4, _GROUP, 8)
    require_scales(checkpoint, scale, info.name, scheme, shape)
    return _linear(checkpoint, info.name, shape, dtype, scheme, scale)


def _linear(
    checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype, scheme: Scheme, scale: str
) -> ScaledLinear:
    linear = name.removesuffix(_WEIGHT)
    inputs = (part.format(weight=name, linear=linear) for part in _INPUTS)
    parts = (name, scale, *(part for part in inputs if part in checkpoint))
    how = "8-bit floats, in groups or by a scale of their tensor"
    return ScaledLinear(linear, shape, dtype, scheme, parts, name, name, scale, inputs_in_words=how)


def _scale_of(checkpoint: Checkpoint, weight: str) -> str:
    """The name of a weight's scales; "" where there are none."""
    names = (name.format(weight=weight, linear=weight.removesuffix(_WEIGHT)) for name in _SCALES)
    return next((name for name in names if name in checkpoint), "")


def _require_matrices(info: TensorInfo) -> None:
    if len(info.shape) not in (2, 3) or 0 in info.shape:
        raise UnsupportedError(f"tensor {info.name!r} has shape {list(info.shape)}; this reader knows matrices")


class _Fbgemm(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(("quant_method", "activation_scale_ub", "modules_to_not_convert"))


class FbgemmFp8:
    """``quant_method: fbgemm_fp8``: E4M3 with one float scale per output channel, which of fused experts (``[experts,
    inputs, outputs]``) is the last dimension."""

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        _Fbgemm.read(declared)
        dtype = model_dtype(checkpoint, torch.bfloat16)
        for info in checkpoint.infos.values():
            if info.dtype != torch.float8_e4m3fn:
                continue
            _require_matrices(info)
            scale, scheme, fused = f"{info.name}_scale", Scheme(E4M3, None, 8), len(info.shape) == 3
            require_scales(checkpoint, scale, info.name, scheme, info.shape, last=fused)
            linear = info.name.removesuffix(_WEIGHT)
            bounds = (f"{linear}.input_scale_ub", f"{info.name}_input_scale_ub")
            parts = (info.name, scale, *(part for part in bounds if part in checkpoint))
            yield ScaledLinear(
                *(linear, info.shape, dtype, scheme, parts, info.name, info.name, scale),
                channels_last=fused,
                inputs_in_words="8-bit floats per token, below a bound",
            )
