"""Choice of upgrades after a missed gate: the units with the most estimated KL divergence per byte get more bits.

Linears that runtimes fuse (they share an input) are one unit. What a unit is to blame for is estimated from what was
measured before anything was repaired: the error of its block when it is entered with the original's state, so without
what it inherits, in squares, shared among the block's units by their squared errors (of the output on the calibration
text where the method knows it, of the weights otherwise). Later a unit's share goes with its own error alone, for the
drift around it changes with every other unit. What an upgrade would leave of it follows from the step of the rounding:
a bit halves it, and so quarters the squared error; of GGML's types, which have no such rule, from what they leave of
normally distributed weights. Upgrades are taken greedily by divergence removed per byte, until what is left should pass
or the size limit is reached. It is an estimate: the artifact is measured again afterwards, and that decides.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.quantize.mixed_precision.budget import usual_types
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Check, Report

__all__ = [
    "REPAIRABLE",
    "TYPE_ERRORS",
    "Unit",
    "Upgrade",
    "choose_upgrades",
    "needed_share",
    "sensitivities",
    "unit_error",
]

#: Checks that more bits can make pass.
REPAIRABLE = ("perplexity", "kl_mean", "top1_agreement", "generation.agreement")
_BITS = (2, 3, 4, 8)
_SMALLEST_GROUP = 32
_FIRST_GROUP = 128
# Left of the predicted divergence, because predictions flatter.
_MARGIN = 0.8
#: GGML type → relative squared error of normally distributed weights in it, encoded here with an importance of one.
TYPE_ERRORS: Final[Mapping[str, float]] = {
    "Q2_K": 0.0690,
    "Q3_K": 0.0207,
    "Q4_0": 0.00659,
    "IQ4_XS": 0.00550,
    "IQ4_NL": 0.00541,
    "Q4_K": 0.00492,
    "Q4_1": 0.00487,
    "Q5_0": 0.00161,
    "Q5_K": 0.00120,
    "Q5_1": 0.00115,
    "Q6_K": 0.000303,
    "Q8_0": 0.0000288,
}


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that must change together.

    Attributes:
        linears: module names.
        shapes: ``(rows, columns)`` of each.
        scheme: what they are stored in; None for dense ones.
        divergence: estimated share in the squared drift of the model.
        fixed: whether they keep their scheme: experts, which all have one.
    """

    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    scheme: Scheme | None
    divergence: float
    fixed: bool = False


@dataclass(frozen=True, slots=True)
class Upgrade:
    """A unit's new scheme (None: as in the original), and the bytes it takes in addition."""

    linears: tuple[str, ...]
    before: Scheme
    after: Scheme | None
    nbytes: int


def needed_share(failed: Iterable[Check]) -> float | None:
    """What share of the divergence may be left for all failed checks to pass; None if more bits can't help.

    KL grows with the divergence, so does the logarithm of perplexity over the original's; the share of predictions that
    differ grows with its root.
    """
    shares: list[float] = []
    for check in failed:
        if check.name not in REPAIRABLE or check.value is None or check.limit is None:
            return None
        if check.name == "perplexity":
            if not check.reference or check.limit <= check.reference:
                return None
            shares.append(math.log(check.limit / check.reference) / math.log(check.value / check.reference))
        elif check.name == "kl_mean":
            shares.append(check.limit / check.value)
        elif check.limit > 1:
            return None
        else:
            shares.append(((1 - check.limit) / (1 - check.value)) ** 2)
    return _MARGIN * min(shares) if shares else None


def sensitivities(report: Report, units: Sequence[tuple[str, ...]], errors: Mapping[str, float]) -> list[float]:
    """What a unit's squared error costs: its estimated share in the squared divergence, over that error.

    Args:
        report: of the artifact before any repair, with ``block_divergence`` if it was measured.
        units: module names of their linears.
        errors: linear → squared relative error.

    Returns:
        of each unit a factor for :func:`unit_error`; 1 where its block was not measured.
    """
    measured = report.check("block_divergence")
    blocks = measured.detail.get("blocks", ()) if measured is not None else ()
    own = {block["name"]: block["own"] ** 2 for block in blocks}
    homes = [next((block for block in own if unit[0].startswith(f"{block}.")), "") for unit in units]
    totals: dict[str, float] = {}
    for home, unit in zip(homes, units, strict=True):
        totals[home] = totals.get(home, 0.0) + unit_error(unit, errors)
    return [own[home] / totals[home] if home and totals[home] else 1.0 for home in homes]


def unit_error(unit: Sequence[str], errors: Mapping[str, float]) -> float:
    """The mean squared relative error of a unit's linears."""
    return sum(errors.get(name, 0.0) for name in unit) / len(unit)


def choose_upgrades(
    units: Iterable[Unit],
    share: float,
    budget: int,
    *,
    nbytes: Callable[[tuple[int, int], Scheme | None], int],
    accepts: Callable[[Scheme, tuple[int, int]], bool],
) -> list[Upgrade]:
    """The upgrades to make now, by what they remove per byte; empty if none fits.

    Args:
        share: of the divergence that may be left.
        budget: bytes that may be added.
        nbytes: size of a linear of that shape in that scheme.
        accepts: whether the format holds linears of that shape in that scheme.
    """
    state = {unit.linears: unit for unit in units if unit.scheme is not None}
    left = sum(unit.divergence for unit in state.values())
    target = share * left
    first = {key: unit.scheme for key, unit in state.items()}
    spent = dict.fromkeys(state, 0)
    queue: list[tuple[float, int, tuple[str, ...], Scheme | None, float, int]] = []

    order = itertools.count()

    def offer(unit: Unit) -> None:
        """Put the unit's next steps into the queue."""
        for after, factor in _steps(unit, accepts):
            cost = sum(nbytes(shape, after) - nbytes(shape, unit.scheme) for shape in unit.shapes)
            gain = (1 - factor) * unit.divergence
            if gain > 0:
                heapq.heappush(queue, (-gain / max(1, cost), next(order), unit.linears, after, factor, max(0, cost)))

    for unit in state.values():
        offer(unit)
    while queue and left > target:
        _, _, key, after, factor, cost = heapq.heappop(queue)
        unit = state[key]
        if sum(spent.values()) + cost > budget:
            continue
        spent[key] += cost
        left -= (1 - factor) * unit.divergence
        state[key] = replace(unit, scheme=after, divergence=factor * unit.divergence)
        queue = [entry for entry in queue if entry[2] != key]
        heapq.heapify(queue)
        if after is not None:
            offer(state[key])
    chosen = []
    for key, unit in state.items():
        before = first[key]
        if unit.scheme != before and before is not None:
            chosen.append(Upgrade(key, before, unit.scheme, spent[key]))
    return chosen


def _steps(unit: Unit, accepts: Callable[[Scheme, tuple[int, int]], bool]) -> list[tuple[Scheme | None, float]]:
    """Better schemes one step away, and the share of the squared error that each leaves."""
    scheme = unit.scheme
    if scheme is None or unit.fixed:
        return []
    found: list[tuple[Scheme | None, float]] = [(None, 0.0)]
    columns = unit.shapes[0][1]
    if scheme.adjustable:
        more = next((bits for bits in _BITS if bits > scheme.bits), None)
        if more is not None:
            found.append((scheme.with_bits(more), 4.0 ** (scheme.bits - more)))
        size = scheme.columns_per_group(columns)
        smaller = size // 2 if scheme.group_size else min(_FIRST_GROUP, columns // 2)
        if smaller >= _SMALLEST_GROUP:
            # The largest of n normal values grows as the root of 2 ln n, and the rounding step with it.
            found.append((replace(scheme, group_size=smaller), math.log(smaller) / math.log(size)))
    if scheme.block is not None:
        found += _next_type(scheme.block, columns, lambda kind: all(accepts(kind, shape) for shape in unit.shapes))
    return [
        (after, factor)
        for after, factor in found
        if after is None or all(accepts(after, shape) for shape in unit.shapes)
    ]


def _next_type(block: str, columns: int, accepts: Callable[[Scheme], bool]) -> list[tuple[Scheme, float]]:
    """The next of GGML's types by bytes that leaves less than this one, and the share that it leaves."""
    taken = load_codec(block)
    for name in usual_types(columns):
        codec = load_codec(name)
        share = TYPE_ERRORS[name] / TYPE_ERRORS[block]
        if codec.nbytes * taken.size > taken.nbytes * codec.size and share < 1 and accepts(Scheme.of_block(name)):
            return [(Scheme.of_block(name), share)]
    return []
