"""What quantizing the embedding and the output head costs: the KL divergence of each type.

The head's errors are errors of logits: with ``Δ`` by which its weight moves and inputs ``x`` from the last norm, a
token costs ``½ (Σ_v p_v (Δ_v · x)² − (Σ_v p_v Δ_v · x)²)``. Of its rows those that hold most of the probability are
taken, and of the others some, which speak for the rest by their probability.

An error of the embedding is one of the hidden state that enters the first block wherever its token stands, so that it
costs what :mod:`llmconvert.quantize.mixed_precision.sensitivity` says of a linear's, with the gradients that come to
that block: rare rows cost little, and rows that no text has nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import States
from llmconvert.engine.stream import Stream
from llmconvert.quantize.methods.base import GgmlQuantizer, Method
from llmconvert.quantize.methods.imatrix import Imatrix
from llmconvert.quantize.mixed_precision.encoding import encoded
from llmconvert.quantize.scheme import Scheme

__all__ = ["OuterSubject", "embedding_costs", "head_costs"]

# Tokens at which the head is measured, and its rows.
_TOKENS = 512
_ROWS = 4096
# Tokens that the scale of embeddings, which some models multiply by, is taken from.
_SCALE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class OuterSubject:
    """What is measured.

    Attributes:
        skeleton: the original model.
        blocks: what a forward pass does.
        windows: calibration text, ``[1, length]`` each.
        tape: the input of every block for every window.
        method: what will encode the tensors.
    """

    skeleton: Skeleton
    blocks: Sequence[BlockPlan]
    windows: Sequence[torch.Tensor]
    tape: States
    method: Method

    def moved(self, rows: torch.Tensor, squares: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """By how much rows ``[rows, columns]`` in float32 move when they are stored in a type."""
        method = self.method if isinstance(self.method, GgmlQuantizer) else Imatrix()
        return encoded(method, rows, squares, scheme).dequantize(torch.float32) - rows


def head_costs(subject: OuterSubject, tensor: str, schemes: Sequence[Scheme]) -> list[float]:
    """Divergence per token that each type of the head brings.

    Args:
        tensor: of the checkpoint, the head's weight.
    """
    inputs, probabilities = _predictions(subject)
    mass = probabilities.sum(0, dtype=torch.float64)
    order = mass.argsort(descending=True, stable=True)
    frequent, rare = order[:_ROWS], order[_ROWS:]
    rare = rare[:: max(1, len(rare) // _ROWS)]
    share = float(mass[order[_ROWS:]].sum() / mass[rare].sum()) if len(rare) else 0.0
    chosen = torch.cat([frequent, rare])
    weights = probabilities[:, chosen].float()
    weights[:, len(frequent) :] *= share
    rows, squares = _rows(subject.skeleton, tensor, chosen), inputs.square().mean(0)
    found: list[float] = []
    for scheme in schemes:
        errors = inputs @ subject.moved(rows, squares, scheme).T
        mean = (weights * errors).sum(1, dtype=torch.float64)
        squared = (weights * errors.square_()).sum(1, dtype=torch.float64)
        found.append(0.5 * float((squared - mean.square()).clamp(min=0).mean()))
    return found


def embedding_costs(subject: OuterSubject, tensor: str, schemes: Sequence[Scheme], gradients: States) -> list[float]:
    """Divergence per token that each type of the embedding brings.

    Args:
        tensor: of the checkpoint, the embedding's weight.
        gradients: by the input of the first block, for every window.
    """
    windows = [window[0] for window in subject.windows]
    ids, places = torch.cat(windows).unique(return_inverse=True)
    rows = _rows(subject.skeleton, tensor, ids)
    slopes: list[tuple[torch.Tensor, torch.Tensor]] = []
    scale, begin = 0.0, 0
    for batch, window in enumerate(windows):
        own, inverse = places[begin : begin + len(window)].unique(return_inverse=True)
        gradient = gradients.get(0, batch)[0].float().cpu()
        slopes.append((own, torch.zeros(len(own), gradient.shape[1]).index_add_(0, inverse, gradient)))
        if not batch:
            entered = subject.tape.get(0, 0)[0, :_SCALE_TOKENS].float().cpu()
            stored = rows[places[: len(entered)]]
            scale = float((entered * stored).sum() / stored.square().sum().clamp(min=1e-30))
        begin += len(window)
    found: list[float] = []
    for scheme in schemes:
        moved = scale * subject.moved(rows, torch.ones(rows.shape[1]), scheme)
        squares = sum(float((moved[own] * slope).sum(1).square().sum(dtype=torch.float64)) for own, slope in slopes)
        found.append(0.5 * squares / len(places))
    return found


def _rows(skeleton: Skeleton, tensor: str, chosen: torch.Tensor) -> torch.Tensor:
    """Some rows of a tensor, float32 ``[chosen, columns]``."""
    return skeleton.checkpoint[tensor][chosen].float().contiguous()


def _predictions(subject: OuterSubject) -> tuple[torch.Tensor, torch.Tensor]:
    """At some tokens what comes to the head, float32 ``[tokens, columns]``, and what it makes of it, float16
    ``[tokens, vocabulary]``."""
    skeleton, last = subject.skeleton, subject.skeleton.block_count - 1
    stride = max(1, sum(window.shape[1] for window in subject.windows) // _TOKENS)
    stream = Stream(
        skeleton,
        subject.windows,
        subject.blocks,
        mode="replay",
        states=subject.tape,
        start=last,
        head=True,
        answers=False,
    )
    head = skeleton.model.get_output_embeddings()
    assert head is not None
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, -2)[::stride].float().cpu()))
    with closing(stream):
        skeleton.load_block(last)
        probabilities = [logits[0, ::stride].float().softmax(-1).half().cpu() for logits in stream.logits()]
    hook.remove()
    return torch.cat(seen), torch.cat(probabilities)
