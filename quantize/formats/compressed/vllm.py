"""compressed-tensors as vLLM alone has to load it, whatever transformers makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llmconvert.quantize.formats.compressed.tensors import CompressedTensors

__all__ = ["CompressedTensorsForVllm"]


@dataclass(frozen=True)
class CompressedTensorsForVllm(CompressedTensors):
    """Tensors stay what the checkpoint has; experts of classes that transformers has no names for are written one by
    one, as vLLM and llm-compressor call them."""

    library: ClassVar[str] = "vllm"
    joins: ClassVar[bool] = False
