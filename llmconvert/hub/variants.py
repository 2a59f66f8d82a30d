"""Root card of a repository with one variant of a model per folder: what there is, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from llmconvert.errors import HubError
from llmconvert.hub.card import CARD, front_matter, mark_card, state_of_card
from llmconvert.hub.plan import WEIGHTS, PushPlan
from llmconvert.hub.repository import MANIFEST, Content, Listing
from llmconvert.hub.transfer import iterate_content

__all__ = ["variants_card"]

_KIND = "one variant per folder"


def variants_card(
    listing: Listing, plan: PushPlan, contents: Mapping[str, Content], *, replace: bool = False
) -> bytes | None:
    """The root's card as it should be after this push, or None if the root has a card that is none of ours.

    Args:
        replace: write over ours even if somebody has changed it since.

    Raises:
        HubError: ours was changed since it was published.
    """
    present = listing.get(CARD)
    before = ""
    if present is not None:
        before = b"".join(iterate_content(present)).decode(errors="replace")
        state = state_of_card(before, _KIND)
        if state == "foreign":
            return None
        if state == "edited" and not replace:
            raise HubError(
                f"{plan.repo_id}: {CARD}, which lists the variants, was changed since it was published; take the "
                "change over, or write over it with --replace"
            )
    sizes = {name: file.size for name, file in listing.items() if not name.startswith(plan.folder)}
    sizes |= {name: content.size for name, content in contents.items()}
    variants = sorted(name.removesuffix(f"/{MANIFEST}") for name in sizes if name.endswith(f"/{MANIFEST}"))
    weights = {
        variant: {name: size for name, size in sizes.items() if _is_weight_of(variant, name)} for variant in variants
    }
    rows = [
        f"| `{variant}` | {sum(weights[variant].values()) / 1e6:,.1f} MB | "
        + (f"[card]({variant}/{CARD}) |" if f"{variant}/{CARD}" in sizes else "|")
        for variant in variants
    ]
    lines = [
        f"# {plan.repo_id.split('/')[1]}",
        "",
        "Several variants of one model, each in a folder of its own.",
        "",
        "| folder | weights | |",
        "|---|---|---|",
        *rows,
        *_how_to_load(plan, weights),
        "",
    ]
    try:
        older = front_matter(before, f"{plan.repo_id}: {CARD}")
    except HubError:
        if not replace:
            raise
        older = {}
    newer = front_matter(plan.card or "", f"{plan.folder}{CARD}")
    return mark_card(_merged(older, newer), "\n".join(lines), _KIND).encode()


def _is_weight_of(variant: str, name: str) -> bool:
    return name.startswith(f"{variant}/") and name.endswith(WEIGHTS)


def _how_to_load(plan: PushPlan, weights: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The first variant of each kind, by what loads it."""
    lines = []
    branch = plan.revision if plan.revision != "main" else None
    for variant in [variant for variant, files in weights.items() if any(n.endswith(".safetensors") for n in files)][
        :1
    ]:
        where = f'"{plan.repo_id}", ' + (f'revision="{branch}", ' if branch else "") + f'subfolder="{variant}"'
        lines += [
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({where})",
            f"tokenizer = AutoTokenizer.from_pretrained({where})",
            "```",
        ]
    for file in [name for files in weights.values() for name in files if name.endswith(".gguf")][:1]:
        of = f" --revision {branch}" if branch else ""
        lines += ["", "```", f"hf download {plan.repo_id}{of} {file} --local-dir .", f"llama-server -m {file}", "```"]
    return lines


def _merged(older: Mapping[str, Any], newer: Mapping[str, Any]) -> str:
    """The new variant's metadata with the tags of all; what they disagree on is said in their own cards."""
    if not newer and not older:
        return ""
    tags = [*_listed(older.get("tags")), *_listed(newer.get("tags"))]
    merged = {**older, **newer, **({"tags": list(dict.fromkeys(tags))} if tags else {})}
    return f"---\n{ModelCardData(**merged).to_yaml()}\n---\n"


def _listed(value: object) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else [value] if isinstance(value, str) else []
