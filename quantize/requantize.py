"""Requantization: other schemes for some linears of a finished artifact, while every other tensor keeps its bytes.

The linears in question get back their original weights, everything else stays as the artifact has it, and this mixture
is quantized as far as it changed: a linear is calibrated on what the artifact's linears before it give. Methods that
aim at what the original gives see the original itself beside it, not the mixture, which has lost something already.
Linears behind a changed one keep codes that were fitted to its earlier values; what that comes to is for the next
measurement to say.
"""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.progress import SILENT, Progress
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import LayerResult, quantize_checkpoint, read_layers, write_layers
from llmconvert.quantize.methods.base import ScalingQuantizer, load_quantizer
from llmconvert.quantize.plan import Override, plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.artifact import Artifact, build_artifact, job_key
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.storage.writer import check_output_directory, plan_layout

__all__ = ["Assignment", "requantize_checkpoint", "trace"]

#: Module name of every linear in the blocks → its scheme, None for one that is dense.
Assignment = Mapping[str, Scheme | None]

_DENSE = "none"
# The directory of what is quantized anew, while the output is built.
_PART = "changed"


def trace(source: Checkpoint, device: torch.device) -> tuple[Skeleton, tuple[BlockPlan, ...]]:
    """The model's shapes: names of its linears, and which of them share an input.

    Raises:
        UnsupportedError: see :func:`llmconvert.engine.discovery.discover`.
    """
    skeleton = Skeleton(source, device)
    return skeleton, discover(skeleton)


def requantize_checkpoint(
    artifact: Path,
    source: Checkpoint,
    output: Path,
    *,
    method: str,
    format: str,
    before: Assignment,
    changes: Assignment,
    record: Path,
    windows: Sequence[torch.Tensor] = (),
    device: torch.device,
    memory_budget: int | None = None,
    identity: str = "",
    options: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> tuple[LayerResult, ...]:
    """Write ``artifact`` anew to ``output``, with ``changes``.

    Beside the output, the disk must hold the model's dense weights once more while this runs.

    Args:
        artifact: a finished artifact of ``source``, in ``format``.
        source: the original, dense.
        before: what the artifact is stored in.
        changes: linears to change. Those that share an input must change together.
        record: file for what is returned, written before ``output`` appears; see
            :func:`~llmconvert.quantize.job.read_layers`.
        windows, memory_budget, identity, options: as for :func:`llmconvert.quantize.job.quantize_checkpoint`, which
            continues an interrupted run.

    Returns:
        what came of each linear that was changed; one that became dense has no error.

    Raises:
        CheckpointError: the artifact is not stored as ``before`` says.
        SchemeError: nothing would be quantized any more.
        UnsupportedError: the method changes more than linears.
        LlmconvertError: see :func:`llmconvert.quantize.job.quantize_checkpoint`.
    """
    check_output_directory(output)
    skeleton, blocks = trace(source, device)
    layout_format = load_format(format)
    after = {**before, **changes}
    some = next((scheme for scheme in after.values() if scheme is not None), None)
    if some is None:
        raise SchemeError("the changes leave no linear quantized")
    quantizer = load_quantizer(method, options or {})
    if isinstance(quantizer, ScalingQuantizer):
        raise UnsupportedError(
            f"method {method!r} changes norms along with the linears, so single linears of a finished artifact can't "
            "be given another scheme; quantize the model anew, with overrides"
        )
    plan = plan_quantization(skeleton, blocks, some, _overrides(after), quantizer, layout_format)
    layout = plan_layout(plan.specs)
    with SafetensorsCheckpoint(artifact) as stored:
        settings = {
            "method": method,
            "options": repr(quantizer),
            "format": format,
            "device": device.type,
            "artifact": stored.identity,
            "before": {name: str(scheme) for name, scheme in before.items()},
            "changes": {name: str(scheme) for name, scheme in changes.items()},
        }
        key = job_key(source, layout, settings, identity=identity, windows=windows)
        with build_artifact(output, layout, key, progress=progress) as made:
            part = made.work / _PART
            results: tuple[LayerResult, ...] = ()
            anew = {name: scheme for name, scheme in changes.items() if scheme is not None}
            if anew and not part.exists():
                mixture = _Mixture(open_dense(stored), source, {plan.sites[name].tensor for name in changes})
                try:
                    quantize_checkpoint(
                        mixture,
                        part,
                        method=method,
                        scheme=next(iter(anew.values())),
                        format=format,
                        overrides=[*_overrides(anew), Override("*", None)],
                        windows=windows,
                        device=device,
                        memory_budget=memory_budget,
                        identity=identity or f"{stored.identity} {source.identity}",
                        options=options,
                        original=source,
                        record=record,
                        progress=progress,
                    )
                finally:
                    if any(made.work.glob(f"*{_PART}*")):  # what it leaves to continue from is worth keeping
                        made.finish("linears quantized anew")
            if anew:
                results = tuple(layer for layer in read_layers(record) if layer.scheme != _DENSE)
            dense = (plan.sites[name] for name, scheme in changes.items() if scheme is None)
            results += tuple(LayerResult(site.stored, _DENSE, site.shape, 0.0, None) for site in dense)
            write_layers(record, results)
            prefixes = tuple(plan.sites[name].prefix for name in changes)
            _merge(made, stored, source, part if anew else None, prefixes)
            files = {**stored.files, **layout_format.files(plan.declared)}
            made.publish({**stored.config, "quantization_config": plan.declared}, files)
    return results


def _overrides(assignment: Assignment) -> list[Override]:
    return [Override(glob.escape(name), scheme) for name, scheme in assignment.items()]


class _Mixture(CheckpointView):
    """An artifact's dense weights, but for some that are the original's. Inputs are not quantized in calibration."""

    def __init__(self, artifact: Checkpoint, source: Checkpoint, originals: set[str]) -> None:
        super().__init__(artifact)
        self._source = source
        self._originals = originals
        self.infos = {name: source.infos[name] if name in originals else info for name, info in artifact.infos.items()}
        self.quantized_inputs = {}

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return (self._source if name in self._originals else self.base).read_rows(name, start, stop)


def _merge(made: Artifact, stored: Checkpoint, source: Checkpoint, part: Path | None, changed: tuple[str, ...]) -> None:
    """Write unchanged tensors of the artifact and, of the linears with these prefixes, those that changed."""
    with ExitStack() as stack:
        quantized = stack.enter_context(SafetensorsCheckpoint(part)) if part is not None else None
        for name, spec in made.layout.specs.items():
            origin = stored
            if name.startswith(changed):
                origin = quantized if quantized is not None and name in quantized else source
            info = origin.infos.get(name)
            if info is None or (info.shape, info.dtype) != (spec.shape, spec.dtype):
                raise CheckpointError(f"tensor {name!r} of the artifact is not stored as its schemes say")
            made.copy(origin, [name])
