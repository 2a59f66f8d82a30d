"""When a runtime computes what we do: one rule for all of them.

Kernels sum in another order and round in between. How much that is, our own forward tells, run once in float32 and once
with the roundings of such kernels: in bfloat16, or, for llama.cpp, with the inputs of linears in 8 bits per block.

- Log-probabilities agree when they differ, as root mean square, by no more than twice what those roundings change in
  our own: the runtime makes its own, and they need not fall as ours do.
- Greedy tokens agree when each of them is our best after the same tokens, or one that we hold for as good: that loses
  no more than four times what the roundings move our best token against our second, as root mean square over all
  places. A token that loses more is a wrong one, wherever it stands: the runtime's continuation is followed to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["Agreement", "Forward", "compare", "joined", "rms"]


@dataclass(frozen=True)
class Forward:
    """Our own log-probabilities ``[prompts, places, vocabulary]`` over prompts and a runtime's continuations of them.

    Attributes:
        exact: in float32.
        rounded: with the runtime's kind of roundings.
    """

    exact: torch.Tensor
    rounded: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """How a runtime's numbers compare with ours.

    Attributes:
        distance: root mean square between its log-probabilities and ours.
        allowed: the most that it may be.
        equal: share of its tokens that are our best.
        lost: the most that one of its tokens loses against our best, in nats.
        tie: the most that it may lose.
        decided: share of the steps at which our best token is ahead by more than ``tie``: there it must be chosen.
    """

    distance: float
    allowed: float
    equal: float
    lost: float
    tie: float
    decided: float

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.distance <= self.allowed and self.lost <= self.tie


def compare(
    logprobs: torch.Tensor,
    tokens: torch.Tensor,
    ours: Forward,
    *,
    prompt: int,
    floor: float = 0.0,
    start: int = 0,
) -> Agreement:
    """Compare a runtime with our forward.

    Args:
        logprobs: its own ``[prompts, places, vocabulary]``.
        tokens: its greedy continuations ``[prompts, steps]``.
        ours: over at least ``prompt + steps - 1`` places.
        prompt: tokens of a prompt.
        floor: root mean square of what the runtime rounds besides.
        start: the place that its log-probabilities begin at.
    """
    moved = _lead(ours.rounded, ours.exact) - _lead(ours.exact, ours.exact)
    tie = 4 * (rms(moved) + floor)
    steps = ours.rounded[:, prompt - 1 : prompt - 1 + tokens.shape[1]]
    lost = steps.amax(-1) - steps.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Agreement(
        distance=rms(logprobs - ours.rounded[:, start : start + logprobs.shape[1]]),
        allowed=2 * rms(ours.rounded - ours.exact) + floor,
        equal=_share(lost == 0),
        lost=float(lost.max()),
        tie=tie,
        decided=_share(_lead(steps, steps) > tie),
    )


def rms(values: torch.Tensor) -> float:
    """Root mean square."""
    return float(values.square().mean().sqrt())


def joined(prompts: Sequence[Sequence[int]], tokens: torch.Tensor) -> list[torch.Tensor]:
    """Windows ``[1, places]`` of prompts and what continues them."""
    return [torch.tensor([[*prompt, *row.tolist()]]) for prompt, row in zip(prompts, tokens, strict=True)]


def _lead(logprobs: torch.Tensor, ranked: torch.Tensor) -> torch.Tensor:
    """How far the token that ``ranked`` holds for best is ahead of its second."""
    best = logprobs.gather(-1, ranked.topk(2, -1).indices)
    return best[..., 0] - best[..., 1]


def _share(values: torch.Tensor) -> float:
    return float(values.float().mean())
