"""What comes of a quantization: each linear's own numbers, and the job's; and the file that keeps the former."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmconvert.engine.memory import MemoryEstimate
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.sink import ArtifactSink
from llmconvert.storage.writer import write_json

__all__ = ["LayerResult", "QuantizeResult", "layers_of", "read_layers", "write_layers"]


@dataclass(frozen=True, slots=True)
class LayerResult:
    """One quantized linear.

    Attributes:
        name: in the checkpoint, without ``.weight``.
        scheme: what it is stored in.
        shape: ``(rows, columns)``.
        error: squared output error over squared output on the calibration inputs; None for data-free methods.
        damping: share of the mean diagonal that its Hessian needed; None without one.
        expert: the expert that it belongs to, ``model.layers.0.mlp.experts.3``; None for others.
        tokens: of calibration text that the router sent to that expert; None without text.
        outer: ``head``, ``embedding`` or ``tied`` for what lies outside the blocks; "" for others.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    error: float | None
    damping: float | None
    expert: str | None = None
    tokens: int | None = None
    outer: str = ""


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """A finished job.

    Attributes:
        output: the artifact: a directory, or a file.
        layers: every quantized linear, in model order.
        memory: what the job was expected to need, and the mode chosen.
        nbytes: size of the weight files.
        seconds: wall-clock time of this run.
        phases: seconds of this run by phase.
        resumed_blocks: blocks that an earlier, interrupted run had finished.
        files: names of the weight files.
        types: how many tensors have each type, in formats whose files say it of every tensor (GGUF).
        notes: what is otherwise than asked for, or otherwise in the runtime than in transformers, a sentence each.
    """

    output: Path
    layers: tuple[LayerResult, ...]
    memory: MemoryEstimate
    nbytes: int
    seconds: float
    phases: Mapping[str, float]
    resumed_blocks: int
    files: tuple[str, ...] = ()
    types: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> int:
        """Quantized linears; where every tensor has a type, tensors of one that is no plain float."""
        return sum(count for kind, count in self.types.items() if kind not in FLOATS) or len(self.layers)


def layers_of(plan: QuantizationPlan, sink: ArtifactSink) -> tuple[LayerResult, ...]:
    """What came of the linears of a plan that a sink has taken."""
    found = ((plan.sites[name], plan.schemes[name], result) for name, result in sink.results.items())
    return tuple(
        LayerResult(site.stored, str(scheme), site.shape, error, damping, site.owner, tokens, site.outside)
        for site, scheme, (error, damping, tokens) in found
    )


def write_layers(record: Path, layers: Sequence[LayerResult]) -> None:
    """Keep what came of each linear in a file."""
    write_json(record, [asdict(layer) for layer in layers])


def read_layers(record: Path) -> tuple[LayerResult, ...]:
    """What :func:`write_layers` kept."""
    return tuple(LayerResult(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.loads(record.read_bytes()))
