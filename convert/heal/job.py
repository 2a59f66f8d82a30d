"""Healing a merged checkpoint by distillation from the original, on disk: refused, resumed, or written whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.weights import attention_tensors
from llmconvert.convert.heal.muon import Muon
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.errors import DatasetError, UsageError
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.report.steps import HealReport
from llmconvert.storage.artifact import job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.shared import share_tensors
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, check_output_directory, plan_layout
from llmconvert.training.loop import Learner, Training
from llmconvert.training.model import ResidentModel
from llmconvert.training.needs import backward_nbytes, require_memory
from llmconvert.training.options import TrainingOptions
from llmconvert.training.output import build_trained
from llmconvert.training.state import TrainingState

__all__ = ["HealOptions", "HealPlan", "heal_attention", "plan_heal"]


class HealOptions(TrainingOptions):
    """How a model is healed: what is trained are attention's weights."""


@dataclass(frozen=True, slots=True)
class HealPlan:
    """A healing that was settled from headers; :func:`plan_heal` makes one.

    Attributes:
        options: how.
        layout: of the output's weight files.
        needs: what running it takes.
    """

    options: HealOptions
    layout: Layout
    needs: Needs
    _original: Checkpoint
    _merged: Checkpoint
    _output: Path
    _windows: Sequence[torch.Tensor]
    _state: Path | None
    _context: Context

    def run(self) -> HealReport:
        """Train, and write the output; what an interrupted run of the same plan has saved is continued.

        Raises:
            CalibrationError: a loss is not finite.
            CapacityError: the disk does not suffice.
            OutputError: the output is in use.
        """
        merged, original, context = self._merged, self._original, self._context
        names = _attention_of(merged)
        apart = frozenset((*names, *_attention_of(original)))
        dtype = compute_dtype(context.device)
        identity = context.identity
        about = {
            "original": original.identity if not identity else "",
            "dtype": str(dtype),
            "options": asdict(self.options),
        }
        job = job_key(merged, self.layout, about, identity=identity, windows=self._windows)
        with build_trained(self._output, self.layout, job, self._state, context.progress) as made:
            shared = share_tensors((original, merged), apart, context.device, dtype)
            teacher, student = (ResidentModel(view, context.device, dtype) for view in shared)
            learner = _learner(student, names, self.options)
            healing = Training(teacher, student, learner, self._windows, self.options)

            with context.progress.task("Healing attention", self.options.steps) as task:
                final = healing.run(made.found, job, made.save, task)
            best = final.best or learner.keep()
            tokens = sum(self._windows[0].shape[1] * self.options.batch for _ in final.history)
            del healing, learner, teacher, student, shared
            for name in names:  # one by one, so that both dtypes are never there together
                best[name] = best[name].to(merged.infos[name].dtype)
            made.write(best, merged)
        return _report(final, self.options, tokens, made.start)


def plan_heal(
    original: Checkpoint,
    merged: Checkpoint,
    output: Path,
    options: HealOptions,
    *,
    windows: Sequence[torch.Tensor],
    context: Context | None = None,
    state: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> HealPlan:
    """Settle a healing: attention weights of ``merged`` that learn from ``original``; nothing but headers is read.

    Both models will be in memory, everything but attention once. Nothing but attention changes.

    Args:
        original: dense weights, the teacher.
        merged: the same model with other attention weights, the student.
        output: a directory that does not exist yet or is empty; it appears whole or not at all.
        options: how.
        windows: token ids, each ``[1, length]``; the last ``options.held_out`` are kept for measuring.
        context: device, memory, progress (one unit per step), and what tells these two models from others that look
            alike; what is known of their files by default.
        state: a file to keep the state in; a run that finds its own continues from there. It
            stays when the run is over: whoever has the report safe removes it. By default it lies in the hidden
            directory that the output is built in, and goes with it.
        max_shard_bytes: size at which a new shard is begun.

    Raises:
        UsageError: models that don't go together, or an output directory that is unusable.
        DatasetError: too few windows.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    check_output_directory(output)
    require_dense(original, "the original")
    require_dense(merged, "the merged model")
    names = _attention_of(merged)
    _require_kin(original, merged, frozenset((*names, *_attention_of(original))))
    _check_windows(windows, options)
    memory = _require_memory(merged, names, max(window.shape[1] for window in windows), context)
    layout = plan_layout((TensorSpec(i.name, i.dtype, i.shape) for i in merged.infos.values()), max_shard_bytes)
    trained = sum(info.nbytes // info.dtype.itemsize for info in (merged.infos[name] for name in names))
    # The trained weights, their running means and the best so far, in float32; twice while a state replaces the last.
    passing = 2 * 3 * 4 * trained
    disk = output_nbytes(layout, merged.config, merged.files) + passing
    on_host = context.device.type == "cpu"
    host, held = (memory, 0) if on_host else (BASE_NBYTES + merged.nbytes, memory - BASE_NBYTES)
    needs = Needs(host, held, disk, passing=passing)
    return HealPlan(options, layout, needs, original, merged, output, windows, state, context)


def heal_attention(
    original: Checkpoint,
    merged: Checkpoint,
    output: Path,
    *,
    windows: Sequence[torch.Tensor],
    options: HealOptions | None = None,
    device: torch.device | None = None,
    state: Path | None = None,
    identity: str = "",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress = SILENT,
) -> HealReport:
    """Heal ``merged`` by distillation from ``original``: :func:`plan_heal` and its run in one call.

    Args:
        original, merged, output, windows, options, state, max_shard_bytes: see :func:`plan_heal`.
        device, identity, progress: see :class:`~llmconvert.context.Context`.

    Raises:
        LlmconvertError: see :func:`plan_heal` and :meth:`HealPlan.run`.
    """
    context = Context(device or torch.device("cpu"), None, identity, progress)
    return plan_heal(
        original,
        merged,
        output,
        options or HealOptions(),
        windows=windows,
        context=context,
        state=state,
        max_shard_bytes=max_shard_bytes,
    ).run()


def _report(state: TrainingState, options: HealOptions, tokens: int, start: int) -> HealReport:
    looks = state.held_out
    best = min(looks, key=lambda entry: entry["kl"]) if looks else None
    return HealReport(
        steps=state.step,
        asked=options.steps,
        best_step=int(best["step"]) if best is not None else state.step,
        tokens=tokens,
        trained=sum(tensor.numel() for tensor in (state.best or state.weights).values()),
        before=looks[0]["kl"] if looks else None,
        after=best["kl"] if best is not None else None,
        history=tuple(state.history),
        held_out=tuple(looks),
        seconds=state.seconds,
        resumed_at=start,
    )


def _learner(student: ResidentModel, names: Sequence[str], options: HealOptions) -> Learner:
    """Attention's weights in float32, and Muon for heads, which learned more than AdamW from a given text."""
    parameters = student.train(names)
    geometry = read_geometry(student.skeleton.checkpoint)
    outputs = {f"{projections.output}.weight" for projections in geometry.projections}
    rows = [parameter for name, parameter in parameters.items() if name not in outputs]
    columns = [parameter for name, parameter in parameters.items() if name in outputs]

    def keep() -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}

    optimizer = Muon(rows, columns, head_dim=geometry.head_dim, lr=options.learning_rate)
    return Learner(parameters, optimizer, keep, "attention.heal.learning_rate")


def _attention_of(checkpoint: Checkpoint) -> list[str]:
    geometry = read_geometry(checkpoint)
    names = [name for layer in range(geometry.layers) for name in attention_tensors(checkpoint, geometry, layer)]
    return [name for name in names if name in checkpoint]


def _require_kin(original: Checkpoint, merged: Checkpoint, apart: frozenset[str]) -> None:
    """Refuse models that differ in more than attention.

    Raises:
        UsageError: naming a tensor.
    """
    for name in (set(original.infos) | set(merged.infos)) - apart:
        ours, theirs = merged.infos.get(name), original.infos.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            raise UsageError(
                f"tensor {name} is not the same in the original and in the model to heal; "
                "only models that differ in attention alone can be healed"
            )


def _check_windows(windows: Sequence[torch.Tensor], options: HealOptions) -> None:
    if len(windows) < options.held_out + 1:
        raise DatasetError(
            f"healing: {len(windows)} windows of text, of which {options.held_out} are held out, leave nothing to "
            "learn from; give more text, or shorter windows"
        )


def _require_memory(merged: Checkpoint, names: Sequence[str], length: int, context: Context) -> int:
    """Bytes that healing takes; refuses, before any work, what does not fit."""
    dtype = compute_dtype(context.device)
    numel = {name: info.nbytes // info.dtype.itemsize for name, info in merged.infos.items()}
    trained = sum(numel[name] for name in names)
    rest = sum(numel.values()) - trained
    activations = backward_nbytes(merged, length, dtype)
    # Teacher's attention; the student's with its gradient, its running mean, and the best so far.
    needed = BASE_NBYTES + (rest + 2 * trained) * dtype.itemsize + 4 * 4 * trained + activations
    require_memory(
        needed,
        "healing",
        f"both models with what they share held once, the optimizer, {activations / 1e6:,.0f} MB of activations",
        "use shorter windows or a machine with more memory, or leave out attention.heal",
        context,
    )
    return needed
