"""Linears that runtimes join into one matrix: scales of blocks, which rows share, must not reach across the seams.

vLLM lays query, key and value projections, and gate and up projection, one below the other, and their scales too: all
but the last need a whole number of blocks of rows, and in a mixture's experts the last as well, or it does not load the
model (``validate_fp8_block_shape`` and ``validate_fp8_block_shape_moe`` of its ``fp8_utils.py``, 0.32).
"""

from __future__ import annotations

from collections.abc import Iterable

from llmconvert.quantize.serving.tensor_parallel import Matrix

__all__ = ["cut_at_seams"]

# Those that another one comes after.
_NOT_LAST = ("q_proj", "k_proj", "gate_proj", "q_a_proj")
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj")


def cut_at_seams(matrices: Iterable[Matrix]) -> str:
    """Which of a model's linears keep vLLM from loading it, and what to take instead; empty if none does."""
    for matrix in matrices:
        block = matrix.scheme.rows if matrix.scheme is not None else None
        if block is None or block == 1:
            continue
        name = matrix.name.removesuffix(".weight")
        leaf = name.rpartition(".")[2]
        # An expert's down projection is as wide as its others are high.
        height = matrix.columns if ".experts." in name and leaf == "down_proj" else matrix.rows
        if height % block and leaf in (_OF_EXPERTS if ".experts." in name else _NOT_LAST):
            return (
                f"vLLM can't load it, on one device neither: it joins {leaf} with others, and {height:,} rows are no "
                f"whole number of blocks of {block}. fp8-dynamic, whose scales are by row, has no blocks"
            )
    return ""
