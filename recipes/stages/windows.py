"""Token windows of a recipe: which text, which tokenizer, drawn by a stage so that a run draws them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save

from llmconvert.engine.architecture.config import declared_number
from llmconvert.engine.memory import BASE_NBYTES, tokenizer_nbytes
from llmconvert.errors import UsageError
from llmconvert.needs import Needs
from llmconvert.recipes.forecast import Forecast
from llmconvert.recipes.schema.measuring import PerplexitySettings
from llmconvert.recipes.schema.recipe import CalibrateSettings
from llmconvert.recipes.stages.stage import ORIGINAL, Place, Stage, Work
from llmconvert.report.section import Value
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_file
from llmconvert.text.datasets import Corpus, is_here, load_dataset_text
from llmconvert.text.mixture import MixedCorpus, draw_mixture
from llmconvert.text.shares import MixedSource, windows_by_share
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import TokenWindows, WindowSource, check_disjoint, draw_windows

__all__ = [
    "CALIBRATION",
    "DISTIL_TEXT",
    "EVALUATION_TEXT",
    "HEALING_TEXT",
    "DrawnText",
    "WindowRequest",
    "draw_text",
    "mixed",
    "text_stage",
]

#: The stages that draw text.
CALIBRATION, EVALUATION_TEXT, HEALING_TEXT = "calibrate", "evaluation-text", "heal-text"
DISTIL_TEXT = "distil-text"

_FILE = "windows.safetensors"
#: More windows than any text has.
_ALL = 1 << 40
# Windows that are reckoned with where all of a text are wanted, and it is not here to count.
_FORESEEN = 128
# Texts that are kept for who plans on the same ones.
_KEPT = 16


@dataclass(frozen=True, slots=True)
class WindowRequest:
    """Windows to draw. ``setting`` is the recipe's section, for errors; ``dataset`` a name, or a mixture of several."""

    setting: str
    dataset: str | tuple[MixedSource, ...]
    samples: int
    length: int
    order: Literal["shuffled", "sequential"]
    seed: int
    stride: int | None = None

    @classmethod
    def calibration(cls, settings: CalibrateSettings) -> WindowRequest:
        """What ``calibrate`` asks for."""
        return cls("calibrate", mixed(settings), settings.samples, settings.length, settings.order, settings.seed)

    @classmethod
    def evaluation(cls, settings: PerplexitySettings) -> WindowRequest:
        """What ``validate.perplexity`` asks for: the first windows of the text."""
        samples = settings.max_windows or _ALL
        return cls("validate.perplexity", settings.dataset, samples, settings.window, "sequential", 0, settings.stride)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all datasets."""
        return (self.dataset,) if isinstance(self.dataset, str) else tuple(source.dataset for source in self.dataset)

    def shortfall(self, windows: TokenWindows) -> str:
        """What to say where a text gave fewer windows than this asks for; empty where it gave as many."""
        if self.samples == _ALL or windows.drawn >= self.samples:
            return ""
        return (
            f"{self.setting}: {windows.drawn:,} windows of {windows.length:,} tokens, and not the {self.samples:,} "
            f"asked for; {' + '.join(self.names)} has no more"
        )

    def corpus(self) -> Corpus | MixedCorpus:
        """The text, or the texts.

        Raises:
            DatasetError: one does not exist or cannot be read, or shares don't come to whole windows.
        """
        if isinstance(self.dataset, str):
            return load_dataset_text(self.dataset)
        windows_by_share(self.dataset, self.samples)
        return MixedCorpus(tuple((source, load_dataset_text(source.dataset)) for source in self.dataset))

    def draw(self, checkpoint: Checkpoint, corpus: Corpus | MixedCorpus) -> TokenWindows:
        """Tokenize ``corpus`` with the model's tokenizer and cut the windows.

        Raises:
            UsageError: the model has fewer positions than a window.
            DatasetError: too little text, or text that does not go with the tokenizer.
            SourceError: the model has no usable tokenizer.
        """
        positions = declared_number(checkpoint.config, "max_position_embeddings")
        if positions is not None and self.length > positions:
            raise UsageError(
                f"{self.setting}: windows of {self.length:,} tokens don't fit the model's {positions:,} positions; "
                f"take {positions:,} tokens at most"
            )
        if isinstance(corpus, MixedCorpus):
            return draw_mixture(
                load_tokenizer(checkpoint),
                corpus,
                samples=self.samples,
                length=self.length,
                order=self.order,
                seed=self.seed,
                vocab_size=declared_number(checkpoint.config, "vocab_size"),
            )
        return draw_windows(
            load_tokenizer(checkpoint),
            corpus,
            samples=self.samples,
            length=self.length,
            stride=self.stride,
            order=self.order,
            seed=self.seed,
            vocab_size=declared_number(checkpoint.config, "vocab_size"),
        )


def mixed(settings: CalibrateSettings) -> str | tuple[MixedSource, ...]:
    """The dataset that a section names, or the datasets of its mix."""
    found = settings.dataset
    if isinstance(found, str):
        return found
    return tuple(MixedSource(source.name, source.share, source.template) for source in found)


class DrawnSource(Value):
    """What one dataset gave: all of :class:`~llmconvert.text.tokens.WindowSource`."""

    dataset: str
    corpus_digest: str
    samples: int
    tokens: int
    tokens_total: int


class DrawnText(Value):
    """What a text's stage says of its windows: all of :class:`~llmconvert.text.tokens.TokenWindows` but the ids."""

    requested: int
    drawn: int
    tokens_total: int
    dataset: str
    corpus_digest: str
    digest: str
    bos: bool
    stride: int
    sources: tuple[DrawnSource, ...] = ()


class _Text:
    """Draws one text's windows. The text is held from when its digest is asked for until it is drawn."""

    def __init__(self, name: str, request: WindowRequest) -> None:
        self._name = name
        self._request = request
        self._corpus: Corpus | MixedCorpus | None = None

    def settings(self, work: Work) -> Mapping[str, Any]:
        self._corpus = self._corpus or self._request.corpus()
        asked = asdict(self._request)
        del asked["setting"]
        return {"text": self._corpus.digest, **asked}

    def forecast(self, work: Work, output: Path) -> Forecast:
        """Draw the windows for what is planned on them; of a text still to be fetched, blank ones, as many as asked."""
        request = self._request
        named = " + ".join(request.names)
        if all(map(is_here, request.names)):
            draw_text(work, self._name, request)
            short = request.shortfall(work.texts[self._name])
            notes: tuple[str, ...] = (short,) if short else ()
        else:
            count = min(request.samples, _FORESEEN)
            blank = torch.zeros((1, request.length), dtype=torch.int64)
            about = (count, count * request.length, named, "", "", False, request.stride or request.length)
            work.texts[self._name] = TokenWindows((blank,) * count, *about)
            notes = (f"{named} is still to be fetched, {count:,} windows of it are reckoned with",)
        windows = work.texts[self._name]
        disk = 8 * windows.drawn * windows.length
        with work.original.open() as checkpoint:
            memory = BASE_NBYTES + tokenizer_nbytes(checkpoint)
        return Forecast(Needs(memory=memory, disk=disk), kind=f"text {named}", work=1.0, notes=notes)

    def build(self, work: Work, place: Place) -> DrawnText:
        assert self._corpus is not None and place.notes is not None
        with work.original.open() as checkpoint:
            windows = self._request.draw(checkpoint, self._corpus)
        write_file(place.notes / _FILE, save({"ids": torch.cat(windows.windows)}))
        known = {field.name: getattr(windows, field.name) for field in fields(windows) if field.name != "windows"}
        sources = [asdict(source) for source in windows.sources]
        return DrawnText.model_validate({**known, "drawn": windows.drawn, "sources": sources})

    def finish(self, work: Work) -> None:
        self._corpus = None
        done = work.finished[self._name]
        ids = load_file(done.directory / _FILE)["ids"]
        about: DrawnText = done.details
        windows = TokenWindows(
            tuple(row.unsqueeze(0).clone() for row in ids),
            about.requested,
            about.tokens_total,
            about.dataset,
            about.corpus_digest,
            about.digest,
            about.bos,
            about.stride,
            tuple(WindowSource(**source.model_dump()) for source in about.sources),
        )
        work.texts[self._name] = windows
        _tell(work, self._request.shortfall(windows))
        evaluation = work.texts.get(EVALUATION_TEXT)
        taught = [work.texts.get(CALIBRATION)] if self._name == EVALUATION_TEXT else [windows]
        for text in taught:
            if text is not None and evaluation is not None:
                check_disjoint(text, evaluation)


def text_stage(name: str, request: WindowRequest) -> Stage[DrawnText]:
    """Draw a text's windows; a text that is missing, or used twice, is found out now and not after the long work.

    Raises:
        DatasetError: when its settings are asked for, the text does not exist; when it is finished, it is the same as
            that of the evaluation.
    """
    text = _Text(name, request)
    after = {"tokenizer of": ORIGINAL}
    return Stage(
        name, after, DrawnText.model_validate, text.build, text.settings, finish=text.finish, forecast=text.forecast
    )


def draw_text(work: Work, name: str, request: WindowRequest) -> None:
    """Draw a text's windows for stages that are built without a work directory."""
    corpus = request.corpus()
    asked = (replace(request, setting=""), corpus.digest, work.original.key)
    if asked not in work.drawn:
        if len(work.drawn) >= _KEPT:
            work.drawn.clear()
        with work.original.open() as checkpoint:
            work.drawn[asked] = request.draw(checkpoint, corpus)
    work.texts[name] = work.drawn[asked]
    _tell(work, request.shortfall(work.texts[name]))


def _tell(work: Work, note: str) -> None:
    if note:
        work.context.progress.log(f"note: {note}")
