"""The site's pages that lie elsewhere in the repository, and links as GitHub wants them turned into links of the site.

Pages link to each other by paths in the repository, so that they work where the repository is read. Here every such
link becomes one between pages; one that leads to no page fails the build, which is strict.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
#: File of the repository → page of the site. All others of ``docs/`` are pages under their own names.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    **{
        f"bench/results/{path.name}": f"results/{'index.md' if path.name == 'README.md' else path.name}"
        for path in sorted((ROOT / "bench" / "results").glob("*.md"))
    },
}
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside ``docs/``."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn a page's links into those of the site."""
    here = page.file.src_uri
    source = next((name for name, target in ELSEWHERE.items() if target == here), f"docs/{here}")
    parts = _CODE.split(markdown)
    return "".join(part if i % 2 else _turned(part, source, here) for i, part in enumerate(parts))


def _turned(text: str, source: str, here: str) -> str:
    return _LINK.sub(lambda match: _target(match[1], source, here), text)


def _target(link: str, source: str, here: str) -> str:
    path, anchor, fragment = link.partition("#")
    if "://" in link or not path:
        return link
    named = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = ELSEWHERE.get(named, named.removeprefix("docs/") if named.startswith("docs/") else named)
    return posixpath.relpath(page, posixpath.dirname(here) or ".") + anchor + fragment
