"""How much memory a streamed job needs, stated before it starts, and how much there is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode
from llmconvert.errors import CapacityError
from llmconvert.memory import available_nbytes
from llmconvert.needs import Needs
from llmconvert.storage.checkpoint import Checkpoint

__all__ = [
    "BASE_NBYTES",
    "LOADED_NBYTES",
    "MemoryEstimate",
    "activation_nbytes",
    "choose_mode",
    "kept_of",
    "tokenizer_nbytes",
]

#: The interpreter with torch and transformers, and a plan made with them.
LOADED_NBYTES = 440_000_000
#: With compiled kernels, thread stacks and the allocator's slack as well, where a model's forward runs.
BASE_NBYTES = 500_000_000
# What a byte of tokenizer.json becomes when it is loaded: measured for vocabularies of 49,152 to 256,000 tokens, 8 to 9
# of them, and 10 to 12 while it is read.
_TOKENIZER_GROWTH = 10
# On a CPU, freed memory that a job may keep for what it takes next, where there is room, since fresh pages have to be
# cleared first; and how far below what is stated it begins to give it back, since it looks only now and then.
_KEPT_NBYTES, _MARGIN_NBYTES = 80 << 20, 64 << 20
# Leave some of what is free to the page cache and to others.
_USABLE = 0.8


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Peak resident bytes of a job, by what they are for, in a given mode."""

    mode: Mode
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def kept(self) -> int:
        """Resident bytes up to which the process keeps what it frees; 0 beside an accelerator: none."""
        return kept_of(self.total, torch.device("cpu")) if "kept" in self.parts else 0

    def needs(self, device: torch.device, *, disk: int, passing: int = 0) -> Needs:
        """As what a job on ``device`` needs of the machine, with the bytes of disk that come to it.

        ``passing`` of them are free again when it is done.

        Beside an accelerator, the process holds what it is itself and the weights that it reads.
        """
        if device.type == "cpu":
            return Needs(memory=self.total, disk=disk, passing=passing)
        own = self.parts["base"] + self.parts.get("tokenizer", 0)
        host = own + self.parts.get("two blocks", 0)
        return Needs(memory=host, device_memory=self.total - own, disk=disk, passing=passing)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in self.parts.items())
        return f"{self.total / 1e6:,.0f} MB ({self.mode}: {parts})"


def kept_of(stated: int, device: torch.device) -> int:
    """Resident bytes up to which a process that was said to take so many keeps what it frees.

    Beside an accelerator, where activations are not the process's, nothing is kept.
    """
    return max(0, stated - _MARGIN_NBYTES) if device.type == "cpu" else 0


def tokenizer_nbytes(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's tokenizer, loaded to draw text: pieces and merges as tables; freed, they stay a hole."""
    file = checkpoint.files.get("tokenizer.json")
    if file is None:
        return 0
    return _TOKENIZER_GROWTH * (len(file) if isinstance(file, bytes) else file.stat().st_size)


def activation_nbytes(plans: Sequence[BlockPlan], skeleton: Skeleton, lengths: Sequence[int], mode: Mode) -> int:
    """Bytes of activations at the worst moment.

    In lockstep every batch waits at the same stop and one is running; in replay there is only the running one. Linears
    that multiply in float32 share the memory for it.
    ``plans`` are of the longest batch; what a shorter one holds is taken to be in proportion.
    """
    longest = max(lengths)
    running = max(plan.peak_nbytes for plan in plans) + skeleton.product_nbytes(longest)
    # Wherever they wait, batches are kept as they come to a layer's experts, and with what these give.
    running += skeleton.visit_nbytes(sum(lengths), held=mode == "replay")
    if mode == "replay":
        return running
    held = max((stop.held_nbytes for plan in plans for stop in plan.stops), default=0)
    return running + held * sum(lengths) // longest


def choose_mode(
    skeleton: Skeleton,
    plans: Sequence[BlockPlan],
    lengths: Sequence[int],
    work_nbytes: int,
    budget: int | None,
    mode: Mode | None = None,
    *,
    streams: int = 1,
    processes: int = 1,
) -> MemoryEstimate:
    """Lockstep if it fits the budget, replay if only that does.

    Without batches there is no forward: neither embeddings nor blocks are loaded, and the mode makes no difference.

    Args:
        skeleton: the model.
        plans: of its longest batch.
        lengths: tokens of every batch; empty for methods that need no calibration.
        work_nbytes: what one linear's statistics and solution need.
        budget: bytes the job may use on the skeleton's device; what is free there now when None.
        mode: the mode to use in any case.
        streams: models that the batches run through beside each other.
        processes: how many share the budget.

    Raises:
        CapacityError: not even replay fits; names what it would take.
    """
    limit = budget if budget is not None else int(available_nbytes(skeleton.device) * _USABLE)
    limit //= processes
    candidates: tuple[Mode, ...] = (mode,) if mode else ("lockstep", "replay")
    for candidate in candidates:
        parts = {"base": BASE_NBYTES if lengths else LOADED_NBYTES, "one linear": work_nbytes}
        if lengths:
            parts["tokenizer"] = tokenizer_nbytes(skeleton.checkpoint)
            blocks = 2 * max(skeleton.block_nbytes(index) for index in range(skeleton.block_count))
            blocks += skeleton.expert_nbytes()
            activations = activation_nbytes(plans, skeleton, lengths, candidate)
            model = {"embeddings": skeleton.outer_nbytes(head=False), "two blocks": blocks, "activations": activations}
            parts |= {name: streams * size for name, size in model.items()}
        estimate = MemoryEstimate(candidate, parts)
        if estimate.total <= limit:
            keeps = lengths and skeleton.device.type == "cpu" and estimate.total + _KEPT_NBYTES <= limit
            return MemoryEstimate(candidate, {**parts, "kept": _KEPT_NBYTES}) if keeps else estimate
    raised = "allow more (memory, --memory), " if budget is not None else ""
    if estimate.parts["base"] > limit:
        raise CapacityError(
            f"this model needs {estimate}, {limit / 1e6:,.0f} MB may be used, which is less than Python, torch and "
            f"transformers take alone; {raised or 'close what else runs, '}or use a machine with more memory"
        )
    raise CapacityError(
        f"this model needs {estimate}, {limit / 1e6:,.0f} MB may be used; {raised}"
        "use shorter calibration samples, a data-free method (rtn), or a machine with more memory"
    )
