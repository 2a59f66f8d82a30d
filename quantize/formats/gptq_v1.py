"""The GPTQ format, version 1, as AutoGPTQ defined it (https://github.com/AutoGPTQ/AutoGPTQ): GPTQModel, vLLM, ExLlama.

A linear of ``n`` inputs and ``r`` outputs is stored transposed: ``qweight`` int32 ``[n · bits / 32, r]`` (unsigned
codes packed along the inputs), ``qzeros`` int32 ``[groups, r · bits / 32]`` (packed along the outputs), ``scales``
float16 ``[groups, r]`` and ``g_idx`` int32 ``[n]``, the group of every input.

Zero points are stored minus one. GPTQModel, the one maintained reader of asymmetric weights, adds the one to the whole
32-bit word for 2, 4 and 8 bits, so a zero point of 0 borrows from its neighbour, and code by code for 3 bits; what is
written here is what it undoes. AutoGPTQ's own kernels add code by code, and differ where a zero point is 0: where a
group of weights has (nearly) no negative one. AutoGPTQ itself destroyed such words when it packed them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import half_scale_dtype
from llmconvert.quantize.pack import pack_words, packed_length, unpack_words
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.version import __version__

__all__ = ["GptqV1", "stored_zeros", "unstored_zeros"]

_BITS = (2, 3, 4, 8)
_GROUP_SIZES = (None, 16, 32, 64, 128, 256, 512, 1024)
# Both dimensions are packed, so both come in whole words of any of these widths.
_MULTIPLE = 32
# vLLM asks for the scheme of these linears under the name of the one it fuses them into.
_FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class GptqV1:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``, and their configuration in both of its places."""

    def check(self, scheme: Scheme) -> None:
        if scheme.kind != "int" or scheme.bits not in _BITS or scheme.activation_bits != 16:
            raise UnsupportedError(
                f"scheme {scheme}: gptq stores integer weights of 2, 3, 4 or 8 bits with 16-bit activations"
            )
        if scheme.group_size not in _GROUP_SIZES:
            sizes = ", ".join(f"g{size}" for size in _GROUP_SIZES if size)
            raise UnsupportedError(f"scheme {scheme}: gptq readers know the group sizes channel, {sizes}")

    def scale_dtype(self, scheme: Scheme, dtype: torch.dtype) -> torch.dtype:
        return half_scale_dtype(dtype)

    def specs(self, linear: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
        rows, columns = shape
        if rows % _MULTIPLE or columns % _MULTIPLE:
            raise UnsupportedError(
                f"{linear}: a weight of shape {list(shape)}; gptq needs multiples of {_MULTIPLE} in both dimensions; "
                "leave it dense with an override (scheme: none), or choose compressed-tensors"
            )
        groups = scheme.groups(columns)
        return [
            TensorSpec(f"{linear}.qweight", torch.int32, (packed_length(columns, scheme.bits), rows)),
            TensorSpec(f"{linear}.qzeros", torch.int32, (groups, packed_length(rows, scheme.bits))),
            TensorSpec(f"{linear}.scales", torch.float16, (groups, rows)),
            TensorSpec(f"{linear}.g_idx", torch.int32, (columns,)),
        ]

    def pack(self, linear: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        scheme = tensor.scheme
        _, columns = tensor.shape
        groups = scheme.groups(columns)
        codes = _unsigned(tensor.codes, scheme)
        if tensor.zero is None:
            zeros = torch.full_like(tensor.scale, -scheme.code_min, dtype=torch.uint8)
        else:
            zeros = _unsigned(tensor.zero, scheme)
        scales = tensor.scale.T.to(torch.float16).contiguous()
        if not torch.isfinite(scales).all():
            raise CheckpointError(f"{linear}: a scale is beyond float16, in which gptq stores scales")
        group = torch.arange(columns, dtype=torch.int32, device=codes.device) // (columns // groups)
        return {
            f"{linear}.qweight": pack_words(codes, scheme.bits).T.contiguous(),
            f"{linear}.qzeros": stored_zeros(zeros.T.contiguous(), scheme.bits),
            f"{linear}.scales": scales,
            f"{linear}.g_idx": group.to(torch.int32),
        }

    def unpack(self, linear: str, stored: Mapping[str, torch.Tensor], scheme: Scheme) -> QuantizedTensor:
        scales, columns = stored[f"{linear}.scales"], stored[f"{linear}.g_idx"].shape[0]
        words = stored[f"{linear}.qweight"].T.contiguous()
        zero = None
        if not scheme.symmetric:
            unsigned = unstored_zeros(stored[f"{linear}.qzeros"], scheme.bits, scales.shape[1])
            zero = _signed(unsigned.T.contiguous(), scheme)
        codes = _signed(unpack_words(words, scheme.bits, columns), scheme)
        return QuantizedTensor(codes, scales.T.contiguous(), zero, scheme)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        (common, _), *others = Counter(schemes.values()).most_common()
        if any(scheme.symmetric != common.symmetric for scheme, _ in others):
            used = ", ".join(str(scheme) for scheme, _ in ((common, 0), *others))
            raise UnsupportedError(
                f"schemes {used}: gptq readers take one symmetry per model; make all of them symmetric, or none"
            )
        # Readers look for quantized linears inside the blocks alone; the output head needs no mention.
        lists = {match[1] for name in schemes if (match := re.match(r"(.*?\.)\d+\.", name))}
        dynamic: dict[str, Any] = {f"-:^{_pattern(name)}$": {} for name in kept if name.startswith(tuple(lists))}
        dynamic |= {f"+:^{_pattern(name)}$": _settings(scheme) for name, scheme in schemes.items() if scheme != common}
        producers = [f"llmconvert:{__version__}"]
        if not common.symmetric:
            # Not who made the file but how its zero points are stored: as GPTQModel does since 0.9.0, one less in every
            # word, and not as AutoGPTQ did, which destroyed words with a 0. GPTQModel (7.7, models/loader.py) looks for
            # its own name with that version or a later one anywhere in this list, refuses asymmetric version 1 without
            # it, and asks nothing else of it; transformers, optimum and vLLM don't look.
            producers.append("gptqmodel:0.9.0")
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            **_settings(common),
            "pack_dtype": "int32",
            "lm_head": False,
            "true_sequential": True,
            "meta": {"quantizer": producers},
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {"quantize_config.json": (json.dumps(declared, indent=2) + "\n").encode()}


def stored_zeros(zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned zero points uint8 ``[groups, rows]`` as ``qzeros``: minus one, packed.

    Args:
        zeros: each below ``2 ** bits``.
        bits: 2, 3, 4 or 8.
    """
    if bits == 3:
        return pack_words(zeros.sub(1) & 7, bits)
    return pack_words(zeros, bits) - _ones(bits)


def unstored_zeros(qzeros: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """The inverse of :func:`stored_zeros`."""
    if bits == 3:
        return unpack_words(qzeros, bits, rows).add(1) & 7
    return unpack_words(qzeros + _ones(bits), bits, rows)


def _ones(bits: int) -> int:
    """A word with the code 1 in every place."""
    return sum(1 << place for place in range(0, 32, bits))


def _settings(scheme: Scheme) -> dict[str, Any]:
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "sym": scheme.symmetric,
        "desc_act": False,
    }


def _pattern(linear: str) -> str:
    """What matches a linear, and the one that a runtime fuses it into."""
    prefix, dot, leaf = linear.rpartition(".")
    names = f"(?:{leaf}|{_FUSED[leaf]})" if leaf in _FUSED else re.escape(leaf)
    return re.escape(prefix + dot) + names


def _unsigned(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    # Modulo 256, so that the sum needs no wider type.
    return codes.view(torch.uint8).add(-scheme.code_min)


def _signed(codes: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return codes.sub(-scheme.code_min).view(torch.int8)
