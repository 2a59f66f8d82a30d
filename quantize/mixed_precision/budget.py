"""Mixed precision under a budget: a scheme for every unit, with the least divergence for the bits per weight.

What each scheme costs a unit in divergence was measured (:mod:`llmconvert.quantize.mixed_precision.sensitivity`); for
small errors the divergences of units add up (Malinovskii et al. 2024, arXiv 2411.17525), so this is a knapsack with one
choice per unit. Of a unit's schemes only those on the lower convex hull of bytes and divergence are worth having.
Everything begins with the smallest, and steps along the hulls are taken by divergence removed per byte, the steepest
first. Up to the first step that does not fit, nothing better exists for the bytes taken; what is left goes to the next
steps that fit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from llmconvert.errors import SchemeError
from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.quantize.mixed_precision.units import FusedUnit, Storage
from llmconvert.quantize.scheme import Scheme, SchemeOrMix

__all__ = ["Budget", "Choice", "Options", "allocate", "candidates", "convex_hull", "usual_types"]


# What GGML has to offer: of the types with super-blocks and of others, none that is worse at the same bytes.
_SUPER_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
_SIMPLE_TYPES = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True, slots=True)
class Budget:
    """What is asked for.

    Attributes:
        bits_per_weight: mean over all weights quantized, scales and zero points included, as they lie in the file.
        bits: widths of integers to choose from, and whole schemes.
        group_sizes: of integers, to choose from where they divide the columns; None is one scale per output channel.
        max_bytes: of all weight files, in the place of a mean.
        types: of GGML to choose from, where that is what there is; None: those that are usual for a tensor's columns.
    """

    bits_per_weight: float | None
    bits: tuple[int | Scheme, ...] = (2, 3, 4, 8)
    group_sizes: tuple[int | None, ...] = (32, 64, 128)
    max_bytes: int | None = None
    types: tuple[str, ...] | None = None

    def limit(self, weights: int, rest: int) -> int:
        """Bytes that so many weights may take; ``rest`` is what else lies in the files."""
        if self.max_bytes is not None:
            return self.max_bytes - rest
        assert self.bits_per_weight is not None
        return int(weights * self.bits_per_weight / 8)


@dataclass(frozen=True, slots=True)
class Options:
    """What a unit can have: scheme → its bytes and divergence."""

    unit: FusedUnit
    costs: Mapping[Scheme, tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Choice:
    """What a unit gets."""

    unit: FusedUnit
    scheme: Scheme
    nbytes: int
    divergence: float


def candidates(unit: FusedUnit, scheme: SchemeOrMix, budget: Budget, storage: Storage) -> tuple[Scheme, ...]:
    """The schemes to choose from for a unit.

    Args:
        scheme: what is not chosen comes from here: symmetry, and 16-bit activations. A mix of GGML's types is for
            choosing among these.

    Raises:
        SchemeError: there are none.
    """
    if isinstance(scheme, GgmlMix):
        every = [Scheme.of_block(name) for name in budget.types or usual_types(unit.columns)]
    else:
        widths = [bits for bits in budget.bits if isinstance(bits, int)]
        every = [replace(scheme.with_bits(bits), group_size=size) for bits in widths for size in budget.group_sizes]
        every += [option for option in budget.bits if isinstance(option, Scheme)]
    found = tuple(option for option in every if all(storage.accepts(option, shape, every[:1]) for shape in unit.shapes))
    if not found:
        tried = ", ".join(map(str, every))
        raise SchemeError(
            f"{unit.linears[0]} with {unit.columns} columns can have none of the schemes to choose from ({tried})"
        )
    return found


def usual_types(columns: int) -> tuple[str, ...]:
    """GGML's types for rows of so many weights, by growing bytes."""
    return _SUPER_TYPES if columns % 256 == 0 else _SIMPLE_TYPES


def allocate(
    options: Sequence[Options], budget: Budget, fixed: Iterable[tuple[int, int]] = (), rest: int = 0
) -> tuple[Choice, ...]:
    """Choose for every unit, within the budget.

    Args:
        fixed: weights and bytes of what else is quantized, by schemes that are given; it counts too.
        rest: bytes of everything else in the files, for a budget of bytes.

    Raises:
        SchemeError: not even the smallest schemes fit; says what they come to.
    """
    given = list(fixed)
    weights = sum(choice.unit.weights for choice in options) + sum(count for count, _ in given)
    limit = budget.limit(weights, rest)
    hulls = [convex_hull(option.costs) for option in options]
    at = [0] * len(options)
    spent = sum(option.costs[hull[0]][0] for option, hull in zip(options, hulls, strict=True))
    spent += sum(nbytes for _, nbytes in given)
    if spent > limit:
        least = "the smallest schemes to choose from already take"
        if budget.max_bytes is not None:
            raise SchemeError(f"budget.max_bytes {budget.max_bytes:,}: {least} {spent + rest:,} with all else")
        raise SchemeError(
            f"budget.bits_per_weight {budget.bits_per_weight}: {least} {8 * spent / weights:.3f} bits per weight"
        )
    steps: list[tuple[float, int, int]] = []
    for index, (option, hull) in enumerate(zip(options, hulls, strict=True)):
        for place in range(1, len(hull)):
            (small, worse), (large, better) = option.costs[hull[place - 1]], option.costs[hull[place]]
            steps.append(((better - worse) / (large - small), index, place))
    # Along a hull steps get flatter, so that the order of all steps is also that of each unit's own.
    for _, index, place in sorted(steps):
        costs, hull = options[index].costs, hulls[index]
        more = costs[hull[place]][0] - costs[hull[at[index]]][0]
        if spent + more <= limit:
            spent += more
            at[index] = place
    chosen: list[Choice] = []
    for option, hull, place in zip(options, hulls, at, strict=True):
        chosen.append(Choice(option.unit, hull[place], *option.costs[hull[place]]))
    return tuple(chosen)


def convex_hull(costs: Mapping[Scheme, tuple[int, float]]) -> list[Scheme]:
    """The schemes on the lower convex hull of bytes and divergence, by growing bytes and falling divergence."""
    hull: list[Scheme] = []
    for scheme in sorted(costs, key=lambda scheme: costs[scheme]):
        if hull and costs[scheme][1] >= costs[hull[-1]][1]:
            continue
        while len(hull) > 1 and _slope(costs, hull[-2], hull[-1]) >= _slope(costs, hull[-2], scheme):
            hull.pop()
        hull.append(scheme)
    return hull


def _slope(costs: Mapping[Scheme, tuple[int, float]], first: Scheme, second: Scheme) -> float:
    return (costs[second][1] - costs[first][1]) / (costs[second][0] - costs[first][0])
