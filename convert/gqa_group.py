"""Which heads to merge with which: groups of equal size at the least total loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch

__all__ = ["balanced_groups"]

#: Up to so many partitions all are tried.
_EXHAUSTIVE = 5000


def balanced_groups(costs: torch.Tensor, count: int) -> tuple[tuple[int, ...], ...]:
    """Partition heads into ``count`` groups of equal size, minimizing the sum of ``costs`` within groups.

    Few heads are partitioned optimally, many by exchanging pairs of heads until no exchange helps.

    Args:
        costs: loss of merging two heads, symmetric, ``[heads, heads]``.
        count: number of groups; divides the number of heads.

    Returns:
        Groups in ascending order, each by its first head.
    """
    matrix: list[list[float]] = costs.tolist()
    heads = len(matrix)
    size = heads // count
    partitions = math.factorial(heads) // (math.factorial(size) ** count * math.factorial(count))
    if partitions <= _EXHAUSTIVE:
        return min(_partitions(tuple(range(heads)), size), key=lambda groups: _total(matrix, groups))
    groups = _exchange(matrix, _greedy(matrix, count, size))
    return tuple(sorted(tuple(sorted(group)) for group in groups))


def _total(costs: list[list[float]], groups: tuple[tuple[int, ...], ...]) -> float:
    return sum(costs[a][b] for group in groups for a, b in itertools.combinations(group, 2))


def _partitions(heads: tuple[int, ...], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    if not heads:
        yield ()
        return
    first, rest = heads[0], heads[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(head for head in rest if head not in others)
        for groups in _partitions(left, size):
            yield ((first, *others), *groups)


def _greedy(costs: list[list[float]], count: int, size: int) -> list[list[int]]:
    """Groups filled one after the other with the head that fits the group best."""
    left = set(range(len(costs)))
    groups: list[list[int]] = []
    for _ in range(count):
        group = [min(left)]
        left.remove(group[0])
        while len(group) < size:
            best = min(sorted(left), key=lambda head: sum(costs[head][member] for member in group))
            left.remove(best)
            group.append(best)
        groups.append(group)
    return groups


def _exchange(costs: list[list[float]], groups: list[list[int]]) -> list[list[int]]:
    """Swap members of different groups as long as the total falls."""

    def tie(head: int, group: list[int], without: int) -> float:
        return sum(costs[head][member] for member in group if member != without)

    improved = True
    while improved:
        improved = False
        for left, right in itertools.combinations(groups, 2):
            for i, j in itertools.product(range(len(left)), range(len(right))):
                a, b = left[i], right[j]
                before = tie(a, left, a) + tie(b, right, b)
                after = tie(b, left, a) + tie(a, right, b)
                if after < before * (1 - 1e-9):
                    left[i], right[j] = b, a
                    improved = True
    return groups
