"""The GPTQ format as AutoGPTQ defined it (https://github.com/AutoGPTQ/AutoGPTQ): GPTQModel, vLLM, ExLlama.

A linear of ``n`` inputs and ``r`` outputs is stored transposed: ``qweight`` int32 ``[n · bits / 32, r]`` (unsigned
codes packed along the inputs), ``qzeros`` int32 ``[groups, r · bits / 32]`` (packed along the outputs), ``scales``
float16 ``[groups, r]`` and ``g_idx`` int32 ``[n]``, the group of every input.

Version 1 is written; versions 1 and 2 are read, activation order (``desc_act``) included, which scatters a group's
inputs. What is stored tells the width of every linear, so per-layer overrides (``dynamic``) need no looking up.

Version 2 stores zero points as they are, version 1 minus one. GPTQModel, the one maintained reader of asymmetric
weights, adds the one to the whole 32-bit word for 2, 4 and 8 bits, so a zero point of 0 borrows from its neighbour, and
code by code for 3 bits; what is written here is what it undoes. AutoGPTQ's own kernels add code by code, and differ
where a zero point is 0: where a group of weights has (nearly) no negative one. AutoGPTQ itself destroyed such words
when it packed them.

A head of its own is stored like a linear where ``lm_head`` of the config is true, as GPTQModel has it
(https://github.com/ModelCloud/GPTQModel) and as vLLM reads it (``get_linear_quant_method`` in its ``gptq_utils.py``);
in another scheme than most linears it is named in ``dynamic``. Embeddings are quantized by none of the readers.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from llmconvert.engine.architecture.families import HEADS
from llmconvert.engine.sites import Site
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import (
    FLOATS,
    Feature,
    Format,
    OuterUse,
    StoredLinear,
    model_dtype,
    require_matrix,
    require_shape,
    settings,
)
from llmconvert.quantize.formats.reading import Declared
from llmconvert.quantize.narrow import half_scale_dtype, half_scales
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.pack import pack_words, packed_length, signed_codes, unpack_words, unsigned_codes
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.version import __version__

__all__ = ["GptqFormat", "stored_zeros", "unstored_zeros"]

_WORDS = ".qweight"
_BITS = (2, 3, 4, 8)
_NUMBERS = tuple(Int(bits, symmetric) for bits in _BITS for symmetric in (True, False))
_HEAD_BITS = (4, 8)
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


class _Config(Declared):
    """What is read of a config. Of ``dynamic`` it is the tensors that tell, and ``lm_head`` is among them."""

    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "meta", "dynamic", "lm_head", "group_size", "version", "producer", "quantizer"),
            # How codes were chosen, by AutoGPTQ, optimum, GPTQModel and AutoRound.
            *("damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "mse", "v2", "v2_alpha"),
            *("gptaq", "gptaq_alpha", "act_group_aware", "foem", "method", "fallback", "failsafe", "hessian"),
            *("dataset", "tokenizer", "model_seqlen", "batch_size", "pad_token_id", "cache_block_outputs", "iters"),
            *("seqlen", "nsamples", "lr", "minmax_lr", "autoround_version", "enable_quanted_input"),
            *("low_gpu_mem_usage", "enable_minmax_tuning", "block_name_to_quantize", "offload_to_disk"),
            *("module_name_preceding_first_block", "modules_in_block_to_quantize", "modules_to_not_convert"),
            # How they are run.
            *("use_exllama", "disable_exllama", "exllama_config", "max_input_length", "use_cuda_fp16", "backend"),
            *("model_name_or_path", "model_file_base_name", "data_type"),
        )
    )

    bits: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: str | None = "int32"
    is_marlin_format: bool = False


class GptqFormat(Format):
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx``, and their configuration in both of its places."""

    loaders: ClassVar[Sequence[str]] = ("optimum", "gptqmodel")
    lacks: ClassVar[Mapping[Feature, str]] = {}
    outer: ClassVar[OuterUse] = "asked"

    def check(self, scheme: Scheme) -> None:
        if scheme.number not in _NUMBERS or scheme.activation_bits != 16:
            raise UnsupportedError(
                f"scheme {scheme}: gptq stores integer weights of 2, 3, 4 or 8 bits with 16-bit activations"
            )
        if scheme.group_size not in _GROUP_SIZES:
            sizes = ", ".join(f"g{size}" for size in _GROUP_SIZES if size)
            raise UnsupportedError(f"scheme {scheme}: gptq readers know the group sizes channel, {sizes}")

    def check_outer(self, site: Site, scheme: Scheme) -> bool:
        if site.kind != "head":
            what = "is embedding and head, one matrix" if site.kind == "tied" else "is an embedding"
            raise UnsupportedError(
                f"{site.name}: {what}, and no reader of gptq takes one that is quantized; leave it dense, or take "
                "format: compressed-tensors, gguf or mlx"
            )
        if not scheme.symmetric or scheme.bits not in _HEAD_BITS:
            raise UnsupportedError(
                f"{site.name}: scheme {scheme}; of gptq heads vLLM reads symmetric ones of 4 and 8 bits; "
                "take w4a16-g64 or w8a16-g64, or leave the head out"
            )
        return False

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
        codes = unsigned_codes(tensor.codes, scheme.bits)
        if tensor.zero is None:
            zeros = torch.full_like(tensor.scale, 1 << (scheme.bits - 1), dtype=torch.uint8)
        else:
            zeros = unsigned_codes(tensor.zero, scheme.bits)
        scales = half_scales(linear, tensor).T.contiguous()
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
            zero = signed_codes(unsigned.T.contiguous(), scheme.bits)
        codes = signed_codes(unpack_words(words, scheme.bits, columns), scheme.bits)
        return QuantizedTensor(codes, scales.T.contiguous(), zero, scheme)

    def quantization_config(self, schemes: Mapping[str, Scheme], kept: Sequence[str]) -> dict[str, Any]:
        (common, _), *others = Counter(schemes.values()).most_common()
        if any(scheme.symmetric != common.symmetric for scheme, _ in others):
            used = ", ".join(str(scheme) for scheme, _ in ((common, 0), *others))
            raise UnsupportedError(
                f"schemes {used}: gptq readers take one symmetry per model; make all of them symmetric, or none"
            )
        head = any(_is_head(name) for name in schemes)
        # Readers leave the output head dense without being told.
        named = (name for name in kept if not _is_head(name))
        dynamic: dict[str, Any] = {f"-:^{_pattern(name)}$": {} for name in named}
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
            "lm_head": head,
            "true_sequential": True,
            "meta": {"quantizer": producers},
            **({"dynamic": dynamic} if dynamic else {}),
        }

    def files(self, declared: Mapping[str, Any]) -> Mapping[str, bytes]:
        return {"quantize_config.json": (json.dumps(declared, indent=2) + "\n").encode()}

    def find(self, checkpoint: Checkpoint, declared: Mapping[str, Any]) -> Iterable[StoredLinear]:
        found = _Config.read(declared)
        version = (found.checkpoint_format or found.format or "gptq").lower()
        if version not in ("gptq", "gptq_v2") or str(found.pack_dtype) != "int32" or found.is_marlin_format:
            keys = ("checkpoint_format", "format", "pack_dtype", "is_marlin_format")
            raise UnsupportedError(
                f"a GPTQ checkpoint with {settings(declared, *keys)}; this reader knows gptq and gptq_v2, packed in "
                "int32"
            )
        for name in checkpoint.infos:
            if name.endswith(_WORDS):
                yield _linear(checkpoint, found, name.removesuffix(_WORDS), plain=version == "gptq_v2")


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
        bits = self.scheme.bits
        if self.scheme.symmetric and not (zeros == 1 << (bits - 1)).all():
            raise CheckpointError(f"{self.linear}: config.json says symmetric, {self.linear}.qzeros says otherwise")
        zero = None if self.scheme.symmetric else signed_codes(zeros, bits)
        return QuantizedTensor(signed_codes(codes, bits), scales.contiguous(), zero, self.scheme)

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


def _linear(checkpoint: Checkpoint, declared: _Config, linear: str, *, plain: bool) -> _Gptq:
    words = require_matrix(checkpoint, linear, "qweight", dtypes=(torch.int32,))
    scales = require_matrix(checkpoint, linear, "scales", dtypes=FLOATS)
    indexed = f"{linear}.g_idx" in checkpoint
    bits = declared.bits
    if declared.desc_act and not indexed:
        raise CheckpointError(f"quantized linear {linear!r} has no tensor '{linear}.g_idx', and desc_act is true")
    if indexed:
        columns = math.prod(checkpoint.infos[f"{linear}.g_idx"].shape)
        require_shape(checkpoint, linear, "g_idx", (columns,), dtypes=(torch.int32, torch.int64))
        bits = next((width for width in _BITS if packed_length(columns, width) == words[0]), 0)
    else:
        columns = words[0] * 32 // bits if bits in _BITS else 0
    if bits not in _BITS or scales[1] != words[1]:
        raise CheckpointError(
            f"quantized linear {linear!r}: qweight {list(words)}, scales {list(scales)} and {columns} inputs do not "
            f"belong together in any of {', '.join(map(str, _BITS))} bits"
        )
    rows, groups = words[1], scales[0]
    require_shape(checkpoint, linear, "qzeros", (groups, packed_length(rows, bits)), dtypes=(torch.int32,))
    size = None if groups == 1 else -(-columns // groups)
    scheme = Scheme(Int(bits, declared.sym), size)
    parts = tuple(f"{linear}.{part}" for part in ("qweight", "qzeros", "scales", *(["g_idx"] if indexed else [])))
    return _Gptq(linear, (rows, columns), model_dtype(checkpoint), scheme, parts, plain, indexed)


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


def _is_head(linear: str) -> bool:
    return f"{linear}.weight".endswith(HEADS)


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
