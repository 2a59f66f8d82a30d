"""The recipe's budget: how many bits or bytes, and what there is to choose from."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from llmconvert.recipes.schema.named import TensorType, WidthOrScheme
from llmconvert.recipes.schema.quantities import Bytes
from llmconvert.recipes.schema.section import Count, Section, to_tuple

__all__ = ["BudgetSettings"]


class BudgetSettings(Section):
    """A mean number of bits per weight, scales included; layers get what brings the least divergence for it.

    ``max_bytes`` is for all weight files together, in the place of a mean. ``bits`` and ``group_sizes`` are what there
    is to choose from; among the bits may be schemes of other kinds (``[nvfp4, fp8-dynamic]``), which have groups of
    their own. With ``format: gguf`` it is ``types`` of tensors, ``[q3_k, q4_k, q6_k]``, of embedding and head too.
    """

    bits_per_weight: Annotated[float, Field(gt=0, le=16)] | None = None
    max_bytes: Bytes | None = None
    bits: Annotated[tuple[WidthOrScheme, ...], BeforeValidator(to_tuple), Field(min_length=1)] = (
        2,
        3,
        4,
        8,
    )
    group_sizes: Annotated[tuple[Count, ...], BeforeValidator(to_tuple), Field(min_length=1)] = (32, 64, 128)
    types: Annotated[tuple[TensorType, ...], BeforeValidator(to_tuple), Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> BudgetSettings:
        if (self.bits_per_weight is None) == (self.max_bytes is None):
            raise ValueError("give either bits_per_weight or max_bytes")
        return self

    @property
    def label(self) -> str:
        """What names the result."""
        bits = self.bits_per_weight
        return f"{bits:g}bpw" if bits is not None else f"{(self.max_bytes or 0) / 1e6:.4g}MB"
