"""A recipe's model, opened: what a run, a single command and each of several processes begin with."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.convert.source import Source, open_source
from llmconvert.device import open_device
from llmconvert.memory import PeakMemory
from llmconvert.progress import Progress
from llmconvert.recipes.schema.presets import preset_words
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.artifact import with_papers
from llmconvert.recipes.stages.conversion import (
    converted_view,
    merge_notes,
    open_remote,
    recipe_adapter,
    require_source,
)
from llmconvert.recipes.stages.provenance import unread_card
from llmconvert.recipes.stages.run import require_texts
from llmconvert.recipes.stages.stage import Work
from llmconvert.report.report import Step

__all__ = ["fetch_model", "open_model", "opened_work", "put_papers", "tell_of", "work_on"]


def open_model(recipe: Recipe, progress: Progress) -> Source:
    """The recipe's model, fetched; where it is streamed, known from its headers.

    Raises:
        LlmconvertError: see :func:`llmconvert.convert.source.open_source`.
    """
    if recipe.stream:
        return open_remote(recipe)
    return open_source(recipe.model, allow_pickle=recipe.allow_pickle, progress=progress)


def fetch_model(recipe: Recipe, progress: Progress) -> tuple[Source, Step]:
    """The same, with what the report says of it.

    Raises:
        LlmconvertError: see :func:`open_model`.
    """
    begin = time.perf_counter()
    with PeakMemory() as memory:
        source = open_model(recipe, progress)
    seconds = round(time.perf_counter() - begin, 3)
    return source, Step(name="fetch", seconds=seconds, peak_rss_bytes=memory.nbytes)


def work_on(recipe: Recipe, source: Source, context: Context, ranks: Ranks = ALONE) -> Work:
    """What stages build on when nothing is built yet.

    Args:
        source: the recipe's model.
        context: device, memory and progress.
        ranks: the processes that take part.

    Raises:
        LlmconvertError: the model is not one that the recipe can begin with, or its adapter does not fit.
    """
    stored, adapter = require_source(recipe, source), recipe_adapter(recipe, context.progress)
    for note in merge_notes(source, adapter):
        context.progress.log(f"note: {note}")
    return Work(recipe, context, source, converted_view(recipe, source, stored, adapter), stored, adapter, ranks=ranks)


def tell_of(recipe: Recipe, source: Source, progress: Progress) -> None:
    """Say what is worth knowing before the work: a card that can't be read, what a preset stands for."""
    if (note := unread_card(source)) is not None:
        progress.log(note)
    if words := preset_words(recipe.preset, recipe.to_mapping()):
        progress.log(words)


@contextmanager
def opened_work(recipe: Recipe, progress: Progress, ranks: Ranks = ALONE) -> Iterator[Work]:
    """The recipe's model as a run has it when it has been fetched; it is closed with the block.

    Raises:
        LlmconvertError: see :func:`open_model` and :func:`work_on`.
    """
    device = open_device(recipe.device, None if ranks.alone else ranks.local_rank)
    context = Context(device, recipe.memory, progress=progress)
    require_texts(recipe)
    source = open_model(recipe, progress)
    with source.checkpoint:
        tell_of(recipe, source, progress)
        yield work_on(recipe, source, context, ranks)


def put_papers(work: Work) -> None:
    """Before the weights are written: what lies beside them will be about them, and not about their source."""
    with_papers(work)
    work.view = converted_view(work.recipe, work.source, work.stored, work.adapter)
    work.has_papers = True
