"""What an artifact gains and loses where it is served: time to load, memory, speed of reading and of writing.

Original and artifact take turns, each turn in a process of its own: what else the machine does meets both alike.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmconvert.convert.inspection import describe_model
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import LlmconvertError
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.machine import of_machine
from llmconvert.quantize.formats.compressed.config import has_zero_points
from llmconvert.quantize.formats.dense_view import QuantizedView
from llmconvert.quantize.formats.reading import declared_quantization
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Section
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.validate.measurement import Measurement, Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError
from llmconvert.validate.runtimes.transformers import not_loaded
from llmconvert.validate.serving.runtimes import ServedBy, Turn, run_turn

__all__ = ["ServingCheck", "stored_as"]

_ARTIFACT, _ORIGINAL = "artifact", "original"
# In which llama.cpp gets an original that is no GGUF file.
_DENSE_TYPES = {"float16": "f16", "float32": "f32"}


@dataclass(frozen=True, slots=True)
class ServingCheck(Measurement):
    """Load time, memory and speed in runtimes as a measurement; a runtime that was asked for and gave none fails.

    Attributes:
        runtimes: in which.
        contexts: tokens of the prompts; those beyond the model's trained length are left out.
        tokens: written behind each.
        rounds: turns of original and artifact.
    """

    runtimes: tuple[ServedBy, ...]
    contexts: tuple[int, ...] = (512, 2048)
    tokens: int = 32
    rounds: int = 2

    def require(self) -> None:
        """Refuse, before any work, a runtime that is not there."""
        for served in self.runtimes:
            served.require()

    def measure(self, subject: Subject) -> list[Check]:
        """One check for each runtime: the artifact's speed of writing at the longest context, with all else beside.

        A runtime that cannot run the artifact fails it only where none of the others can.
        """
        format, schemes = stored_as(subject.stored, subject.dense)
        accelerated = torch.cuda.is_available()
        lacking = [served.lacks(format, schemes, accelerated=accelerated) for served in self.runtimes]
        return [
            self._check(served, subject, lack, asked=all(lacking))
            for served, lack in zip(self.runtimes, lacking, strict=True)
        ]

    def _check(self, served: ServedBy, subject: Subject, lack: str, *, asked: bool) -> Check:
        name, label = f"serve.{served.key}.tokens_per_second", f"Speed of writing in {served.name}"
        if lack:
            return Check.unmeasured(name, f"{served.name} {lack}", asked=asked, label=label, quiet=True)
        try:
            contexts = self._contexts(subject)
            found, notes = self._turns(served, subject, contexts)
        except UnmeasuredError as error:
            return Check.unmeasured(name, str(error), asked=True, label=label, quiet=True)
        longest = contexts[-1]
        medians = {model: _median(turns) for model, turns in found.items()}
        artifact, original = medians[_ARTIFACT], medians.get(_ORIGINAL)
        where = f"{served.name} {artifact.version} on {subject.device}, {os.cpu_count()} processors"
        gains = "" if original is None else f"{_gains(artifact, original, contexts)}; "
        text = "; ".join([f"{gains}{where}; one sequence, greedy", *notes])
        return Check(
            name=name,
            label=f"{label} after {longest:,} tokens",
            value=artifact.writing[longest],
            reference=original.writing[longest] if original is not None else None,
            unit="tokens/s",
            detail={"text": text, "runtime": f"{served.name} {artifact.version}", "contexts": list(contexts)},
            sections=(self._section(served, found, contexts, text),),
        )

    def _contexts(self, subject: Subject) -> tuple[int, ...]:
        trained = Architecture.of(subject.dense.config).trained_length
        limits = [limit for limit in (trained, describe_model(subject.dense).position_limit) if limit is not None]
        most = min(limits) - 2 * self.tokens if limits else max(self.contexts)
        fitting = tuple(context for context in sorted(self.contexts) if context <= most)
        if not fitting:
            raise UnmeasuredError(f"the model takes {min(limits):,} positions, fewer than any context asked for")
        return fitting

    def _turns(
        self, served: ServedBy, subject: Subject, contexts: Sequence[int]
    ) -> tuple[dict[str, list[Turn]], list[str]]:
        """Every turn by model, and what is to be said of it."""
        notes: list[str] = []
        vocabulary = Architecture.of(subject.dense.config).vocab_size
        with _original(served, subject, notes) as original:
            models = {_ORIGINAL: original} if original is not None else {}
            models[_ARTIFACT] = (_path(subject), subject.stored, subject.dense)
            for _, _, dense in models.values():
                if served.name == "transformers" and (reason := not_loaded(dense, subject.device, subject.memory)):
                    raise UnmeasuredError(reason)
            found: dict[str, list[Turn]] = {}
            with subject.progress.task(f"serving in {served.name}", self.rounds * len(models)) as task:
                for _ in range(self.rounds):
                    for model, (path, stored, _dense) in list(models.items()):
                        try:
                            turn = run_turn(
                                served,
                                path,
                                contexts,
                                self.tokens,
                                vocabulary=vocabulary,
                                seed=subject.seed,
                                options=_options(served, stored, subject),
                            )
                        except UnmeasuredError as error:
                            if model == _ARTIFACT:
                                raise
                            notes.append(f"the original: {error}")
                            del models[model]
                            found.pop(model, None)
                            continue
                        found.setdefault(model, []).append(turn)
                        task.advance(1, f"{model}: {turn.writing[contexts[-1]]:.1f} tokens/s")
        return found, notes

    def _section(
        self, served: ServedBy, found: Mapping[str, Sequence[Turn]], contexts: Sequence[int], text: str
    ) -> Section:
        speeds = [
            Column(heading=f"{what} {context:,}", unit="tokens/s")
            for context in contexts
            for what in ("reads", "writes after")
        ]
        rows: list[tuple[Cell, ...]] = []
        for number in range(self.rounds):
            for model, turns in found.items():
                for turn in turns[number : number + 1]:
                    both = [speed for one in contexts for speed in (turn.reading[one], turn.writing[one])]
                    rows.append((model, float(number + 1), turn.load, float(turn.memory), *both))
        return Section(
            name=f"serve-{served.key.replace('_', '-')}",
            title=f"Served by {served.name}",
            text=f"{text}. A process for every turn, original and artifact alternating; {self.tokens} tokens are "
            "written behind a random prompt. Memory is the process's at most, loading until it answers first.",
            columns=(
                Column(heading="model"),
                Column(heading="turn"),
                Column(heading="loads", unit="s"),
                Column(heading="memory", unit="bytes"),
                *speeds,
            ),
            rows=tuple(rows),
            shown=("card",),
        )


def _median(turns: Sequence[Turn]) -> Turn:
    def of(speeds: Sequence[Mapping[int, float]]) -> dict[int, float]:
        return {context: statistics.median(one[context] for one in speeds) for context in speeds[0]}

    return Turn(
        turns[0].version,
        statistics.median(turn.load for turn in turns),
        round(statistics.median(turn.memory for turn in turns)),
        of([turn.reading for turn in turns]),
        of([turn.writing for turn in turns]),
    )


def _gains(artifact: Turn, original: Turn, contexts: Sequence[int]) -> str:
    """What the artifact has of the original's, gains and losses alike."""
    speeds = [
        f"writes {artifact.writing[one] / original.writing[one]:.2f} × and reads "
        f"{artifact.reading[one] / original.reading[one]:.2f} × as fast as the original at {one:,} tokens"
        for one in contexts
    ]
    rest = f"takes {artifact.memory / original.memory:.2f} × its memory, {artifact.load / original.load:.2f} × to load"
    return ", ".join([*speeds, rest])


def stored_as(stored: Checkpoint, dense: Checkpoint) -> tuple[str | None, frozenset[Scheme]]:
    """The format of a checkpoint, None of dense weights in safetensors, and the schemes that are in it.

    Args:
        stored: the checkpoint as it is on disk.
        dense: what :func:`~llmconvert.quantize.formats.dense_view.open_dense` makes of it.
    """
    if isinstance(stored, GgufCheckpoint):
        return "gguf", frozenset()
    quantized = dense.quantized if isinstance(dense, QuantizedView) else {}
    return _format(stored), frozenset(found.scheme for found in quantized.values())


def _format(stored: Checkpoint) -> str | None:
    declared = declared_quantization(stored)
    return None if declared is None else str(declared.get("quant_method", "")).lower()


def _path(subject: Subject) -> Path:
    return subject.stored.path if isinstance(subject.stored, GgufCheckpoint) else subject.artifact


def _options(served: ServedBy, stored: Checkpoint, subject: Subject) -> dict[str, Any]:
    if served.name != "transformers":
        return {}
    options: dict[str, Any] = {"device": str(subject.device)}
    return {**options, "dequantize": True} if has_zero_points(declared_quantization(stored)) else options


@contextmanager
def _original(
    served: ServedBy, subject: Subject, notes: list[str]
) -> Iterator[tuple[Path, Checkpoint, Checkpoint] | None]:
    """The original as the runtime reads it; None, and a note, where it has none."""
    reference, dense = subject.reference, subject.original
    if reference is None or dense is None:
        yield None
        return
    if served.name != "llama.cpp":
        if isinstance(reference, SafetensorsCheckpoint) and served.reads(_format(reference)):
            yield reference.directory, reference, dense
            return
        notes.append(f"{served.name} does not read the original as it is stored")
        yield None
        return
    if isinstance(reference, GgufCheckpoint):
        yield reference.path, reference, dense
        return
    with tempfile.TemporaryDirectory(dir=subject.artifact.absolute().parent, prefix=".llmconvert-") as folder:
        path = Path(folder) / "original.gguf"
        kind = _DENSE_TYPES.get(str(next(iter(dense.infos.values())).dtype).removeprefix("torch."), "bf16")
        try:
            quantize_checkpoint(dense, path, method="rtn", scheme=parse_scheme(kind), format="gguf")
        except LlmconvertError as error:
            if of_machine(error):
                raise
            notes.append(f"the original: {error}")
            yield None
            return
        notes.append(f"the original is a GGUF file in {kind.upper()}")
        yield path, reference, dense
