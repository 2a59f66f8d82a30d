"""Where a job computes, how much memory it may take, which model it works on, and to whom it reports."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.progress import SILENT, Progress

__all__ = ["Context"]


@dataclass(frozen=True, slots=True)
class Context:
    """What surrounds a job. None of it but the device's type may change a byte of the result.

    Attributes:
        device: where to compute.
        memory: bytes that may be used, on the device if it has memory of its own; what is free there if None.
        identity: tells sources apart that look alike (a fingerprint of their files); an interrupted job is continued
            only under the same one.
        progress: where long work is shown.
        ranks: the processes that do the job together. Their number may change last bits, and so a few codes.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: int | None = None
    identity: str = ""
    progress: Progress = SILENT
    ranks: Ranks = ALONE
