"""The compressed-tensors format (https://github.com/vllm-project/compressed-tensors): vLLM, transformers, SGLang.

Three of its layouts: ``pack-quantized`` for integer weights of 2 to 8 bits with 16-bit activations (codes packed into
int32 words along the columns, zero points along the rows), ``int-quantized`` for 8-bit weights with 8-bit activations
(codes as int8, activations quantized per token while running), and ``float-quantized`` for E4M3 weights, with or
without E4M3 activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.codes import FP8
from llmconvert.quantize.pack import pack_words, packed_length, unpack_words
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import TensorSpec

__all__ = ["CompressedTensors"]


class CompressedTensors:
    """``pack-quantized``, ``int-quantized`` and ``float-quantized`` tensors and their configuration."""

    def check(self, scheme: Scheme) -> None:
        if scheme.kind in ("nf4", "absmax"):
            raise UnsupportedError(f"scheme {scheme}: compressed-tensors has no {scheme.kind}; format bitsandbytes has")
        if scheme.kind == "fp8":
            if scheme.group_size is not None:
                raise UnsupportedError(
                    f"scheme {scheme}: runtimes read E4M3 weights with one scale per channel only (w8a8-channel-fp8)"
                )
            return
        if scheme.activation_bits == 8 and (scheme.bits != 8 or scheme.group_size is not None or not scheme.symmetric):
            raise UnsupportedError(
                f"scheme {scheme}: compressed-tensors stores int8 activations with w8a8-channel-sym weights only"
            )

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        groups = scheme.groups(columns)
        scale = TensorSpec(f"{linear}.weight_scale", scale_dtype, (rows, groups))
        if _layout(scheme) != "pack-quantized":
            return [TensorSpec(f"{linear}.weight", FP8 if scheme.kind == "fp8" else torch.int8, shape), scale]
        packed = (rows, packed_length(columns, scheme.bits))
        specs = [
            TensorSpec(f"{linear}.weight_packed", torch.int32, packed),
            scale,
            TensorSpec(f"{linear}.weight_shape", torch.int64, (2,)),
        ]
        if not scheme.symmetric:
            zeros = (packed_length(rows, scheme.bits), groups)
            specs.append(TensorSpec(f"{linear}.weight_zero_point", torch.int32, zeros))
        return specs

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        scheme = tensor.scheme
        if _layout(scheme) != "pack-quantized":
            return {f"{linear}.weight": tensor.codes, f"{linear}.weight_scale": tensor.scale}
        stored = {
            f"{linear}.weight_packed": pack_words(_unsigned(tensor.codes, scheme), scheme.bits),
            f"{linear}.weight_scale": tensor.scale,
            f"{linear}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
        }
        if tensor.zero is not None:
            packed = pack_words(_unsigned(tensor.zero, scheme).T.contiguous(), scheme.bits)
            stored[f"{linear}.weight_zero_point"] = packed.T.contiguous()
        return stored

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        scale = stored[f"{linear}.weight_scale"]
        if _layout(scheme) != "pack-quantized":
            return QuantizedTensor(stored[f"{linear}.weight"], scale, None, scheme)
        words = stored[f"{linear}.weight_packed"]
        rows, columns = words.shape[0], int(stored[f"{linear}.weight_shape"][1])
        codes = _signed(unpack_words(words, scheme.bits, columns), scheme)
        zero = None
        if not scheme.symmetric:
            # Zero points are packed along the rows: all of them are needed to find those of a few rows.
            packed = stored[f"{linear}.weight_zero_point"].T.contiguous()
            zero = _signed(unpack_words(packed, scheme.bits, rows).T.contiguous(), scheme)
        return QuantizedTensor(codes, scale, zero, scheme)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        by_scheme: dict[Scheme, list[str]] = {}
        for linear, scheme in schemes.items():
            by_scheme.setdefault(scheme, []).append(linear)
        # The commonest scheme is for every linear that nothing else names; names win over classes in every reader.
        ordered = sorted(by_scheme, key=lambda scheme: -len(by_scheme[scheme]))
        groups = {
            f"group_{index}": {
                "targets": ["Linear"] if index == 0 else by_scheme[scheme],
                "weights": _weight_args(scheme),
                "input_activations": _activation_args(scheme),
                "output_activations": None,
                "format": _layout(scheme),
            }
            for index, scheme in enumerate(ordered)
        }
        layouts = {_layout(scheme) for scheme in ordered}
        return {
            "quant_method": "compressed-tensors",
            "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(kept),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}


def _layout(scheme: Scheme) -> str:
    if scheme.kind == "fp8":
        return "float-quantized"
    return "int-quantized" if scheme.activation_bits == 8 else "pack-quantized"


def _type(scheme: Scheme) -> str:
    return "float" if scheme.kind == "fp8" else "int"


def _weight_args(scheme: Scheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": _type(scheme),
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def _activation_args(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.activation_bits == 16:
        return None
    return {
        "num_bits": 8,
        "type": _type(scheme),
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
        "observer": None,
        "observer_kwargs": {},
    }


def _unsigned(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    # Modulo 256, so that the sum needs no wider type.
    return codes.view(torch.uint8).add(-scheme.code_min)


def _signed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return codes.sub(-scheme.code_min).view(torch.int8)
