"""What the census examines, and what it can come to: transformers' classes by kind, findings with their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

__all__ = ["CLASSES", "METHODS", "SCHEME", "Case", "Finding"]

SCHEME = "w4a16-g32"
METHODS = ("rtn", "gptq")


@dataclass(frozen=True, order=True)
class Case:
    """A class: under which model type, and in which mapping, transformers has it."""

    kind: str
    model_type: str
    class_name: str

    @property
    def key(self) -> str:
        """Of its result."""
        return f"{self.kind}/{self.model_type}"


def _cases(kind: str, mapping: Mapping[str, Any]) -> list[Case]:
    found = []
    for model_type, named in mapping.items():
        found.append(Case(kind, model_type, named if isinstance(named, str) else named[0]))
    return found


CLASSES: Sequence[Case] = (
    *_cases("causal", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    *_cases("image-text", MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
)


@dataclass(frozen=True)
class Finding:
    """What came of a class.

    Attributes:
        verdict: see ``census.py``.
        detail: of a refusal, its message; of an error, what was wrong.
        method: that it came of; empty where both did the same.
        weights: numbers in the checkpoint.
        quantized: of these, those that were quantized.
        trace: of a crash.
        code: the commit of llmconvert that it came of; empty outside of a checkout.
    """

    verdict: str
    detail: str = ""
    method: str = ""
    weights: int = 0
    quantized: int = 0
    trace: str = ""
    code: str = ""
