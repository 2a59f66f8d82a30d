"""The repair as a check of the report: every change, a table of them in few words, and the way it went."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llmconvert.report.report import Check, Report
from llmconvert.report.section import Cell, Column, Plot, Section, Series
from llmconvert.validate.render.display import format_bytes, format_runs
from llmconvert.validate.repair import Upgrade

__all__ = ["repair_check"]

# Of a linear's name: the index of its block, and what it is called inside.
_IN_BLOCK = re.compile(r".*?\.(\d+)\.(.*)")


def repair_check(rounds: Sequence[Sequence[Upgrade]], trail: Sequence[Report], reason: str, limit: int) -> Check:
    """The repair itself as a check: whether it sufficed, and what was done."""
    done = sum(len(upgrades) for upgrades in rounds)
    added = sum(upgrade.nbytes for upgrades in rounds for upgrade in upgrades)
    words = f"{done} groups of layers got better schemes, {format_bytes(added)} more in all" if done else ""
    if reason:
        words = f"the artifact can't be repaired: {reason}" + (f"; {words}" if words else "")
    return Check(
        name="repair",
        label="Rounds of repair",
        value=len(rounds),
        ok=not reason,
        unit="rounds",
        detail={"text": words, "max_bytes": limit, "changes": _changes(rounds)},
        sections=(_section(rounds, trail, limit),) if rounds else (),
    )


def _section(rounds: Sequence[Sequence[Upgrade]], trail: Sequence[Report], limit: int) -> Section:
    # One scheme may have come to hundreds of linears, and the reader is on a phone.
    rows: list[tuple[Cell, ...]] = []
    for number, upgrades in enumerate(rounds, start=1):
        alike: dict[tuple[str, str], list[Upgrade]] = {}
        for upgrade in upgrades:
            alike.setdefault((str(upgrade.before), _after(upgrade)), []).append(upgrade)
        rows += [
            (number, before, after, _in_short(same), sum(upgrade.nbytes for upgrade in same))
            for (before, after), same in alike.items()
        ]
    return Section(
        name="repair",
        title="Repair",
        text="Layers with the most estimated divergence per byte got more bits, smaller groups or larger types, and "
        f"everything was measured again after each round. The weights may take {format_bytes(limit)}.",
        columns=(
            Column(heading="round"),
            Column(heading="before"),
            Column(heading="after"),
            Column(heading="layers"),
            Column(heading="more", unit="bytes"),
        ),
        rows=tuple(rows),
        plot=_plot(trail),
        shown=("card",),
    )


def _changes(rounds: Sequence[Sequence[Upgrade]]) -> list[dict[str, Any]]:
    """Every change: its round, the linears, their schemes before and after, and the bytes added."""
    return [
        {"round": number, "linears": list(upgrade.linears), "before": str(upgrade.before)}
        | {"after": _after(upgrade), "bytes": upgrade.nbytes}
        for number, upgrades in enumerate(rounds, start=1)
        for upgrade in upgrades
    ]


def _after(upgrade: Upgrade) -> str:
    return str(upgrade.after or "as in the original")


def _in_short(upgrades: Sequence[Upgrade]) -> str:
    """The linears of several units by kind: ``q_proj, k_proj, v_proj of 0–4, 7; down_proj of 2``."""
    blocks: dict[str, list[int]] = {}
    for upgrade in upgrades:
        matches = [_IN_BLOCK.fullmatch(name) for name in upgrade.linears]
        kind = ", ".join(
            match[2].rpartition(".")[2] if match else name for match, name in zip(matches, upgrade.linears, strict=True)
        )
        blocks.setdefault(kind, []).extend({int(match[1]) for match in matches if match})
    return "; ".join(f"{kind} of {', '.join(format_runs(found))}" if found else kind for kind, found in blocks.items())


def _plot(trail: Sequence[Report]) -> Plot | None:
    """The number that failed first, over the size, round by round."""
    first = next(check for check in trail[0].checks if not check.ok)
    points = [(report.check("size_bytes"), report.check(first.name)) for report in trail]
    sizes = [size.value / 1e6 for size, _ in points if size is not None and size.value is not None]
    values = [check.value if check is not None else None for _, check in points]
    if len(sizes) != len(values):
        return None
    return Plot(
        caption="The number that missed its limit, over the size of the weights, round by round.",
        x_label="weights on disk, MB",
        y_label=f"{first.name}{f', {first.unit}' if first.unit else ''}",
        series=(Series(label=first.name, x=tuple(sizes), y=tuple(values)),),
        limit=first.limit,
    )
