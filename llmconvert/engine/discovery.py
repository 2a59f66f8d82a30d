"""Tracing a forward pass on fake tensors: the order of linears, which share an input, and what a batch keeps alive.

The model runs once on fake tensors (shapes and dtypes, no data). That tells in which order every block calls its
linears, which of them receive the very same tensor (and so share statistics), which add to the residual stream, what a
block returns, and how many bytes a batch keeps alive wherever it may have to wait. An architecture that the engine
cannot run fails here, before any work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.experts import find_experts
from llmconvert.engine.architecture.model import build_meta_model, fix_frequencies
from llmconvert.engine.architecture.reach import Reach, on_shapes
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.tracing.alike import StandIn, kinds_of
from llmconvert.engine.tracing.blocks import BlockPlan, Stop
from llmconvert.engine.tracing.recorder import BlockRecorder, ExpertShapes, Tracker
from llmconvert.errors import UnsupportedError

__all__ = ["PROBE_LENGTH", "BlockPlan", "Stop", "discover"]

#: Tokens that suffice where no batch will run: which linears share an input doesn't depend on the length.
PROBE_LENGTH = 16
# Traces that are kept for who asks the same again.
_KEPT = 16


def discover(skeleton: Skeleton, length: int = PROBE_LENGTH) -> tuple[BlockPlan, ...]:
    """Run a batch of shape ``[1, length]`` through the model's shapes; bytes hold for batches up to that length.

    Planning, calibration and evaluation ask the same of one model; it is run once in a process.

    Raises:
        UnsupportedError: the forward does not run this way, or does not pass its blocks once each and in order.
    """
    return _trace(
        _Question(
            json.dumps(skeleton.checkpoint.config),
            frozenset(type(module).forward for module in skeleton.model.modules()),
            skeleton.dtype,
            skeleton.attention,
            skeleton.device,
            skeleton.reach,
            tuple(name for slots in skeleton.experts for name in slots),
            tuple(tuple(linears) for linears in skeleton.linears),
            length,
        )
    )


@dataclass(frozen=True, slots=True)
class _Question:
    """All that a trace depends on.

    Attributes:
        config: ``config.json``.
        forwards: what its modules do.
        dtype, attention, device: what the model computes in, how it attends, and where.
        reach: what text reaches of it.
        experts: names of the modules that hold experts.
        linears: names of each block's linears.
        length: tokens.
    """

    config: str
    forwards: frozenset[Callable[..., Any]]
    dtype: torch.dtype
    attention: str
    device: torch.device
    reach: Reach
    experts: tuple[str, ...]
    linears: tuple[tuple[str, ...], ...]
    length: int


@lru_cache(maxsize=_KEPT)
def _trace(asked: _Question) -> tuple[BlockPlan, ...]:
    config = build_config(json.loads(asked.config))
    kind = config.model_type
    # Built outside the fake mode, which does not take the constants that some modules turn into buffers.
    model = build_meta_model(config, asked.dtype, asked.attention)
    fix_frequencies(model)
    taken = set(asked.experts)
    for name, _, layout in [found for found in find_experts(model) if found[0] in taken]:
        model.set_submodule(name, ExpertShapes(layout))
    listed: Any = model.get_submodule(asked.reach.blocks)
    blocks = [listed[position] for position in asked.reach.positions]
    # What the first of a kind does stands for the others. Before the first block there is no residual stream yet.
    kinds = kinds_of(list(listed), [config, config.get_text_config()])
    first: dict[Hashable, int] = {}
    standing: list[tuple[StandIn, int, int]] = []
    for index, position in enumerate(asked.reach.positions[1:], 1):
        linears = tuple(name.removeprefix(asked.reach.prefix(index)) for name in asked.linears[index])
        like = first.setdefault((kinds[position], linears), index)
        if like != index:
            listed[position] = StandIn(blocks[index], blocks[like])
            standing.append((listed[position], index, like))
    # Fake, but on the real device, whose attention kernels decide what is alive.
    with on_shapes(model, asked.device):
        tracker = Tracker(model)
        recorders = [BlockRecorder(index, tracker) for index in range(len(blocks))]
        order: list[int] = []
        for recorder, block, linears in zip(recorders, blocks, asked.linears, strict=True):
            recorder.attach(block, asked.reach.prefix(recorder.index), linears, order)
        for stand_in, index, like in standing:
            stand_in.follow(recorders[index], recorders[like])
        ids = torch.zeros((1, asked.length), dtype=torch.long, device=asked.device)
        untold = f"architecture {kind!r} cannot be traced on shapes alone; its forward may take sizes from values"
        with foreign_settings(untold, WHOLE), tracker:
            model(input_ids=ids, use_cache=False)
    handed = next((recorder.handed for recorder in recorders if recorder.handed), "")
    if handed:
        raise UnsupportedError(
            f"architecture {kind!r}: its blocks hand each other more than hidden states ({handed}), and a pass that "
            f"begins at a block has nothing else; {WHOLE}"
        )
    if order != list(range(len(blocks))):
        raise UnsupportedError(
            f"architecture {kind!r}: its forward passes the blocks in the order {order[:8]}…, expected each once, "
            f"in order, with the hidden state as first argument, to be run block by block; {WHOLE}"
        )
    *before, last = (recorder.plan() for recorder in recorders)
    return (*before, replace(last, behind_nbytes=tracker.peak))
