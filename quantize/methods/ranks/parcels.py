"""A solution as tensors that travel from one process to another, and JSON values that say what they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from llmconvert.quantize.methods.base import Solution
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import NestedScales, QuantizedTensor, SuperBlockScales

__all__ = ["packed", "unpacked"]

_OWN = ("codes", "scale", "zero", "divisor", "offset", "input_scale")
_NESTED = ("codes", "absmax", "offset")
_SUPER = ("scale", "subs", "minimum", "sub_minima")


def packed(solution: Solution) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """What there is to say of a solution, and its tensors."""
    nested, tensors = solution.tensor.nested, dict(_there(solution.tensor, _OWN, ""))
    about: dict[str, Any] = {
        "error": solution.error,
        "energy": solution.energy,
        "damping": solution.damping,
        "tokens": solution.tokens,
    }
    if isinstance(nested, SuperBlockScales):
        tensors |= _there(nested, _SUPER, "super ")
        about["limits"] = nested.limits
    elif nested is not None:
        tensors |= _there(nested, _NESTED, "nested ")
    return {**about, "tensors": list(tensors)}, list(tensors.values())


def unpacked(about: dict[str, Any], tensors: Sequence[torch.Tensor], scheme: Scheme) -> Solution:
    """The solution again; ``tensors`` are as many as ``about`` names."""
    found = dict(zip(about["tensors"], tensors, strict=True))
    nested: NestedScales | SuperBlockScales | None = None
    if "super scale" in found:
        least, most = about["limits"]
        parts = {name: found.pop(f"super {name}", None) for name in _SUPER}
        assert parts["scale"] is not None and parts["subs"] is not None
        nested = SuperBlockScales(parts["scale"], parts["subs"], (least, most), parts["minimum"], parts["sub_minima"])
    elif "nested codes" in found:
        nested = NestedScales(*(found.pop(f"nested {name}") for name in _NESTED))
    own = {name: found.get(name) for name in _OWN}
    assert own["codes"] is not None and own["scale"] is not None
    tensor = QuantizedTensor(
        own["codes"],
        own["scale"],
        own["zero"],
        scheme,
        nested,
        own["divisor"],
        own["offset"],
        own["input_scale"],
    )
    return Solution(tensor, about["error"], about["damping"], about["tokens"], about["energy"])


def _there(holder: object, names: Sequence[str], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        value = getattr(holder, name)
        if value is not None:
            yield prefix + name, value
