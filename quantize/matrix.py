"""Which method, scheme and format go together, and what reads the result: for refusals, budgets and README's table.

Nothing is listed twice: a method says which kinds of codes it chooses, a format which schemes it holds, and the
runtimes' record (:mod:`llmconvert.quantize.runtimes`) what has been seen to read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import FORMATS, Format, load_format
from llmconvert.quantize.methods.base import METHODS, Quantizer, load_method
from llmconvert.quantize.runtimes import Runtime, runtimes_of
from llmconvert.quantize.scheme import Scheme

__all__ = [
    "USUAL",
    "Combination",
    "check_combination",
    "check_format",
    "check_method",
    "combinations",
    "formats_for",
    "markdown_matrix",
    "methods_for",
    "readers_of",
]

#: Schemes that the table shows; others of the same widths go with the same.
USUAL = (
    "w8a8",
    "fp8",
    "llm.int8",
    "w8a16-g128",
    "w4a16-g64",
    "w4a16-g64-asym",
    "nf4",
    "nf4-dq",
    "w3a16-g64",
    "w3a16-g64-asym",
    "w2a16-g64",
    "w2a16-g64-asym",
)


@dataclass(frozen=True, slots=True)
class Combination:
    """One that can be made.

    Attributes:
        method, format: by name.
        readers: runtimes that have read the format in such a scheme, whatever its group size; our own reader always
            does.
    """

    method: str
    scheme: Scheme
    format: str
    readers: tuple[Runtime, ...]


def methods_for(scheme: Scheme) -> tuple[str, ...]:
    """Names of the methods that can choose codes of this scheme."""
    return tuple(name for name in METHODS if scheme.kind in load_method(name, {}).kinds)


def formats_for(scheme: Scheme) -> tuple[str, ...]:
    """Names of the formats that can hold it."""
    return tuple(name for name in FORMATS if _holds(load_format(name), scheme))


def readers_of(format: str, scheme: Scheme) -> tuple[Runtime, ...]:
    """Runtimes that were run with this format in this scheme, or in one that differs in its group size alone."""
    return tuple(
        runtime
        for runtime in runtimes_of(format)
        if any(_alike(Scheme.parse(tested), scheme) for tested in runtime.schemes)
    )


def combinations(schemes: Sequence[str] = USUAL) -> Iterator[Combination]:
    """Everything that goes together, scheme by scheme."""
    for text in schemes:
        scheme = Scheme.parse(text)
        for format in formats_for(scheme):
            for method in methods_for(scheme):
                yield Combination(method, scheme, format, readers_of(format, scheme))


def check_combination(method: Quantizer, scheme: Scheme, layout: Format) -> None:
    """Refuse what does not go together.

    Raises:
        UnsupportedError: with the methods or formats that do.
    """
    check_method(method, scheme)
    check_format(layout, scheme)


def check_method(method: Quantizer, scheme: Scheme) -> None:
    """Refuse a scheme whose codes a method cannot choose.

    Raises:
        UnsupportedError: with the methods that can.
    """
    if scheme.kind not in method.kinds:
        raise UnsupportedError(
            f"scheme {scheme}: {type(method).__name__.lower()} chooses {' and '.join(sorted(method.kinds))} codes "
            f"only; methods for {scheme.kind} are {', '.join(methods_for(scheme))}"
        )


def check_format(layout: Format, scheme: Scheme) -> None:
    """Refuse a scheme that a format cannot hold.

    Raises:
        UnsupportedError: with the formats that hold it.
    """
    try:
        layout.check(scheme)
    except UnsupportedError as error:
        able = ", ".join(formats_for(scheme)) or "none"
        raise UnsupportedError(f"{error}; formats that hold {scheme}: {able}") from None


def markdown_matrix() -> str:
    """The table as README has it: by scheme the methods, and for every format what reads it."""
    lines = [f"| scheme | methods | {' | '.join(FORMATS)} |", f"|---|---|{'---|' * len(FORMATS)}"]
    for text in USUAL:
        scheme = Scheme.parse(text)
        cells = [_cell(name, scheme) for name in FORMATS]
        lines.append(f"| `{text}` | {', '.join(methods_for(scheme))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(format: str, scheme: Scheme) -> str:
    if format not in formats_for(scheme):
        return ""
    names = dict.fromkeys(runtime.name for runtime in readers_of(format, scheme))
    return ", ".join(names) or "ours"


def _holds(layout: Format, scheme: Scheme) -> bool:
    try:
        layout.check(scheme)
    except UnsupportedError:
        return False
    return True


def _alike(tested: Scheme, scheme: Scheme) -> bool:
    """Equal but for the size of groups; one scale per channel is another thing. LLM.int8 is a way to round to w8a8."""
    if scheme.kind == "absmax":
        scheme = replace(scheme, kind="int")
    if tested.group_size is None or scheme.group_size is None:
        return tested == scheme
    return replace(tested, group_size=scheme.group_size) == scheme
