"""How rotary positions are stretched, by kind and factor: the value and its name, ``yarn:2.0``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from llmconvert.errors import UsageError

__all__ = ["RopeScaling"]

Kind = Literal["linear", "dynamic", "yarn"]
# Far beyond any model's; a number of hundreds of digits would become infinity.
_MOST = 1e6
_FORM = re.compile(r"(?P<kind>[a-z]+):(?P<factor>\d+(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """A kind of scaling and its factor: inputs up to ``factor`` times as long as the model was trained on."""

    kind: Kind
    factor: float

    @classmethod
    def parse(cls, text: str) -> RopeScaling:
        """``yarn:2.0``, ``linear:4`` or ``dynamic:2``.

        Raises:
            UsageError: another form, an unknown kind, or a factor that is not above 1, or above a million.
        """
        match = _FORM.fullmatch(text.strip())
        if match is None or match["kind"] not in get_args(Kind):
            raise UsageError(
                f"rope scaling {text!r}: expected {', '.join(get_args(Kind))} and a factor, as in yarn:2.0"
            )
        factor = float(match["factor"])
        if not 1 < factor <= _MOST:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise UsageError(f"rope scaling {shown!r}: the factor must be above 1 and at most {_MOST:,.0f}")
        return cls(match["kind"], factor)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor!r}".removesuffix(".0")
