"""Distilling a quantized model on disk: scales, norms and codes learn from the original; files keep their layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from llmconvert.compute.precision import compute_dtype
from llmconvert.context import Context
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import DatasetError, UnsupportedError, UsageError
from llmconvert.needs import Needs
from llmconvert.quantize.distil.optimizer import StoredAdam
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.requirements import (
    count_trained,
    differing,
    distil_nbytes,
    needs_of,
    norm_names,
    require_learnable,
    require_no_experts,
    state_nbytes,
)
from llmconvert.quantize.distil.weights import LearnedValue, LearnedWeight, Trained
from llmconvert.quantize.formats.base import Format, load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.reading import declared_quantization
from llmconvert.report.steps import DistilReport
from llmconvert.storage.artifact import job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec
from llmconvert.storage.dense import require_dense
from llmconvert.storage.shared import share_tensors
from llmconvert.storage.writer import DEFAULT_SHARD_BYTES, Layout, check_output_directory, plan_layout
from llmconvert.training.loop import Learner, Training
from llmconvert.training.model import ResidentModel
from llmconvert.training.output import TrainedArtifact, build_trained
from llmconvert.training.state import TrainingState

__all__ = ["DistilPlan", "plan_distil"]


@dataclass(frozen=True, slots=True)
class DistilPlan:
    """A distillation that was settled from headers; :func:`plan_distil` makes one.

    Attributes:
        options: how.
        layout: of the output's weight files: the artifact's.
        needs: what running it takes.
        weights: tensors whose scales are trained, by their dense names.
        norms: norms that are trained.
    """

    options: DistilOptions
    layout: Layout
    needs: Needs
    weights: tuple[str, ...]
    norms: tuple[str, ...]
    _original: Checkpoint
    _artifact: Checkpoint
    _view: QuantizedView
    _format: Format
    _output: Path
    _windows: Sequence[torch.Tensor]
    _state: Path | None
    _context: Context

    def run(self) -> DistilReport:
        """Train, and write the output; what an interrupted run of the same plan has saved is continued.

        Raises:
            CalibrationError: a loss is not finite.
            CapacityError: the disk does not suffice.
            OutputError: the output is in use.
        """
        artifact, original, context = self._artifact, self._original, self._context
        dtype = compute_dtype(context.device)
        about = {"original": original.identity, "dtype": str(dtype), "options": asdict(self.options)}
        job = job_key(artifact, self.layout, about, identity=context.identity, windows=self._windows)
        with build_trained(self._output, self.layout, job, self._state, context.progress) as made:
            final, stored, moved = self._train(made, job, dtype)
            made.write(stored.items(), artifact)
        return self._report(final, moved, made.start)

    def _train(
        self, made: TrainedArtifact, job: str, dtype: torch.dtype
    ) -> tuple[TrainingState, dict[str, torch.Tensor], int]:
        """The state in the end, every tensor of the output that is not the artifact's own, and how many codes moved."""
        original, context, options = self._original, self._context, self.options
        others = differing(original, self._view)
        # A quantized head or embedding is not the original's, and is left as it is.
        apart = frozenset((*self._view.quantized, *self.norms, *others))
        views = share_tensors((original, self._view), apart, context.device, dtype)
        teacher, student = (ResidentModel(view, context.device, dtype) for view in views)
        # With other norms or embeddings the artifact is in coordinates of its own: where its weights were before they
        # were quantized is not known.
        trained = self._trained(student if others else teacher, student, dtype)
        optimizer = StoredAdam(trained, lr=options.learning_rate, code_rate=options.code_rate)
        learner = Learner(
            {name: one.value for name, one in trained.items()},
            optimizer,
            partial(_keep, trained, optimizer),
            "quantize.distil.learning_rate",
            optimizer.write,
        )
        training = Training(teacher, student, learner, self._windows, options)
        with context.progress.task("Distilling", options.steps) as task:
            final = training.run(made.found, job, made.save, task)
        stored, moved = self._stored(final.best or learner.keep(), trained)
        return final, stored, moved

    def _trained(
        self, unquantized: ResidentModel, student: ResidentModel, dtype: torch.dtype
    ) -> dict[str, LearnedWeight | LearnedValue]:
        """What is trained, by the names of dense tensors; codes begin towards the values of ``unquantized``."""
        device, view = self._context.device, self._view
        values = student.train((*self.weights, *self.norms), dtype)
        found: dict[str, LearnedWeight | LearnedValue] = {}
        own = unquantized.weights(self.weights) if self.options.code_rate else {}
        for name in self.weights:
            start, stored = view.read_quantized(name), view.infos[name].dtype
            start = replace(
                start,
                codes=start.codes.to(device),
                scale=start.scale.to(device),
                zero=None if start.zero is None else start.zero.to(device),
                offset=None if start.offset is None else start.offset.to(device),
            )
            scale_dtype = self._format.scale_dtype(start.scheme, stored)
            found[name] = LearnedWeight(start, values[name], stored, scale_dtype, own.get(name))
        for name in self.norms:
            found[name] = LearnedValue(self._artifact[name].to(device), values[name])
        return found

    def _stored(
        self, best: Mapping[str, torch.Tensor], trained: Mapping[str, Trained]
    ) -> tuple[dict[str, torch.Tensor], int]:
        stored: dict[str, torch.Tensor] = {}
        moved = 0
        for name, one in trained.items():
            kept = {
                key.removeprefix(f"{name}/"): value.cpu() for key, value in best.items() if key.startswith(f"{name}/")
            }
            if not isinstance(one, LearnedWeight):
                stored[name] = kept["value"]
                continue
            moved += int((kept["codes"] != one.start.codes.cpu()).sum())
            packed = self._format.pack(self._view.quantized[name].linear, one.tensor(kept))
            # A part that says how a file is read, the order of columns for example, stays as it was.
            stored |= {part: tensor for part, tensor in packed.items() if part in self._artifact}
        return stored, moved

    def _report(self, state: TrainingState, moved: int, start: int) -> DistilReport:
        looks = state.held_out
        best = min(looks, key=lambda entry: entry["kl"]) if looks else None
        weights = sum(info.shape[0] * info.shape[1] for info in (self._view.infos[name] for name in self.weights))
        return DistilReport(
            steps=state.step,
            asked=self.options.steps,
            best_step=int(best["step"]) if best is not None else state.step,
            tokens=sum(self._windows[0].shape[1] * self.options.batch for _ in state.history),
            trained=count_trained(self._view, self.weights, self.norms),
            before=looks[0]["kl"] if looks else None,
            after=best["kl"] if best is not None else None,
            history=tuple(state.history),
            held_out=tuple(looks),
            seconds=state.seconds,
            resumed_at=start,
            codes=weights,
            moved=moved,
            norms=len(self.norms),
        )


def _keep(trained: Mapping[str, Trained], optimizer: StoredAdam) -> dict[str, torch.Tensor]:
    """What would be stored of everything now, by ``NAME/PART``."""
    return {f"{name}/{part}": value for name, one in trained.items() for part, value in optimizer.stored(one).items()}


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

    Both models will be in memory, what is not trained once. Names, dtypes and shapes of all tensors stay, and so do
    config and files.

    Args:
        original: dense weights, the teacher.
        artifact: the same model, quantized, as it is stored.
        output: a directory that does not exist yet or is empty; it appears whole or not at all.
        options: how.
        windows: token ids, each ``[1, length]``; the last ``options.held_out`` are kept for measuring.
        context: device, memory, progress (one unit per step), and what tells these two models from others.
        state: a file to keep the state in; see :func:`llmconvert.convert.heal.job.plan_heal`.
        max_shard_bytes: size at which a new shard is begun.

    Raises:
        UnsupportedError: the artifact's format or schemes have no scales to learn, or the model is a mixture of
            experts.
        UsageError: models that don't go together, or an output directory that is unusable.
        DatasetError: too few windows.
        CapacityError: memory does not suffice.
    """
    context = context or Context()
    check_output_directory(output)
    require_dense(original, "the original")
    declared = declared_quantization(artifact)
    if not declared:
        raise UsageError("distillation: the model is not quantized; there are no scales to learn")
    layout_format = load_format(str(declared.get("quant_method", "")).lower())
    if "distillation" in layout_format.lacks:
        raise UnsupportedError(f"distillation: {layout_format.lacks['distillation']}")
    view = open_dense(artifact, weights_only=True)
    assert isinstance(view, QuantizedView)
    skeleton = Skeleton(view, context.device)
    require_no_experts(skeleton)
    weights = tuple(site.tensor for site in skeleton.sites.values() if view.scheme_of(site.tensor) is not None)
    for name in weights:
        scheme = view.scheme_of(name)
        assert scheme is not None
        require_learnable(name, scheme, moving=options.code_rate > 0)
    norms = norm_names(skeleton) if options.norms else ()
    for name in (*weights, *norms):
        if name not in original or original.infos[name].shape != view.infos[name].shape:
            raise UsageError(
                f"tensor {name} of the artifact is not the original's; distil from the model it was made of"
            )
    if len(windows) < options.held_out + 1:
        raise DatasetError(
            f"distillation: {len(windows)} windows of text, of which {options.held_out} are held out, leave nothing "
            "to learn from; give more text, or shorter windows"
        )
    memory = distil_nbytes(view, weights, options, max(window.shape[1] for window in windows), context)
    layout = plan_layout((TensorSpec(i.name, i.dtype, i.shape) for i in artifact.infos.values()), max_shard_bytes)
    count = sum(rows * columns for rows, columns in (view.infos[name].shape for name in weights))
    made = output_nbytes(layout, artifact.config, artifact.files)
    kept = state_nbytes(count, count_trained(view, weights, norms), options)
    needs = needs_of(memory, original, made, kept, context)
    return DistilPlan(
        options,
        layout,
        needs,
        weights,
        norms,
        original,
        artifact,
        view,
        layout_format,
        output,
        windows,
        state,
        context,
    )
