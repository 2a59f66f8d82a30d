"""Settings of a recipe that are each valid and cannot be meant together."""

from __future__ import annotations

from collections.abc import Iterator

from llmconvert.recipes.recipe import Recipe

__all__ = ["contradictions"]


def contradictions(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Key path and explanation of every contradiction."""
    yield from _same_text(recipe)


def _same_text(recipe: Recipe) -> Iterator[tuple[tuple[str | int, ...], str]]:
    perplexity = recipe.validation.perplexity if recipe.validation is not None else None
    if recipe.calibrate is None or perplexity is None or recipe.calibrate.dataset != perplexity.dataset:
        return
    other = (
        "pydoc-topics:train and pydoc-topics:test are disjoint"
        if perplexity.dataset.startswith("pydoc-topics")
        else "name another split or another dataset for one of them"
    )
    yield (
        ("validate", "perplexity", "dataset"),
        f"validate.perplexity.dataset: found {perplexity.dataset!r}, which calibrate.dataset uses as well; a score on "
        f"the calibration text flatters the result; {other}",
    )
