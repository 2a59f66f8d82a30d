"""Drawing without any global state of matplotlib: as SVG for pages, as PNG for model cards.

As SVG their text is text and their ink is the page's own colour (``currentColor``), so that one drawing serves light
and dark pages; as PNG they are dark on white.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Literal

__all__ = ["COLOURS", "INK", "MARKERS", "Format", "legend", "render", "style"]

Format = Literal["svg", "png"]

#: Near-black for PNG; a colour that occurs nowhere else, to be found again in the SVG.
INK = "#1e2328"
#: Of middle lightness: at least 3:1 against white and against near-black.
COLOURS = ("#3b82c4", "#d07a1f", "#2e9567", "#c75a9b", "#8a6fd1", "#a08025", "#d1495b", "#2a9d9d", "#7f7f7f")
#: One per colour.
MARKERS = "osD^vP*Xh"
# About as wide as a phone, and half as a page, so that their text has the size of text in both.
_INCHES = (4.8, 3.2)
_FONT = {"font.size": 9.5, "font.family": "sans-serif"}


def render(draw: Callable[[Any], None], format: Format, name: str) -> bytes:
    """What ``draw`` puts into an empty figure. ``name`` keeps the ids of several SVGs on one page apart."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    buffer = io.BytesIO()
    # Restored on leaving: text as text, and ids that are the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, **_FONT}):
        figure = Figure(figsize=_INCHES, layout="constrained")
        (FigureCanvasSVG if format == "svg" else FigureCanvasAgg)(figure)
        draw(figure)
        if format == "png":
            figure.savefig(buffer, format="png", dpi=220, facecolor="white")
            return buffer.getvalue()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue().decode(), name).encode()


def _inline(svg: str, name: str) -> str:
    """An SVG to stand inside a page: no prologue, ids of its own, the page's ink and font."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: system-ui, sans-serif", svg)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r'<svg \1width="100%" role="img"', svg, count=1)
    return svg.replace(INK, "currentColor")


def style(axes: Any) -> None:
    """Axes in the page's ink, with a light grid behind."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.grid(color="#888888", alpha=0.25, linewidth=0.8)
    axes.set_axisbelow(True)


def legend(figure: Any, columns: int) -> None:
    """A legend above the axes, without a frame."""
    figure.legend(
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=8.5,
        columnspacing=1.2,
        handlelength=1.4,
        handletextpad=0.5,
    )
