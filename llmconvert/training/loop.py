"""The one training loop: a student is distilled from the model that it was made from.

Healing of merged attention and distillation of quantized weights are this loop with other parameters and another
optimizer. It is short because clipping, autocast and schedules are torch's. transformers' ``Trainer`` does not fit: its
checkpoints are whole models, its losses come from labels or from teachers called inside the student's forward, and two
models that share most tensors, with a loss computed a few positions at a time, are outside what it drives.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from llmconvert.errors import CalibrationError
from llmconvert.progress import Task
from llmconvert.training.loss import Losses
from llmconvert.training.options import TrainingOptions
from llmconvert.training.pair import Pair
from llmconvert.training.state import TrainingState

__all__ = ["Learner", "Training"]


@dataclass(frozen=True)
class Learner:
    """What is trained, and how a step changes it.

    Attributes:
        parameters: of the student, by the names that the state has for them.
        optimizer: moves them; everything that it remembers between steps is in its ``state``, as tensors.
        keep: what is kept of weights that do best on the held-out text, by name.
        setting: the recipe's key of the learning rate, for errors.
        refresh: makes the parameters anew from what the optimizer remembers, where they follow from it and are not
            saved; None where they don't.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    keep: Callable[[], dict[str, torch.Tensor]]
    setting: str
    refresh: Callable[[], None] | None = None


class Training:
    """A student on its way to its teacher.

    Args:
        pair: both, and the text; the last ``options.held_out`` of its windows are not learned from.
        learner: the student's parameters and their optimizer.
        options: how.
    """

    def __init__(self, pair: Pair, learner: Learner, options: TrainingOptions) -> None:
        self._pair, self._learner, self._options = pair, learner, options
        self._learned = len(pair.windows) - options.held_out
        self._held_out = range(self._learned, len(pair.windows))

    def run(
        self, state: TrainingState | None, identity: str, save: Callable[[TrainingState], None], task: Task
    ) -> TrainingState:
        """Take all steps, or those that are left after ``state``; ``save`` is called now and then.

        Raises:
            CalibrationError: the losses are not finite.
        """
        options, learner = self._options, self._learner
        optimizer = learner.optimizer
        state = self._restore(state) if state is not None else self._begin(identity)
        for group in optimizer.param_groups:
            group["initial_lr"] = group.get("initial_lr", group["lr"])
        schedule = LambdaLR(optimizer, partial(_share_of_rate, options), last_epoch=state.step - 1)
        task.advance(state.step)
        begin, spent = time.perf_counter(), state.seconds
        while state.step < options.steps and not self._stalled(state):
            losses = self._step(state.step)
            nn.utils.clip_grad_norm_(learner.parameters.values(), options.clip, error_if_nonfinite=True)
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
                self._collect(state)
                save(state)
        state.seconds = spent + time.perf_counter() - begin
        return state

    def _begin(self, identity: str) -> TrainingState:
        state = TrainingState(identity, 0, {}, {}, {})
        if self._held_out:
            self._evaluate(state)
        return state

    def _step(self, step: int) -> Losses:
        """Gradients of one step, in the parameters' ``grad``."""
        options = self._options
        positions = slice(step % options.stride, None, options.stride)
        losses = self._pair.differentiate(self._batch(step), positions=positions, hidden=options.hidden)
        if not torch.isfinite(torch.tensor(losses.total(options.hidden))):
            raise CalibrationError(
                f"the loss of step {step + 1} is not finite; use a smaller learning rate "
                f"({self._learner.setting}, now {options.learning_rate:g})"
            )
        return losses

    def _batch(self, step: int) -> list[int]:
        """The windows of a step, by number: epoch after epoch, each in an order of its own that the seed determines."""
        chosen = []
        for position in range(step * self._options.batch, (step + 1) * self._options.batch):
            epoch, index = divmod(position, self._learned)
            generator = torch.Generator().manual_seed(self._options.seed + epoch)
            chosen.append(int(torch.randperm(self._learned, generator=generator)[index]))
        return chosen

    def _evaluate(self, state: TrainingState) -> None:
        """Look at the held-out text, and keep the weights if they are the best so far."""
        state.held_out.append({"step": state.step, "kl": self._pair.divergence(self._held_out)})
        if state.held_out[-1]["kl"] <= min(entry["kl"] for entry in state.held_out):
            state.best = self._learner.keep()

    def _stalled(self, state: TrainingState) -> bool:
        """Whether the held-out text has been getting no better; looks of the first half don't tell.

        At rates that are high yet, a student may stand behind what it began with, and be ahead once they have fallen.
        """
        patience = self._options.patience
        late = [entry["kl"] for entry in state.held_out if 2 * entry["step"] > self._options.steps]
        return len(late) >= patience and min(late[-patience:]) > min(entry["kl"] for entry in state.held_out)

    def _collect(self, state: TrainingState) -> None:
        learner = self._learner
        if learner.refresh is None:
            state.weights = {name: parameter.detach() for name, parameter in learner.parameters.items()}
        state.optimizer = {
            f"{name}/{key}": value
            for name, parameter in learner.parameters.items()
            for key, value in learner.optimizer.state[parameter].items()
        }

    def _restore(self, state: TrainingState) -> TrainingState:
        learner = self._learner
        for key, value in state.optimizer.items():
            name, _, leaf = key.rpartition("/")
            learner.optimizer.state[learner.parameters[name]][leaf] = value.to(self._pair.device)
        while state.weights:  # one by one: what was read goes as it is taken up
            name, weight = state.weights.popitem()
            learner.parameters[name].data.copy_(weight)
        if learner.refresh is not None:
            learner.refresh()
        return state


def _share_of_rate(options: TrainingOptions, step: int) -> float:
    """What of the learning rate a step has: first rising evenly, then falling along half a cosine, to zero at the end.

    transformers has this schedule in a module that loads peft and bitsandbytes: 60 MB, a second, and their warnings.
    """
    warmup = max(1, round(options.warmup * options.steps))
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (options.steps + 1 - warmup)))
