"""Single experts by the names that vLLM and llm-compressor have for them, in classes where transformers has none.

transformers 5.23 loads the experts of these classes from one tensor of a layer, which no format holds quantized. vLLM
puts them together of a matrix each, as llm-compressor writes them, quantized ones too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

__all__ = ["RUNTIME", "first_elsewhere", "names_elsewhere"]

#: The runtime that reads them.
RUNTIME = "vllm"

_BESIDE = "mlp.experts"
# Model type → what stands before the number of an expert; behind it, gate_proj, up_proj and down_proj.
_STEMS: Mapping[str, str] = {
    "qwen3_vl_moe": _BESIDE,  # vLLM 0.32: models/qwen3_vl_moe.py; llm-compressor's examples
    "step3p7": "moe.experts",  # vLLM 0.32: models/step3p5.py, "new format from LLM Compressor"
}


def names_elsewhere(model_type: str) -> Sequence[WeightConverter]:
    """What would make a layer's experts of a matrix each, in the form of transformers' own table; empty for classes
    that it has in there itself, or whose names nobody was seen to read.

    Args:
        model_type: of the whole model's config.
    """
    stem = _STEMS.get(model_type)
    if stem is None:
        return ()
    gate, up, down = (f"{stem}.*.{projection}.weight" for projection in ("gate_proj", "up_proj", "down_proj"))
    return (
        WeightConverter([gate, up], f"{_BESIDE}.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)]),
        WeightConverter([down], f"{_BESIDE}.down_proj", [MergeModulelist(dim=0)]),
    )


def first_elsewhere(model_type: object, tensors: Iterable[str]) -> str:
    """The first of these tensors that is of a single expert by such a name; "" if none is."""
    stem = _STEMS.get(model_type) if isinstance(model_type, str) else None
    pattern = re.compile(rf"(?:^|\.){re.escape(stem)}\.\d+\." if stem else r"(?!)")
    return next((name for name in tensors if pattern.search(name)), "")
