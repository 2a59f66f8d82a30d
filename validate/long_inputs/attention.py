"""Attention backends compared (eager, SDPA's math and flash, FlashAttention): time and memory of prefill by its length.

One process per measurement, and logits of the last position only, so that the attention is what is measured. The
exponent of a curve is the slope of its logarithm over that of the length, over the longest three lengths measured:
short prompts are read in the time and memory of everything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from llmconvert.convert.inspection import describe_model
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import UsageError
from llmconvert.memory import available_nbytes
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.generation.greedy import PROMPTS
from llmconvert.validate.long_inputs.backends import BACKENDS, refusal
from llmconvert.validate.runtimes.isolated import UnmeasuredError, run_isolated

__all__ = ["LENGTHS", "AttentionOptions", "AttentionResult", "BackendPoint", "exponent", "measure_attention"]

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
_USABLE = 0.8
_FITTED = 3
# A process that takes this much longer than expected is stuck.
_PATIENCE = 10.0
_START_SECONDS = 120.0
# How the reasons begin that longer prompts share.
_TOO_LARGE = ("needs", "out of memory")


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What to measure.

    Attributes:
        backends: names in :data:`llmconvert.validate.long_inputs.backends.BACKENDS`.
        lengths: prompt lengths in tokens.
        seconds: lengths that would take longer than this to read are left out.
        memory: bytes that a measurement may take beyond the loaded model; 80 % of what is free by default.
        windows, window: evaluation text used for the comparison of logits.
        prompts, max_new_tokens: of the greedy continuations; no prompts, no continuations.
    """

    backends: tuple[str, ...] = ("eager", "math", "flash")
    lengths: tuple[int, ...] = LENGTHS
    seconds: float = 120.0
    memory: int | None = None
    windows: int = 2
    window: int = 512
    prompts: tuple[str, ...] = PROMPTS
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        for name in self.backends:
            if name not in BACKENDS:
                raise UsageError(f"attention backend {name!r} is unknown; known are {', '.join(BACKENDS)}")
        if not self.backends or not self.lengths or min(self.lengths) < 2:
            raise UsageError("attention: at least one backend and lengths of 2 tokens or more are needed")


@dataclass(frozen=True, slots=True)
class BackendPoint:
    """A prompt of ``length`` tokens read with one backend: median seconds and peak bytes beyond the loaded model.

    Both are None where it was not run; ``reason`` says why, and ``failed`` that neither the model's size nor its time
    was the reason.
    """

    backend: str
    length: int
    seconds: float | None = None
    extra_bytes: int | None = None
    reason: str = ""
    failed: bool = False


@dataclass(frozen=True)
class AttentionResult:
    """Everything measured.

    Attributes:
        points: one per backend and length, those not run included.
        refused: backend → why it can't run with this model here.
        comparison: what :func:`~.agreement.compare_backends` found; empty if it was not run.
        note: why the comparison was not run.
        method: how memory was measured.
    """

    points: tuple[BackendPoint, ...]
    refused: Mapping[str, str]
    comparison: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    method: str = ""

    def measured(self, backend: str) -> list[BackendPoint]:
        """The points of a backend that were run, by length."""
        return sorted(
            (point for point in self.points if point.backend == backend and point.seconds is not None),
            key=lambda point: point.length,
        )

    def exponents(self, backend: str) -> tuple[float | None, float | None]:
        """Of memory and time over the length; None with fewer than three lengths."""
        found = self.measured(backend)
        memory = exponent([(point.length, point.extra_bytes or 0) for point in found])
        return memory, exponent([(point.length, point.seconds or 0.0) for point in found])


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """Least-squares slope of log(value) over log(length), over the longest three; None with fewer."""
    usable = [(math.log(length), math.log(value)) for length, value in points if value > 0][-_FITTED:]
    if len(usable) < _FITTED:
        return None
    mean_x = sum(x for x, _ in usable) / len(usable)
    mean_y = sum(y for _, y in usable) / len(usable)
    return sum((x - mean_x) * (y - mean_y) for x, y in usable) / sum((x - mean_x) ** 2 for x, _ in usable)


def measure_attention(
    artifact: Path,
    options: AttentionOptions,
    windows: Sequence[torch.Tensor] = (),
    *,
    device: torch.device,
    progress: Progress = SILENT,
) -> AttentionResult:
    """Measure the backends on a model directory. Nothing that can't run is an error; it is reported with its reason.

    Args:
        windows: evaluation text, int64 ``[1, L]`` each; random tokens without it.
    """
    config = AutoConfig.from_pretrained(artifact, local_files_only=True, trust_remote_code=False)
    with SafetensorsCheckpoint(artifact) as stored:
        summary = describe_model(stored)
    # Of weights that can't be read here, no more than two in a byte are packed anywhere else.
    parameters, limits = summary.parameters or 2 * summary.stored_bytes, summary.position_limit
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    refused = {name: why for name in options.backends if (why := refusal(name, config, device, dtype))}
    backends = [name for name in options.backends if name not in refused]
    comparison: Mapping[str, Any] = {}
    note = ""
    if backends:
        texts = _text(windows, options, config, limits)
        try:
            comparison = _compare(artifact, backends, texts, options, parameters, device)
        except UnmeasuredError as error:
            note = str(error)
    for name, found in comparison.get("backends", {}).items():
        if "reason" in found:
            refused[name] = found["reason"]
    runner = _Runner(artifact, config, options, device, limits)
    running = [name for name in options.backends if name not in refused]
    with progress.task("attention backends", max(1, len(running) * len(options.lengths))) as task:
        for name in running:
            for length in sorted(options.lengths):
                runner.run(name, length)
                task.advance(1, f"{name}, {length:,} tokens")
    return AttentionResult(tuple(runner.points), refused, comparison, note, runner.method)


def _text(
    windows: Sequence[torch.Tensor], options: AttentionOptions, config: PretrainedConfig, limits: int | None
) -> list[list[int]]:
    length = min(options.window, limits or options.window)
    if windows:
        return [window[0, :length].tolist() for window in windows[: options.windows]]
    generator = torch.Generator().manual_seed(0)
    size = (options.windows, length)
    found: list[list[int]] = torch.randint(Architecture.of(config).vocab_size, size, generator=generator).tolist()
    return found


def _budget(options: AttentionOptions, device: torch.device) -> int:
    if options.memory is not None:
        return options.memory
    return int(_USABLE * available_nbytes(device))


def _compare(
    artifact: Path,
    backends: Sequence[str],
    windows: Sequence[Sequence[int]],
    options: AttentionOptions,
    parameters: int,
    device: torch.device,
) -> Mapping[str, Any]:
    budget = _budget(options, device)
    needed = 6 * parameters
    if needed > budget:
        raise UnmeasuredError(f"the float32 reference beside the model takes {needed:,} bytes, {budget:,} may be used")
    found: Mapping[str, Any] = run_isolated(
        "llmconvert.validate.long_inputs.agreement:compare_backends",
        {
            "directory": str(artifact),
            "backends": list(backends),
            "windows": windows,
            "device": str(device),
            "prompts": list(options.prompts),
            "max_new_tokens": options.max_new_tokens,
            "limit": budget if device.type == "cpu" else None,
        },
        timeout=_START_SECONDS + _PATIENCE * options.seconds,
    )
    return found


class _Runner:
    """Runs points by growing length, and leaves out what would not fit or take too long."""

    def __init__(
        self,
        artifact: Path,
        config: PretrainedConfig,
        options: AttentionOptions,
        device: torch.device,
        positions: int | None,
    ) -> None:
        self.points: list[BackendPoint] = []
        self.method = ""
        self._artifact, self._config, self._options = artifact, config.get_text_config(), options
        self._device, self._positions = device, positions

    def run(self, backend: str, length: int) -> None:
        budget = _budget(self._options, self._device)
        reason = self._too_long(length) or self._too_large(backend, length, budget) or self._too_slow(backend, length)
        if reason:
            self.points.append(BackendPoint(backend, length, reason=reason))
            return
        arguments = {
            "directory": str(self._artifact),
            "backend": backend,
            "length": length,
            "device": str(self._device),
            "limit": budget if self._device.type == "cpu" else None,
        }
        try:
            found = run_isolated(
                "llmconvert.validate.long_inputs.prefill:measure_prefill",
                arguments,
                timeout=_START_SECONDS + _PATIENCE * self._options.seconds,
            )
        except UnmeasuredError as error:
            self.points.append(BackendPoint(backend, length, reason=str(error), failed=not error.by_limit))
            return
        self.method = found["method"]
        self.points.append(BackendPoint(backend, length, found["seconds"], found["extra_bytes"]))

    def _too_long(self, length: int) -> str:
        if self._positions is None or length <= self._positions:
            return ""
        return f"the model has learned {self._positions:,} positions"

    def _too_large(self, backend: str, length: int, budget: int) -> str:
        """From the last length's memory, or at least from the matrices of scores, before and after the softmax."""
        power = 2 if BACKENDS[backend].quadratic else 1
        before = [point for point in self.points if point.backend == backend]
        if before and before[-1].reason.startswith(_TOO_LARGE):
            return f"{_TOO_LARGE[0]} more than {before[-1].length:,} tokens, which did not fit"
        needed = 0
        if before and before[-1].extra_bytes:
            needed = round(before[-1].extra_bytes * (length / before[-1].length) ** power)
        elif power == 2:
            itemsize = 4 if self._config.dtype == torch.float32 else 2
            needed = 2 * itemsize * Architecture.of(self._config).query_heads * length**2
        return f"{_TOO_LARGE[0]} about {needed:,} bytes, {budget:,} may be used" if needed > budget else ""

    def _too_slow(self, backend: str, length: int) -> str:
        before = [point for point in self.points if point.backend == backend and point.seconds is not None]
        if not before or before[-1].seconds is None:
            return ""
        expected = before[-1].seconds * (length / before[-1].length) ** 2
        limit = self._options.seconds
        return f"takes up to {expected:,.0f} s, at most {limit:,.0f} s are allowed" if expected > limit else ""
