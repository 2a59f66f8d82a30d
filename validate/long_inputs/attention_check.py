"""The comparison of attention backends (:mod:`.attention`) as checks and sections of the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmconvert.report.report import Check
from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.validate.long_inputs.attention import AttentionOptions, AttentionResult, BackendPoint, measure_attention
from llmconvert.validate.measurement import Measurement, Subject

__all__ = ["AttentionCheck", "attention_checks"]

_MEMORY = "Extra memory of flash, relative to eager"
# In float32 backends differ by the order of sums: far less than this, relative to the largest logit.
_SAME_FUNCTION = 1e-3
# In 16 bits they round elsewhere than eager, and not by more.
_SAME_ROUNDING = 2.0


@dataclass(frozen=True, slots=True)
class AttentionCheck(Measurement):
    """Attention backends as a measurement: agreement with float32, greedy text, memory and time of reading a prompt.

    Attributes:
        options: what to measure.
        named: backends that were asked for by name, so that one that can't run is a failed check.
    """

    options: AttentionOptions
    named: frozenset[str] = frozenset()

    def measure(self, subject: Subject) -> list[Check]:
        """A check per backend, one for greedy tokens, one for memory, with tables and plots over the length."""
        if unloadable := subject.unloadable:
            return [Check.unmeasured("attention.flash.memory", unloadable, asked=True, label=_MEMORY, quiet=True)]
        windows = subject.windows.windows if subject.windows is not None else ()
        memory = self.options.memory if self.options.memory is not None else subject.memory
        result = measure_attention(
            subject.artifact,
            replace(self.options, memory=memory),
            windows,
            device=subject.device,
            progress=subject.progress,
        )
        return attention_checks(result, self.options, self.named)


def attention_checks(
    result: AttentionResult, options: AttentionOptions, named: frozenset[str] = frozenset()
) -> list[Check]:
    """The checks of a result; a backend among the ``named`` that did not run fails."""
    checks = [_backend_check(name, result, name in named) for name in options.backends]
    checks += [_generation_check(name, found) for name, found in result.comparison.get("continuations", {}).items()]
    checks.append(_memory_check(result, options))
    return checks


def _backend_check(name: str, result: AttentionResult, named: bool) -> Check:
    check = f"attention.{name}.max_abs_diff"
    label = f"Largest difference of a logit, {name} to float32"
    if name in result.refused:
        return Check.unmeasured(check, f"{name}: {result.refused[name]}", asked=named, label=label, quiet=True)
    found = result.comparison.get("backends", {}).get(name)
    if found is None:
        return Check.unmeasured(check, f"{name}: {result.note}", asked=True, label=label, quiet=True)
    largest = result.comparison["reference"]["largest"]
    wide = found.get("float32_max_abs_diff")
    same = wide is None or wide <= _SAME_FUNCTION * largest
    eager = result.comparison["backends"].get("eager", {}).get("mean_abs_diff")
    rounded = not eager or result.comparison["dtype"] == "float32" or found["mean_abs_diff"] <= _SAME_ROUNDING * eager
    dtype = result.comparison["dtype"]
    text = (
        f"{name} in {dtype}: {found['mean_abs_diff']:.2g} on the average, perplexity {found['perplexity']:.4f} against "
        f"{result.comparison['reference']['perplexity']:.4f}; "
        + (f"in float32 at most {wide:.2g}" if wide is not None else "there is no kernel of it for float32")
    )
    if not (same and rounded):
        text += "; this is more than rounding, the backend computes something else"
    return Check(
        name=check,
        label=label,
        value=found["max_abs_diff"],
        ok=bool(same and rounded),
        quiet=True,
        detail={"text": text, **found, "dtype": dtype, "reference": result.comparison["reference"]},
    )


def _generation_check(name: str, found: dict[str, Any]) -> Check:
    """Greedy tokens that part from eager's where the reference sees no tie."""
    untied = [text for text in found["parted"] if not text["gap"] <= found["tolerance"]]
    ties = len(found["parted"]) - len(untied)
    text = (
        f"{name}: {found['equal']} of {found['texts']} greedy texts are eager's, {ties} part at a tie (a gap of at "
        f"most {found['tolerance']:.2g} between the two logits in float32)"
    )
    if untied:
        text += f"; {len(untied)} part elsewhere, first after {untied[0]['position']} tokens of {untied[0]['prompt']!r}"
    columns = ("prompt", "after tokens", "eager wrote", f"{name} wrote", "gap of the logits")
    rows = [
        (str(part["prompt"]), float(part["position"]), repr(part["eager"]), repr(part["other"]), float(part["gap"]))
        for part in found["parted"]
    ]
    section = Section(
        name=f"attention-ties-{name.replace('_', '-')}",
        title=f"Where {name} writes another token than eager",
        text=f"{text}. After that token the texts go different ways.",
        columns=tuple(Column(heading=heading) for heading in columns),
        rows=tuple(rows),
    )
    return Check(
        name=f"attention.{name}.generation",
        label=f"Greedy texts of {name} that part from eager's, but for ties",
        value=len(untied),
        limit=0,
        ok=not untied,
        unit="texts",
        quiet=True,
        detail={"text": text, **found},
        sections=(section,) if rows else (),
    )


def _memory_check(result: AttentionResult, options: AttentionOptions) -> Check:
    about: dict[str, Any] = {"label": _MEMORY, "quiet": True, "sections": tuple(_sections(result, options))}
    if broken := [point for point in result.points if point.failed]:
        why = f"{broken[0].backend} at {broken[0].length:,} tokens: {broken[0].reason}"
        return Check.unmeasured("attention.flash.memory", why, asked=True, **about)
    eager = {point.length: point.extra_bytes for point in result.measured("eager")}
    both = [point for point in result.measured("flash") if eager.get(point.length) and point.extra_bytes]
    if not both:
        why = "eager and flash did not both read a prompt"
        return Check.unmeasured("attention.flash.memory", why, asked=False, **about)
    last = both[-1]
    wide = eager[last.length] or 0
    seconds = {point.length: point.seconds for point in result.measured("eager")}
    ratio = (seconds[last.length] or 0.0) / (last.seconds or 1.0)
    part = wide / (last.extra_bytes or 1)
    text = f"at {last.length:,} tokens, where flash takes 1/{part:.0f} and is {ratio:.1f} × as fast"
    detail = {
        "text": text,
        "length": last.length,
        "speedup": ratio,
        "method": result.method,
        "points": [_point(point) for point in result.points],
        "exponents": {name: result.exponents(name) for name in options.backends},
    }
    share = (last.extra_bytes or 0) / wide
    about |= {"quiet": False, "value": share, "unit": "relative", "detail": detail}
    return Check(name="attention.flash.memory", **about)


def _point(point: BackendPoint) -> dict[str, Any]:
    return {
        "backend": point.backend,
        "length": point.length,
        "seconds": point.seconds,
        "extra_bytes": point.extra_bytes,
        "reason": point.reason,
    }


def _sections(result: AttentionResult, options: AttentionOptions) -> list[Section]:
    found = [_agreement_section(result, options)]
    memory = _curve_section(
        result,
        options,
        name="attention-memory",
        title="Memory of reading a prompt",
        what="Peak memory beyond the loaded model",
        unit="bytes",
        value=lambda point: point.extra_bytes,
        exponent=lambda name: result.exponents(name)[0],
    )
    seconds = _curve_section(
        result,
        options,
        name="attention-time",
        title="Time of reading a prompt",
        what="Time to the first token",
        unit="seconds",
        value=lambda point: point.seconds,
        exponent=lambda name: result.exponents(name)[1],
    )
    return [*found, memory, seconds]


def _left_out(points: Sequence[BackendPoint]) -> list[str]:
    """One sentence for every reason why points were not measured: which backends, at which lengths."""
    lengths: dict[str, dict[str, list[str]]] = {}
    for point in points:
        if point.reason:
            lengths.setdefault(point.reason, {}).setdefault(point.backend, []).append(f"{point.length:,}")
    sentences = []
    for reason, backends in lengths.items():
        alike: dict[tuple[str, ...], list[str]] = {}
        for backend, found in backends.items():
            alike.setdefault(tuple(found), []).append(backend)
        which = "; ".join(f"{_listed(names)} at {_listed(found)} tokens" for found, names in alike.items())
        sentences.append(f"Left out: {which}: {reason}")
    return sentences


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _curve_section(
    result: AttentionResult,
    options: AttentionOptions,
    *,
    name: str,
    title: str,
    what: str,
    unit: str,
    value: Callable[[BackendPoint], float | None],
    exponent: Callable[[str], float | None],
) -> Section:
    run = [backend for backend in options.backends if backend not in result.refused]
    grid = {(point.backend, point.length): point for point in result.points}
    lengths = sorted({point.length for point in result.points})
    rows = [(float(length), *(_value(grid.get((backend, length)), value) for backend in run)) for length in lengths]
    slopes = {backend: exponent(backend) for backend in run}
    fitted = ", ".join(f"{backend} {slope:.2f}" for backend, slope in slopes.items() if slope is not None)
    refused = [f"{backend} was not run: {reason}" for backend, reason in result.refused.items()]
    text = (
        f"{what}; logits of the last position only, one process per measurement ({result.method or 'none was run'}). "
    )
    text += f"Exponents over the length, from the longest three: {fitted}. " if fitted else ""
    text += " ".join(f"{sentence}." for sentence in (*refused, *_left_out(result.points)))
    series = [
        Series(
            label=f"{backend}, exponent {slopes[backend]:.2f}" if slopes[backend] is not None else backend,
            unit=unit,
            x=tuple(float(point.length) for point in result.measured(backend)),
            y=tuple(value(point) for point in result.measured(backend)),
        )
        for backend in run
        if result.measured(backend)
    ]
    plot = Plot(
        caption=f"{what} over the length of the prompt.",
        x_label="tokens",
        y_label=what.lower(),
        x_scale="log",
        y_scale="log",
        series=tuple(series),
    )
    columns = (Column(heading="tokens"), *(Column(heading=backend, unit=unit) for backend in run))
    return Section(
        name=name,
        title=title,
        text=text.strip(),
        columns=columns,
        rows=tuple(rows),
        plot=plot if series else None,
        shown=("terminal", "card") if series else ("terminal",),
    )


def _value(point: BackendPoint | None, value: Callable[[BackendPoint], float | None]) -> Cell:
    if point is None or point.reason:
        return "not run"
    found = value(point)
    return None if found is None else float(found)


def _agreement_section(result: AttentionResult, options: AttentionOptions) -> Section:
    """How far every backend is from the float32 reference, or why it was not run."""
    dtype = result.comparison.get("dtype", "its own dtype")
    headings = ("backend", f"largest, {dtype}", f"mean, {dtype}", "perplexity", "largest, float32", "what ran")
    rows: list[Sequence[Cell]] = []
    for name in options.backends:
        found = result.comparison.get("backends", {}).get(name)
        if name in result.refused or found is None:
            why = result.refused.get(name, result.note)
            rows.append((name, None, None, None, None, f"not run: {why}"))
            continue
        numbers = (found["max_abs_diff"], found["mean_abs_diff"], f"{found['perplexity']:.4f}")
        rows.append((name, *numbers, found.get("float32_max_abs_diff"), ", ".join(found["kernels"])))
    reference = result.comparison.get("reference")
    text = "Differences of logits to eager attention in float32"
    if reference is not None:
        text += (
            f", whose perplexity is {reference['perplexity']:.4f} and whose largest logit {reference['largest']:.1f}"
        )
    return Section(
        name="attention-agreement",
        title="Attention backends: the same output",
        text=f"{text}.",
        columns=tuple(Column(heading=heading) for heading in headings),
        rows=tuple(tuple(row) for row in rows),
        shown=("terminal",),
    )
