"""What can be distilled: known from headers, refused before the work."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint

__all__ = [
    "Counted",
    "differing",
    "norm_names",
    "numbers_of",
    "require_learnable",
    "require_single_experts",
    "require_still_experts",
]


@dataclass(frozen=True, slots=True)
class Counted:
    """What is trained, and what is held beside it.

    Attributes:
        codes: weights that are stored as codes of these.
        groups: of such weights.
        scales: that are learned, minima among them.
        norms: weights of norms that are.
        apart: other numbers that original and artifact don't share.
    """

    codes: int
    groups: int
    scales: int
    norms: int
    apart: int


def require_learnable(name: str, scheme: Scheme, *, moving: bool) -> None:
    """Refuse weights whose scales follow from others, or stand for many rows.

    Raises:
        UnsupportedError: naming tensor and scheme.
    """
    number = scheme.number
    powers = number.scales is not None and not number.scales.shared
    nested = scheme.nested and scheme.block is None
    if scheme.rows != 1 or nested or powers or number.absmax:
        raise UnsupportedError(
            f"distillation: {name} is stored in {scheme}, whose scales are those of several rows, powers of two, "
            "nested or prescribed; those of integers in groups or by channel (w4a16-g64), of MLX's affine weights, of "
            "nvfp4 and of GGUF's types can be learned"
        )
    if moving and not number.even:
        raise UnsupportedError(
            f"distillation: {name} is stored in {scheme}, and only codes of integers can move; set "
            "quantize.distil.code_rate to 0"
        )


def norm_names(skeleton: Skeleton) -> tuple[str, ...]:
    """The checkpoint's names of all weights of norms in the decoder."""
    base = f"{skeleton.model.base_model_prefix}."
    found = []
    for parameter, stored in skeleton.names.items():
        module, _, leaf = parameter.rpartition(".")
        if parameter.startswith(base) and leaf == "weight" and module not in skeleton.sites:
            kind = type(skeleton.model.get_submodule(module)).__name__
            found += [stored] if "norm" in kind.lower() else []
    return tuple(found)


def differing(original: Checkpoint, view: Checkpoint, names: Collection[str]) -> list[str]:
    """Tensors, of ``names``, that are in both and not the same: of a rotated model, for example."""
    common = [name for name in view if name in original and name in names]
    return [
        name
        for name in common
        if original.infos[name].shape != view.infos[name].shape
        or not torch.equal(original[name].float(), view[name].float())
    ]


def numbers_of(checkpoint: Checkpoint, name: str) -> int:
    """How many numbers a tensor has."""
    info = checkpoint.infos[name]
    return info.nbytes // info.dtype.itemsize


def require_still_experts(skeleton: Skeleton, options: DistilOptions) -> None:
    """Refuse what takes all weights of a model in memory together, of a mixture: of that one expert is there at a time.

    Raises:
        UnsupportedError: naming the option.
    """
    if options.whole and any(skeleton.experts):
        asked = options.whole[0]
        raise UnsupportedError(
            f"distillation: architecture {skeleton.architecture.model_type!r} is a mixture of experts, of which one is "
            f"in memory at a time, and {asked} takes all weights together; set quantize.distil.{asked} to 0"
        )


def require_single_experts(skeleton: Skeleton, quantized: Collection[str]) -> None:
    """Refuse experts that are quantized in one tensor of their layer: scales of each by itself can be learned.

    Args:
        skeleton: of the artifact as dense weights.
        quantized: its tensors that are not stored as floats.

    Raises:
        UnsupportedError: naming the tensor.
    """
    joint = next((site for site in skeleton.sites.values() if not site.stored_alone and site.tensor in quantized), None)
    if joint is not None:
        raise UnsupportedError(
            f"distillation: {joint.tensor} has the experts of a layer quantized in one tensor; those that are stored "
            "one by one can be learned; leave out quantize.distil"
        )
