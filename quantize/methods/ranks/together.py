"""Linears solved by several processes: each takes some rows of every linear, and all get what all have found.

Rows do not depend on each other, given the moments of their inputs, which every process has (and factorizes). So work
is shared out evenly also where one linear has an input of its own. Where rows share scales, a linear is solved whole;
where linears do, they are solved together, and other linears by other processes meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmconvert.compute.ranks.group import Ranks
from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.methods.base import Quantizer, Solution, Target
from llmconvert.quantize.methods.ranks.parcels import packed, unpacked
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor

__all__ = ["exchange_solutions", "shared_out", "solve_together"]


@dataclass(frozen=True, slots=True)
class Piece:
    """What one process solves of a linear.

    Attributes:
        target: by its number.
        rows: of it.
    """

    target: int
    rows: range


def solve_together(
    method: Quantizer, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype, ranks: Ranks
) -> dict[str, Solution]:
    """As :meth:`~llmconvert.quantize.methods.base.Quantizer.quantize`; every process gets all solutions.

    Args:
        method: solves.
        targets: the same in every process, as is the rest.
        hessian: to be overwritten.
        scale_dtype: what scales are stored as.
        ranks: the processes.
    """
    if ranks.alone:
        return method.quantize(targets, hessian, scale_dtype)
    own = shared_out(targets, ranks)[ranks.rank]
    # Each linear has at most one piece here, so names still tell them apart.
    parts = [replace(targets[one.target], weight=_rows(targets[one.target].weight, one.rows)) for one in own]
    if hessian is not None and hessian.aim is not None:
        hessian = replace(hessian, aim=_aim(hessian.aim, targets, own))
    found = method.quantize(parts, hessian, scale_dtype) if parts else {}
    solved = [(one.target, found[part.name]) for one, part in zip(own, parts, strict=True)]
    solutions = exchange_solutions(solved, [target.scheme for target in targets], targets[0].weight.device, ranks)
    return {target.name: _joined(solutions[number]) for number, target in enumerate(targets)}


def exchange_solutions(
    solved: Sequence[tuple[int, Solution]], schemes: Sequence[Scheme], device: torch.device, ranks: Ranks
) -> dict[int, list[Solution]]:
    """What all processes have found, by the number of the linear; of one that is cut, in the order of ranks.

    Args:
        solved: by this process.
        schemes: of all linears, by number.
        device: where solutions are, and come to.
        ranks: the processes.
    """
    parcels = [(number, *packed(solution)) for number, solution in solved]
    said = ranks.ask([(number, about) for number, about, _ in parcels])
    came = ranks.exchange([tensor for _, _, tensors in parcels for tensor in tensors], device)
    found: dict[int, list[Solution]] = {}
    for abouts, tensors in zip(said, came, strict=True):
        left = iter(tensors)
        for number, about in abouts:
            these = [next(left) for _ in about["tensors"]]
            found.setdefault(number, []).append(unpacked(about, these, schemes[number]))
    return found


def shared_out(targets: Sequence[Target], ranks: Ranks) -> list[list[Piece]]:
    """Which pieces each process solves, by rank; those of one linear are in the order of its rows."""
    shares: list[list[Piece]] = [[] for _ in range(ranks.count)]
    kept = [_kept_together(number, target.scheme) for number, target in enumerate(targets)]
    owners = {key: place % ranks.count for place, key in enumerate(dict.fromkeys(kept)) if key is not None}
    for number, (target, key) in enumerate(zip(targets, kept, strict=True)):
        if key is not None:
            shares[owners[key]].append(Piece(number, range(len(target.weight))))
            continue
        for rank, share in enumerate(shares):
            rows = ranks.share(len(target.weight), rank)
            if rows:
                share.append(Piece(number, rows))
    return shares


def _kept_together(number: int, scheme: Scheme) -> Scheme | int | None:
    """What one process solves with a linear: all of its scheme, or itself alone; None if it can be cut."""
    if scheme.number.scales is not None and scheme.number.scales.shared:
        return scheme
    return number if scheme.rows != 1 or (scheme.nested and scheme.block is None) else None


def _rows(weight: torch.Tensor, rows: range) -> torch.Tensor:
    return weight[rows.start : rows.stop]


def _aim(aim: torch.Tensor, targets: Sequence[Target], own: Sequence[Piece]) -> torch.Tensor:
    """Of the rows that this process solves."""
    parts = aim.split([len(target.weight) for target in targets])
    return torch.cat([_rows(parts[one.target], one.rows) for one in own]) if own else aim[:0]


def _joined(parts: Sequence[Solution]) -> Solution:
    if len(parts) == 1:
        return parts[0]
    tensor = QuantizedTensor.concatenate([part.tensor for part in parts])
    lost = energy = 0.0
    for part in parts:
        if part.error is None or part.energy is None:
            return Solution(tensor, None, parts[0].damping)
        lost, energy = lost + part.error * part.energy, energy + part.energy
    return Solution(tensor, lost / energy if energy > 0 else 0.0, parts[0].damping, None, energy)
