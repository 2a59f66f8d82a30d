"""What a run will do and need, as values: step by step, and in all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from llmconvert.errors import CapacityError
from llmconvert.needs import Needs
from llmconvert.phases import LOADING_KERNELS
from llmconvert.recipes.planning.history import Seconds, remember
from llmconvert.report.report import Step
from llmconvert.report.steps import QuantizeReport

__all__ = ["RunPlan", "StepPlan"]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Attributes:
        name: of the step.
        reused: it is there already, and nothing is done.
        needs: what it takes of the machine.
        files: weight files that it makes, by name → bytes.
        least: bytes of these at least, where they are bounds; None where they are exact.
        tensors: in them.
        seconds: how long it will take; None where nothing like it was timed here.
        kind: what it has in common with steps that take time in proportion; empty of those that nobody times.
        work: how much there is to do, in units of the kind.
        solving: how much of the memory each artifact takes that is made in one pass with others.
        place: where it writes; whose disk counts.
        key: equal for steps that are one where several recipes run; empty for those that each does for itself.
        notes: what else to know.
    """

    name: str
    reused: bool = False
    needs: Needs = field(default_factory=Needs)
    files: Mapping[str, int] | None = None
    least: int | None = None
    tensors: int = 0
    seconds: Seconds | None = None
    kind: str = ""
    work: float = 0.0
    solving: int = 0
    place: Path | None = None
    key: str = ""
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of the weight files, at most."""
        return sum((self.files or {}).values())


@dataclass(frozen=True, slots=True)
class RunPlan:
    """A run as it will be.

    Attributes:
        name: of the recipe, or the command.
        model: what it begins with.
        makes: what the artifact calls itself; empty where none is made.
        steps: in order, what is fetched and published among them.
        parameters: numbers in the model.
        blocks: decoder blocks of the model.
        readers: which runtimes read the result.
        memory: bytes that may be used; those that are free now, or the recipe's own limit.
        device_memory: the same on an accelerator; None where the run computes on the processor.
        processes: that do it together. What is said of memory is said of each of them.
    """

    name: str
    model: str
    makes: str
    steps: tuple[StepPlan, ...]
    parameters: int
    blocks: int
    readers: str
    memory: int
    device_memory: int | None = None
    processes: int = 1

    @property
    def needs(self) -> Needs:
        """Of the steps one after the other."""
        return reduce(Needs.then, (step.needs for step in self.steps if not step.reused), Needs())

    @property
    def todo(self) -> bool:
        """Whether anything is left to build; publishing again what is there is not."""
        return any(not step.reused and step.name != "publish" for step in self.steps)

    @property
    def seconds(self) -> Seconds | None:
        """Of all steps; None where one of those that take time was never timed."""
        todo = [step for step in self.steps if not step.reused]
        if not todo or any(step.seconds is None for step in todo):
            return None
        return reduce(Seconds.__add__, (step.seconds for step in todo if step.seconds is not None))

    def remember(self, done: Iterable[Step]) -> None:
        """Keep how long steps took that were done from beginning to end, for plans to come.

        Kernels are compiled when they are first loaded on a machine, which no later run does again: that time is left
        out.
        """
        timed = {step.name: step for step in self.steps if not step.reused}
        for one in done:
            step = timed.get(one.name)
            if step is not None and not one.reused and not one.resumed:
                once = one.details.phases.get(LOADING_KERNELS, 0.0) if isinstance(one.details, QuantizeReport) else 0.0
                remember(step.kind, step.work, one.seconds - once)

    def require_room(self) -> None:
        """Refuse a run that can't fit this machine.

        Raises:
            CapacityError: with the step, what it needs, what there is, and the setting that would make it fit.
        """
        for step in self.steps:
            if step.reused:
                continue
            needs, device = step.needs, self.device_memory
            if device is not None and needs.device_memory > device:
                raise CapacityError(
                    f"{step.name}: needs {_size(needs.device_memory)} on the device, {_size(device)} are free there; "
                    f"{_advice(step.name)}"
                )
            if device is None and needs.memory > self.memory:
                raise CapacityError(
                    f"{step.name}: needs {_size(needs.memory)} of memory, {_size(self.memory)} may be used; "
                    f"{_advice(step.name)}"
                )
        for place, needed in self._disks().items():
            there = shutil.disk_usage(place)
            free = there.free
            if not there.total:
                raise CapacityError(
                    f"{place} has no room for files at all: no disk lies behind it; keep finished stages elsewhere "
                    "(work_dir, --work-dir)"
                )
            if needed > free:
                raise CapacityError(
                    f"the run needs {_size(needed)} of disk in {place}, {_size(free)} are free; remove something, or "
                    "keep finished stages on another disk (work_dir, --work-dir) and downloads as well (HF_HOME); a "
                    "method without calibration can also work on a Hub model while it downloads (stream: true)"
                )

    def _disks(self) -> dict[Path, int]:
        """Bytes that each disk has to take at the worst moment, by one of the directories on it."""
        named: dict[int, Path] = {}
        total: dict[Path, Needs] = {}
        for step in self.steps:
            if step.reused or step.place is None or not step.needs.disk:
                continue
            place = _existing(step.place)
            first = named.setdefault(place.stat().st_dev, place)
            total[first] = total.get(first, Needs()).then(step.needs)
        return {place: needs.disk for place, needs in total.items()}

    def to_mapping(self) -> dict[str, Any]:
        """As JSON values."""
        needs = self.needs
        return {
            "name": self.name,
            "model": self.model,
            "makes": self.makes,
            "parameters": self.parameters,
            "blocks": self.blocks,
            "readers": self.readers,
            "memory_free": self.memory,
            "device_memory_free": self.device_memory,
            "processes": self.processes,
            "needs": _needs(needs),
            "seconds": _seconds(self.seconds),
            "steps": [
                {
                    "name": step.name,
                    "reused": step.reused,
                    "needs": _needs(step.needs),
                    "files": dict(step.files or {}),
                    "bytes_least": step.nbytes if step.least is None else step.least,
                    "bytes_most": step.nbytes,
                    "tensors": step.tensors,
                    "seconds": _seconds(step.seconds),
                    "notes": list(step.notes),
                }
                for step in self.steps
            ],
        }


def _needs(needs: Needs) -> dict[str, int]:
    return {
        "memory": needs.memory,
        "device_memory": needs.device_memory,
        "disk": needs.disk,
        "disk_left": needs.left,
        "download": needs.download,
    }


def _seconds(seconds: Seconds | None) -> list[float] | None:
    return None if seconds is None else [round(seconds.least, 1), round(seconds.most, 1)]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _advice(step: str) -> str:
    """The setting that makes a step need less."""
    if step.startswith("validate"):
        return "take shorter windows (validate.perplexity.window)"
    if step == "heal":
        return "train attention alone (attention.heal.train), or take shorter windows (attention.heal.length)"
    if step == "distil":
        return (
            "take shorter windows (quantize.distil.length), or leave codes as they are (quantize.distil.code_rate: 0)"
        )
    return "take fewer or shorter windows (calibrate.samples, calibrate.length), or close what else runs"
