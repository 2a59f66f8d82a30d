"""The card of several artifacts of one model in one repository: a table, which one to take, sizes against quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmconvert.hub.card import mark_card, parts_of_card
from llmconvert.report.report import Report
from llmconvert.report.steps import QuantizeReport
from llmconvert.validate.render.display import format_bytes
from llmconvert.validate.render.pareto import front, knee, measure_of, points

__all__ = ["SetMember", "render_set_card", "with_set"]

#: Memory of machines that people have, in GB, and the part of it that a model may have.
_MACHINES = (8, 16, 24)
_SHARE = 0.9
#: Contexts that memory is told for, in tokens.
_SHORT, _LONG = 4096, 32768
_KIND = "set"
_MEASURES = (
    ("bits_per_weight", "bits per weight", "{:.2f}"),
    ("perplexity", "perplexity", "{:.2f}"),
    ("kl_mean", "KL, mean", "{:.4f}"),
    ("kl_p999", "KL, 99.9th percentile", "{:.3f}"),
    ("top1_agreement", "same top-1", "{:.1%}"),
)


@dataclass(frozen=True, slots=True)
class SetMember:
    """One artifact of a set.

    Attributes:
        place: its file, or folder, in the repository.
        report: what was measured on it.
        token_nbytes: of the key-value cache, for each token of context; None where that is not known.
        link: to it; its place if None, and nothing where empty.
    """

    place: str
    report: Report
    token_nbytes: int | None
    link: str | None = None

    @property
    def nbytes(self) -> float | None:
        """Of its weight files."""
        check = self.report.check("size_bytes")
        return None if check is None else check.value

    def memory(self, context: int) -> float | None:
        """Bytes of weights and cache for so many tokens of context."""
        if self.nbytes is None or self.token_nbytes is None:
            return None
        return self.nbytes + context * self.token_nbytes


def render_set_card(front_matter: str, title: str, members: Mapping[str, SetMember], plot: str | None) -> str:
    """The card, marked as one of ours.

    Args:
        front_matter: fences included.
        title: of the card: what was quantized.
        members: by name.
        plot: the name of a picture of sizes against what :func:`~llmconvert.validate.render.pareto.measure_of` says;
            None without one.
    """
    reports = {name: member.report for name, member in members.items()}
    first = next(iter(reports.values()))
    lines = [f"# {title}", "", f"{len(members)} quantizations of {first.model.source}, made in one go.", ""]
    lines += _comparison(members)
    measure = measure_of(reports)
    found = points(reports, measure)
    bend = knee(found)
    if plot is not None:
        lines += ["", f"![Size against {'KL' if measure == 'kl_mean' else measure}]({plot})"]
        if len(found) > 2:
            best = ", ".join(f"`{members[point.name].place}`" for point in front(found))
            lines += ["", f"No other one is both smaller and better than {best}."]
        if bend is not None:
            lines += [f"The knee is `{members[bend.name].place}`: beyond it, more bytes gain little."]
    if notes := list(_notes(members)):
        lines += ["", "## What to know", "", *notes]
    if first.model.calibration:
        lines += ["", f"Calibrated on {first.model.calibration}."]
    lines += ["", "Made with llmconvert; the report of each is under `llmconvert/`."]
    return mark_card(front_matter, "\n" + "\n".join(lines) + "\n", _KIND)


def _notes(members: Mapping[str, SetMember]) -> Iterator[str]:
    """What is otherwise than asked for, or in a runtime than in transformers, and of which of them, if not of all."""
    found: dict[str, list[str]] = {}
    for member in members.values():
        steps = (step.details for step in member.report.steps)
        for note in dict.fromkeys(note for step in steps if isinstance(step, QuantizeReport) for note in step.notes):
            found.setdefault(note, []).append(f"`{member.place}`")
    for note, places in found.items():
        of = "" if len(places) == len(members) else f" ({', '.join(places)})"
        yield f"- {note[:1].upper()}{note[1:]}.{of}"


def with_set(card: str, members: Mapping[str, SetMember]) -> str:
    """An artifact's card, with the comparison of a set that it is one of; marked as a set's card is."""
    front, text = parts_of_card(card)
    lines = ["", "## The set", "", "Made in one go with this one:", "", *_comparison(members)]
    return mark_card(front, text.rstrip("\n") + "\n" + "\n".join(lines) + "\n", _KIND)


def _comparison(members: Mapping[str, SetMember]) -> list[str]:
    """A table of all, and which one is for which machine."""
    headings = ["", "size", *(heading for _, heading, _ in _MEASURES), "RAM at 4k", "RAM at 32k"]
    lines = [_row(headings), _row(["---", *["---:"] * (len(headings) - 1)])]
    lines += [_row(_cells(member)) for member in members.values()]
    lines += [
        "",
        "KL is the divergence of predictions from the original's, in nats per token. RAM is weights and the key-value",
        "cache in 16 bits, for 4,096 and 32,768 tokens of context; runtimes take some more for themselves.",
    ]
    advice = list(_advice(list(members.values())))
    return [*lines, "", "## Which one", "", *advice] if advice else lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(member: SetMember) -> list[str]:
    link = member.place if member.link is None else member.link
    cells = [f"[{member.place}]({link})" if link else member.place, _size(member.nbytes)]
    for name, _, form in _MEASURES:
        check = member.report.check(name)
        cells.append("" if check is None or check.value is None else form.format(check.value))
    return [*cells, _size(member.memory(_SHORT)), _size(member.memory(_LONG))]


def _size(nbytes: float | None) -> str:
    return "" if nbytes is None else format_bytes(nbytes)


def _advice(members: Sequence[SetMember]) -> list[str]:
    """For each machine the one with the least divergence that fits with a long context, or else a short one."""
    found: list[str] = []
    for memory in _MACHINES:
        for context, words in ((_LONG, "32k"), (_SHORT, "4k")):
            fitting = [
                (check.value, member)
                for member in members
                if (taken := member.memory(context)) is not None and taken <= _SHARE * memory * 1e9
                if (check := member.report.check("kl_mean") or member.report.check("perplexity")) is not None
                if check.value is not None
            ]
            if fitting:
                best = min(fitting, key=lambda pair: (pair[0], pair[1].place))[1]
                found.append(f"- {memory} GB: `{best.place}`, with {words} tokens of context")
                break
        else:
            if any(member.memory(_SHORT) is not None for member in members):
                found.append(f"- {memory} GB: none fits")
    return found
