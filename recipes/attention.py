"""The attention step of a recipe: where a rewrite to fewer key-value heads will come in."""

from __future__ import annotations

from llmconvert.errors import UnsupportedError
from llmconvert.recipes.recipe import AttentionSettings

__all__ = ["require_attention_rewrite"]


def require_attention_rewrite(settings: AttentionSettings) -> None:
    """Refuse the step by name, before any work: this version cannot merge heads yet.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"attention: rewriting to {settings.kv_heads} key-value heads (method {settings.method}) is not part of this "
        "version; remove the attention section, or run with --set attention=null"
    )
