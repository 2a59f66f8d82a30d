"""Windows of token ids for calibration and evaluation.

A text is tokenized whole and cut into consecutive windows of equal length; a collection of documents is rendered,
tokenized and packed one after the other (an end-of-text token between them), and cut the same way. Windows that are
less than their length apart overlap, which gives predictions more context than the first ones of a window have; each
prediction is then to be scored once (:attr:`TokenWindows.scored`). If the tokenizer
puts a beginning-of-text token before every text, each window starts with it and holds one token of text less: such
models rely on that first token to dump attention on, and compute nonsense without it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from llmconvert.errors import DatasetError, SourceError
from llmconvert.text.chat import ChatRenderer, ChatTemplate
from llmconvert.text.datasets import Corpus, Document
from llmconvert.text.shares import DEFAULT_TEMPLATE
from llmconvert.text.tokenizer import tokenizer_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Order", "Overlap", "TokenWindows", "WindowSource", "check_disjoint", "draw_windows"]

Order = Literal["shuffled", "sequential"]

# In the place of a chat template: what is said in conversations, as text.
_AS_TEXT = "none"
# Runs of this many equal tokens don't happen by chance; idioms and headings are shorter.
_NGRAM = 32
# Above this share of common text the evaluation measures memory, not quality.
_MAX_SHARED = 0.5


@dataclass(frozen=True, slots=True)
class WindowSource:
    """What one dataset gave to a mixture.

    Attributes:
        dataset: its full name.
        corpus_digest: content digest of the whole dataset.
        samples: windows from it.
        tokens: in these.
        tokens_total: of its text that were available to cut windows from.
    """

    dataset: str
    corpus_digest: str
    samples: int
    tokens: int
    tokens_total: int


@dataclass(frozen=True)
class TokenWindows:
    """Token ids ready for a model.

    Attributes:
        windows: int64 ``[1, length]`` each.
        requested: how many windows were asked for; ``drawn`` may be fewer when the text is short.
        tokens_total: tokens of text that were available to cut windows from.
        dataset: full name of the dataset, split included.
        corpus_digest: content digest of the whole dataset (:class:`Corpus`).
        digest: hex SHA-256 of the ids as little-endian int64, window after window.
        bos: whether every window starts with the tokenizer's beginning-of-text token.
        stride: tokens from the beginning of a window to that of the next; its length if they don't overlap.
        sources: of a mixture, what each dataset gave; none where all comes from one.
    """

    windows: tuple[torch.Tensor, ...] = field(repr=False)
    requested: int
    tokens_total: int
    dataset: str
    corpus_digest: str
    digest: str
    bos: bool
    stride: int
    sources: tuple[WindowSource, ...] = ()

    @property
    def texts(self) -> tuple[tuple[str, str], ...]:
        """Full name and content digest of every dataset."""
        return tuple((source.dataset, source.corpus_digest) for source in self.sources) or (
            (self.dataset, self.corpus_digest),
        )

    @property
    def drawn(self) -> int:
        """How many windows there are."""
        return len(self.windows)

    @property
    def length(self) -> int:
        """Tokens per window."""
        return int(self.windows[0].shape[1])

    @property
    def scored(self) -> tuple[int, ...]:
        """How many predictions at the end of each window no earlier window has made: all in the first one."""
        everything = self.length - 1
        return (everything, *[min(self.stride, everything)] * (self.drawn - 1))


@dataclass(frozen=True, slots=True)
class Overlap:
    """Text common to calibration and evaluation.

    Attributes:
        windows: evaluation windows that also are calibration windows, token for token.
        fraction: share of the evaluation's distinct runs of 32 tokens that occur in the calibration windows.
    """

    windows: int
    fraction: float


def draw_windows(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    *,
    samples: int | None,
    length: int,
    stride: int | None = None,
    order: Order = "shuffled",
    seed: int = 0,
    vocab_size: int | None = None,
    template: str = DEFAULT_TEMPLATE,
) -> TokenWindows:
    """Cut ``samples`` windows of ``length`` tokens from a corpus.

    ``shuffled`` draws, by ``seed`` and without repetition, from all windows of a text, or from documents in random
    order; ``sequential`` takes the first. Text for fewer windows than asked gives those there are.

    Args:
        samples: how many windows; None for all there are.
        length: tokens per window.
        stride: tokens from the beginning of a window to that of the next; ``length`` by default. Windows that overlap
            are consecutive, so their order is sequential.
        vocab_size: the model's vocabulary size, to catch a tokenizer that belongs to another model.
        template: which of the tokenizer's chat templates renders conversations; ``none`` takes what is said as text.

    Raises:
        DatasetError: the text does not fill a single window, an id lies outside the vocabulary, or conversations
            meet a tokenizer without chat template.
        ValueError: ``samples``, ``length`` or ``stride`` makes no sense.
    """
    if (samples is not None and samples < 1) or length < 2:
        raise ValueError(f"at least 1 window of 2 tokens is needed, asked for {samples} of {length}")
    stride = length if stride is None else stride
    if not 1 <= stride <= length or (stride < length and order != "sequential"):
        raise ValueError(f"a stride of {stride} does not go with {order} windows of {length} tokens")
    generator = np.random.default_rng(seed)
    bos = _added_bos(tokenizer)
    body = length - (bos is not None)
    step = min(stride, body)
    whole = len(corpus.documents) == 1
    wanted = None if samples is None or (whole and order == "shuffled") else body + (samples - 1) * step
    documents = _in_order(corpus.documents, generator if order == "shuffled" else None)
    ids = _tokenize(tokenizer, documents, corpus.dataset, wanted, template)
    count = (len(ids) - body) // step + 1
    if count < 1:
        raise DatasetError(
            f"dataset {corpus.dataset}: {len(ids):,} tokens of text don't fill one window of {length:,}; "
            "give more text or a smaller length"
        )
    if vocab_size is not None and int(ids.max()) >= vocab_size:
        raise DatasetError(
            f"dataset {corpus.dataset}: the tokenizer gives id {int(ids.max()):,}, the model's vocabulary has "
            f"{vocab_size:,} entries; the tokenizer belongs to another model"
        )
    chosen = generator.permutation(count)[:samples] if whole and order == "shuffled" else np.arange(count)[:samples]
    windows = [ids[i * step : i * step + body] for i in chosen]
    if bos is not None:
        windows = [np.concatenate(([bos], window)) for window in windows]
    digest = hashlib.sha256(b"".join(window.astype("<i8").tobytes() for window in windows)).hexdigest()
    tensors = tuple(torch.from_numpy(window.astype(np.int64)).unsqueeze(0) for window in windows)
    return TokenWindows(
        tensors, samples or count, len(ids), corpus.dataset, corpus.digest, digest, bos is not None, stride
    )


def _added_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts before every text by itself, if it does."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return int(bos) if bos is not None and ids and ids[0] == bos else None


def _in_order(documents: Sequence[Document], generator: np.random.Generator | None) -> Iterator[Document]:
    order = np.arange(len(documents)) if generator is None else generator.permutation(len(documents))
    for index in order:
        yield documents[int(index)]


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, documents: Iterator[Document], dataset: str, wanted: int | None, template: str
) -> np.ndarray:
    """Ids of documents one after the other, int64 ``[tokens]``, until ``wanted`` are there (all without it)."""
    end = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    total = 0
    for text in _texts(tokenizer, documents, dataset, template):
        # verbose=False: exceeding model_max_length is what cutting windows is for, and not worth a warning.
        with tokenizer_errors():
            ids = np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        if parts and end is not None and parts[-1][-1] != end:
            parts.append(np.array([end], dtype=np.int64))
            total += 1
        if len(ids):
            parts.append(ids)
            total += len(ids)
        if wanted is not None and total >= wanted:
            break
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _texts(
    tokenizer: PreTrainedTokenizerBase, documents: Iterator[Document], dataset: str, template: str
) -> Iterator[str]:
    """Documents as texts; conversations rendered, or what is said in them alone."""
    with contextlib.ExitStack() as stack:
        renderer: ChatRenderer | None = None
        for document in documents:
            if isinstance(document, str):
                if template not in (DEFAULT_TEMPLATE, _AS_TEXT):
                    raise DatasetError(
                        f"dataset {dataset}: holds text and no conversations, which template {template!r} could "
                        "render; leave template out"
                    )
                yield document
                continue
            if template == _AS_TEXT:
                yield "\n\n".join(filter(None, map(_said, document)))
                continue
            try:
                renderer = renderer or stack.enter_context(ChatRenderer(_template(tokenizer, template)))
                yield renderer.render(document)
            except SourceError as error:
                raise DatasetError(f"dataset {dataset}: holds conversations, and {error}") from error


def _said(message: Mapping[str, Any]) -> str:
    """The text of a message, without what is no text in it."""
    content = message["content"]
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, Mapping) and "text" in part)


def _template(tokenizer: PreTrainedTokenizerBase, name: str) -> ChatTemplate:
    template = ChatTemplate.of(tokenizer, name)
    if template is None:
        raise SourceError("the model's tokenizer has no chat template to render them; use a dataset with a text field")
    return template


def check_disjoint(calibration: TokenWindows, evaluation: TokenWindows) -> Overlap:
    """Refuse to evaluate on the text that was calibrated on, and measure what two different texts share.

    Raises:
        DatasetError: the same dataset and split, the same content under another name, or more than half of the
            evaluation text in the calibration windows.
    """
    name, digest = evaluation.dataset, evaluation.corpus_digest
    if any(name == dataset or digest == known for dataset, known in calibration.texts):
        raise DatasetError(
            f"dataset {evaluation.dataset}: calibration and evaluation use the same text, which would flatter the "
            "result; name another split or another dataset for one of them"
        )
    known = {window.numpy().tobytes() for window in calibration.windows}
    windows = sum(window.numpy().tobytes() in known for window in evaluation.windows)
    ours, theirs = _ngram_hashes(evaluation.windows), _ngram_hashes(calibration.windows)
    fraction = float(np.isin(ours, theirs).mean()) if len(ours) else 0.0
    if fraction > _MAX_SHARED:
        raise DatasetError(
            f"dataset {evaluation.dataset}: {100 * fraction:.0f} % of the evaluation text was calibrated on "
            f"({calibration.dataset}); use another text for one of them"
        )
    return Overlap(windows, fraction)


def _ngram_hashes(windows: Sequence[torch.Tensor]) -> np.ndarray:
    """A 64-bit polynomial hash of every run of ``_NGRAM`` tokens in every window."""
    factors = np.uint64(0x9E3779B97F4A7C15) ** np.arange(_NGRAM, dtype=np.uint64)
    hashes = [
        (np.lib.stride_tricks.sliding_window_view(ids, _NGRAM) * factors).sum(axis=1, dtype=np.uint64)
        for ids in (window[0].numpy().astype(np.uint64) + np.uint64(1) for window in windows)
        if len(ids) >= _NGRAM
    ]
    return np.unique(np.concatenate(hashes)) if hashes else np.empty(0, dtype=np.uint64)
