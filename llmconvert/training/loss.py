"""Distillation loss: KL divergence of the predictions, and the error of hidden states.

Distillation on soft targets is Hinton et al. 2015 (arXiv 1503.02531), on hidden states Jiao et al. 2020, TinyBERT
(arXiv 1909.10351). The divergence is KL(teacher ‖ student) in nats over the whole vocabulary; its gradient with respect
to the logits is known, ``softmax(student) - softmax(teacher)``, and is computed some positions at a time, so that
logits of a whole window never exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llmconvert.memory import row_slices
from llmconvert.training.model import ResidentModel

__all__ = [
    "Losses",
    "divergence_nbytes",
    "hidden_divergence",
    "logit_divergence",
    "prediction_divergence",
    "prediction_nbytes",
]

# Logits of one piece, in elements: large enough for the head's matrix product; in float32 just below the 32 MiB up to
# which the C library gives the same memory again, where larger pieces would have it cleared anew every time.
_CHUNK_ELEMENTS = 7 << 20
# Of a piece of logits in float32, alive at the same time.
_COPIES = 6


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over positions: ``kl`` in nats; ``hidden``, share of error in the hidden states, over blocks."""

    kl: float
    hidden: float

    def total(self, hidden_weight: float) -> float:
        """What is minimized."""
        return self.kl + hidden_weight * self.hidden


def prediction_divergence(
    teacher: ResidentModel,
    student: ResidentModel,
    teacher_final: torch.Tensor,
    student_final: torch.Tensor,
    *,
    gradient: bool,
    share: float = 1.0,
) -> tuple[float, torch.Tensor | None]:
    """KL(teacher ‖ student), mean over positions.

    Args:
        teacher_final, student_final: what goes into the output heads, ``[1, length, hidden]``.
        gradient: whether to give its gradient with respect to ``student_final``; that of the student's own head is
            added to its parameters where these are trained.
        share: of the loss, what is added to the head's gradients.

    Returns:
        The divergence in nats, and the gradient (None unless asked for).
    """
    length = student_final.shape[1]
    vocabulary = student.skeleton.architecture.vocab_size
    total = 0.0
    gradients: list[torch.Tensor] = []
    head = student.head_parameters if gradient else ()
    for part in row_slices((length, vocabulary), _CHUNK_ELEMENTS):
        piece = student_final[:, part].detach().requires_grad_(gradient)
        with torch.no_grad():
            expected = teacher.logits(teacher_final[:, part])
        with torch.set_grad_enabled(gradient):
            logits = student.logits(piece)
        summed, slope = _summed(expected, logits.detach(), gradient=gradient)
        total += summed
        if slope is not None:
            first, *others = torch.autograd.grad(logits, (piece, *head), slope.div_(length).to(logits.dtype))
            gradients.append(first)
            for parameter, other in zip(head, others, strict=True):
                if parameter.grad is None:
                    parameter.grad = other.mul_(share)
                else:
                    parameter.grad.add_(other, alpha=share)
    return total / length, torch.cat(gradients, dim=1) if gradient else None


def logit_divergence(
    expected: torch.Tensor, found: torch.Tensor, positions: slice, *, gradient: bool
) -> tuple[float, torch.Tensor | None]:
    """KL(teacher ‖ student), mean over ``positions`` of a window whose logits are there, ``[1, length, vocabulary]``.

    Args:
        expected: the teacher's logits.
        found: the student's.
        positions: that count.
        gradient: whether to give its gradient with respect to ``found``, of the same shape and dtype.

    Returns:
        The divergence in nats, and the gradient (None unless asked for).
    """
    whole = torch.zeros_like(found, requires_grad=False) if gradient else None
    compared, wanted = found.detach()[:, positions], expected[:, positions]
    length, total = compared.shape[1], 0.0
    for part in row_slices((length, compared.shape[-1]), _CHUNK_ELEMENTS):
        summed, slope = _summed(wanted[:, part], compared[:, part], gradient=gradient)
        total += summed
        if whole is not None and slope is not None:
            whole[:, positions][:, part] = slope.div_(length)
    return total / length, whole


def divergence_nbytes(length: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Peak bytes of :func:`logit_divergence` with its arguments: these and the gradient, and pieces in float32."""
    return vocabulary * 3 * length * dtype.itemsize + 4 * _COPIES * min(length * vocabulary, _CHUNK_ELEMENTS)


def prediction_nbytes(length: int, vocabulary: int, dtype: torch.dtype) -> int:
    """Peak bytes of :func:`prediction_divergence`: a piece of both logits, their gradient, and copies in float32."""
    return (3 * dtype.itemsize + 4 * _COPIES) * min(length * vocabulary, _CHUNK_ELEMENTS)


def _summed(expected: torch.Tensor, found: torch.Tensor, *, gradient: bool) -> tuple[float, torch.Tensor | None]:
    """The divergence summed over positions, and its gradient by the second logits, in float32."""
    teacher, student = expected.float().log_softmax(-1), found.float().log_softmax(-1)
    probabilities = teacher.exp()
    total = float(teacher.sub_(student).mul_(probabilities).sum(-1).sum(dtype=torch.float64))
    return total, student.exp_().sub_(probabilities) if gradient else None


def hidden_divergence(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """Share of error in hidden states, position by position, mean over all positions and blocks.

    The share is ``e / (e + s)`` of the squared error ``e`` and the square ``s`` of the teacher's state: the relative
    squared error where it is small, and one at most. Some positions have states thousands of times as large as others
    (Sun et al. 2024, arXiv 2402.17762); a student that puts one elsewhere would have no other gradient.
    """
    parts = []
    for target, value in zip(teacher, student, strict=True):
        wanted = target.float()
        error = (value.float() - wanted).square().sum(-1)
        size = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        parts.append((error / (error + size)).mean())
    return torch.stack(parts).mean()
