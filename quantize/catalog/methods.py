"""The table of methods, with what each of them says of itself: names, settings, and what it reads."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
from llmconvert.quantize.catalog.declared import Setting, declaration_of
from llmconvert.quantize.scheme import parse_scheme

__all__ = [
    "METHODS",
    "about_method",
    "check_options",
    "method_settings",
    "needs_calibration",
    "require_method",
    "usual_method",
]

#: Method name → where its class lies; loaded on use.
METHODS: Mapping[str, str] = {
    "rtn": "llmconvert.quantize.methods.rtn:Rtn",
    "gptq": "llmconvert.quantize.methods.gptq:Gptq",
    "gptaq": "llmconvert.quantize.methods.gptaq:Gptaq",
    "signround": "llmconvert.quantize.methods.signround:SignRound",
    "awq": "llmconvert.quantize.methods.awq:Awq",
    "smoothquant": "llmconvert.quantize.methods.smoothquant:SmoothQuant",
    "hqq": "llmconvert.quantize.methods.hqq:Hqq",
    "imatrix": "llmconvert.quantize.methods.imatrix:Imatrix",
}

# Fields of methods that programs set and recipes can't.
_INTERNAL = frozenset({"dtype"})


def require_method(name: str) -> None:
    """Refuse a name that no method has.

    Raises:
        UnsupportedError: with the nearest one.
    """
    if name in METHODS:
        return
    close = difflib.get_close_matches(name.lower(), METHODS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UnsupportedError(f"method {name!r} is not known; known are {', '.join(METHODS)}{hint}")


def about_method(name: str) -> str:
    """A method in one line: the first of its file."""
    return declaration_of(METHODS[name]).title


def method_settings(name: str) -> tuple[Setting, ...]:
    """The options of a method: name, kind, default, meaning."""
    return tuple(setting for setting in declaration_of(METHODS[name]).settings if setting.name not in _INTERNAL)


def check_options(name: str, options: Iterable[str]) -> None:
    """Refuse options that a method doesn't have, by name; their values are for the method to refuse.

    Raises:
        UnsupportedError: there is no such method; or with the nearest option, and all there are.
    """
    require_method(name)
    known = [setting.name for setting in method_settings(name)]
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UnsupportedError(
                f"method {name!r} has no option {option!r}; it has {', '.join(known) if known else 'none'}{hint}"
            )


def needs_calibration(name: str) -> bool:
    """Whether a method needs calibration text."""
    return declaration_of(METHODS[name]).constants["calibration"] != "none"


def usual_method(scheme: str | None, *, text: bool) -> str:
    """The method to take where none is named.

    That is GPTQ; of GGML's types and of floats with calibration text alone, without which they are rounded to nearest.
    Other numbers that are no integers always are.

    Args:
        scheme: by name; None where a budget chooses schemes. One that is none is for others to refuse.
        text: whether there is calibration text.
    """
    try:
        found = None if scheme is None else parse_scheme(scheme)
    except SchemeError:
        found = None
    if isinstance(found, GgmlMix):
        return "gptq" if text and found.base not in FLOATS else "rtn"
    if found is not None and found.number.parts is not None:
        return "gptq" if text else "rtn"
    return "gptq" if found is None or found.number.even else "rtn"
