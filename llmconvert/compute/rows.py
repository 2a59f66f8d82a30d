"""Row-parallel loops: rows of a matrix shared out among threads, which compiled kernels run outside the GIL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch

__all__ = ["over_rows"]

_ROWS_PER_THREAD = 64


def over_rows(
    kernel: Callable[..., None], rows: int, *arguments: torch.Tensor | np.ndarray[Any, Any] | np.generic | int | float
) -> None:
    """Run ``kernel(begin, end, *arguments)`` over all rows, in as many threads as torch uses; tensors go as arrays."""
    threads = max(1, min(torch.get_num_threads(), rows // _ROWS_PER_THREAD))
    bounds = [rows * i // threads for i in range(threads + 1)]
    arrays = [value.numpy() if isinstance(value, torch.Tensor) else value for value in arguments]

    if threads == 1:
        kernel(0, rows, *arrays)
        return
    pool = _helpers(threads - 1)
    others = [pool.submit(kernel, bounds[i], bounds[i + 1], *arrays) for i in range(1, threads)]
    kernel(bounds[0], bounds[1], *arrays)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _helpers(count: int) -> ThreadPoolExecutor:
    """The threads beside the caller's, kept: starting one can take longer than a kernel."""
    return ThreadPoolExecutor(count, thread_name_prefix="llmconvert-rows")
