"""The compiled loops of :mod:`llmconvert.compute.dot_products`.

``vdpbf16ps`` (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2) multiplies two pairs of bfloat16
values in each of 16 lanes and adds both products to a float32 sum. It takes denormal values for zero. A tile of 8
columns of ``A`` times 48 of ``B`` keeps its sums in 24 of the 32 registers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llmconvert.compute.precision import LANES

__all__ = ["TILE_PANELS", "multiply", "pack", "tiles_left"]

#: Panels of ``B`` that a tile reaches over.
TILE_PANELS = 3
_TILE_LEFT = 8
_LINE_BYTES = 4 * LANES
# Pairs of rows multiplied before the next tile: what three panels of them take stays close to the processor.
_PAIRS_AT_ONCE = 256
# Panels of ``A`` that so many pairs are taken of before the next ones: half of a second-level cache of a megabyte. With
# 4,096 columns all of them would come from memory for every group of ``B``'s.
_LEFT_PANELS_AT_ONCE = 32


class _BFloat(ir.types.Type):
    """LLVM's ``bfloat``, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_INDEX, _PAIR = ir.IntType(64), ir.IntType(32)
_SUMS, _PAIRS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(_PAIR, LANES)
_HALVES = ir.VectorType(_BFloat(), 2 * LANES)


def _tile(panels: int) -> Any:
    """A tile's product for so many panels of ``B``: straight LLVM code, since numba has no vectors.

    Its arguments are addresses of the first pairs of A's columns and of B's panel and of the tile's first sum, the
    number of pairs, and the bytes from one panel of B, and from one line of the sums, to the next.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def product(
        typing: Any, left: Any, right: Any, total: Any, pairs: Any, panel_bytes: Any, line_bytes: Any
    ) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: list[ir.Value]) -> ir.Value:
            left, right, total, pairs, panel_bytes, line_bytes = arguments
            kind = ir.FunctionType(_SUMS, [_SUMS, _HALVES, _HALVES])
            name = "llvm.x86.avx512bf16.dpbf16ps.512"
            known = builder.module.globals.get(name)
            dot = known if known is not None else ir.Function(builder.module, kind, name)

            def offset(address: ir.Value, count: int, nbytes: ir.Value) -> ir.Value:
                return builder.add(address, builder.mul(nbytes, _INDEX(count)))

            def load(address: ir.Value, kind: ir.Type) -> ir.Value:
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)

            places = [
                offset(offset(total, row, line_bytes), panel, _INDEX(_LINE_BYTES))
                for row in range(_TILE_LEFT)
                for panel in range(panels)
            ]
            before = [load(place, _SUMS) for place in places]
            entry, loop = builder.block, builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            step = builder.phi(_INDEX)
            sums = [builder.phi(_SUMS) for _ in places]
            line = builder.mul(step, _INDEX(_LINE_BYTES))
            columns = [
                builder.bitcast(load(builder.add(offset(right, panel, panel_bytes), line), _PAIRS), _HALVES)
                for panel in range(panels)
            ]
            after = []
            for row in range(_TILE_LEFT):
                pair = load(builder.add(builder.add(left, line), _INDEX(4 * row)), _PAIR)
                one = builder.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, _PAIR(0))
                all_lanes = builder.shuffle_vector(one, ir.Constant(_PAIRS, ir.Undefined), ir.Constant(_PAIRS, None))
                same = builder.bitcast(all_lanes, _HALVES)
                own = sums[row * panels : (row + 1) * panels]
                after += [builder.call(dot, [value, same, column]) for value, column in zip(own, columns, strict=True)]
            following = builder.add(step, _INDEX(1))
            for phi, first, later in zip((step, *sums), (_INDEX(0), *before), (following, *after), strict=True):
                phi.add_incoming(first, entry)
                phi.add_incoming(later, loop)
            done = builder.append_basic_block()
            builder.cbranch(builder.icmp_signed("<", following, pairs), loop, done)
            builder.position_at_end(done)
            for place, value in zip(places, after, strict=True):
                builder.store(value, builder.inttoptr(place, _SUMS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return product


_tile_1, _tile_2, _tile_3 = map(_tile, range(1, TILE_PANELS + 1))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def tiles_left(group: int, left_panels: int, right_panels: int, upper: bool) -> int:
    """Tiles of a group of ``B``'s panels; with ``upper``, none of columns of ``A`` behind the group's."""
    needed = min(left_panels, (group + 1) * TILE_PANELS) if upper else left_panels
    return needed * (LANES // _TILE_LEFT)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def multiply(
    begin: int,
    end: int,
    left: np.ndarray[Any, Any],
    right: np.ndarray[Any, Any],
    total: np.ndarray[Any, Any],
    upper: bool,
) -> None:
    """Tiles ``begin`` to ``end``, counted group by group of ``B``'s panels, down the columns of ``A``.

    They are done some pairs and some columns of ``A`` at a time, which then stay close to the processor while one group
    after the other is multiplied by them. Every sum takes its pairs in their order all the same.
    """
    left_panels, pairs, _ = left.shape
    right_panels, halves = right.shape[0], LANES // _TILE_LEFT
    groups = (right_panels + TILE_PANELS - 1) // TILE_PANELS
    panel_bytes, line_bytes = pairs * _LINE_BYTES, 4 * total.shape[1]
    a, b, c = left.ctypes.data, right.ctypes.data, total.ctypes.data
    at_once = _LEFT_PANELS_AT_ONCE * halves
    for start in range(0, pairs, _PAIRS_AT_ONCE):
        some = min(_PAIRS_AT_ONCE, pairs - start)
        for top in range(0, left_panels * halves, at_once):
            before = 0
            for group in range(groups):
                count = tiles_left(group, left_panels, right_panels, upper)
                first, last = max(begin - before, 0, top), min(end - before, count, top + at_once)
                before += count
                panel = group * TILE_PANELS
                width = min(TILE_PANELS, right_panels - panel)
                columns = b + panel * panel_bytes + start * _LINE_BYTES
                for tile in range(first, last):
                    rows = a + tile // halves * panel_bytes + start * _LINE_BYTES + tile % halves * (4 * _TILE_LEFT)
                    sums = c + tile * _TILE_LEFT * line_bytes + panel * _LINE_BYTES
                    if width == TILE_PANELS:
                        _tile_3(rows, columns, sums, some, panel_bytes, line_bytes)
                    elif width == 2:
                        _tile_2(rows, columns, sums, some, panel_bytes, line_bytes)
                    else:
                        _tile_1(rows, columns, sums, some, panel_bytes, line_bytes)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def pack(begin: int, end: int, values: np.ndarray[Any, Any], packed: np.ndarray[Any, Any]) -> None:
    for pair in range(begin, end):
        for panel in range(packed.shape[0]):
            line, column = packed[panel, pair], panel * LANES
            first, second = values[2 * pair, column : column + LANES], values[2 * pair + 1, column : column + LANES]
            for lane in range(LANES):
                line[lane] = np.int32(first[lane]) & 0xFFFF | np.int32(second[lane]) << 16
