"""Compatibility of methods, schemes, formats and runtimes: for refusals, budgets and tables.

Nothing is listed twice: a method says which numbers it chooses codes of, a format which schemes it holds, and the
runtimes' record (:mod:`llmconvert.quantize.runtimes`) what has been seen to read it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
from llmconvert.quantize.catalog.formats import FORMATS
from llmconvert.quantize.catalog.methods import METHODS
from llmconvert.quantize.catalog.schemes import USUAL
from llmconvert.quantize.formats.base import FileFormat, Format, load_format
from llmconvert.quantize.methods.base import GgmlQuantizer, Method, load_method
from llmconvert.quantize.runtimes import Runtime, runtimes_of
from llmconvert.quantize.scheme import Scheme, SchemeOrMix, parse_scheme

__all__ = [
    "Combination",
    "Readership",
    "check_combination",
    "check_format",
    "check_method",
    "combinations",
    "formats_for",
    "markdown_matrix",
    "methods_for",
    "readers_of",
    "readership",
    "refused_by",
]


# What lies outside the blocks and is quantized, in words.
_OUTER = {
    "head": "a quantized head",
    "embedding": "a quantized embedding",
    "tied": "a quantized embedding that is the head too",
}


@dataclass(frozen=True, slots=True)
class Combination:
    """One that can be made.

    Attributes:
        method, format: by name.
        readers: runtimes that have read the format in such a scheme, whatever its group size; our own reader always
            does.
    """

    method: str
    scheme: SchemeOrMix
    format: str
    readers: tuple[Runtime, ...]


def methods_for(scheme: SchemeOrMix) -> tuple[str, ...]:
    """Names of the methods that can choose codes of this scheme."""
    return tuple(name for name in METHODS if _chooses(load_method(name, {}), scheme))


def formats_for(scheme: SchemeOrMix) -> tuple[str, ...]:
    """Names of the formats that can hold it."""
    return tuple(name for name in FORMATS if _holds(load_format(name), scheme))


def readers_of(format: str, scheme: SchemeOrMix) -> tuple[Runtime, ...]:
    """Runtimes that were run with this format in this scheme, or in one that differs in its group size alone.

    Codes that a GGML type holds are read by what was run with the mix that has this type.
    """
    layout = load_format(format)
    stored = layout.mix_of(scheme) if isinstance(layout, FileFormat) else scheme
    return tuple(
        runtime
        for runtime in runtimes_of(format)
        if any(_alike(parse_scheme(tested), stored) for tested in runtime.schemes)
    )


def refused_by(script: str, format: str, schemes: Iterable[SchemeOrMix]) -> tuple[str, ...]:
    """Those schemes that a runtime was shown in a format and does not load, groups of any size being alike.

    Args:
        script: the runtime, as :attr:`~llmconvert.quantize.runtimes.Runtime.script` has it.
    """
    shown = [parse_scheme(text) for one in runtimes_of(format) if one.script == script for text in one.refused]
    return tuple(sorted({str(scheme) for scheme in schemes if any(_alike(tested, scheme) for tested in shown)}))


@dataclass(frozen=True, slots=True)
class Readership:
    """Which runtimes have read a format in all of an artifact's schemes.

    Attributes:
        read: their names.
        unseen: names of those that read the format, and the schemes, or what else, that they were never run with.
        refused: names of those that read the format, and the schemes that they were shown and do not load.
    """

    read: tuple[str, ...]
    unseen: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        read = ", ".join(self.read) or "no runtime but ours"
        left = [f"{name} does not load {', '.join(schemes)}" for name, schemes in self.refused.items()]
        left += [f"{name} was never run with {', '.join(schemes)}" for name, schemes in self.unseen.items()]
        return "; ".join([f"schemes read by {read}", *left])


def readership(
    format: str,
    schemes: Iterable[SchemeOrMix],
    outer: Collection[str] = (),
    runtime: str | None = None,
    *,
    experts: bool = False,
) -> Readership:
    """Who reads an artifact with these schemes, as far as the record of runs goes (groups of any size are alike).

    Args:
        format: by name.
        schemes: of all that is quantized.
        outer: what of it lies outside the blocks: ``head``, ``embedding``, ``tied``.
        runtime: the one that the artifact is for alone, as requests call it.
        experts: whether experts of a mixture are among what is quantized.
    """
    used = sorted(set(schemes), key=str)
    runtimes = [one for one in runtimes_of(format) if runtime in (None, one.script)]
    keys = {str(scheme): {runtime.key for runtime in readers_of(format, scheme)} for scheme in used}
    refusals = {reader.name: refused_by(reader.script, format, used) for reader in runtimes}
    unseen = {
        reader.name: (
            *(text for text in map(str, used) if reader.key not in keys[text] and text not in refusals[reader.name]),
            *(_OUTER[kind] for kind in sorted(outer) if kind not in reader.outer),
            *(("quantized experts",) if experts and not reader.experts else ()),
        )
        for reader in runtimes
    }
    read = tuple(name for name, schemes_left in unseen.items() if not schemes_left and not refusals[name])
    return Readership(
        read,
        {name: left for name, left in unseen.items() if left},
        {name: schemes for name, schemes in refusals.items() if schemes},
    )


def combinations(schemes: Sequence[str] = USUAL) -> Iterator[Combination]:
    """Everything that goes together, scheme by scheme."""
    for text in schemes:
        scheme = parse_scheme(text)
        for format in formats_for(scheme):
            for method in methods_for(scheme):
                yield Combination(method, scheme, format, readers_of(format, scheme))


def check_combination(method: Method, scheme: SchemeOrMix, layout: Format) -> None:
    """Refuse what does not go together.

    Raises:
        UnsupportedError: with the methods or formats that do.
    """
    check_method(method, scheme)
    check_format(layout, scheme)


def check_method(method: Method, scheme: SchemeOrMix) -> None:
    """Refuse a scheme whose codes a method cannot choose.

    Raises:
        UnsupportedError: with the methods that can.
    """
    if not _chooses(method, scheme):
        codes = {"even": "int", "scaled": "int and float", "solved": "int, float and GGUF"}.get(
            method.numbers, "GGUF's"
        )
        wanted = "GGUF types" if isinstance(scheme, GgmlMix) else scheme.number.name
        raise UnsupportedError(
            f"scheme {scheme}: {type(method).__name__.lower()} chooses {codes} codes only; methods for {wanted} are "
            f"{', '.join(methods_for(scheme))}"
        )


def check_format(layout: Format, scheme: SchemeOrMix) -> None:
    """Refuse a scheme that a format cannot hold.

    Raises:
        UnsupportedError: with the formats that hold it.
    """
    able = ", ".join(formats_for(scheme)) or "none"
    if isinstance(scheme, GgmlMix):
        if not isinstance(layout, FileFormat):
            raise UnsupportedError(f"{scheme} is a GGUF type; it needs format: {able} (--format {able})")
        return
    try:
        _check_held(layout, scheme)
    except UnsupportedError as error:
        raise UnsupportedError(f"{error}; formats that hold {scheme}: {able}") from None


def markdown_matrix() -> str:
    """The table of ``docs/methods.md``: by scheme the methods, and for every format what reads it."""
    lines = [f"| scheme | methods | {' | '.join(FORMATS)} |", f"|---|---|{'---|' * len(FORMATS)}"]
    for text in USUAL:
        scheme = parse_scheme(text)
        cells = [_cell(name, scheme) for name in FORMATS]
        lines.append(f"| `{text}` | {', '.join(methods_for(scheme))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(format: str, scheme: SchemeOrMix) -> str:
    if format not in formats_for(scheme):
        return ""
    names = dict.fromkeys(runtime.name for runtime in readers_of(format, scheme))
    return ", ".join(names) or "ours"


def _chooses(method: Method, scheme: SchemeOrMix) -> bool:
    if isinstance(scheme, GgmlMix):
        return isinstance(method, GgmlQuantizer) or (method.numbers == "solved" and scheme.base not in FLOATS)
    if scheme.block is not None and isinstance(method, GgmlQuantizer):
        return True
    if method.numbers == "solved":
        return scheme.number.solvable
    able = {"any": True, "even": scheme.number.even, "scaled": scheme.number.even or scheme.number.parts is not None}
    return able.get(method.numbers, False) and (method.numbers == "any" or scheme.block is None)


def _holds(layout: Format, scheme: SchemeOrMix) -> bool:
    if isinstance(scheme, GgmlMix):
        return isinstance(layout, FileFormat)
    try:
        _check_held(layout, scheme)
    except UnsupportedError:
        return False
    return True


def _check_held(layout: Format, scheme: Scheme) -> None:
    if scheme.block is not None and not isinstance(layout, FileFormat):
        raise UnsupportedError(f"scheme {scheme}: its blocks are GGUF's")
    layout.check(scheme)


def _alike(tested: SchemeOrMix, scheme: SchemeOrMix) -> bool:
    """Equal but for the size of groups; one scale per channel is another thing. LLM.int8 is a way to round to w8a8."""
    if isinstance(tested, GgmlMix) or isinstance(scheme, GgmlMix):
        return tested == scheme
    scheme = replace(scheme, number=scheme.number.stored)
    if tested.group_size is None or scheme.group_size is None:
        return tested == scheme
    return replace(tested, group_size=scheme.group_size) == scheme
