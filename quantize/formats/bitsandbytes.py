"""The formats of bitsandbytes (https://github.com/bitsandbytes-foundation/bitsandbytes), which transformers loads.

NF4 with or without quantized scales, and 8-bit rows that run with 8-bit activations (LLM.int8). The layout is described
in :mod:`llmconvert.quantize.readers.bitsandbytes`, beside the reader of other producers' files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.codes import NF4_LEVELS
from llmconvert.quantize.nf4 import NESTED_GROUP, dynamic_levels, unnest_scales
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor
from llmconvert.storage.checkpoint import TensorSpec

__all__ = ["BitsAndBytes"]

_STATE = "weight.quant_state.bitsandbytes__nf4"
_BLOCKS = (64, 128, 256, 512, 1024)
# The encoding of bitsandbytes itself, and codes down to −128, which methods other than rounding choose.
_LLM_INT8 = Scheme(8, activation_bits=8, kind="absmax")
_INT8 = (_LLM_INT8, Scheme(8, activation_bits=8))
# What dequantized weights are rounded to; activations of another dtype are computed in that all the same.
_DTYPE = "bfloat16"
# The JSON of a linear is as long whatever its offset: spaces follow, which no parser minds.
_OFFSET_LENGTH = 25


class BitsAndBytes:
    """4-bit and 8-bit tensors and their configuration."""

    def check(self, scheme: Scheme) -> None:
        if scheme in _INT8 or (scheme.kind == "nf4" and scheme.group_size in _BLOCKS):
            return
        sizes = ", ".join(f"g{size}" for size in _BLOCKS)
        raise UnsupportedError(f"scheme {scheme}: bitsandbytes stores nf4 and nf4-dq (with {sizes}), llm.int8 and w8a8")

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        # 127 scales in bfloat16 are exact in float32, so the row's largest magnitude gives the scale back.
        return torch.bfloat16 if scheme.kind == "int" else torch.float32

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        if scheme in _INT8:
            return [
                TensorSpec(f"{linear}.weight", torch.int8, shape),
                TensorSpec(f"{linear}.SCB", torch.float32, (rows,)),
                TensorSpec(f"{linear}.weight_format", torch.uint8, ()),
            ]
        blocks = rows * scheme.groups(columns)
        state = len(_state(shape, scheme, None))
        specs = [
            TensorSpec(f"{linear}.weight", torch.uint8, (rows * columns // 2, 1)),
            TensorSpec(f"{linear}.weight.absmax", torch.uint8 if scheme.nested else torch.float32, (blocks,)),
            TensorSpec(f"{linear}.weight.quant_map", torch.float32, (len(NF4_LEVELS),)),
            TensorSpec(f"{linear}.{_STATE}", torch.uint8, (state,)),
        ]
        if scheme.nested:
            count = -(-blocks // NESTED_GROUP)
            specs.append(TensorSpec(f"{linear}.weight.nested_absmax", torch.float32, (count,)))
            specs.append(TensorSpec(f"{linear}.weight.nested_quant_map", torch.float32, (256,)))
        return specs

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        if tensor.scheme in _INT8:
            return {
                f"{linear}.weight": tensor.codes,
                f"{linear}.SCB": _largest(tensor.scale.view(-1), half=tensor.scheme == _LLM_INT8),
                f"{linear}.weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        nested = tensor.nested
        codes = tensor.codes.view(torch.uint8).view(-1, 2)
        state = _state(tensor.shape, tensor.scheme, nested)
        stored = {
            f"{linear}.weight": (codes[:, 0] << 4 | codes[:, 1]).unsqueeze(1),
            f"{linear}.weight.absmax": tensor.scale.reshape(-1) if nested is None else nested.codes,
            f"{linear}.weight.quant_map": torch.tensor(NF4_LEVELS, dtype=torch.float32),
            f"{linear}.{_STATE}": torch.tensor(list(state), dtype=torch.uint8),
        }
        if nested is not None:
            stored[f"{linear}.weight.nested_absmax"] = nested.absmax
            stored[f"{linear}.weight.nested_quant_map"] = dynamic_levels()
        return stored

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        if scheme in _INT8:
            scale = (stored[f"{linear}.SCB"] / 127).unsqueeze(1)
            return QuantizedTensor(stored[f"{linear}.weight"], scale, None, scheme)
        state = json.loads(bytes(stored[f"{linear}.{_STATE}"].tolist()))
        rows, columns = state["shape"]
        pairs = stored[f"{linear}.weight"].view(-1)
        codes = torch.stack((pairs >> 4, pairs & 15), -1).view(torch.int8).view(rows, columns)
        absmax = stored[f"{linear}.weight.absmax"]
        if not scheme.nested:
            return QuantizedTensor(codes, absmax.view(rows, -1), None, scheme)
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
        nested = NestedScales(absmax, stored[f"{linear}.weight.nested_absmax"], offset)
        return QuantizedTensor(codes, unnest_scales(nested).view(rows, -1), None, scheme, nested)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        used = sorted(set(schemes.values()), key=str)
        if len(used) > 1:
            raise UnsupportedError(
                f"schemes {', '.join(map(str, used))}: bitsandbytes has one scheme per model; give overrides that one "
                "or none (scheme: none), or choose compressed-tensors or gptq"
            )
        four = used[0].kind == "nf4"
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four,
            "load_in_8bit": not four,
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": used[0].nested,
            "bnb_4bit_compute_dtype": _DTYPE,
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_skip_modules": list(kept),
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {}


def _state(shape: tuple[int, int], scheme: Scheme, nested: NestedScales | None) -> bytes:
    """What bitsandbytes has to know of a linear, as JSON; of the same length for every offset."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": scheme.group_size, "dtype": _DTYPE, "shape": list(shape)}
    length = len(json.dumps(state))
    if scheme.nested:
        offset = 0.0 if nested is None else nested.offset.item()
        length += len(json.dumps({"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": 0}))
        state |= {"nested_blocksize": NESTED_GROUP, "nested_dtype": "float32", "nested_offset": offset}
        length += _OFFSET_LENGTH
    return json.dumps(state).ljust(length).encode()


def _largest(scale: torch.Tensor, *, half: bool) -> torch.Tensor:
    """The float32 nearest to 127 scales that, over 127, gives the scale again; where none does, the nearest.

    With ``half`` it is known to have been a float16.
    """
    nearest = (scale.double() * 127).float()
    if half:
        return nearest.half().float()
    for towards in (torch.inf, -torch.inf):
        beside = torch.nextafter((scale.double() * 127).float(), torch.full_like(scale, towards))
        exact = (nearest / 127 != scale) & (beside / 127 == scale)
        nearest = torch.where(exact, beside, nearest)
    return nearest
