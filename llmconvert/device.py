"""Devices by name: ``cpu``, ``cuda``, ``cuda:N``, ``auto``."""

from __future__ import annotations

import torch

from llmconvert.errors import UsageError

__all__ = ["open_device"]


def open_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device ``name``: ``cpu``, ``cuda``, ``cuda:N``, or with ``auto`` a GPU where there is one.

    Args:
        name: of it.
        local_rank: number of this process on its machine, where several share a job; each takes a GPU of its own.

    Raises:
        UsageError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if local_rank is not None:
        if device.index is not None:
            raise UsageError(f"device {name!r}: each of several processes takes a GPU of its own; say cuda")
        name, device = f"cuda:{local_rank}", torch.device("cuda", local_rank)
    if not torch.backends.cuda.is_built():
        raise UsageError(
            f"device {name!r}: the PyTorch that is installed ({torch.__version__}) is built without CUDA; compute on "
            "the cpu, or install one that is built for your GPU (https://pytorch.org/get-started)"
        )
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise UsageError(
            f"device {name!r}: found {count} CUDA devices; "
            + (f"name one of cuda:0 … cuda:{count - 1}" if count else "check the driver and CUDA_VISIBLE_DEVICES")
        )
    return device
