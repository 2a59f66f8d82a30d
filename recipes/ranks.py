"""Several processes that run one recipe: the first one leads, and calls the others to stages that are built together.

Only the first one knows the work directory, builds what is built alone, and writes. The others wait for its call, which
says what is finished and where it lies; they open the same model, share the work of the stage, and wait again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmconvert.compute.ranks.group import Ranks
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.progress import SILENT
from llmconvert.quantize.methods.base import load_method
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.recipes.stages.opening import opened_work, put_papers
from llmconvert.recipes.stages.run import stages_of
from llmconvert.recipes.stages.stage import Finished, Place, Work
from llmconvert.report.section import Value
from llmconvert.storage.contents import Contents
from llmconvert.text.tokens import TokenWindows, WindowSource
from llmconvert.version import __version__

__all__ = ["agree", "follow", "require_shareable"]


def agree(ranks: Ranks, command: str, recipe: Recipe, **more: object) -> None:
    """Refuse processes that were asked for different things, and what several can't do.

    Args:
        ranks: the processes.
        command: what they run.
        recipe: with its options.
        more: what else was asked for.

    Raises:
        UsageError: naming the first key that differs, or the versions.
        UnsupportedError: naming the setting.
    """
    if ranks.alone:
        return
    own = {"command": command, "llmconvert": __version__, "torch": torch.__version__, **recipe.to_mapping(), **more}
    everyone = ranks.ask({name: str(value) for name, value in _flat(own)})
    for rank, theirs in enumerate(everyone):
        for name in (*everyone[0], *theirs):
            first, found = everyone[0].get(name, "nothing"), theirs.get(name, "nothing")
            if first != found:
                raise UsageError(
                    f"{name}: {first} on rank 0, {found} on rank {rank} of {ranks.count}; start all processes with "
                    "the same command and the same versions"
                )
    require_shareable(recipe, ranks.count)


def require_shareable(recipe: Recipe, count: int) -> None:
    """Refuse what takes one process, by its setting; what depends on the model is refused when it is planned.

    Args:
        count: of the processes.

    Raises:
        UnsupportedError: naming the setting, and what to do instead.
    """
    if count == 1:
        return
    settings = recipe.quantize
    if recipe.stream:
        raise UnsupportedError(f"stream with {count} processes: one downloads; leave it out, or use one process")
    if settings is None:
        return
    if settings.budget is not None:
        raise UnsupportedError(
            f"quantize.budget with {count} processes: sensitivity is measured by one; choose with one process, and "
            "give what it chose as quantize.overrides"
        )
    if load_method(settings.method, settings.options).calibration == "block":
        raise UnsupportedError(
            f"method {settings.method!r} with {count} processes: it trains whole blocks in one; use gptq, gptaq, awq, "
            "smoothquant, imatrix, rtn or hqq, or one process"
        )


def follow(recipe: Recipe, ranks: Ranks) -> None:
    """Take part in every stage that the first process calls for, until it needs no one any more.

    Raises:
        LlmconvertError: whatever goes wrong here; it ends all processes.
    """
    todo = stages_of(recipe)
    call = ranks.tell()  # from then on the model is fetched
    if call is None:
        return
    with opened_work(recipe, SILENT, ranks) as work:
        while call is not None:
            _take_over(work, call, ranks.exchange([], torch.device("cpu"))[0])
            measuring = todo.measuring(call["after"].get("artifact", ""), call["stage"])
            stages = [stage for stage in (*todo.making, measuring) if stage is not None]
            stage = next(stage for stage in stages if stage.name == call["stage"])
            stage.build(replace(work, context=replace(work.context, ranks=ranks)), Place(Path(call["model"])))
            call = ranks.tell()


def _take_over(work: Work, call: Mapping[str, Any], ids: list[torch.Tensor]) -> None:
    """Know what the first process knows."""
    for (name, about), rows in zip(call["texts"].items(), ids, strict=True):
        sources = tuple(WindowSource(**source) for source in about.pop("sources"))
        windows = tuple(row.unsqueeze(0).clone() for row in rows)
        work.texts[name] = TokenWindows(windows, **about, sources=sources)
    for name, (key, directory) in call["finished"].items():
        work.finished[name] = Finished(name, key, Path(directory), Value(), Contents({}))
    if call["papers"]:
        put_papers(work)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
