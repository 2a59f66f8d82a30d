"""Prefill of one prompt with one attention backend, for its time and peak memory; runs in a process of its own."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.memory import PeakMemory, release_freed_memory
from llmconvert.validate.long_inputs.backends import activate
from llmconvert.validate.runtimes.isolated import limit_memory, reset_peak
from llmconvert.validate.runtimes.transformers import runtime

__all__ = ["cache_nbytes", "measure_prefill"]

_WARMUP_TOKENS = 16
_REPEATS = 5
# Prompts faster than this are read several times.
_ENOUGH_SECONDS = 2.0


def measure_prefill(
    directory: str,
    backend: str,
    length: int,
    *,
    device: str,
    dtype: str | None = None,
    cache: bool = False,
    batch: int = 1,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Read a random prompt of ``length`` tokens, with the logits of its last position only.

    Args:
        directory: of the model.
        dtype: what to compute in; the config's own by default.
        cache: whether keys and values are kept, as for writing on.
        limit: bytes that may be taken beyond the loaded model; on the CPU the system holds the process to it.

    Returns:
        ``seconds`` (median), ``loaded_bytes`` (resident with the loaded model), ``peak_bytes`` (its highest point while
        reading), ``extra_bytes`` (the difference), ``cache_bytes``, and ``method``, how the peak was measured.
    """
    where = torch.device(device)
    kind = getattr(torch, dtype) if dtype is not None else None
    with runtime(Path(directory), device=where, dtype=kind) as loaded, activate(loaded.model, backend):
        model = loaded.model
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(Architecture.of(model.config).vocab_size, (batch, length), generator=generator).to(where)
        _read(model, ids[:, :_WARMUP_TOKENS], cache)  # threads, and kernels that are compiled or chosen on first use
        meter = _CudaMeter(where) if where.type == "cuda" else _HostMeter(limit)
        with meter:
            first, held = _timed(model, ids, cache)
        seconds = [first]
        while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_SECONDS:
            seconds.append(_timed(model, ids, cache)[0])
    return {
        "seconds": statistics.median(seconds),
        "loaded_bytes": meter.loaded,
        "peak_bytes": meter.peak,
        "extra_bytes": max(0, meter.peak - meter.loaded),
        "cache_bytes": held,
        "method": meter.method,
    }


def cache_nbytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers, whatever its layers keep them as."""
    return sum(_nbytes(value) for layer in cache.layers for name, value in vars(layer).items() if "window" not in name)


def _nbytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() if value.dim() > 1 else 0
    return sum(map(_nbytes, value)) if isinstance(value, tuple) else 0


def _read(model: Any, ids: torch.Tensor, cache: bool) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=cache, logits_to_keep=1)


def _timed(model: Any, ids: torch.Tensor, cache: bool) -> tuple[float, int]:
    begin = time.perf_counter()
    output = _read(model, ids, cache)
    if ids.device.type == "cuda":
        torch.cuda.synchronize(ids.device)
    seconds = time.perf_counter() - begin
    return seconds, cache_nbytes(output.past_key_values) if cache else 0


class _HostMeter:
    """Resident memory of this process, by the kernel's own mark where that can be started anew."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def __enter__(self) -> None:
        release_freed_memory()
        limit_memory(self._limit)
        reset_peak()
        with PeakMemory() as now:
            pass
        self.loaded = now.nbytes
        reset_peak()
        self._memory = PeakMemory()
        self._memory.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._memory.__exit__(*exc)
        self.peak, self.method = self._memory.nbytes, f"resident memory, {self._memory.method}"


class _CudaMeter:
    """Device memory that PyTorch has given out."""

    method = "device memory"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        self.loaded = int(torch.cuda.memory_allocated(self._device))

    def __exit__(self, *exc: object) -> None:
        torch.cuda.synchronize(self._device)
        self.peak = int(torch.cuda.max_memory_allocated(self._device))
