"""How many tokens of a text the routers of a mixture send to each expert: one pass, and a limit on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.engine.discovery import BlockPlan
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode, Stream
from llmconvert.errors import CalibrationError
from llmconvert.phases import Phases

__all__ = ["count_tokens", "require_tokens"]

# So many experts are named.
_NAMED = 5


def count_tokens(
    skeleton: Skeleton,
    blocks: Sequence[BlockPlan],
    windows: Sequence[torch.Tensor],
    mode: Mode,
    phases: Phases | None = None,
) -> Iterator[tuple[str, Sequence[int]]]:
    """Each layer's experts, by the name of the module that has them, with the tokens of each of them.

    Args:
        skeleton: the model.
        blocks: what a forward pass does.
        windows: token ids, each ``[1, length]``.
        mode: lockstep or replay.
        phases: where time is counted.
    """
    phases = phases or Phases()
    with closing(Stream(skeleton, windows, blocks, mode=mode, phases=phases)) as stream:
        for run in phases.pull("counting", stream.blocks()):
            sites = {run.site(name).layer: name for stop in run.plan.stops for name in stop.linears}
            for layer in run.slots:
                with phases.measure("counting"):
                    counts = run.experts(sites[layer]).tokens()
                yield layer, counts


def require_tokens(
    skeleton: Skeleton,
    blocks: Sequence[BlockPlan],
    windows: Sequence[torch.Tensor],
    mode: Mode,
    least: int,
    *,
    every: bool = False,
    phases: Phases | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Refuse a text of which some expert of the model gets too little; arguments as for :func:`count_tokens`.

    Args:
        least: tokens that every expert has to get.
        every: whether all experts are shown all tokens.
        ranks: the processes, each of which has some of the windows.

    Raises:
        CalibrationError: naming the experts with the fewest.
    """
    total = ranks.sum_number(sum(window.shape[1] for window in windows))
    if every:
        if total < least:
            raise CalibrationError(
                f"min_tokens_per_expert is {least:,}, and the calibration text has {total:,} tokens in all; give more "
                "of it (samples, length)"
            )
        return
    short: list[tuple[int, str]] = []
    count = 0
    for layer, own in count_tokens(skeleton, blocks, windows, mode, phases):
        counts = [sum(each) for each in zip(*ranks.ask(list(own)), strict=True)]
        count += len(counts)
        short += [(tokens, f"{layer}.{number}") for number, tokens in enumerate(counts) if tokens < least]
    if short:
        named = ", ".join(f"{name} ({tokens:,})" for tokens, name in sorted(short)[:_NAMED])
        more = f" and {len(short) - _NAMED} more" if len(short) > _NAMED else ""
        raise CalibrationError(
            f"min_tokens_per_expert is {least:,}, and routers send fewer of the {total:,} calibration tokens to "
            f"{len(short)} of {count} experts: {named}{more}. Give more text (samples, length), have every expert "
            "shown all tokens (experts: all), or ask for fewer"
        )
