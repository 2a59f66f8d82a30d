"""Fidelity: the runtime's logits against our reader's, on the same tokens in the same dtype.

All quality figures come from our own reader. They hold for users only if the runtime decodes the same weights, so the
runtime's logits are compared with ours on the same tokens and in the same dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from llmconvert.engine.architecture.config import declared_number
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import GateError
from llmconvert.validate.measurement import Planned, Subject
from llmconvert.validate.runtimes.transformers import Runtime

__all__ = ["Fidelity", "Probe", "fidelity", "probe_nbytes", "take_probe"]

# Tokens of the first window that a runtime's numbers are compared on.
_TOKENS = 256
# bfloat16 carries 8 bits, and other kernels sum in another order: a few roundings per layer come to this at most.
# One layer read wrongly gives more than ten times as much.
_MAX_RELATIVE = 0.03


@dataclass(frozen=True)
class Probe:
    """What a runtime is compared with.

    Attributes:
        window: token ids, int64 ``[1, L]``.
        logits: what our reader computes for them from the artifact, ``[1, L, V]``.
    """

    window: torch.Tensor
    logits: torch.Tensor


def probe_nbytes(planned: Planned) -> int:
    """Bytes of the logits that a comparison holds: ours, and the runtime's."""
    vocabulary = declared_number(planned.dense.config, "vocab_size") or 0
    largest = max(planned.dense.infos.values(), key=lambda info: info.nbytes)
    return 2 * _TOKENS * vocabulary * largest.dtype.itemsize


def take_probe(subject: Subject) -> Probe | None:
    """Our reader's logits for the beginning of the first window of the evaluation text.

    None without a text, and where the artifact's perplexity could not be had: it computes NaN or infinity, and nothing
    is left to compare.
    """
    quality = subject.check("perplexity")
    if subject.windows is None or (quality is not None and quality.value is None):
        return None
    window = subject.windows.windows[0][:, :_TOKENS]
    (logits,) = stream_logits(subject.dense, [window], device=subject.device, dtype=subject.dtype)
    return Probe(window, logits)


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How far the runtime's logits are from ours.

    Attributes:
        max_abs_diff: largest difference of two logits.
        relative: root mean square of the differences over that of the logits.
        top1_agreement: share of positions with the same most likely token.
        tokens: positions compared.
    """

    max_abs_diff: float
    relative: float
    top1_agreement: float
    tokens: int

    @property
    def ok(self) -> bool:
        """Whether roundings explain the difference."""
        return self.relative <= _MAX_RELATIVE


def fidelity(runtime: Runtime, windows: Sequence[torch.Tensor], expected: Iterable[torch.Tensor]) -> Fidelity:
    """Compare the runtime's logits for ``windows`` (int64 ``[1, L]``) with ``expected`` (``[1, L, V]`` each, in order).

    Raises:
        GateError: the runtime's logits have another shape or are not finite.
    """
    largest = squares = norm = 0.0
    same = tokens = 0
    for window, ours in zip(windows, expected, strict=True):
        with torch.inference_mode():
            theirs = runtime.model(input_ids=window.to(runtime.device), use_cache=False).logits.cpu()
        if theirs.shape != ours.shape:
            raise GateError(f"{runtime.name}: gives logits {tuple(theirs.shape)}, our reader {tuple(ours.shape)}")
        for row_ours, row_theirs in zip(ours[0].cpu(), theirs[0], strict=True):
            reference, found = row_ours.float(), row_theirs.float()
            difference = found - reference
            largest = max(largest, float(difference.abs().max()))
            squares += float(difference.square().sum())
            norm += float(reference.square().sum())
            same += int(reference.argmax() == found.argmax())
        tokens += ours.shape[1]
    if not squares < float("inf"):
        raise GateError(f"{runtime.name}: the logits are not finite, our reader's are")
    return Fidelity(largest, (squares / norm) ** 0.5 if norm else 0.0, same / tokens, tokens)
