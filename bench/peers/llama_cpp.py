"""All logits of a GGUF file by llama.cpp itself, by ctypes out of xllamacpp's library, which exports its C interface.

Parameters are structs whose layout changes with the version. So they pass through here as the bytes that
``llama_*_default_params`` filled in; only the first fields are set, whose defaults are checked.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

# Larger than any of them; a callee reads no further than what it knows.
_PARAMS = 1024
_CONTEXT_DEFAULTS = (512, 2048, 512, 1)


class _Params(ctypes.Structure):
    _fields_ = [("raw", ctypes.c_uint8 * _PARAMS)]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    library = ctypes.CDLL(str(next(Path(next(iter(spec.submodule_search_locations or ()))).glob("*.so"))))
    pointer, integer = ctypes.c_void_p, ctypes.c_int32
    signatures = {
        "llama_backend_init": (None, []),
        "llama_log_set": (None, [pointer, pointer]),
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Params]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_set_n_threads": (None, [pointer, integer, integer]),
        "llama_decode": (integer, [pointer, _Batch]),
        "llama_get_logits": (pointer, [pointer]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_free": (None, [pointer]),
        "llama_model_free": (None, [pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


# llama.cpp keeps the pointer: the callback has to outlive every call.
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)


def llama_cpp_logits(
    path: Path, windows: Sequence[torch.Tensor], vocabulary: int, *, threads: int = 2
) -> Iterator[torch.Tensor]:
    """The logits float32 ``[length, vocabulary]`` that llama.cpp computes for each window of ids ``[1, length]``."""
    library = _library()
    library.llama_log_set(ctypes.cast(_QUIET, ctypes.c_void_p), None)
    longest = max(window.shape[1] for window in windows)
    params = library.llama_context_default_params()
    found = struct.unpack_from("<4I", bytes(params.raw))
    if found != _CONTEXT_DEFAULTS:
        raise SystemExit(f"xllamacpp's llama.cpp has other context parameters than expected: {found}")
    struct.pack_into("<3I", params.raw, 0, longest, longest, longest)
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {path}")
    context = library.llama_init_from_model(model, params)
    library.llama_set_n_threads(context, threads, threads)
    try:
        for window in windows:
            library.llama_memory_clear(library.llama_get_memory(context), True)
            yield _decoded(library, context, window[0], vocabulary)
    finally:
        library.llama_free(context)
        library.llama_model_free(model)


def _decoded(library: ctypes.CDLL, context: int, ids: torch.Tensor, vocabulary: int) -> torch.Tensor:
    length = len(ids)
    token, position = ids.to(torch.int32).numpy(), np.arange(length, dtype=np.int32)
    every, sequence = np.ones(length, np.int8), np.zeros(1, np.int32)
    counts, rows = np.ones(length, np.int32), np.full(length, sequence.ctypes.data, np.uintp)
    batch = _Batch(
        length,
        token.ctypes.data,
        None,
        position.ctypes.data,
        counts.ctypes.data,
        rows.ctypes.data,
        every.ctypes.data,
    )
    if (code := library.llama_decode(context, batch)) != 0:
        raise SystemExit(f"llama_decode: {code}")
    values = ctypes.cast(library.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
    return torch.from_numpy(np.ctypeslib.as_array(values, (length, vocabulary)).copy())
