"""What recipes can already say about attention, and this version cannot do yet: refused by name, before any work.

A rewrite to fewer key-value heads comes in as a stage between convert and calibrate (``recipes/runner.py``), the
comparison of attention backends as one of the checks.
"""

from __future__ import annotations

from llmconvert.errors import UnsupportedError
from llmconvert.recipes.recipe import Recipe

__all__ = ["require_attention_support"]


def require_attention_support(recipe: Recipe) -> None:
    """Refuse a recipe that rewrites attention or compares attention backends.

    Raises:
        UnsupportedError: naming the section and what to do.
    """
    if recipe.attention is not None:
        raise UnsupportedError(
            f"attention: rewriting to {recipe.attention.kv_heads} key-value heads (method {recipe.attention.method}) "
            "is not part of this version; remove the section, or run with --set attention=null"
        )
    if recipe.validation is not None and recipe.validation.attention:
        raise UnsupportedError(
            f"validate.attention: comparing the backends {', '.join(recipe.validation.attention)} is not part of this "
            "version; remove the key, or run with --set validate.attention=[]"
        )
