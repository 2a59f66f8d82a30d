"""Root card of a repository with one variant of a model per folder: what there is, and how to load it.

Its marker holds the hash of the text behind it, so that a card which nobody has changed since can be told from one that
somebody has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from llmconvert.errors import HubError
from llmconvert.hub.plan import PushPlan
from llmconvert.hub.repository import MANIFEST, Content, Listing
from llmconvert.hub.transfer import iterate_content

__all__ = ["ROOT_CARD", "variants_card"]

ROOT_CARD = "README.md"
_MARK = re.compile(r"<!-- llmconvert: one variant per folder(?:, sha256 ([0-9a-f]{64}))? -->\n")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def variants_card(
    listing: Listing, plan: PushPlan, contents: Mapping[str, Content], *, replace: bool = False
) -> bytes | None:
    """The root's card as it should be after this push, or None if the root has a card that is none of ours.

    Args:
        replace: write over ours even if somebody has changed it since.

    Raises:
        HubError: ours was changed since it was published.
    """
    present = listing.get(ROOT_CARD)
    if present is not None:
        state = _state(b"".join(iterate_content(present)).decode(errors="replace"))
        if state == "foreign":
            return None
        if state == "edited" and not replace:
            raise HubError(
                f"{plan.repo_id}: {ROOT_CARD}, which lists the variants, was changed since it was published; take the "
                "change over, or write over it with --replace"
            )
    sizes = {name: file.size for name, file in listing.items() if not name.startswith(plan.folder)}
    sizes |= {name: content.size for name, content in contents.items()}
    folders = sorted(name.removesuffix(MANIFEST) for name in sizes if name.endswith(f"/{MANIFEST}"))
    rows = []
    for folder in folders:
        weights = sum(sizes[name] for name in sizes if name.startswith(folder) and name.endswith(".safetensors"))
        name = folder.rstrip("/")
        card = f"[card]({folder}README.md)" if f"{folder}README.md" in sizes else ""
        rows.append(f"| `{name}` | {weights / 1e6:,.1f} MB | {card} |")
    lines = [
        f"# {plan.repo_id.split('/')[1]}",
        "",
        "Several variants of one model, each in a folder of its own.",
        "",
        "| folder | weights | |",
        "|---|---|---|",
        *rows,
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{plan.repo_id}", subfolder="{folders[0].rstrip("/")}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{plan.repo_id}", subfolder="{folders[0].rstrip("/")}")',
        "```",
        "",
    ]
    matter = _FRONT_MATTER.match(plan.card or "")
    front, text = matter[0] if matter else "", "\n".join(lines)
    return f"{front}<!-- llmconvert: one variant per folder, sha256 {_digest(front, text)} -->\n{text}".encode()


def _state(card: str) -> str:
    """``"ours"`` as it was published, ``"edited"`` since, or ``"foreign"``."""
    mark = _MARK.search(card)
    if mark is None:
        return "foreign"
    return "ours" if mark[1] == _digest(card[: mark.start()], card[mark.end() :]) else "edited"


def _digest(front: str, text: str) -> str:
    return hashlib.sha256((front + text).encode()).hexdigest()
