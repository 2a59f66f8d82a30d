"""Layers with sliding windows in turns with layers that see everything: llama.cpp is told every which one does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.architectures.architecture import Reading
from llmconvert.gguf.architectures.entries import Config

__all__ = ["period_of", "read_windows", "write_windows"]

_WINDOW: Final = "attention.sliding_window"
_PERIOD: Final = "attention.sliding_window_pattern"
_SLIDING, _FULL = "sliding_attention", "full_attention"


def period_of(kinds: list[str]) -> int | None:
    """Every which layer sees everything, the others a window; None where there is no such number."""
    for period in range(1, len(kinds) + 1):
        if kinds == _kinds(period, len(kinds)):
            return period
    return 0 if kinds and set(kinds) == {_SLIDING} else None


def _kinds(period: int, layers: int) -> list[str]:
    """llama.cpp's ``set_swa_pattern``; with a period of zero all have windows."""
    return [_SLIDING if not period or layer % period < period - 1 else _FULL for layer in range(layers)]


def write_windows(arch: str, usual: int, *, told: bool = True) -> Callable[[Config], Mapping[str, Any]]:
    """The metadata of the windows.

    Args:
        arch: for errors.
        usual: the period that llama.cpp's class takes by itself.
        told: whether it can be told another.
    """

    def write(config: Config) -> Mapping[str, Any]:
        kinds = list(config.get("layer_types") or [])
        window = config.get("sliding_window")
        if not window or _SLIDING not in kinds:
            return {}
        period = period_of(kinds)
        # With fewer layers than a period all of them have windows.
        if kinds == _kinds(usual, len(kinds)):
            period = usual
        if period is None or (period != usual and not told):
            raise UnsupportedError(
                f"config.json: layer_types is {', '.join(kinds)}; llama.cpp's {arch} has layers that see everything "
                f"at equal distances{'' if told else f', every {usual}'}"
            )
        return {_WINDOW: window} | ({_PERIOD: period} if period != usual else {})

    return write


def read_windows(file: Reading, usual: int) -> dict[str, Any]:
    """``sliding_window`` and ``layer_types`` of a config."""
    layers, window = file.layers, file.get(_WINDOW, 0)
    if not isinstance(window, int) or not window:
        return {"sliding_window": None, "layer_types": [_FULL] * layers}
    period = file.get(_PERIOD, usual)
    kinds = _kinds(period if isinstance(period, int) else usual, layers)
    if hasattr(period, "__len__") and len(period) == layers:
        kinds = [_SLIDING if one else _FULL for one in period]
    return {"sliding_window": window, "layer_types": kinds}
