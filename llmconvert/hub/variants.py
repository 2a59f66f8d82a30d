"""Root card of a repository with one variant of a model per folder: what there is, and how to load it.

Its marker holds the hash of the text behind it, so that a card which nobody has changed since can be told from one that
somebody has.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from huggingface_hub import ModelCard, ModelCardData

from llmconvert.errors import HubError
from llmconvert.hub.plan import PushPlan
from llmconvert.hub.repository import MANIFEST, Content, Listing
from llmconvert.hub.transfer import iterate_content

__all__ = ["ROOT_CARD", "variants_card"]

ROOT_CARD = "README.md"
_MARK = re.compile(r"<!-- llmconvert: one variant per folder(?:, sha256 ([0-9a-f]{64}))? -->\n")


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
    before = ""
    if present is not None:
        before = b"".join(iterate_content(present)).decode(errors="replace")
        state = _state(before)
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
    front, text = _front_matter(before, plan.card or ""), "\n".join(lines)
    return f"{front}<!-- llmconvert: one variant per folder, sha256 {_digest(front, text)} -->\n{text}".encode()


def _state(card: str) -> str:
    """``"ours"`` as it was published, ``"edited"`` since, or ``"foreign"``."""
    mark = _MARK.search(card)
    if mark is None:
        return "foreign"
    return "ours" if mark[1] == _digest(card[: mark.start()], card[mark.end() :]) else "edited"


def _front_matter(before: str, card: str) -> str:
    """The new variant's metadata with the tags of all; what they disagree on is said in their own cards."""
    cards = [ModelCard(text, ignore_metadata_errors=True) for text in (before, card)]
    older, newer = (dict(found.data.to_dict()) for found in cards)
    if not newer and not older:
        return ""
    tags = [*(older.get("tags") or ()), *(newer.get("tags") or ())]
    merged = {**older, **newer, **({"tags": list(dict.fromkeys(tags))} if tags else {})}
    return f"---\n{ModelCardData(**merged).to_yaml()}\n---\n"


def _digest(front: str, text: str) -> str:
    return hashlib.sha256((front + text).encode()).hexdigest()
