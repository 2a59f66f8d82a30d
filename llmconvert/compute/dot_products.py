"""``AᵀB`` of bfloat16 matrices, summed in float32, with the dot products of AVX-512 BF16.

torch's products of bfloat16 give bfloat16 on a CPU, and oneDNN reads float32 as bfloat16 with AMX alone: without it a
Hessian would be multiplied at the rate of float32. ``vdpbf16ps`` (Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 2) multiplies two pairs of bfloat16 values in each of 16 lanes and adds both products to a
float32 sum: twice that rate. It takes denormal values for zero.

Rows of the operands are the summed dimension, so two of them are laid together (:func:`pack_pairs`): a lane then holds
a column at two neighbouring rows. A tile of 8 columns of ``A`` times 48 of ``B`` keeps its sums in 24 of the 32
registers. Each entry is summed by one thread, in the order of its rows, however many threads there are.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llmconvert.compute.precision import cpu_has
from llmconvert.compute.rows import over_rows

__all__ = ["LANES", "add_products", "load_dot_products", "pack_pairs", "use_dot_products"]

#: Columns of a packed panel, as many as a register has lanes; operands hold whole panels.
LANES = 16
_TILE_LEFT = 8
_TILE_PANELS = 3
_LINE_BYTES = 4 * LANES
# Pairs of rows multiplied before the next tile: what three panels of them take stays close to the processor.
_PAIRS_AT_ONCE = 256


def use_dot_products() -> bool:
    """Whether these products are the fastest here: AVX-512 BF16 without AMX, for which oneDNN has its own."""
    return cpu_has("avx512_bf16") and not cpu_has("amx_bf16")


def pack_pairs(values: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    """Lay rows together in pairs, and columns in panels.

    Args:
        values: bfloat16 ``[rows, columns]``, an even number of rows and whole panels.
        packed: memory for it, at least as many int32 as pairs of values.

    Returns:
        A view of ``packed``, int32 ``[panels, pairs, LANES]``.
    """
    rows, columns = values.shape
    panels = packed[: rows // 2 * columns].view(columns // LANES, rows // 2, LANES)
    over_rows(_pack, rows // 2, values.view(torch.int16), panels)
    return panels


def add_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, upper: bool = False) -> None:
    """Add ``AᵀB`` of two packed operands of as many pairs to ``total``, float32 ``[columns of A, columns of B]``.

    With ``upper`` only tiles that reach the diagonal or lie above it are multiplied.
    """
    panels = len(left), len(right)
    tiles = sum(_tiles_left(group, *panels, upper) for group in range(-(-len(right) // _TILE_PANELS)))
    over_rows(_multiply, tiles, left, right, total, upper)


def load_dot_products() -> None:
    """Load the kernels, or compile them where no earlier process has, so that no linear waits for it.

    Does nothing where :func:`use_dot_products` says no.
    """
    if not use_dot_products():
        return
    values, packed = torch.zeros((2, 2 * LANES), dtype=torch.bfloat16), torch.empty(2 * LANES, dtype=torch.int32)
    pack_pairs(values, packed)
    packed = pack_pairs(values[:, :LANES], packed)  # columns of a wider matrix are another layout
    add_products(torch.zeros((LANES, LANES)), packed, packed)


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
    def multiply(
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

    return multiply


_tile_1, _tile_2, _tile_3 = map(_tile, range(1, _TILE_PANELS + 1))


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _tiles_left(group: int, left_panels: int, right_panels: int, upper: bool) -> int:
    """Tiles of a group of ``B``'s panels; with ``upper``, none of columns of ``A`` behind the group's."""
    needed = min(left_panels, (group + 1) * _TILE_PANELS) if upper else left_panels
    return needed * (LANES // _TILE_LEFT)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _multiply(
    begin: int,
    end: int,
    left: np.ndarray[Any, Any],
    right: np.ndarray[Any, Any],
    total: np.ndarray[Any, Any],
    upper: bool,
) -> None:
    """Tiles ``begin`` to ``end``, counted group by group of ``B``'s panels, down the columns of ``A``."""
    left_panels, pairs, _ = left.shape
    right_panels, halves = right.shape[0], LANES // _TILE_LEFT
    panel_bytes, line_bytes = pairs * _LINE_BYTES, 4 * total.shape[1]
    a, b, c = left.ctypes.data, right.ctypes.data, total.ctypes.data
    before = 0
    for group in range((right_panels + _TILE_PANELS - 1) // _TILE_PANELS):
        count = _tiles_left(group, left_panels, right_panels, upper)
        first, last = max(begin - before, 0), min(end - before, count)
        before += count
        panel = group * _TILE_PANELS
        width = min(_TILE_PANELS, right_panels - panel)
        for start in range(0, pairs, _PAIRS_AT_ONCE):
            some = min(_PAIRS_AT_ONCE, pairs - start)
            columns = b + panel * panel_bytes + start * _LINE_BYTES
            for tile in range(first, last):
                rows = a + tile // halves * panel_bytes + start * _LINE_BYTES + tile % halves * (4 * _TILE_LEFT)
                sums = c + tile * _TILE_LEFT * line_bytes + panel * _LINE_BYTES
                if width == _TILE_PANELS:
                    _tile_3(rows, columns, sums, some, panel_bytes, line_bytes)
                elif width == 2:
                    _tile_2(rows, columns, sums, some, panel_bytes, line_bytes)
                else:
                    _tile_1(rows, columns, sums, some, panel_bytes, line_bytes)


@numba.njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _pack(begin: int, end: int, values: np.ndarray[Any, Any], packed: np.ndarray[Any, Any]) -> None:
    for pair in range(begin, end):
        for panel in range(packed.shape[0]):
            line, column = packed[panel, pair], panel * LANES
            first, second = values[2 * pair, column : column + LANES], values[2 * pair + 1, column : column + LANES]
            for lane in range(LANES):
                line[lane] = np.int32(first[lane]) & 0xFFFF | np.int32(second[lane]) << 16
