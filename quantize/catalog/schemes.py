"""Schemes in words: the usual ones and the types of GGUF files, for lists and tables."""

from __future__ import annotations

from llmconvert.gguf.ggml.mix import FLOATS, MIXES, GgmlMix
from llmconvert.quantize.scheme import ALIASES, Scheme, SchemeOrMix, parse_scheme

__all__ = ["USUAL", "about_scheme", "usual_schemes"]

#: Schemes that tables show; others of the same widths go with the same.
USUAL = (
    "w8a8",
    "fp8-dynamic",
    "fp8-block",
    "fp8-static",
    "mxfp8",
    "llm.int8",
    "w8a16-g128",
    "w4a16-g64",
    "w4a16-g64-asym",
    "w4a16-g64-affine",
    "w4a16-g32",
    "w4afp8",
    "nvfp4",
    "nvfp4a16",
    "mxfp4",
    "mxfp4a16",
    "nf4",
    "nf4-dq",
    "w3a16-g64",
    "w3a16-g64-asym",
    "w2a16-g64",
    "w2a16-g64-asym",
    "q8_0",
    "q4_k_m",
)


def usual_schemes() -> dict[str, str]:
    """Name → what it means, of the usual schemes and of every type of GGUF files."""
    return {name: about_scheme(parse_scheme(name)) for name in dict.fromkeys((*USUAL, *MIXES))}


def about_scheme(scheme: SchemeOrMix) -> str:
    """A scheme in one line."""
    return _mix(scheme) if isinstance(scheme, GgmlMix) else _scheme(scheme)


def _mix(mix: GgmlMix) -> str:
    if mix.base in FLOATS:
        return f"GGUF: every matrix in {mix.base}"
    better = {"s": ", few of them better", "m": ", some of them better", "l": ", many of them better"}
    return f"GGUF: most matrices in {mix.base}{better.get(mix.name.rpartition('_')[2], '')}"


def _scheme(scheme: Scheme) -> str:
    nested = ", scales quantized too" if scheme.nested else ""
    other = next((f"; also called {alias}" for alias, name in ALIASES.items() if Scheme.parse(name) == scheme), "")
    return f"{scheme.words}{nested}{_inputs(scheme)}{other}"


def _inputs(scheme: Scheme) -> str:
    kind = scheme.activation_bits
    if kind == 16:
        return ""
    fixed = ", a scale fixed by calibration text" if scheme.fixes_inputs else ""
    return f"; activations in {kind} bits{' (E4M3)' if scheme.float_inputs else ''}{fixed}"
