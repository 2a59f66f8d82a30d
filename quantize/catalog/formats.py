"""The table of formats on disk, with what each of them says of itself."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.quantize.catalog.declared import declaration_of
from llmconvert.quantize.numbers import AFFINE
from llmconvert.quantize.scheme import parse_scheme

__all__ = [
    "FORMATS",
    "FOR_RUNTIMES",
    "READERS",
    "about_format",
    "library_of",
    "loaders_of",
    "only_format",
    "require_format",
]

#: Format name, which is the ``quant_method`` of its configs → where its class lies; loaded on use.
FORMATS: Mapping[str, str] = {
    "compressed-tensors": "llmconvert.quantize.formats.compressed.tensors:CompressedTensors",
    "gptq": "llmconvert.quantize.formats.gptq:GptqFormat",
    "awq": "llmconvert.quantize.formats.awq_gemm:AwqGemm",
    "bitsandbytes": "llmconvert.quantize.formats.bitsandbytes:BitsAndBytes",
    "gguf": "llmconvert.quantize.formats.gguf:Gguf",
    "mlx": "llmconvert.quantize.formats.mlx.affine:Mlx",
}

#: Format and runtime → the class of artifacts that this runtime alone has to load.
FOR_RUNTIMES: Mapping[tuple[str, str], str] = {
    ("compressed-tensors", "vllm"): "llmconvert.quantize.formats.compressed.vllm:CompressedTensorsForVllm",
}

#: ``quant_method`` of configs that are read and not written → where its reader lies; loaded on use.
READERS: Mapping[str, str] = {
    "fp8": "llmconvert.quantize.formats.released.fp8:FineGrainedFp8",
    "mxfp8": "llmconvert.quantize.formats.released.fp8:FineGrainedFp8",
    "fbgemm_fp8": "llmconvert.quantize.formats.released.fp8:FbgemmFp8",
    "mxfp4": "llmconvert.quantize.formats.released.mxfp4:GptOssMxfp4",
    "modelopt": "llmconvert.quantize.formats.released.modelopt:ModelOpt",
    "modelopt_fp4": "llmconvert.quantize.formats.released.modelopt:ModelOpt",
}


def require_format(name: str) -> None:
    """Refuse a name that no format has.

    Raises:
        UnsupportedError: with the nearest one.
    """
    if name in FORMATS:
        return
    close = difflib.get_close_matches(name.lower(), FORMATS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UnsupportedError(f"format {name!r} is not known; known are {', '.join(FORMATS)}{hint}")


def only_format(scheme: str) -> str | None:
    """The format that alone has schemes of this kind; None if there are several, or it is no scheme."""
    try:
        found = parse_scheme(scheme)
    except SchemeError:
        return None
    if isinstance(found, GgmlMix):
        return "gguf"
    if found.number == replace(AFFINE, bits=found.bits):
        return "mlx"
    return "bitsandbytes" if found.number.absmax else None


def about_format(name: str) -> str:
    """A format in one line: the first of its file."""
    return declaration_of(FORMATS[name]).title


def library_of(name: str) -> str:
    """The library that loads it, as model cards name it."""
    return str(declaration_of(FORMATS[name]).constants.get("library", "transformers"))


def loaders_of(name: str) -> tuple[str, ...]:
    """Packages that transformers needs to load it."""
    found = declaration_of(FORMATS[name]).constants.get("loaders", ())
    return tuple(str(package) for package in found) if isinstance(found, tuple) else ()
