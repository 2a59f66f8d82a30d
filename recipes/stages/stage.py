"""A stage of a run as data: what it follows, what else decides its output, and who builds it.

:mod:`llmconvert.recipes.runner` walks stages in a work directory; the single commands build theirs straight into the
output that they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from llmconvert.compute.ranks.group import ALONE, Ranks
from llmconvert.context import Context
from llmconvert.convert.adapter.files import Adapter
from llmconvert.convert.quantized import StoredAs
from llmconvert.convert.source import Source
from llmconvert.engine.skeleton import Skeleton
from llmconvert.recipes.forecast import Forecast
from llmconvert.recipes.schema.recipe import Recipe
from llmconvert.report.report import Step
from llmconvert.report.section import Value
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.contents import Contents
from llmconvert.text.tokens import TokenWindows

__all__ = ["MODEL", "ORIGINAL", "Finished", "Original", "Place", "Stage", "Work"]

#: The folder of a stage's directory that holds its model.
MODEL = "model"
#: What a stage follows that works on the model in the recipe's dtype, converted on this disk or not.
ORIGINAL = "original"

D = TypeVar("D", bound=Value)


@dataclass(frozen=True, slots=True)
class Original:
    """The model that an artifact is made from and measured against, in the recipe's dtype.

    Attributes:
        key: identifies its contents.
        open: opens it; it can be opened more than once.
        note: what reading it costs, where that is worth saying.
    """

    key: str
    open: Callable[[], AbstractContextManager[Checkpoint]]
    note: str = ""

    @classmethod
    def on_disk(cls, key: str, directory: Path) -> Original:
        """Converted, in a directory."""
        return cls(key, lambda: SafetensorsCheckpoint(directory))

    @classmethod
    def seen(cls, key: str, view: Checkpoint, note: str = "") -> Original:
        """As it came, seen through a view that stays open."""
        return cls(key, lambda: nullcontext(view), note)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stage is built.

    Attributes:
        model: directory (or GGUF file) of the model, which does not exist yet or is empty.
        notes: directory for what must outlast a kill beside it; None where nothing can be taken over later.
    """

    model: Path
    notes: Path | None = None

    @classmethod
    def stage(cls, directory: Path) -> Place:
        """In the directory of a stage."""
        return cls(directory / MODEL, directory)


@dataclass(frozen=True, slots=True)
class Finished(Generic[D]):
    """A finished stage: its key, its directory, what its builder said, and what its files hold."""

    name: str
    key: str
    directory: Path
    details: D
    contents: Contents

    @property
    def model(self) -> Path:
        """The model that it made."""
        return self.directory / MODEL


@dataclass
class Work:
    """What stages build on: the recipe, the model as it came, and what was finished before them.

    Attributes:
        recipe: of the run.
        context: device, memory and progress.
        source: the model as it came.
        view: it in the recipe's dtype, converted whenever it is read.
        stored: what the model is quantized in as it came; None if it is dense.
        adapter: what is merged into it; None without one.
        texts: token windows, by the name of the stage that drew them.
        finished: stages, by name.
        steps: what the report will say of the run so far.
        drawn: windows by what was asked for, of which text and tokenizer; shared by several that are planned together.
        forecasts: of stages that rewrite the model, by what tells them from others; shared likewise.
        skeletons: builds models on shapes, where a run is only planned; may give one that other plans have built.
        foreseen: models that stages will make, by name, where a run is only planned.
        sizes: bytes of their weight files, by name, likewise.
        ranks: the processes that take part in stages which are built together; others are built by the first.
        has_papers: whether what lies beside the weights is about what is made of them.
    """

    recipe: Recipe
    context: Context
    source: Source
    view: Original
    stored: StoredAs | None = None
    adapter: Adapter | None = None
    texts: dict[str, TokenWindows] = field(default_factory=dict)
    finished: dict[str, Finished[Any]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    drawn: dict[Hashable, TokenWindows] = field(default_factory=dict)
    forecasts: dict[Hashable, Forecast] = field(default_factory=dict)
    skeletons: Callable[..., Skeleton] = Skeleton
    foreseen: dict[str, Checkpoint] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    ranks: Ranks = ALONE
    has_papers: bool = False

    @property
    def original(self) -> Original:
        """The model in the recipe's dtype: converted, once that is done; until then, and where it streams, a view."""
        made = self.finished.get("convert")
        return Original.on_disk(made.key, made.model) if made is not None else self.view

    def key(self, name: str) -> str | None:
        """What identifies the output of a stage, or of the original; None of a text that the recipe doesn't need."""
        if name == ORIGINAL:
            return self.original.key
        if name in self.texts:
            return self.texts[name].digest
        return self.finished[name].key if name in self.finished else None

    def open(self, name: str) -> AbstractContextManager[Checkpoint]:
        """The model that a stage made, or will make, or the original."""
        if name in self.foreseen and name not in self.finished:
            return nullcontext(self.foreseen[name])
        return self.original.open() if name == ORIGINAL else SafetensorsCheckpoint(self.finished[name].model)

    def windows(self, name: str) -> Sequence[torch.Tensor]:
        """Token ids ``[1, length]`` each that the stage drew; none where the recipe has no such text."""
        return self.texts[name].windows if name in self.texts else ()

    def build(self, stage: Stage[D], place: Place) -> D:
        """What a stage's builder says, when it has built it in a place; of several processes the first one does this.

        It calls the others to a stage that is built together, where there is anything left to build.
        """
        there = place.notes is not None and place.model.exists()
        if self.ranks.alone or not stage.together or there:
            return stage.build(self, place)
        texts = {name: asdict(replace(text, windows=())) for name, text in self.texts.items()}
        for about in texts.values():
            del about["windows"]
        call = {
            "stage": stage.name,
            "after": dict(stage.after),
            "model": str(place.model.absolute()),
            "finished": {name: [done.key, str(done.directory.absolute())] for name, done in self.finished.items()},
            "texts": texts,
            "papers": self.has_papers,
        }
        self.ranks.tell(call)
        self.ranks.exchange([torch.cat(text.windows) for text in self.texts.values()], torch.device("cpu"))
        return stage.build(replace(self, context=replace(self.context, ranks=self.ranks)), place)

    def context_of(self, name: str) -> Context:
        """The context of a job on that stage's output."""
        return replace(self.context, identity=self.key(name) or "")


def _nothing_else(work: Work) -> Mapping[str, Any]:
    return {}


def _no_check(work: Work) -> None:
    pass


def _nothing_to_foresee(work: Work, output: Path) -> Forecast:
    return Forecast()


@dataclass(frozen=True, slots=True)
class Stage(Generic[D]):
    """One step of a run.

    Attributes:
        name: of the stage, part of its directory's name.
        after: what it follows: a role, as its key and what is said of changes call it → a stage's name.
        read: reads back what ``build`` said, from JSON values.
        build: makes it in a place, and says what it did. A place may hold what a killed call left, if ``resumable``.
        settings: what else decides its output, as JSON values.
        resumable: ``build`` continues from what it finds; otherwise it always finds its place empty.
        finish: called when it is there, built now or earlier.
        reported: whether the report counts it among its steps.
        forecast: what building it in an output will need and make; nothing but headers and texts is read. It refuses
            what building would refuse.
    """

    name: str
    after: Mapping[str, str]
    read: Callable[[Mapping[str, Any]], D]
    build: Callable[[Work, Place], D]
    settings: Callable[[Work], Mapping[str, Any]] = _nothing_else
    resumable: bool = False
    finish: Callable[[Work], None] = _no_check
    reported: bool = True
    forecast: Callable[[Work, Path], Forecast] = _nothing_to_foresee
    together: bool = False

    def inputs(self, work: Work) -> Mapping[str, Any]:
        """Everything that decides the stage's output: its key is their hash."""
        return {**{role: work.key(name) for role, name in self.after.items()}, **self.settings(work)}
