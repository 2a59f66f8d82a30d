"""Benchmarks by lm-eval (https://github.com/EleutherAI/lm-evaluation-harness), for original and artifact.

A thin integration: the tasks, their prompts and their metrics are lm-eval's, the models are loaded as
:mod:`llmconvert.validate.runtimes.transformers` loads them. What a task downloads is lm-eval's business, too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.needs import Needs
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Section
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.measurement import Measurement, Planned, Subject
from llmconvert.validate.runtimes.transformers import loading_needs, not_loaded, runtime

__all__ = ["Tasks"]


@dataclass(frozen=True, slots=True)
class _Score:
    """A metric of a task: lm-eval's name of it, its value and standard error."""

    metric: str
    value: float
    error: float | None
    higher_is_better: bool
    samples: int


@dataclass(frozen=True, slots=True)
class Tasks(Measurement):
    """Tasks to run.

    Attributes:
        names: as lm-eval knows them.
        samples: of each task; all if None.
        fewshot: examples before each; as the task says if None.
        include: a directory with task files besides lm-eval's own.
        max_drop: what a task may lose against the original; no limit if None.
    """

    names: tuple[str, ...]
    samples: int | None = None
    fewshot: int | None = None
    include: Path | None = None
    max_drop: float | None = None

    def require(self) -> None:
        """See :class:`~llmconvert.validate.measurement.Measurement`.

        Raises:
            UnsupportedError: lm-eval is not installed.
            UsageError: it has no task of a name.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise UnsupportedError("tasks: lm-eval is not installed; pip install 'lm-eval>=0.4.9', or leave them out")
        known = set(self._manager().all_tasks)
        for name in self.names:
            if name not in known:
                raise UsageError(f"validate.tasks: lm-eval has no task {name!r}; lm-eval ls tasks lists them")

    def needs(self, planned: Planned) -> Needs:
        """That of loading a model whole; of what lm-eval holds beside it nothing is known."""
        return loading_needs(planned, original=planned.compared)

    def measure(self, subject: Subject) -> Sequence[Check]:
        """A check for each task, with its first metric; all metrics are in the section of the first check."""
        note = not_loaded(subject.dense, subject.device, subject.memory)
        if note:
            return [Check.unmeasured(f"task.{name}", note, asked=True) for name in self.names]
        ours = self._run(subject.artifact, subject)
        theirs: Mapping[str, list[_Score]] = {}
        if isinstance(subject.reference, SafetensorsCheckpoint) and not not_loaded(
            subject.reference, subject.device, subject.memory
        ):
            theirs = self._run(subject.reference.directory, subject)
        checks = [self._check(name, scores[0], _same(theirs.get(name, ()), scores[0])) for name, scores in ours.items()]
        if checks:
            checks[0] = checks[0].model_copy(update={"sections": (_section(ours, theirs),)})
        return checks

    def _run(self, directory: Path, subject: Subject) -> dict[str, list[_Score]]:
        """Task → its metrics, for a model directory."""
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with (
            subject.progress.task(f"lm-eval, {directory.name}", 1) as task,
            runtime(directory, device=subject.device, dtype=subject.dtype) as loaded,
        ):
            found: dict[str, Any] = simple_evaluate(
                model=HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=1),
                tasks=list(self.names),
                task_manager=self._manager(),
                num_fewshot=self.fewshot,
                limit=self.samples,
                log_samples=False,
                random_seed=subject.seed,
                numpy_random_seed=subject.seed,
                torch_random_seed=subject.seed,
                fewshot_random_seed=subject.seed,
            )
            task.advance(1)
        higher, counts = found["higher_is_better"], found["n-samples"]
        return {
            name: _scores(values, higher.get(name, {}), int(counts.get(name, {}).get("effective", 0)))
            for name, values in found["results"].items()
        }

    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=str(self.include) if self.include is not None else None)

    def _check(self, name: str, ours: _Score, theirs: _Score | None) -> Check:
        limit, why = None, ""
        detail: dict[str, Any] = {"metric": ours.metric, "samples": ours.samples, "error": ours.error}
        if self.max_drop is None:
            pass
        elif theirs is None or not ours.higher_is_better:  # a limit that can't be judged is not kept
            why = "the original could not be measured" if theirs is None else f"{ours.metric} is no score that falls"
            why = f"max_drop can't be judged: {why}; leave it out to do without"
        else:
            limit = theirs.value - self.max_drop
            if ours.value < limit:
                why = (
                    f"{ours.metric} fell from {100 * theirs.value:.1f} to {100 * ours.value:.1f} %, "
                    f"allowed are {100 * self.max_drop:g} points"
                )
        if why:
            detail["text"] = f"{name}: {why}"
        return Check(
            name=f"task.{name}",
            label=f"{name}, {ours.metric}",
            value=ours.value,
            reference=theirs.value if theirs is not None else None,
            limit=limit,
            ok=not why,
            unit="share" if ours.metric.startswith(("acc", "exact_match", "f1")) else "",
            detail=detail,
        )


def _scores(values: Mapping[str, Any], higher: Mapping[str, bool], samples: int) -> list[_Score]:
    """The metrics among a task's results, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    found: list[_Score] = []
    for key, value in values.items():
        metric, _, filter_ = key.partition(",")
        if not filter_ or metric.endswith("_stderr") or not isinstance(value, float | int):
            continue
        error = values.get(f"{metric}_stderr,{filter_}")
        words = metric if filter_ == "none" else f"{metric} ({filter_})"
        known = error if isinstance(error, float) else None
        found.append(_Score(words, float(value), known, bool(higher.get(metric, True)), samples))
    return found


def _same(scores: Sequence[_Score], wanted: _Score) -> _Score | None:
    return next((score for score in scores if score.metric == wanted.metric), None)


def _section(ours: Mapping[str, list[_Score]], theirs: Mapping[str, list[_Score]]) -> Section:
    rows: list[tuple[Cell, ...]] = []
    for name, scores in ours.items():
        for score in scores:
            before = _same(theirs.get(name, ()), score)
            reference = before.value if before is not None else None
            rows.append((name, score.metric, reference, score.value, score.error, score.samples))
    return Section(
        name="tasks",
        title="Benchmarks",
        text="Run by lm-eval on both models as transformers loads them.",
        columns=(
            Column(heading="task"),
            Column(heading="metric"),
            Column(heading="original", unit="score"),
            Column(heading="artifact", unit="score"),
            Column(heading="standard error", unit="score"),
            Column(heading="samples"),
        ),
        rows=tuple(rows),
    )
