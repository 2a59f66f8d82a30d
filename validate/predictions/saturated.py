"""Inputs that fixed scales cut off: what calibration text fixed, held against text that it has not seen.

A static scale of FP8, and the float32 divisor of NVFP4, are the largest magnitude of a linear's inputs on calibration
text. Larger ones are cut off to it in every runtime.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmconvert.compute.saturation import Saturation
from llmconvert.progress import Progress
from llmconvert.report.report import Check
from llmconvert.report.section import Column, Section

__all__ = ["saturated_inputs"]

_NAME = "saturated_inputs"
#: From which share of a linear's inputs, or from which excess of the largest, it is said to matter.
_NOTABLE_SHARE, _NOTABLE_EXCESS = 1e-3, 2.0
_ROWS = 20


def saturated_inputs(found: Sequence[Saturation], limit: float | None, progress: Progress) -> list[Check]:
    """One check: the share of cut-off inputs in the linear that has most of them; nothing without fixed scales.

    Args:
        found: of every linear with a fixed scale, on the evaluation text.
        limit: what the share may be; None for anything, which is warned of all the same.
        progress: where the warning goes.
    """
    if not found:
        if limit is None:
            return []
        text = "no linear has a fixed scale for its inputs (fp8-static, nvfp4), so none can be cut off"
        return [Check(name=_NAME, value=0.0, limit=limit, unit="share", detail={"text": text})]
    over = sorted((one for one in found if one.beyond), key=lambda one: (-one.share, -one.excess, one.name))
    worst = over[0].share if over else 0.0
    ok = limit is None or worst <= limit
    total, beyond = sum(one.inputs for one in found), sum(one.beyond for one in found)
    detail: dict[str, object] = {"linears": len(found), "saturated": len(over), "inputs": total, "beyond": beyond}
    if over:
        text = _sentence(over, len(found))
        if not ok:
            text += f"; allowed are {100 * (limit or 0):g} %"
        notable = worst > _NOTABLE_SHARE or max(one.excess for one in over) > _NOTABLE_EXCESS
        if notable or not ok:
            text += (
                "; calibrate on more text, or on text like this, or take fp8-dynamic, whose scales are of each token"
            )
            text = f"activations overflow static scales: {text}"
        if notable:
            progress.log(f"warning: {text}")
        detail["text"] = text
    return [
        Check(
            name=_NAME,
            value=worst,
            limit=limit,
            ok=ok,
            unit="share",
            quiet=not over,
            detail=detail,
            sections=(_section(over, len(found)),) if over else (),
        )
    ]


def _sentence(over: Sequence[Saturation], linears: int) -> str:
    farthest = max(over, key=lambda one: one.excess)
    return (
        f"{len(over)} of {linears} linears with fixed scales meet inputs beyond them: most in {over[0].name} "
        f"({100 * over[0].share:.2g} % of its inputs), farthest in {farthest.name} ({farthest.excess:.3g} times the "
        "largest that is kept)"
    )


def _section(over: Sequence[Saturation], linears: int) -> Section:
    return Section(
        name="saturated-inputs",
        title="Inputs beyond static scales",
        text=f"Of {linears} linears whose inputs have scales that calibration text fixed, the {min(len(over), _ROWS)} "
        "with most inputs cut off on the evaluation text; and their largest input, by the largest that is kept.",
        columns=(
            Column(heading="linear"),
            Column(heading="cut off", unit="share"),
            Column(heading="inputs"),
            Column(heading="largest by limit"),
        ),
        rows=tuple((one.name, one.share, float(one.inputs), one.excess) for one in over[:_ROWS]),
    )
