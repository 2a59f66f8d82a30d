"""Distilling a quantized model on disk: scales, norms and codes learn from the original; files keep their layout."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.memory import kept_of
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import DatasetError, UsageError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.memory import keeping_freed_memory
from llmconvert.needs import Needs
from llmconvert.quantize.distil.artifact import DistilledArtifact, PackedArtifact, counted
from llmconvert.quantize.distil.gguf import GgufArtifact
from llmconvert.quantize.distil.memory import distil_memory, needs_of, state_nbytes
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.requirements import (
    Counted,
    norm_names,
    numbers_of,
    require_single_experts,
    require_still_experts,
)
from llmconvert.quantize.distil.resident import ResidentStudent
from llmconvert.quantize.distil.streamed import StreamedStudent
from llmconvert.quantize.distil.student import Student, Subject
from llmconvert.report.steps import DistilReport
from llmconvert.storage.artifact import job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.dense import require_dense
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, check_output_directory
from llmconvert.training.loop import Training
from llmconvert.training.output import build_trained
from llmconvert.training.state import TrainingState

__all__ = ["DistilPlan", "plan_distil"]


@dataclass(frozen=True, slots=True)
class DistilPlan:
    """A distillation that was settled from headers; :func:`plan_distil` makes one.

    Attributes:
        needs: what running it takes.
        streamed: whether one block is in memory at a time: both models do not fit, or are mixtures of experts.
    """

    needs: Needs
    streamed: bool
    _subject: Subject
    _counted: Counted
    _output: Path
    _windows: Sequence[torch.Tensor]
    _state: Path | None

    def run(self) -> DistilReport:
        """Train, and write the output; what an interrupted run of the same plan has saved is continued.

        Raises:
            CalibrationError: a loss is not finite.
            CapacityError: the disk does not suffice.
            OutputError: the output is in use.
        """
        subject, context, options = self._subject, self._subject.context, self._subject.options
        about = {
            "original": subject.original.identity,
            "dtype": str(compute_dtype(context.device)),
            "options": asdict(options),
            "streamed": self.streamed,
        }
        stored, layout = subject.artifact.stored, subject.artifact.layout
        job = job_key(stored, layout, about, identity=context.identity, windows=self._windows)
        with build_trained(self._output, layout, job, self._state, context.progress) as made:
            student: Student
            if self.streamed:
                context.progress.log(
                    "distillation: one block of each model is in memory at a time, and of a mixture one expert"
                )
                student = StreamedStudent(subject, self._windows, made.work)
            else:
                student = ResidentStudent(subject, self._windows)
            kept = kept_of(self.needs.memory, context.device)
            training = Training(student.pair, student.learner, options)
            with keeping_freed_memory(kept), context.progress.task("Distilling", options.steps) as task:
                final = training.run(made.found, job, made.save, task)
            made.write(student.stored(final.best or student.learner.keep()), stored)
        return self._report(final, student.moved, made.start)

    def _report(self, state: TrainingState, moved: int, start: int) -> DistilReport:
        looks, count, subject = state.held_out, self._counted, self._subject
        best = min(looks, key=lambda entry: entry["kl"]) if looks else None
        return DistilReport(
            steps=state.step,
            asked=subject.options.steps,
            best_step=int(best["step"]) if best is not None else state.step,
            tokens=sum(self._windows[0].shape[1] * subject.options.batch for _ in state.history),
            trained=count.scales + count.norms,
            before=looks[0]["kl"] if looks else None,
            after=best["kl"] if best is not None else None,
            history=tuple(state.history),
            held_out=tuple(looks),
            seconds=state.seconds,
            resumed_at=start,
            codes=count.codes,
            moved=moved,
            norms=len(subject.norms),
            streamed=self.streamed,
        )


def plan_distil(
    original: Checkpoint,
    artifact: Checkpoint,
    output: Path,
    options: DistilOptions,
    *,
    windows: Sequence[torch.Tensor],
    context: Context | None = None,
    state: Path | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> DistilPlan:
    """Settle a distillation: what ``artifact`` stores learns from ``original``; nothing but headers is read.

    Both models will be in memory, what is not trained once; where that does not fit and codes stay as they are, one
    block at a time, and always so of mixtures, one expert after the other. Names, dtypes and shapes of all tensors
    stay, and so do config and files.

    Args:
        original: dense weights, the teacher.
        artifact: the same model, quantized, as it is stored; it stays open.
        output: a directory that does not exist yet or is empty; it appears whole or not at all.
        options: how.
        windows: token ids, each ``[1, length]``; the last ``options.held_out`` are kept for measuring.
        context: device, memory, progress (one unit per step), and what tells these two models from others.
        state: a file to keep the state in; see :func:`llmconvert.convert.heal.job.plan_heal`.
        max_shard_bytes: size at which a new shard is begun.

    Raises:
        UnsupportedError: the artifact's format or schemes have no scales to learn, or it is a mixture whose codes are
            to move, or whose experts are not stored one by one.
        UsageError: models that don't go together, or an output directory that is unusable.
        DatasetError: too few windows.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    check_output_directory(output)
    require_dense(original, "the original")
    stored: DistilledArtifact
    stored = (
        GgufArtifact(artifact) if isinstance(artifact, GgufCheckpoint) else PackedArtifact(artifact, max_shard_bytes)
    )
    original, view = stored.original(original), stored.view
    skeleton = Skeleton(view, context.device, compute_dtype(context.device))
    require_still_experts(skeleton, options)
    require_single_experts(skeleton, stored.in_codes)
    sites = [site.tensor for site in skeleton.sites.values() if site.stored_alone]
    weights = tuple(name for name in sites if stored.holds(name))
    for name in weights:
        stored.check(name, moving=options.code_rate > 0)
    left = [name for name in sites if name in stored.apart and name not in weights]
    if left:
        context.progress.log(
            f"distillation: {len(left)} linears stay as they are, {left[0]} for one: stored as floats, or not by rows"
        )
    norms = tuple(name for name in norm_names(skeleton) if stored.holds_norm(name)) if options.norms else ()
    _require_same(skeleton, original, (*weights, *norms))
    if len(windows) < options.held_out + 1:
        raise DatasetError(
            f"distillation: {len(windows)} windows of text, of which {options.held_out} are held out, leave nothing "
            "to learn from; give more text, or shorter windows"
        )
    count, lengths = counted(stored, weights, norms), [window.shape[1] for window in windows]
    largest = max((numbers_of(view, name) for name in weights), default=0)
    memory = distil_memory(skeleton, largest, count, options, lengths, context)
    made = output_nbytes(stored.layout, stored.stored.config or None, stored.stored.files)
    kept = state_nbytes(count.codes, count.scales + count.norms, options)
    needs = needs_of(memory, original, made, kept, context)
    subject = Subject(original, stored, weights, norms, options, context)
    return DistilPlan(needs, memory.streamed, subject, count, output, windows, state)


def _require_same(skeleton: Skeleton, original: Checkpoint, trained: Collection[str]) -> None:
    """See that the original has what is trained, too; experts may lie otherwise in it.

    Args:
        skeleton: of the artifact as dense weights.
        original: the model that it was made of.
        trained: tensors of the artifact.

    Raises:
        UsageError: it has not.
    """
    experts = {site.tensor: site for site in skeleton.sites.values() if site.kind == "expert"}
    own = Skeleton(original, skeleton.device).sites if experts else {}
    for name in trained:
        if name in experts:
            site = experts[name]
            same = site.name in own and own[site.name].shape == site.shape
        else:
            same = name in original and original.infos[name].shape == skeleton.checkpoint.infos[name].shape
        if not same:
            raise UsageError(
                f"tensor {name} of the artifact is not the original's; distil from the model it was made of"
            )
