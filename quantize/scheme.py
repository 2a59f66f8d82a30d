"""Quantization schemes and their names, ``w4a16-g128-sym`` and its kin.

Grammar: ``w<bits>a<bits>[-g<size>|-channel][-sym|-asym]``, e.g. ``w4a16-g64``, ``w8a8``, ``w3a16-g128-asym``.
Weights default to symmetric, one scale per output channel when no group size is given. ``a16`` leaves activations
alone; ``a8`` quantizes them to int8 per token while the model runs (dynamically).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmconvert.errors import SchemeError

__all__ = ["Scheme"]

_PATTERN = re.compile(r"w(?P<bits>\d+)a(?P<act>\d+)(?:-(?:g(?P<group>\d+)|(?P<channel>channel)))?(?:-(?P<sym>a?sym))?")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear's weights (and inputs) are represented.

    Attributes:
        bits: width of a weight code, 2 to 8.
        group_size: columns that share one scale; None for one scale per output channel.
        symmetric: no zero point when true.
        activation_bits: 16 (untouched) or 8 (dynamic, per token).
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    activation_bits: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise SchemeError(f"scheme {self}: weights can have 2 to 8 bits, found {self.bits}")
        if self.group_size is not None and self.group_size < 1:
            raise SchemeError(f"scheme {self}: group size must be positive, found {self.group_size}")
        if self.activation_bits not in (8, 16):
            raise SchemeError(f"scheme {self}: activations can have 16 or 8 bits, found {self.activation_bits}")

    @classmethod
    def parse(cls, text: str) -> Scheme:
        """Read a scheme's name.

        Raises:
            SchemeError: it does not follow the grammar, or a number is out of range.
        """
        match = _PATTERN.fullmatch(text.strip().lower())
        if match is None:
            raise SchemeError(
                f"scheme {text!r} is not understood; expected w<bits>a<bits>[-g<size>|-channel][-sym|-asym], "
                "for example w4a16-g128 or w8a8"
            )
        group = match["group"]
        return cls(int(match["bits"]), int(group) if group else None, match["sym"] != "asym", int(match["act"]))

    def __str__(self) -> str:
        grouping = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"w{self.bits}a{self.activation_bits}-{grouping}-{'sym' if self.symmetric else 'asym'}"

    @property
    def code_min(self) -> int:
        """Smallest code: codes are signed whatever the symmetry, as in compressed-tensors."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, columns: int) -> int:
        """Scales per row of a weight with ``columns`` input columns."""
        return 1 if self.group_size is None else columns // self.group_size

    def columns_per_group(self, columns: int) -> int:
        """Columns that share a scale in a weight with ``columns`` input columns."""
        return self.group_size or columns

    def check_fits(self, name: str, columns: int) -> None:
        """Refuse a group size that does not divide a layer's columns.

        Raises:
            SchemeError: naming the layer and the sizes that would fit.
        """
        if self.group_size is None or columns % self.group_size == 0:
            return
        fitting = [size for size in (16, 32, 64, 128, 256) if columns % size == 0]
        advice = f"sizes that fit it: {', '.join(map(str, fitting))}" if fitting else "only per-channel scales fit it"
        raise SchemeError(
            f"scheme {self}: group size {self.group_size} does not divide the {columns} columns of {name}; {advice}"
        )
