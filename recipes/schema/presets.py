"""Presets: method, scheme, samples and distillation for who doesn't want to choose, as the sections they stand for.

Each is the front of what was measured on SmolLM2-135M (``bench/results``, 4 bits in groups of 64): gptq takes less time
than gptaq, which leaves seven tenths of its divergence, with zero points six; in a sketch, distilled scales and norms
took a tenth of what is left. Text is what every Python has, so that no account and no download is needed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from llmconvert.gguf.ggml.mix import FLOATS
from llmconvert.quantize.catalog.formats import only_format
from llmconvert.quantize.catalog.methods import METHODS, needs_calibration

__all__ = ["PRESETS", "preset_words", "with_preset"]

_TEXT: Final = "pydoc-topics:train"
#: Name → sections of a recipe, keys of which are taken where the recipe has none of its own.
PRESETS: Final[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
    "fast": {
        "calibrate": {"dataset": _TEXT, "samples": 32, "length": 512},
        "quantize": {"method": "gptq", "scheme": "w4a16-g64"},
    },
    "balanced": {
        "calibrate": {"dataset": _TEXT, "samples": 64, "length": 512},
        "quantize": {"method": "gptaq", "scheme": "w4a16-g64"},
    },
    "best": {
        "calibrate": {"dataset": _TEXT, "samples": 64, "length": 512},
        "quantize": {
            "method": "gptaq",
            "scheme": "w4a16-g64-asym",
            "distil": {"steps": 120, "learning_rate": 1e-3, "norms": True},
        },
    },
}
# Formats whose scales are learned.
_LEARNING: Final = ("compressed-tensors", "gptq", "awq", "mlx", "gguf")


def with_preset(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's values with what its preset stands for; what it says itself counts.

    Of a preset's method, scheme and distillation those are left out that do not go with what the recipe says.
    """
    preset = PRESETS.get(str(values.get("preset")))
    given, text = values.get("quantize") or {}, values.get("calibrate") or {}
    if preset is None or not isinstance(given, Mapping) or not isinstance(text, Mapping):
        return values
    chosen = dict(preset["quantize"])
    scheme = given.get("scheme")
    layout = given.get("format") or (only_format(scheme) if isinstance(scheme, str) else None)
    if given.get("budget") is not None:
        chosen.pop("scheme")
    if layout == "bitsandbytes":
        chosen.pop("method")
    if layout not in (None, *_LEARNING) or str(scheme).upper() in FLOATS:
        chosen.pop("distil", None)
    quantize = chosen | {key: value for key, value in given.items() if value is not None}
    method = str(quantize.get("method"))
    reads = "distil" in quantize or "budget" in quantize or (method in METHODS and needs_calibration(method))
    calibrate = {**preset["calibrate"], **text} if reads else text
    return {**values, "quantize": quantize, **({"calibrate": calibrate} if calibrate else {})}


def preset_words(preset: str | None, resolved: Mapping[str, Any]) -> str:
    """The recipe that a preset stands for in a resolved recipe, for a log; "" without one."""
    if preset is None:
        return ""
    shown = {
        key: {name: value for name, value in resolved[key].items() if value not in ([], {})}
        for key in ("calibrate", "quantize")
        if key in resolved
    }
    return f"preset {preset} stands for " + ", ".join(f"{key}: {json.dumps(value)}" for key, value in shown.items())
