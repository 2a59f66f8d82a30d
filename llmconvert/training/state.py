"""Checkpoint of a training's state: one safetensors file, there whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmconvert.errors import MachineError, one_line
from llmconvert.machine import of_machine
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import plan_shard, write_file

__all__ = ["TrainingState", "load_state", "save_state"]

_SCHEMA = "llmconvert.training/1"
_GROUPS = ("weights", "optimizer", "best")


@dataclass
class TrainingState:
    """Everything a training continues from, bit for bit.

    Attributes:
        identity: of the job; another one's state is not taken up.
        step: optimizer steps done.
        weights: trained tensors by checkpoint name.
        optimizer: what it remembers of them, ``NAME/KEY``: running means of their gradients, for example.
        best: what was kept of the weights that did best on the held-out text.
        history: one entry per step done: ``step``, ``kl``, ``hidden``, ``rate``.
        held_out: one entry per evaluation: ``step``, ``kl``.
        seconds: spent so far.
    """

    identity: str
    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]
    history: list[dict[str, float]] = field(default_factory=list)
    held_out: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0


def save_state(path: Path, state: TrainingState) -> None:
    """Write ``state``, tensor by tensor; it is on disk when this returns.

    Raises:
        CapacityError: the disk is full.
    """
    tensors = {
        f"{group}/{name}": tensor.detach() for group in _GROUPS for name, tensor in getattr(state, group).items()
    }
    about: dict[str, Any] = {
        "schema": _SCHEMA,
        "identity": state.identity,
        "step": state.step,
        "history": state.history,
        "held_out": state.held_out,
        "seconds": state.seconds,
    }
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    file = plan_shard(path.name, specs, {"state": json.dumps(about)})

    def pieces() -> Iterator[bytes | memoryview]:
        yield file.header
        for name in file.offsets:
            yield tensors[name].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    write_file(path, pieces())


def load_state(path: Path, identity: str) -> TrainingState | None:
    """The state in ``path``, or None if there is none that can be used, or only another job's.

    Raises:
        MachineError: it is there and cannot be read now.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("state", "{}"))
            if about.get("schema") != _SCHEMA or about.get("identity") != identity:
                return None
            tensors: Mapping[str, torch.Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, RecursionError, AttributeError) as error:
        if of_machine(error):
            raise MachineError(
                f"{path}: what was learned cannot be read: {one_line(error)}; run the same command again"
            ) from error
        return None
    groups = {
        group: {
            name.removeprefix(f"{group}/"): value for name, value in tensors.items() if name.startswith(f"{group}/")
        }
        for group in _GROUPS
    }
    return TrainingState(
        identity=identity,
        step=about["step"],
        history=about["history"],
        held_out=about["held_out"],
        seconds=about["seconds"],
        **groups,
    )
