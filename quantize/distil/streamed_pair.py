"""Both models of a distillation with one block of each in memory at a time, and of a mixture one expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import nn

from llmconvert.engine.architecture.experts import expert_parameter
from llmconvert.engine.backward import differentiate_back
from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import DiskStates, PartOfStates, TapeStates, passing_states
from llmconvert.engine.stream import Stream
from llmconvert.quantize.distil.memory import visit_groups
from llmconvert.quantize.distil.student import Subject
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.training.loss import Losses, logit_divergence

__all__ = ["StreamedPair"]


class StreamedPair:
    """See :class:`~llmconvert.training.pair.Pair`.

    Args:
        original: the teacher, as dense weights.
        artifact: the student, likewise, as it has become whenever it is read.
        subject: both, and what is trained.
        take: gets the gradient of a trained tensor, by its dense name, shaped as the tensor is; an expert's while that
            is loaded, one of every window.
        windows: token ids, each ``[1, length]``.
        dtype: that is computed in.
        work: a directory for the tape.
    """

    def __init__(
        self,
        original: Checkpoint,
        artifact: Checkpoint,
        subject: Subject,
        take: Callable[[str, torch.Tensor], None],
        windows: Sequence[torch.Tensor],
        dtype: torch.dtype,
        work: Path,
    ) -> None:
        self._take, self._work = take, work
        context = subject.context
        self.device = context.device
        self.windows: Sequence[torch.Tensor] = tuple(windows)
        longest = max(window.shape[1] for window in windows)
        self._skeleton = Skeleton(artifact, context.device, dtype, products="learned")
        self._plans = discover(self._skeleton, longest)
        trained = {*subject.weights, *subject.norms}
        self._experts = _experts(self._skeleton, trained)
        self._places = _places(self._skeleton, trained.difference(self._experts.values()))
        for slots in self._skeleton.experts:
            for name, slot in slots.items():
                slot.learn = partial(self._learn, name)
        self._met: list[tuple[str, nn.Parameter]] = []  # what is trained of the block that is loaded
        teacher = Skeleton(original, context.device, dtype)
        plans, lengths = discover(teacher, longest), [window.shape[1] for window in windows]
        states, groups = passing_states(lengths, teacher.hidden_size, dtype), visit_groups(teacher, lengths)
        with context.progress.task("Running the original", len(groups) * teacher.block_count) as task:
            for group in groups:
                mine = self.windows[group.start : group.stop]
                part = PartOfStates(states, group.start)
                with closing(Stream(teacher, mine, plans, mode="replay", states=part)) as stream:
                    for _ in stream.blocks():
                        task.advance()
                    stream.cross(teacher.block_count - 1)
        self._teacher = Stream(
            teacher, self.windows, plans, mode="replay", states=states, start=teacher.block_count, head=True
        )

    def differentiate(self, numbers: Sequence[int], *, positions: slice, hidden: float) -> Losses:
        windows = [self.windows[number] for number in numbers]
        about = [window.shape[1] for window in windows], self._skeleton.hidden_size, self._skeleton.dtype
        divergences = []

        def end(batch: int, logits: torch.Tensor) -> torch.Tensor:
            expected = self._expected(numbers[batch])
            divergence, slope = logit_divergence(expected, logits, positions, gradient=True)
            divergences.append(divergence / len(numbers))
            assert slope is not None
            return slope.div_(len(numbers))

        with (
            closing(TapeStates(self._work, *about)) as tape,
            closing(DiskStates(self._work, *about, name="gradients")) as gradients,
        ):
            for group in visit_groups(self._skeleton, about[0]):
                mine = windows[group.start : group.stop]
                part = PartOfStates(tape, group.start)
                with closing(Stream(self._skeleton, mine, self._plans, mode="replay", states=part)) as stream:
                    for _ in stream.blocks():
                        pass
            walk = differentiate_back(self._skeleton, windows, self._plans, tape, gradients, end=end, enter=self._enter)
            with closing(walk):
                for _ in walk:
                    while self._met:
                        name, parameter = self._met.pop()
                        assert parameter.grad is not None
                        self._take(name, parameter.grad)
        return Losses(sum(divergences), 0.0)

    def divergence(self, numbers: Sequence[int]) -> float:
        windows = [self.windows[number] for number in numbers]
        total = 0.0
        for group in visit_groups(self._skeleton, [window.shape[1] for window in windows]):
            mine = windows[group.start : group.stop]
            with closing(Stream(self._skeleton, mine, self._plans, mode="replay", head=True)) as stream:
                for _ in stream.blocks():
                    pass
                for position, logits in zip(group, stream.logits(), strict=True):
                    expected = self._expected(numbers[position])
                    total += logit_divergence(expected, logits, slice(None), gradient=False)[0]
        return total / len(numbers)

    def _expected(self, number: int) -> torch.Tensor:
        """The original's logits of a window, from what has left its last block."""
        coroutine = self._teacher.enter(self._teacher.skeleton.block_count, number)
        logits = coroutine.run_to_end()
        coroutine.kill()
        return logits

    def _enter(self, index: int) -> None:
        for name, stored in self._places.get(index, ()):
            model = self._skeleton
            inside = model.holds(name)
            holder = model.blocks[index] if inside else model.model
            parameter = holder.get_parameter(model.inside(index, name) if inside else name)
            parameter.requires_grad_()
            self._met.append((stored, parameter))

    def _learn(self, experts: str, number: int, gradients: Mapping[str, torch.Tensor]) -> None:
        """What the loaded expert's gradients say; see :attr:`~llmconvert.engine.experts.ExpertsSlot.learn`."""
        for projection, gradient in gradients.items():
            stored = self._experts.get(expert_parameter(experts, number, projection))
            if stored is not None:
                self._take(stored, gradient)


def _experts(skeleton: Skeleton, trained: Set[str]) -> dict[str, str]:
    """What the checkpoint calls matrices of experts that are trained, by the names that stand for them in the model."""
    experts = (site for site in skeleton.sites.values() if site.kind == "expert")
    return {site.parameter: site.tensor for site in experts if site.tensor in trained}


def _places(skeleton: Skeleton, trained: Set[str]) -> dict[int, list[tuple[str, str]]]:
    """Parameters and what the checkpoint calls them, by the block that they are met with: outer ones by the last."""
    last = skeleton.block_count - 1
    blocks = {skeleton.prefix(index): index for index in range(skeleton.block_count)}
    found: dict[int, list[tuple[str, str]]] = {}
    for name, stored in skeleton.names.items():
        if stored in trained:
            index = next((index for prefix, index in blocks.items() if name.startswith(prefix)), last)
            found.setdefault(index, []).append((name, stored))
    return found
