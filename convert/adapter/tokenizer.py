"""Whether an adapter was trained with another tokenizer or chat template than the model has that it is merged into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmconvert.convert.adapter.files import CHAT_TEMPLATE, TOKENIZER, Adapter
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.parsing import parse_json

__all__ = ["other_tokenizer"]

_CONFIG = "tokenizer_config.json"


def other_tokenizer(base: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    """What is said of a tokenizer beside an adapter that makes other tokens of a text than the model's; else nothing.

    The model's is kept: whether the adapter was trained with the other one, nothing tells.
    """
    found = {name: path.read_bytes() for name, path in adapter.files.items()}
    others = []
    if (
        TOKENIZER in found
        and TOKENIZER in base.files
        and _tokens(found[TOKENIZER]) != _tokens(base.read_file(TOKENIZER))
    ):
        others.append(f"other tokens ({TOKENIZER})")
    if CHAT_TEMPLATE in found and found[CHAT_TEMPLATE].decode(errors="replace").strip() != _template(base):
        others.append(f"another chat template ({CHAT_TEMPLATE})")
    if not others:
        return ()
    return (
        f"the adapter comes with {' and '.join(others)} than the model has, whose own are kept; if it was trained so, "
        "put these files into a copy of the model, and merge into that",
    )


def _tokens(raw: bytes) -> Any:
    """A tokenizer's vocabulary and the tokens added to it; other settings are written otherwise by other versions."""
    values = _parsed(raw)
    model = values.get("model")
    return model.get("vocab") if isinstance(model, Mapping) else None, values.get("added_tokens")


def _template(base: Checkpoint) -> str:
    """A model's chat template; "" without one."""
    if CHAT_TEMPLATE in base.files:
        return base.read_file(CHAT_TEMPLATE).decode(errors="replace").strip()
    told = _parsed(base.read_file(_CONFIG)).get("chat_template") if _CONFIG in base.files else None
    return told.strip() if isinstance(told, str) else ""


def _parsed(raw: bytes) -> Mapping[str, Any]:
    try:
        values = parse_json(raw)
    except ValueError:
        return {}
    return values if isinstance(values, Mapping) else {}
