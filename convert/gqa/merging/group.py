"""Grouping of key-value heads: groups of equal size at the least total loss."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator

import torch

__all__ = ["Groups", "balanced_groups", "candidate_groups"]

Groups = tuple[tuple[int, ...], ...]

#: Up to so many partitions all are tried.
_EXHAUSTIVE = 5000
#: So many searches otherwise, from different beginnings.
_STARTS = 24
# Exchanges that gain less than this share of the mean cost are rounding.
_GAIN = 1e-9


def balanced_groups(costs: torch.Tensor, count: int) -> Groups:
    """The first of :func:`candidate_groups`: the partition with the least sum of ``costs`` within groups."""
    return candidate_groups(costs, count, 1)[0]


def candidate_groups(costs: torch.Tensor, count: int, number: int) -> list[Groups]:
    """Partitions of heads into ``count`` groups of equal size with a small sum of ``costs`` within groups.

    Few heads are partitioned optimally. For many, pairs of heads are exchanged, each time the pair that gains most,
    until none gains; once from groups filled greedily, and from random ones.

    Args:
        costs: loss of merging two heads, symmetric, ``[heads, heads]``.
        count: number of groups; divides the number of heads.
        number: how many partitions to give at most.

    Returns:
        Different partitions, the best first, with groups in ascending order, each by its first head.
    """
    matrix: list[list[float]] = costs.tolist()
    heads = len(matrix)
    size = heads // count
    partitions = math.factorial(heads) // (math.factorial(size) ** count * math.factorial(count))
    found: Iterator[Groups]
    if partitions <= _EXHAUSTIVE:
        found = _partitions(tuple(range(heads)), size)
    else:
        generator = torch.Generator().manual_seed(0)
        starts = [_greedy(matrix, count, size)]
        starts += [torch.randperm(heads, generator=generator) % count for _ in range(_STARTS - 1)]
        found = iter(sorted({_listed(_exchange(costs.double(), start), count) for start in starts}))
    return heapq.nsmallest(number, found, key=lambda groups: _total(matrix, groups))


def _total(costs: list[list[float]], groups: Groups) -> float:
    return sum(costs[a][b] for group in groups for a, b in itertools.combinations(group, 2))


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[Groups]:
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(head for head in rest if head not in others)
        for groups in _partitions(left, size):
            yield ((first, *others), *groups)


def _listed(group_of: torch.Tensor, count: int) -> Groups:
    members: list[list[int]] = [[] for _ in range(count)]
    for head, group in enumerate(group_of.tolist()):
        members[group].append(head)
    return tuple(sorted(map(tuple, members)))


def _greedy(costs: list[list[float]], count: int, size: int) -> torch.Tensor:
    """The group of each head, filled one after the other with the head that fits the group best."""
    left = set(range(len(costs)))
    group_of = torch.empty(len(costs), dtype=torch.long)
    for number in range(count):
        group = [min(left)]
        left.remove(group[0])
        while len(group) < size:
            best = min(sorted(left), key=lambda head: sum(costs[head][member] for member in group))
            left.remove(best)
            group.append(best)
        group_of[group] = number
    return group_of


def _exchange(costs: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """Exchange the two heads that gain most, until no exchange gains.

    Args:
        costs: as above; the diagonal is ignored.
        group_of: the group of each head, ``[heads]``.
    """
    costs = costs - torch.diag(costs.diagonal())
    heads = torch.arange(len(costs))
    group_of = group_of.clone()
    threshold = _GAIN * float(costs.mean())
    while True:
        ties = costs @ torch.nn.functional.one_hot(group_of).to(costs.dtype)
        moving = ties[:, group_of] - ties[heads, group_of][:, None]  # what head a costs more in b's group
        change = moving + moving.T - 2 * costs
        change[group_of[:, None] == group_of] = 0
        best = int(change.argmin())
        first, second = divmod(best, len(costs))
        if not float(change[first, second]) < -threshold:
            return group_of
        group_of[[first, second]] = group_of[[second, first]]
