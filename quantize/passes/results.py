"""What comes of a quantization: each linear's own numbers, and the job's; and the file that keeps the former."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llmconvert.engine.memory import MemoryEstimate
from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.plan import QuantizationPlan
from llmconvert.quantize.sink import ArtifactSink
from llmconvert.storage.writer import write_json

__all__ = [
    "LayerResult",
    "QuantizeResult",
    "coarse_layers",
    "coarse_remark",
    "layers_of",
    "read_layers",
    "write_layers",
]

# Of a linear, from where on it is said: with a half the error of all others has grown by 3 % in NVFP4 and by 19 % in
# E4M3, in normally distributed weights beside one large one.
_COARSE = 0.25
# Linears that are named.
_NAMED = 4


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
        coarse: share of it that has lost digits below the one float32 scale of all of it
            (:func:`~llmconvert.quantize.narrow.coarse_share`); None where there is no such scale.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    error: float | None
    damping: float | None
    expert: str | None = None
    tokens: int | None = None
    outer: str = ""
    coarse: float | None = None


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
    found = ((plan.sites[name], plan.schemes[name], taken) for name, taken in sink.results.items())
    return tuple(
        LayerResult(
            site.stored,
            str(scheme),
            site.shape,
            taken.error,
            taken.damping,
            site.owner,
            taken.tokens,
            site.outside,
            taken.coarse,
        )
        for site, scheme, taken in found
    )


def coarse_layers(layers: Iterable[LayerResult]) -> tuple[LayerResult, ...]:
    """The linears of which so much has lost digits that their error is above what their number has otherwise."""
    return tuple(layer for layer in layers if (layer.coarse or 0.0) >= _COARSE)


def coarse_remark(layers: Iterable[LayerResult]) -> str:
    """What is said of such linears; nothing where there are none."""
    coarse = coarse_layers(layers)
    if not coarse:
        return ""
    worst = max(coarse, key=lambda layer: layer.coarse or 0.0)
    named = ", ".join(layer.name for layer in coarse[:_NAMED])
    more = f" and {len(coarse) - _NAMED} more" if len(coarse) > _NAMED else ""
    return (
        f"coarse scales: {named}{more} ({worst.coarse:.0%} of {worst.name}). A weight of theirs, or of a linear whose "
        "float32 scale they share, is tens of thousands of times as large as most others, which have few digits below "
        "it. Give them a scheme without a scale for all (mxfp4 for nvfp4, fp8-dynamic for fp8-static), or leave them "
        "dense, with an override"
    )


def write_layers(record: Path, layers: Sequence[LayerResult]) -> None:
    """Keep what came of each linear in a file."""
    write_json(record, [asdict(layer) for layer in layers])


def read_layers(record: Path) -> tuple[LayerResult, ...]:
    """What :func:`write_layers` kept."""
    return tuple(LayerResult(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.loads(record.read_bytes()))
