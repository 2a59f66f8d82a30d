"""A section of the report: a titled table, a plot, or both, as values that every rendering understands.

A check or a step that has more to show than one number carries sections. Nothing else has to be told about them:
``report.json`` holds them as they are, ``report.html`` shows them all, and the terminal table and the model card show
those that name them in ``shown``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["Cell", "Column", "Plot", "Section", "Series", "Value"]

Cell = float | str | None


class Value(BaseModel):
    """A frozen value of the report. Unknown keys are kept: a later version may have written more."""

    model_config = ConfigDict(frozen=True, extra="allow", ser_json_inf_nan="null")


class Column(Value):
    """A column's heading, and the unit of its numbers (one of those that checks have); text has none."""

    heading: str
    unit: str = ""


class Series(Value):
    """One line, set of points or set of bars: ``y`` over ``x``, with intervals from ``low`` to ``high`` if known.

    ``x`` are numbers, or labels for bars. A ``y`` of None leaves a gap. ``unit`` says how
    numbers are written beside bars of panels, and along a logarithmic axis.
    """

    label: str
    unit: str = Field(default="", exclude_if=lambda unit: not unit)
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _same_length(self) -> Series:
        lengths = {len(values) for values in (self.x, self.y, self.low, self.high) if values}
        if len(lengths) > 1:
            raise ValueError(f"series {self.label!r}: x, y, low and high have different lengths")
        return self


class Plot(Value):
    """A picture of some series.

    Attributes:
        caption: what it shows, one sentence.
        kind: how; bars of several series stand beside each other, panels give each series a plot of its own, with
            bars from the left that have their number beside them.
        x_label, y_label: of the axes, with their units.
        x_scale, y_scale: of the axes.
        limit: a value of y to draw as a line across, which has to be kept.
    """

    caption: str
    kind: Literal["line", "points", "bars", "panels"] = "line"
    x_label: str
    y_label: str
    x_scale: Literal["linear", "log"] = "linear"
    y_scale: Literal["linear", "log"] = "linear"
    series: tuple[Series, ...]
    limit: float | None = None


class Section(Value):
    """One section.

    Attributes:
        name: identifies it in its report, as letters, digits and hyphens: pictures of the model card are named by it.
        title: its heading.
        text: a sentence or more on what it shows and how it was measured.
        columns, rows: a table; every row has a cell per column.
        plot: a picture.
        shown: where it appears besides the page. A terminal draws no plots.
    """

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    title: str
    text: str = ""
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    plot: Plot | None = None
    shown: tuple[Literal["terminal", "card"], ...] = ()

    @model_validator(mode="after")
    def _whole_rows(self) -> Section:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"section {self.name!r}: a row of {len(row)} cells for {len(self.columns)} columns")
        return self
