"""One of the two models of a merge on its way through the calibration windows, in the memory of one block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates
from llmconvert.engine.stream import BlockRun, Stream
from llmconvert.memory import available_nbytes
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["Side", "refit_dtype", "share"]


def share(context: Context) -> int:
    """Memory for one of the two models; of what is free, a third is left alone."""
    if context.memory is not None:
        return context.memory // 2
    return available_nbytes(context.device) // 3


def refit_dtype(device: torch.device) -> torch.dtype | None:
    """float32 on processors that bfloat16 would slow down; what the checkpoint is stored in where nothing is gained."""
    return torch.float32 if compute_dtype(device) == torch.float32 else None


class Side:
    """One of the two models on its way through the windows.

    With ``replayed``, a window is run anew whenever it is asked for, and holds nothing but its state in between.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows: Sequence[torch.Tensor],
        context: Context,
        place: Path,
        work: int,
        *,
        replayed: bool = False,
    ) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.skeleton = Skeleton(checkpoint, context.device, refit_dtype(context.device))
        self.windows = windows
        self.modules = {stored: name for name, stored in self.skeleton.names.items()}
        lengths = [window.shape[1] for window in windows]
        plans = discover(self.skeleton, max(lengths))
        mode = choose_mode(self.skeleton, plans, lengths, work, share(context)).mode
        shape = lengths, self.skeleton.hidden_size, self.skeleton.dtype
        self._states = DiskStates(place, *shape) if mode == "replay" else None
        self.stream = Stream(self.skeleton, windows, plans, mode="replay" if replayed else mode, states=self._states)

    @property
    def filed(self) -> bool:
        """Whether hidden states are in files, because memory does not hold them."""
        return self._states is not None

    def entering(self, block: BlockRun) -> Callable[[int], torch.Tensor]:
        """The hidden state of each window, ``[tokens, hidden]``, at the entry of a block that none has entered yet."""
        index, stream = block.plan.index, self.stream
        if self.filed:
            return lambda window: stream.state(index, window).flatten(0, -2)
        kept = [hidden.flatten(0, -2) for hidden, _ in block.entries(range(len(self.windows)))]
        return lambda window: kept[window]

    def linear(self, stem: str) -> str:
        """Module name of the linear that the checkpoint calls ``stem``."""
        return self.modules[f"{stem}.weight"].removesuffix(".weight")

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stream.close()
        if self._states is not None:
            self._states.close()
