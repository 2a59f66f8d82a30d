"""The card in the root of a repository with one variant of a model per folder: what there is, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llmconvert.hub.plan import PushPlan
from llmconvert.hub.repository import MANIFEST, Content, Listing
from llmconvert.hub.transfer import iterate_content

__all__ = ["ROOT_CARD", "variants_card"]

ROOT_CARD = "README.md"
_MARK = "<!-- llmconvert: one variant per folder -->"
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def variants_card(listing: Listing, plan: PushPlan, contents: Mapping[str, Content]) -> bytes | None:
    """The root's card as it should be after this push, or None if the root has a card that somebody else wrote."""
    present = listing.get(ROOT_CARD)
    if present is not None and _MARK.encode() not in b"".join(iterate_content(present)):
        return None
    sizes = {name: file.size for name, file in listing.items() if not name.startswith(plan.folder)}
    sizes |= {name: content.size for name, content in contents.items()}
    folders = sorted(name.removesuffix(MANIFEST) for name in sizes if name.endswith(f"/{MANIFEST}"))
    rows = []
    for folder in folders:
        weights = sum(sizes[name] for name in sizes if name.startswith(folder) and name.endswith(".safetensors"))
        name = folder.rstrip("/")
        card = f"[card]({folder}README.md)" if f"{folder}README.md" in sizes else ""
        rows.append(f"| `{name}` | {weights / 1e6:,.1f} MB | {card} |")
    matter = _FRONT_MATTER.match(plan.card or "")
    lines = [
        (matter[0] if matter else "") + _MARK,
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
    return "\n".join(lines).encode()
