"""Training loop of healing: attention weights of the merged model distilled from the original.

The loop is short because its parts are libraries': clipping and autocast are torch's, the schedule is transformers',
and the optimizer is Muon for heads (:mod:`llmconvert.convert.heal.muon`), which learned more than AdamW from a given
text. transformers' ``Trainer`` does not fit: its checkpoints are whole models, its losses come from labels or from
teachers called inside the student's forward, and two models that share all tensors but attention's, with a loss
computed a few positions at a time, are outside what it drives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.heal.loss import Losses, hidden_divergence, prediction_divergence
from llmconvert.convert.heal.model import ResidentModel
from llmconvert.convert.heal.muon import Muon
from llmconvert.convert.heal.state import HealState
from llmconvert.errors import CalibrationError
from llmconvert.progress import Task

__all__ = ["HealOptions", "Healing"]


@dataclass(frozen=True, slots=True)
class HealOptions:
    """How a model is healed.

    Attributes:
        steps: of the optimizer.
        batch: windows per step.
        learning_rate: at its highest, after the warm-up; falls to zero along half a cosine.
        warmup: share of the steps in which the rate rises from zero.
        clip: largest norm of a step's gradient.
        stride: one of so many positions has its predictions compared, the others have their turn later. Output heads
            are a third of a step's work in small models, but what the skipped positions would teach is worth more.
        hidden: weight of the hidden states' error beside the divergence of predictions.
        held_out: windows that are not learned from and tell when to stop.
        evaluate_every: steps between looks at them.
        patience: stop after so many looks without a new best.
        save_every: steps between states on disk.
        seed: of the order of windows.
    """

    steps: int = 200
    batch: int = 2
    learning_rate: float = 3e-3
    warmup: float = 0.05
    clip: float = 1.0
    stride: int = 1
    hidden: float = 0.5
    held_out: int = 8
    evaluate_every: int = 25
    patience: int = 3
    save_every: int = 25
    seed: int = 0


class Healing:
    """A student on its way to its teacher.

    Args:
        teacher: the original.
        student: the merged model.
        names: checkpoint names of the tensors that are trained.
        windows: token ids, each ``[1, length]``; the last ``options.held_out`` of them are not learned from.
        options: how.
    """

    def __init__(
        self,
        teacher: ResidentModel,
        student: ResidentModel,
        names: Sequence[str],
        windows: Sequence[torch.Tensor],
        options: HealOptions,
    ) -> None:
        self._teacher, self._student = teacher, student
        self._options = options
        split = len(windows) - options.held_out
        self._windows, self._held_out = tuple(windows[:split]), tuple(windows[split:])
        self._expected: list[torch.Tensor] = []
        self._device = student.skeleton.device
        self._parameters: dict[str, nn.Parameter] = student.train(names)

    def run(self, state: HealState | None, identity: str, save: Callable[[HealState], None], task: Task) -> HealState:
        """Take all steps, or those that are left after ``state``; ``save`` is called now and then.

        Raises:
            CalibrationError: the losses are not finite.
        """
        options = self._options
        optimizer = self._optimizer()
        state = self._restore(optimizer, state) if state is not None else self._begin(identity)
        for group in optimizer.param_groups:
            group["initial_lr"] = options.learning_rate
        warmup = max(1, round(options.warmup * options.steps))
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, options.steps + 1, last_epoch=state.step - 1)
        task.advance(state.step)
        begin, spent = time.perf_counter(), state.seconds
        while state.step < options.steps and not self._stalled(state):
            losses = self._step(state.step)
            nn.utils.clip_grad_norm_(self._parameters.values(), options.clip, error_if_nonfinite=True)
            rate = float(optimizer.param_groups[0]["lr"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            state.step += 1
            state.history.append({"step": state.step, "kl": losses.kl, "hidden": losses.hidden, "rate": rate})
            task.advance(1, f"{losses.kl:.3f} nats from the original")
            last = state.step == options.steps
            if self._held_out and (last or state.step % options.evaluate_every == 0):
                self._evaluate(state)
            if last or state.step % options.save_every == 0:
                state.seconds = spent + time.perf_counter() - begin
                self._collect(optimizer, state)
                save(state)
        state.seconds = spent + time.perf_counter() - begin
        return state

    def _optimizer(self) -> Muon:
        geometry = read_geometry(self._student.skeleton.checkpoint)
        outputs = {f"{names.output}.weight" for names in geometry.projections}
        rows = [parameter for name, parameter in self._parameters.items() if name not in outputs]
        columns = [parameter for name, parameter in self._parameters.items() if name in outputs]
        return Muon(rows, columns, head_dim=geometry.head_dim, lr=self._options.learning_rate)

    def _begin(self, identity: str) -> HealState:
        state = HealState(identity, 0, {}, {}, {})
        if self._held_out:
            self._evaluate(state)
        return state

    def _step(self, step: int) -> Losses:
        """Gradients of one step, in the parameters' ``grad``."""
        options = self._options
        kl = hidden = 0.0
        for window in self._batch(step):
            with torch.no_grad(), self._autocast():
                target_final, targets = self._teacher.decode(window)
            with self._autocast():
                final, states = self._student.decode(window)
                target_final, final = (
                    part[:, step % options.stride :: options.stride] for part in (target_final, final)
                )
                divergence, slope = prediction_divergence(
                    self._teacher, self._student, target_final, final, gradient=True
                )
                apart = hidden_divergence(targets, states)
            assert slope is not None
            del targets, states
            torch.autograd.backward(
                [final, apart], [slope / options.batch, apart.new_tensor(options.hidden / options.batch)]
            )
            kl, hidden = kl + divergence / options.batch, hidden + float(apart.detach()) / options.batch
        losses = Losses(kl, hidden)
        if not torch.isfinite(torch.tensor(losses.total(options.hidden))):
            raise CalibrationError(
                f"healing: the loss of step {step + 1} is not finite; use a smaller learning rate "
                f"(attention.heal.learning_rate, now {options.learning_rate:g})"
            )
        return losses

    def _batch(self, step: int) -> list[torch.Tensor]:
        """The windows of a step: epoch after epoch, each in an order of its own that the seed determines."""
        chosen = []
        count = len(self._windows)
        for position in range(step * self._options.batch, (step + 1) * self._options.batch):
            epoch, index = divmod(position, count)
            generator = torch.Generator().manual_seed(self._options.seed + epoch)
            chosen.append(self._windows[int(torch.randperm(count, generator=generator)[index])])
        return chosen

    @torch.no_grad()
    def _evaluate(self, state: HealState) -> None:
        """Look at the held-out text, and keep the weights if they are the best so far."""
        kl = 0.0
        with self._autocast():
            if not self._expected:
                self._expected = [self._teacher.decode(window)[0] for window in self._held_out]
            for window, target in zip(self._held_out, self._expected, strict=True):
                final, _ = self._student.decode(window)
                kl += prediction_divergence(self._teacher, self._student, target, final, gradient=False)[0]
        state.held_out.append({"step": state.step, "kl": kl / len(self._held_out)})
        if state.held_out[-1]["kl"] <= min(entry["kl"] for entry in state.held_out):
            state.best = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}

    def _stalled(self, state: HealState) -> bool:
        """Whether the held-out text has been getting no better."""
        scores = [entry["kl"] for entry in state.held_out]
        return len(scores) > self._options.patience and min(scores[-self._options.patience :]) > min(scores)

    def _autocast(self) -> AbstractContextManager[object]:
        dtype = self._student.skeleton.dtype
        return nullcontext() if dtype == torch.float32 else torch.autocast(self._device.type, dtype)

    def _collect(self, optimizer: torch.optim.Optimizer, state: HealState) -> None:
        state.weights = {name: parameter.detach() for name, parameter in self._parameters.items()}
        state.momentum = {
            name: optimizer.state[parameter]["momentum_buffer"] for name, parameter in self._parameters.items()
        }

    def _restore(self, optimizer: torch.optim.Optimizer, state: HealState) -> HealState:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state.weights[name])
            optimizer.state[parameter] = {"momentum_buffer": state.momentum[name].to(self._device)}
        return state
