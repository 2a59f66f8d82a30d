"""A headless Chromium for tests of pages: what it measures in a frame of a given width, and what it prints."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_DEADLINE = 120

# What can be seen of every text: its colour, what is behind it, and whether it lies within the page's width.
_PROBE = """
const shown = document.getElementById('page').contentDocument, view = shown.defaultView;
const backdrop = node => {
  for (; node; node = node.parentElement) {
    const colour = view.getComputedStyle(node).backgroundColor;
    if (!/^rgba\\(.*, 0\\)$/.test(colour)) return colour;
  }
  return 'rgb(255, 255, 255)';
};
const texts = [];
for (const node of shown.querySelectorAll('body *')) {
  const own = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
  if (!own || !node.getClientRects().length || ['STYLE', 'TITLE'].includes(node.tagName)) continue;
  const style = view.getComputedStyle(node), drawn = node instanceof view.SVGElement;
  const box = node.getBoundingClientRect();
  texts.push({
    text: node.textContent.trim().slice(0, 40), colour: drawn ? style.fill : style.color, behind: backdrop(node),
    pixels: drawn ? Math.max(box.width, box.height) : parseFloat(style.fontSize),
    right: node.closest('.wide, pre') ? 0 : box.right,
  });
}
document.body.replaceChildren(Object.assign(document.createElement('pre'), {id: 'found', textContent: JSON.stringify({
  width: view.innerWidth, needed: shown.documentElement.scrollWidth, texts,
  dark: view.matchMedia('(prefers-color-scheme: dark)').matches,
  loaded: view.performance.getEntriesByType('resource').map(entry => entry.name),
})}));
"""


def look_at(page: str, directory: Path, *, width: int, dark: bool = False) -> dict[str, Any]:
    """Show a page in a frame of ``width`` pixels; gives its needed width, its texts and what it loaded."""
    frame = f'<iframe id="page" style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(page)}"></iframe>'
    path = directory / f"look-{width}.html"
    # Modules run when the document, the frame included, has been parsed; the load event comes after both.
    path.write_text(f"<body>{frame}<script>addEventListener('load', () => {{{_PROBE}}})</script></body>")
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    dom = _run(directory, [*scheme, "--window-size=1400,1000", "--dump-dom", path.as_uri()])
    match = re.search(r'<pre id="found">(.*?)</pre>', dom, re.DOTALL)
    assert match is not None, dom[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(match[1]))
    return found


def print_page(page: str, directory: Path) -> bytes:
    """The page as PDF."""
    path, printed = directory / "print.html", directory / "print.pdf"
    path.write_text(page)
    _run(directory, ["--no-pdf-header-footer", f"--print-to-pdf={printed}", path.as_uri()])
    return printed.read_bytes()


def _run(directory: Path, arguments: list[str]) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={directory / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE, check=True).stdout
