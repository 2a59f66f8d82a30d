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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.context import Context
from llmconvert.engine.discovery import BlockPlan, discover
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.needs import Needs
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.matrix import Readership, readership
from llmconvert.quantize.methods.base import ScalingQuantizer, load_quantizer
from llmconvert.quantize.passes.run import LayerResult, QuantizePlan, read_layers, write_layers
from llmconvert.quantize.plan import Override, QuantizationPlan, QuantizeRequest, plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.artifact import Artifact, build_artifact, job_key, output_nbytes
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView, SafetensorsCheckpoint
from llmconvert.storage.writer import Layout, check_output_directory, plan_layout

__all__ = ["Assignment", "RequantizePlan", "RequantizeRequest", "plan_requantize", "trace"]

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


@dataclass(frozen=True, slots=True)
class RequantizeRequest:
    """What is asked for when linears of an artifact get other schemes.

    Attributes:
        method: of those that are quantized anew.
        format: of the artifact.
        before: what the artifact is stored in.
        changes: linears to change. Those that share an input must change together.
        options: of the method.
    """

    method: str
    format: str
    before: Assignment
    changes: Assignment
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def anew(self) -> Mapping[str, Scheme]:
        """The linears that are quantized anew; the other changed ones become dense."""
        return {name: scheme for name, scheme in self.changes.items() if scheme is not None}


@dataclass(frozen=True, slots=True)
class RequantizePlan:
    """A requantization that was settled from headers; :func:`plan_requantize` makes one.

    Attributes:
        request: what was asked for.
        decisions: the scheme of every linear, and every tensor of the output.
        layout: of the output's weight files.
        needs: what running it takes: beside the output, the model's dense weights once more.
    """

    request: RequantizeRequest
    decisions: QuantizationPlan
    layout: Layout
    needs: Needs
    _artifact: Path
    _source: Checkpoint
    _output: Path
    _record: Path
    _windows: Sequence[torch.Tensor]
    _context: Context

    @property
    def readers(self) -> Readership:
        """Which runtimes read what is made, by the schemes that its linears really have."""
        return readership(self.request.format, self.decisions.schemes.values())

    def run(self) -> tuple[LayerResult, ...]:
        """Write the output, or go on where an interrupted run of the same plan was stopped.

        Returns:
            what came of each linear that was changed; one that became dense has no error.

        Raises:
            CheckpointError: the artifact is not stored as the request says.
            LlmconvertError: see :meth:`llmconvert.quantize.job.QuantizePlan.run`.
        """
        request, source, record, sites = self.request, self._source, self._record, self.decisions.sites
        with SafetensorsCheckpoint(self._artifact) as stored:
            key = job_key(
                source, self.layout, self._settings(stored), identity=self._context.identity, windows=self._windows
            )
            with build_artifact(self._output, self.layout, key, progress=self._context.progress) as made:
                part = made.work / _PART
                results: tuple[LayerResult, ...] = ()
                if request.anew and not part.exists():
                    try:
                        self._plan_part(stored, part).run()
                    finally:
                        if any(made.work.glob(f"*{_PART}*")):  # what it leaves to continue from is worth keeping
                            made.finish("linears quantized anew")
                if request.anew:
                    results = tuple(layer for layer in read_layers(record) if layer.scheme != _DENSE)
                dense = (sites[name] for name, scheme in request.changes.items() if scheme is None)
                results += tuple(LayerResult(site.stored, _DENSE, site.shape, 0.0, None) for site in dense)
                write_layers(record, results)
                prefixes = tuple(sites[name].prefix for name in request.changes)
                _merge(made, stored, source, part if request.anew else None, prefixes)
                declared = self.decisions.declared
                layout = load_format(request.format)
                files = {**stored.files, **layout.files(declared)}
                made.publish(layout.config(stored.config, declared), files)
        return results

    def _plan_part(self, stored: Checkpoint, part: Path) -> QuantizePlan:
        """The quantization of what is quantized anew, in the midst of everything else as the artifact has it."""
        request, context = self.request, self._context
        originals = {self.decisions.sites[name].tensor for name in request.changes}
        identity = context.identity or f"{stored.identity} {self._source.identity}"
        overrides = (*_overrides(request.anew), Override("*", None))
        first = next(iter(request.anew.values()))
        return plan_quantize(
            _Mixture(open_dense(stored), self._source, originals),
            part,
            QuantizeRequest(request.method, first, request.format, overrides, request.options),
            windows=self._windows,
            context=replace(context, identity=identity),
            original=self._source,
            record=self._record,
        )

    def _settings(self, stored: Checkpoint) -> Mapping[str, Any]:
        request = self.request
        return {
            "method": request.method,
            "options": repr(load_quantizer(request.method, request.options)),
            "format": request.format,
            "device": self._context.device.type,
            "artifact": stored.identity,
            "before": {name: str(scheme) for name, scheme in request.before.items()},
            "changes": {name: str(scheme) for name, scheme in request.changes.items()},
        }


def plan_requantize(
    artifact: Path,
    source: Checkpoint,
    output: Path,
    request: RequantizeRequest,
    *,
    record: Path,
    windows: Sequence[torch.Tensor] = (),
    context: Context | None = None,
) -> RequantizePlan:
    """Settle writing ``artifact`` anew to ``output``, with changes; nothing but headers is read, nothing written.

    Args:
        artifact: a finished artifact of ``source``.
        source: the original, dense.
        output: directory to create; it appears when it is complete.
        request: the changes, and how.
        record: file for what the run returns, written before ``output`` appears; see
            :func:`~llmconvert.quantize.job.read_layers`.
        windows, context: as for :func:`llmconvert.quantize.job.plan_quantize`.

    Raises:
        SchemeError: nothing would be quantized any more.
        UnsupportedError: the method changes more than linears.
        LlmconvertError: see :func:`llmconvert.quantize.job.plan_quantize`.
    """
    context = context or Context()
    check_output_directory(output)
    skeleton, blocks = trace(source, context.device)
    layout_format = load_format(request.format)
    after = {**request.before, **request.changes}
    some = next((scheme for scheme in after.values() if scheme is not None), None)
    if some is None:
        raise SchemeError("the changes leave no linear quantized")
    quantizer = load_quantizer(request.method, request.options)
    if isinstance(quantizer, ScalingQuantizer):
        raise UnsupportedError(
            f"method {request.method!r} changes norms along with the linears, so single linears of a finished artifact "
            "can't be given another scheme; quantize the model anew, with overrides"
        )
    decisions = plan_quantization(skeleton, blocks, some, _overrides(after), quantizer, layout_format)
    layout = plan_layout(decisions.specs)
    plan = RequantizePlan(request, decisions, layout, Needs(), artifact, source, output, record, windows, context)
    with SafetensorsCheckpoint(artifact) as stored:
        config = layout_format.config(stored.config, decisions.declared)
        files = {**stored.files, **layout_format.files(decisions.declared)}
        needs = Needs(memory=BASE_NBYTES, disk=output_nbytes(layout, config, files))
        if request.anew:
            # Beside the output, as a directory that does not exist: where it will be is not known before the run.
            part = plan._plan_part(stored, output.with_name(f".{output.name}.{_PART}"))
            beside = part.needs.disk
            needs = replace(needs.then(replace(part.needs, passing=0)), passing=beside)
    return replace(plan, needs=needs)


def _overrides(assignment: Assignment) -> list[Override]:
    return [Override(glob.escape(name), scheme) for name, scheme in assignment.items()]


class _Mixture(CheckpointView):
    """An artifact's dense weights, but for some that are the original's. Inputs are not quantized in calibration."""

    def __init__(self, artifact: Checkpoint, source: Checkpoint, originals: set[str]) -> None:
        super().__init__(artifact)
        self._source = source
        self._originals = originals
        self.infos = {name: source.infos[name] if name in originals else info for name, info in artifact.infos.items()}
        self.quantized_inputs, self.quantized_cache = {}, {}

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
