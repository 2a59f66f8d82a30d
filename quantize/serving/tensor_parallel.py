"""Over how many devices a runtime can split an artifact: heads, widths and groups of scales have to come out whole.

vLLM and SGLang give every device whole query heads, whole key-value heads (or one of them to several devices), a share
of the outputs of what enters attention and MLP, and a share of the inputs of what leaves them: there a share that is no
whole number of groups has scales that no device can hold (``verify_marlin_supports_shape`` and the weight loaders of
both). Which linears leave is said by the plan of the family in transformers (``base_model_tp_plan``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.serving.kernel_groups import KERNEL_GROUPS

__all__ = ["Matrix", "TensorParallel", "tensor_parallel"]

#: Numbers of devices that are asked about.
SIZES = (2, 4, 8)
# Of families that transformers has no plan for: names that most of them have.
_USUAL = {
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
# What attention takes in is split by heads.
_BY_HEADS = re.compile(r"(?:attn|attention)[\w.]*$")
# Of a layer, or an expert.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHARED_HEADS = re.compile(r"\.[kv]_proj$")
_OF_AN_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A linear: its name, ``rows`` outputs, ``columns`` inputs, and its scheme; None if it is dense."""

    name: str
    rows: int
    columns: int
    scheme: Scheme | None = None


@dataclass(frozen=True, slots=True)
class TensorParallel:
    """Over how many devices a model can be split.

    Attributes:
        sizes: of 2, 4 and 8 those that it can be split over.
        reasons: of the others, why not.
        group: the largest group size that would leave none of them to groups; None if groups are in nobody's way, or
            no size would help.
    """

    sizes: tuple[int, ...]
    reasons: Mapping[int, str]
    group: int | None = None

    def __str__(self) -> str:
        """``2 and 4 devices (vLLM, SGLang); not 8: …``."""
        able = f"over {_listed(self.sizes, 'and')}" if self.sizes else "over no 2, 4 or 8"
        causes: dict[str, list[int]] = {}
        for size, reason in self.reasons.items():
            causes.setdefault(reason, []).append(size)
        unable = [f"not {_listed(sizes, 'or')}: {reason}" for reason, sizes in causes.items()]
        if not self.sizes:
            unable = [cause.removeprefix("not 2, 4 or 8: ") for cause in unable]
        return "; ".join([f"{able} devices (vLLM, SGLang)", *unable])

    @property
    def warning(self) -> str:
        """What to choose instead, where groups alone are in the way; empty otherwise."""
        return f"groups of {self.group} would split over more devices" if self.group is not None else ""


def _listed(sizes: Sequence[int], word: str) -> str:
    *others, last = map(str, sizes)
    return f"{', '.join(others)} {word} {last}" if others else last


def tensor_parallel(architecture: Architecture, matrices: Iterable[Matrix]) -> TensorParallel:
    """Over which numbers of devices a model of these linears can be split."""
    plan = getattr(architecture.config, "base_model_tp_plan", None) or _USUAL
    # One matrix of each kind, for those of tens of thousands of experts.
    kinds: dict[tuple[object, ...], Matrix] = {}
    for matrix in matrices:
        kinds.setdefault((_NUMBER.sub("", matrix.name), matrix.rows, matrix.columns, matrix.scheme), matrix)
    known = list(_planned(kinds.values(), plan))
    reasons, by_groups = {}, []
    for size in SIZES:
        reason = _heads(architecture, size) or _widths(known, size)
        if not reason and (reason := _groups(known, size)):
            by_groups.append(size)
        reason = reason or _blocks(architecture, known, size)
        if reason:
            reasons[size] = reason
    sizes = tuple(size for size in SIZES if size not in reasons)
    return TensorParallel(sizes, reasons, _better(known, by_groups))


def _planned(matrices: Iterable[Matrix], plan: Mapping[str, str]) -> Iterator[tuple[Matrix, bool]]:
    """Linears that are split, and whether by their inputs."""
    patterns = [
        (re.compile(rf"(?:^|\.){re.escape(name).replace(re.escape('*'), r'[0-9]+')}$"), way)
        for name, way in plan.items()
        if way.endswith(("rowwise", "colwise"))
    ]
    for matrix in matrices:
        name = _OF_AN_EXPERT.sub(".experts.", matrix.name.removesuffix(".weight"))
        name = re.sub(r"\.experts\.(?:gate|up)_proj$", ".experts.gate_up_proj", name)
        way = next((way for pattern, way in patterns if pattern.search(name)), None)
        if way is not None:
            yield matrix, way.endswith("rowwise")


def _heads(architecture: Architecture, size: int) -> str:
    if not architecture.has_attention:
        return ""
    queries, shared = architecture.query_heads, architecture.kv_heads
    if queries % size:
        return f"{queries} query heads"
    fits = shared % size == 0 if shared >= size else size % shared == 0
    return "" if fits or architecture.latent_size else f"{shared} key-value heads"


def _widths(known: Sequence[tuple[Matrix, bool]], size: int) -> str:
    for matrix, by_inputs in known:
        width = matrix.columns if by_inputs else matrix.rows
        if width % size and not (not by_inputs and _BY_HEADS.search(matrix.name.rpartition(".")[0])):
            return f"{_short(matrix)} is {width:,} wide"
    return ""


def _groups(known: Sequence[tuple[Matrix, bool]], size: int) -> str:
    for matrix, by_inputs in known:
        group = matrix.scheme.group_size if matrix.scheme is not None else None
        if by_inputs and group is not None and matrix.columns // size % group:
            share = matrix.columns // size
            return f"a share of {share:,} columns of {_short(matrix)} is no whole number of groups of {group}"
    return ""


def _blocks(architecture: Architecture, known: Sequence[tuple[Matrix, bool]], size: int) -> str:
    """Outputs of which a device would get no whole number of blocks (``validate_fp8_block_shape`` of vLLM)."""
    for matrix, by_inputs in known:
        block = matrix.scheme.rows if matrix.scheme is not None else None
        if by_inputs or block is None or block == 1:
            continue
        # Fewer key-value heads than devices are given to several of them.
        shared = bool(_SHARED_HEADS.search(matrix.name.removesuffix(".weight"))) and architecture.has_attention
        share = matrix.rows // (min(size, architecture.kv_heads) if shared else size)
        if share % block:
            return f"a share of {share:,} rows of {_short(matrix)} is no whole number of blocks of {block}"
    return ""


def _better(known: Sequence[tuple[Matrix, bool]], sizes: Sequence[int]) -> int | None:
    """The largest group size with which groups are in the way of none of these sizes, of those that kernels take.

    Blocks, and numbers whose groups are their own (NVFP4, MX), have no other.
    """
    if any(matrix.scheme is not None and matrix.scheme.number.name != "int" for matrix, _ in known):
        return None
    shares = [
        matrix.columns // size
        for matrix, by_inputs in known
        for size in sizes
        if by_inputs and matrix.scheme is not None and matrix.scheme.group_size is not None
    ]
    return next((group for group in KERNEL_GROUPS if shares and not any(share % group for share in shares)), None)


def _short(matrix: Matrix) -> str:
    return matrix.name.removesuffix(".weight").rpartition(".")[2]
