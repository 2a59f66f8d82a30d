"""llama.cpp's own quantization of tensors and its inverse, by ctypes out of ``xllamacpp``'s library."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    return ctypes.CDLL(str(next(folder.glob("*.so"))))


@functools.cache
def _function() -> Any:
    function = _library().ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return function


def ggml_quantize(values: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 ``[rows, columns]`` in a tensor type: uint8 ``[rows, row bytes]``."""
    qtype = GGMLQuantizationType[name]
    block, block_bytes = GGML_QUANT_SIZES[qtype]
    rows, columns = values.shape
    values = np.ascontiguousarray(values, np.float32)
    out = np.empty((rows, columns // block * block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    written = _function()(int(qtype), values.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
    assert written == out.nbytes
    return out


def ggml_dequantize(raw: np.ndarray, name: str) -> np.ndarray:
    """The inverse: uint8 ``[rows, row bytes]`` as float32 ``[rows, columns]``."""
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    raw = np.ascontiguousarray(raw)
    out = np.empty((len(raw), raw.shape[1] // block_bytes * block), np.float32)
    function = getattr(_library(), f"dequantize_row_{name.lower().replace('_k', '_K')}")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(raw.ctypes.data, out.ctypes.data, out.size)
    return out
