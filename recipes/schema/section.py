"""What sections of a recipe have in common: frozen, no unknown keys, switches and lists as people write them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

__all__ = ["Count", "Device", "Length", "Name", "Section", "Seed", "possible", "switch", "to_tuple"]


def possible(name: str) -> str:
    """A name that a file could have."""
    if "\0" in name:
        raise ValueError("holds a NUL byte, which no name can")
    longest = max((len(os.fsencode(part)) for part in name.split("/")), default=0)
    if longest > _LONGEST_PART or len(os.fsencode(name)) > _LONGEST_NAME:
        raise ValueError(f"a name of {longest:,} bytes; no file has one of more than {_LONGEST_PART}")
    return name


# What file systems take, in bytes: of a name between slashes, and of all of them.
_LONGEST_PART, _LONGEST_NAME = 255, 4095

_DEVICE = re.compile(r"cpu|cuda(:\d+)?|auto")
_DEVICES = {"gpu": "cuda"}


def _device(name: object) -> object:
    """``gpu`` is ``cuda``; ``auto`` is a GPU where there is one, when the job begins."""
    if not isinstance(name, str):
        return name
    found = _DEVICES.get(name.lower(), name.lower())
    if _DEVICE.fullmatch(found) is None:
        raise ValueError("expected cpu, cuda, cuda:N or auto")
    return found


def _number(value: object) -> object:
    """No switch: ``true`` would count as 1."""
    if isinstance(value, bool):
        raise ValueError("expected a whole number")
    return value


#: Where to compute.
Device = Annotated[str, BeforeValidator(_device)]

#: A model, a dataset, a directory: on this machine or elsewhere.
Name = Annotated[str, Field(min_length=1), AfterValidator(possible)]
# Nothing is counted further: what is absurd is told before the work.
Count = Annotated[int, Field(ge=1, le=1 << 31), BeforeValidator(_number)]
Length = Annotated[int, Field(ge=2, le=1 << 24), BeforeValidator(_number)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_number)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @classmethod
    def meant_by(cls, value: object) -> Mapping[str, object]:
        """What somebody meant who gave a value in the section's place: its first key, for an error that shows it."""
        return {next(field.alias or name for name, field in cls.model_fields.items()): value}


def switch(value: object) -> object:
    """``true`` stands for a section with its defaults, ``false`` for none."""
    return {True: {}, False: None}[value] if isinstance(value, bool) else value


def to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
