"""What sections of a recipe have in common: frozen, no unknown keys, switches and lists as people write them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Length", "Section", "Seed", "switch", "to_tuple"]

Count = Annotated[int, Field(ge=1)]
Length = Annotated[int, Field(ge=2)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


def switch(value: object) -> object:
    """``true`` stands for a section with its defaults, ``false`` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
