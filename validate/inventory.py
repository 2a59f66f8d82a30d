"""Inventory: every tensor of the original found again in the artifact, with its relative error.

An artifact can load and compute nonsense because a tensor was dropped, reshaped or written from the wrong buffer, and
loaders fill what is missing with random numbers. So every tensor of the source must be found again, by its name or in
what transformers makes of it while it loads, and the relative error ‖source − artifact‖ / ‖source‖ (Frobenius norm) of
its dequantized values is measured. Where norms hold other values, scales or a rotation went into the weights around
them (AWQ, SmoothQuant, QuaRot): these compute the same in other coordinates, and have no error of this kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.view import MergedAttention
from llmconvert.engine.architecture.config import build_config, declares_tied_embeddings
from llmconvert.engine.architecture.expert_storage import Conversions
from llmconvert.engine.architecture.loading.held import HeldTensors, made_tensors
from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.decoder import DecoderView
from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.machine import of_machine
from llmconvert.memory import row_slices
from llmconvert.needs import Needs
from llmconvert.progress import SILENT, Progress
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import DTYPE_NAMES, Checkpoint
from llmconvert.validate.measurement import Measurement, Planned, Subject

__all__ = ["Inventory", "InventoryCheck", "Status", "TensorRecord", "take_inventory"]

Status = Literal["kept", "cast", "changed", "quantized", "merged", "tied", "added", "dropped", "reshaped"]

_CHUNK_ELEMENTS = 1 << 22
# Rounding to bfloat16 keeps the relative error of every element below 2**-8.
_CAST_ERROR = 2.0**-8


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor of the source, and what it became.

    Attributes:
        status: ``kept`` bit for bit, ``cast`` to another dtype, ``changed`` in values, ``quantized``, ``merged``
            (attention heads), ``tied`` to an equal tensor, ``added``; ``dropped`` and ``reshaped`` are problems.
        shape: in the artifact, dequantized; in the source if it is dropped.
        dtype: the source's safetensors dtype name.
        error: relative error of the (dequantized) values; None where there is nothing to compare, or only values in
            other coordinates.
    """

    name: str
    status: Status
    shape: tuple[int, ...]
    dtype: str
    error: float | None


@dataclass(frozen=True, slots=True)
class Inventory:
    """The records of all tensors, in the source's order, then those only the artifact has.

    Attributes:
        problems: what is wrong, in words.
        moved: norms hold other values, so weights are in other coordinates and have no errors.
    """

    tensors: tuple[TensorRecord, ...]
    problems: tuple[str, ...]
    moved: bool

    @property
    def counts(self) -> dict[str, int]:
        """Status → number of tensors."""
        return dict(Counter(record.status for record in self.tensors))


@dataclass(frozen=True, slots=True)
class InventoryCheck(Measurement):
    """The inventory as a measurement: how many tensors are missing, misshapen or not finite, against an original."""

    def needs(self, planned: Planned) -> Needs:
        """Pieces of a tensor in both, in float32, with their difference and what they are unpacked from."""
        largest = max((math.prod(info.shape) for info in planned.dense.infos.values()), default=0)
        return Needs(BASE_NBYTES + tokenizer_nbytes(planned.dense) + 16 * min(largest, _CHUNK_ELEMENTS))

    def measure(self, subject: Subject) -> list[Check]:
        """One check, with the record of every tensor; none without an original."""
        if subject.original is None:
            return []
        inventory = take_inventory(subject.original, subject.stored, subject.dense, progress=subject.progress)
        counts = ", ".join(f"{count} {status}" for status, count in sorted(inventory.counts.items()))
        problems = inventory.problems
        moved = "; norms are changed, so weights are in other coordinates, and no errors of theirs are given"
        text = counts + moved * inventory.moved
        if problems:
            text = f"{len(problems)} tensors are wrong, first: {problems[0]}" if len(problems) > 1 else problems[0]
        return [
            Check(
                name="inventory",
                value=len(problems),
                limit=0,
                ok=not problems,
                unit="tensors",
                detail={
                    "text": text,
                    "counts": inventory.counts,
                    "problems": list(problems),
                    "tensors": [asdict(record) for record in inventory.tensors],
                },
            )
        ]


def take_inventory(
    source: Checkpoint, stored: Checkpoint, dense: Checkpoint, *, progress: Progress = SILENT
) -> Inventory:
    """Account for every tensor of ``source`` in an artifact.

    Args:
        source: the original, dequantized if it was quantized.
        stored: the artifact as it is on disk.
        dense: the artifact with quantized weights seen as dense ones, under the source's names.

    Raises:
        CheckpointError: a tensor cannot be read.
    """
    if isinstance(stored, GgufCheckpoint):  # it holds a decoder, whatever that was a part of
        source = DecoderView(source)
        dense = _as_the_other_has_it(dense, source)
    source = _as_the_other_has_it(source, dense)
    records: list[TensorRecord] = []
    problems: list[str] = []
    merged = _merged_shapes(source, dense)
    with progress.task("inventory", len(source)) as task:
        for name in source:
            record, problem = _account(name, source, stored, dense, merged)
            records.append(record)
            problems.extend(problem)
            task.advance(1, name)
    for name, info in dense.infos.items():
        if name not in source:
            records.append(TensorRecord(name, "added", info.shape, DTYPE_NAMES[info.dtype], None))
    moved = any(_moves_others(record) for record in records)
    if moved:
        records = [replace(record, error=None) if _may_be_moved(record) else record for record in records]
    return Inventory(tuple(records), tuple(problems), moved)


def _as_the_other_has_it(one: Checkpoint, other: Checkpoint) -> Checkpoint:
    """A checkpoint with what its class makes of its tensors as it loads, where the other has that in their place."""
    if all(name in other for name in one) or all(name in one for name in other):
        return one
    try:
        model = build_meta_model(build_config(one.config), torch.float32, "sdpa")
    except (UnsupportedError, CheckpointError):
        return one
    made = made_tensors(Conversions(model), one, lambda target, conversion: target in other and target not in one)
    return HeldTensors(one, made) if made else one


def _moves_others(record: TensorRecord) -> bool:
    """Whether this is the weight of a norm, with values that quantization alone does not give it."""
    norm = len(record.shape) == 1 and record.name.endswith(".weight")
    return norm and record.status == "changed" and record.error is not None


def _may_be_moved(record: TensorRecord) -> bool:
    return record.status == "quantized" or (record.status == "changed" and len(record.shape) > 1)


def _account(
    name: str,
    source: Checkpoint,
    stored: Checkpoint,
    dense: Checkpoint,
    merged: Mapping[str, tuple[int, ...]] | None,
) -> tuple[TensorRecord, list[str]]:
    """The record of one source tensor, and what is wrong with it in words."""
    info = source.infos[name]
    dtype = DTYPE_NAMES[info.dtype]
    if name not in dense:
        twin = _tied_to(name, source, dense)
        if twin is not None:
            return TensorRecord(name, "tied", info.shape, dtype, 0.0), []
        if merged is not None and name not in merged:  # went with its head
            return TensorRecord(name, "merged", info.shape, dtype, None), []
        return TensorRecord(name, "dropped", info.shape, dtype, None), [f"{name} is missing from the artifact"]
    shape = dense.infos[name].shape
    if shape != info.shape:
        if merged is not None and shape == merged[name]:
            return TensorRecord(name, "merged", shape, dtype, None), []
        problem = [f"{name} has shape {list(shape)}, the source {list(info.shape)}"]
        return TensorRecord(name, "reshaped", shape, dtype, None), problem
    error = _relative_error(name, source, dense)
    if not math.isfinite(error):
        problem = [f"{name} holds values that are not finite, or is not zero where the source is"]
        return TensorRecord(name, "changed", shape, dtype, None), problem
    # Codes of a byte each (int8, FP8) keep their weight's name.
    if name not in stored or stored.infos[name].dtype != dense.infos[name].dtype:
        return TensorRecord(name, "quantized", shape, dtype, error), []
    if stored.infos[name].dtype == info.dtype:
        return TensorRecord(name, "changed" if error else "kept", shape, dtype, error), []
    return TensorRecord(name, "changed" if error > _CAST_ERROR else "cast", shape, dtype, error), []


def _merged_shapes(source: Checkpoint, dense: Checkpoint) -> dict[str, tuple[int, ...]] | None:
    """The shapes of the source's tensors with as many key-value heads as the artifact has; None if it has no fewer."""
    try:
        kv_heads = read_geometry(dense).kv_heads
        if kv_heads >= read_geometry(source).kv_heads:
            return None
        return {name: info.shape for name, info in MergedAttention(source, kv_heads).infos.items()}
    except (UnsupportedError, CheckpointError) as error:
        if of_machine(error):
            raise
        return None  # heads that can't be read weren't merged


def _tied_to(name: str, source: Checkpoint, dense: Checkpoint) -> str | None:
    """A tensor of the artifact to which ``name`` is equal in the source and may be tied by the config."""
    if declares_tied_embeddings(dense.config) is False:
        return None
    shape = source.infos[name].shape
    for other in source:
        if other != name and other in dense and source.infos[other].shape == shape and _equal(name, other, source):
            return other
    return None


def _pieces(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor, a bounded number of elements each."""
    for part in row_slices(shape, _CHUNK_ELEMENTS):
        yield part.start, part.stop


def _equal(first: str, second: str, source: Checkpoint) -> bool:
    return all(
        torch.equal(source.read_rows(first, *rows), source.read_rows(second, *rows))
        for rows in _pieces(source.infos[first].shape)
    )


def _relative_error(name: str, source: Checkpoint, dense: Checkpoint) -> float:
    """Not finite where either holds NaN, or an infinity that the other doesn't: masks and limits hold infinities."""
    difference = norm = 0.0
    for rows in _pieces(source.infos[name].shape):
        ours, theirs = source.read_rows(name, *rows).float(), dense.read_rows(name, *rows).float()
        infinite = ours.isinf() & (ours == theirs)
        if infinite.any():
            ours, theirs = ours.masked_fill(infinite, 0), theirs.masked_fill(infinite, 0)
        norm += float(ours.square().sum(dtype=torch.float64))
        difference += float(ours.sub_(theirs).square_().sum(dtype=torch.float64))
    if norm == 0:
        return 0.0 if difference == 0 else math.inf
    return math.sqrt(difference / norm)
