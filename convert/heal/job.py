"""Healing a merged checkpoint by distillation from the original, on disk: refused, resumed, or written whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.convert.heal.learner import heal_learner, written_tensors
from llmconvert.convert.heal.options import HealOptions
from llmconvert.convert.heal.targets import Targets, attention_names, heal_nbytes, read_targets
from llmconvert.engine.memory import BASE_NBYTES, kept_of
from llmconvert.errors import DatasetError, UsageError
from llmconvert.memory import keeping_freed_memory
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.report.steps import HealReport
from llmconvert.storage.artifact import job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.shared import share_tensors
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, check_output_directory, plan_layout
from llmconvert.training.loop import Training
from llmconvert.training.model import ResidentModel
from llmconvert.training.output import build_trained
from llmconvert.training.pair import ResidentPair
from llmconvert.training.state import TrainingState

__all__ = ["HealPlan", "heal_attention", "plan_heal"]


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
    _targets: Targets
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
        targets, options = self._targets, self.options
        attention = (*targets.attention, *attention_names(original))
        apart = frozenset((*attention, *targets.names) if options.train == "all" else attention)
        dtype = compute_dtype(context.device)
        identity = context.identity
        about = {
            "original": original.identity if not identity else "",
            "dtype": str(dtype),
            "options": asdict(options),
        }
        job = job_key(merged, self.layout, about, identity=identity, windows=self._windows)
        with build_trained(self._output, self.layout, job, self._state, context.progress) as made:
            shared = share_tensors((original, merged), apart, context.device, dtype)
            teacher, student = (ResidentModel(view, context.device, dtype) for view in shared)
            learner = heal_learner(student, targets, options)
            kept = kept_of(self.needs.memory, context.device)
            healing = Training(ResidentPair(teacher, student, self._windows), learner, options)
            with keeping_freed_memory(kept), context.progress.task("Healing", options.steps) as task:
                final = healing.run(made.found, job, made.save, task)
            best = final.best or learner.keep()
            report = _report(final, options, targets, self._windows[0].shape[1], made.start)
            del healing, learner, teacher, student, shared, final
            made.write(written_tensors(best, targets, merged, options), merged)
        return report


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
    """Settle a healing: weights of ``merged`` that learn from ``original``; nothing but headers is read.

    Both models will be in memory, with what they share once: everything but attention, or nothing where all weights are
    trained. What changes are attention's weights, those of all linears in the blocks, or all, as the options say.

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
        UnsupportedError: an architecture whose weights can't all be trained.
        DatasetError: too few windows.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    check_output_directory(output)
    require_dense(original, "the original")
    require_dense(merged, "the merged model")
    targets = read_targets(merged, options, context.device)
    _require_kin(original, merged, frozenset((*targets.attention, *attention_names(original))))
    _check_windows(windows, options)
    memory = heal_nbytes(merged, targets, options, max(window.shape[1] for window in windows), context)
    layout = plan_layout((TensorSpec(i.name, i.dtype, i.shape) for i in merged.infos.values()), max_shard_bytes)
    passing = targets.state_nbytes
    disk = output_nbytes(layout, merged.config, merged.files) + passing
    on_host = context.device.type == "cpu"
    host, held = (memory, 0) if on_host else (BASE_NBYTES + merged.nbytes, memory - BASE_NBYTES)
    needs = Needs(host, held, disk, passing=passing)
    return HealPlan(options, layout, needs, targets, original, merged, output, windows, state, context)


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


def _report(state: TrainingState, options: HealOptions, targets: Targets, length: int, start: int) -> HealReport:
    looks = state.held_out
    best = min(looks, key=lambda entry: entry["kl"]) if looks else None
    return HealReport(
        train=options.train,
        steps=state.step,
        asked=options.steps,
        best_step=int(best["step"]) if best is not None else state.step,
        tokens=length * options.batch * len(state.history),
        trained=targets.heads + targets.others,
        before=looks[0]["kl"] if looks else None,
        after=best["kl"] if best is not None else None,
        history=tuple(state.history),
        held_out=tuple(looks),
        seconds=state.seconds,
        resumed_at=start,
    )


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
