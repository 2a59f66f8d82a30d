"""Datasets for calibration and evaluation, by name: built in, a local file, or a dataset of the Hub.

========================================  =========================================================================
``pydoc-topics:train``, ``…:test``        prose of the standard library, no download (:mod:`llmconvert.text.topics`)
``notes.txt`` (any UTF-8 file)            one document; lines end in ``\\n``, whatever they end in on disk
``chats.jsonl``                           one document per line, from field ``text`` or ``messages``
``wikitext-2[:split]``                    ``Salesforce/wikitext``, ``wikitext-2-raw-v1``; the test split by default
``org/name[/config][:split]``             a Hub dataset with a column ``text`` or ``messages``; train by default
========================================  =========================================================================
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmconvert.errors import DatasetError, one_line
from llmconvert.storage.parsing import parse_json
from llmconvert.text.files import local_path, read_text
from llmconvert.text.topics import SPLITS, topics_text

__all__ = ["Corpus", "Document", "Messages", "is_here", "load_dataset_text", "require_dataset"]

#: A conversation: mappings with at least ``role`` and ``content``, as chat templates take them.
Messages = Sequence[Mapping[str, Any]]
#: Plain text, or a conversation still to be rendered by a tokenizer's chat template.
Document = str | Messages

_TOPICS = "pydoc-topics"
_WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_HUB_ID = re.compile(r"(?P<id>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.+-]+))?")
# Far more than anyone calibrates or evaluates on; it is held and tokenized whole.
_MAX_FILE_NBYTES = 1 << 30
_FILE_SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".json", ".csv", ".parquet", ".raw", ".log")


@dataclass(frozen=True)
class Corpus:
    """Documents and where they came from.

    Attributes:
        dataset: the name in its full form, split included.
        documents: the texts or conversations; sequences over Hub datasets read from disk on access.
        digest: hex SHA-256 of the text, or the Hub library's fingerprint of it.
    """

    dataset: str
    documents: Sequence[Document]
    digest: str


def load_dataset_text(dataset: str) -> Corpus:
    """Find the text that ``dataset`` names (the table above).

    Raises:
        DatasetError: it does not exist, cannot be read, holds no text, or needs the ``datasets`` extra.
    """
    name, _, split = dataset.partition(":")
    if name == _TOPICS:
        return _load_topics(split)
    path = local_path(dataset)
    if _looks_like_file(dataset, path):
        return _load_file(dataset, path)
    if name in ("wikitext-2", "wikitext2"):
        return _load_hub("Salesforce/wikitext", _WIKITEXT_CONFIG, split or "test", joined=True)
    match = _HUB_ID.fullmatch(dataset)
    if match is None:
        raise DatasetError(
            f"dataset {dataset!r} is neither a file nor a name; expected {_topic_names()}, a path, "
            "wikitext-2, or org/name[/config][:split] on the Hub"
        )
    return _load_hub(match["id"], match["config"], match["split"] or "train", joined=False)


def is_here(dataset: str) -> bool:
    """Whether a text lies on this machine, and is not to be fetched."""
    return dataset.partition(":")[0] == _TOPICS or _looks_like_file(dataset, local_path(dataset))


def require_dataset(dataset: str) -> None:
    """Refuse, before any work, a text that can't be there: nothing is read, nor asked of the Hub.

    Raises:
        DatasetError: a file or split that doesn't exist, or the ``datasets`` package is missing.
    """
    name, _, split = dataset.partition(":")
    path = local_path(dataset)
    if name == _TOPICS:
        _require_split(split)
    elif _looks_like_file(dataset, path):
        if not os.path.exists(path):
            raise DatasetError(f"dataset {dataset}: cannot be read: there is no such file")
    elif _HUB_ID.fullmatch(dataset) is not None and "datasets" not in sys.modules and not find_spec("datasets"):
        raise DatasetError(_without_datasets(name))


def _topic_names() -> str:
    return " or ".join(f"{_TOPICS}:{split}" for split in SPLITS)


def _load_topics(split: str) -> Corpus:
    _require_split(split)
    text = topics_text(split)
    return Corpus(f"{_TOPICS}:{split}", (text,), _digest([text.encode()]))


def _require_split(split: str) -> None:
    if split not in SPLITS:
        found = f"split {split!r}" if split else "no split"
        raise DatasetError(
            f"dataset {_TOPICS}: found {found}, expected {_topic_names()} "
            "(calibrate on one and evaluate on the other, they share no text)"
        )


def _looks_like_file(dataset: str, path: Path) -> bool:
    # os.path: names that no file can have, over 255 characters or with NUL bytes, are no error to it.
    there = os.path.exists(path)
    return there or dataset.startswith(("/", "./", "../", "~")) or dataset.lower().endswith(_FILE_SUFFIXES)


def _load_file(dataset: str, path: Path) -> Corpus:
    try:
        text = read_text(path, _MAX_FILE_NBYTES)
    except ValueError as error:
        raise DatasetError(f"dataset {dataset}: {error}") from error
    documents: Sequence[Document] = _parse_jsonl(dataset, text) if path.suffix.lower() == ".jsonl" else (text,)
    if not any(documents) or not text.strip():
        raise DatasetError(f"dataset {dataset}: the file holds no text")
    return Corpus(os.fspath(path.resolve()), documents, _digest([text.encode()]))


def _parse_jsonl(dataset: str, text: str) -> tuple[Document, ...]:
    documents: list[Document] = []
    # Not splitlines: JSON's strings may hold other separators, U+2028 for example.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise DatasetError(f"dataset {dataset}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DatasetError(f"dataset {dataset}, line {number}: a JSON {type(row).__name__}, expected an object")
        documents.append(_document(row, f"dataset {dataset}, line {number}"))
    return tuple(documents)


def _document(row: Mapping[str, Any], where: str) -> Document:
    """The text or conversation of one row.

    Raises:
        DatasetError: neither field is there, or has another form than expected.
    """
    messages = row.get("messages")
    if messages is not None:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(map(_is_message, messages)):
            raise DatasetError(f"{where}: field 'messages' must be a list of objects with 'role' and 'content'")
        return list(messages)
    text = row.get("text")
    if not isinstance(text, str):
        raise DatasetError(f"{where}: found fields {sorted(row)}, expected 'text' (a string) or 'messages'")
    return text


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


class _HubDocuments(Sequence[Document]):
    """The documents of a Hub dataset, each read when it is asked for."""

    def __init__(self, rows: Any, where: str) -> None:
        self._rows = rows
        self._where = where

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return _document(self._rows[index], f"{self._where}, row {index}")


def _without_datasets(repo: str) -> str:
    return (
        f"dataset {repo}: is no file here, and reading from the Hub needs the datasets package: "
        f"pip install 'datasets>=3.0'; or give a local .txt or .jsonl file, or {_topic_names()}"
    )


def _load_hub(repo: str, config: str | None, split: str, *, joined: bool) -> Corpus:
    try:
        import datasets
    except ImportError:
        raise DatasetError(_without_datasets(repo)) from None
    name = f"{repo}{f'/{config}' if config else ''}:{split}"
    try:
        rows: Any = datasets.load_dataset(repo, config, split=split)
    except Exception as error:  # the library lets errors of a dozen kinds through: HTTP, pyarrow, file system, its own
        raise DatasetError(f"dataset {name}: {one_line(error)}") from error
    if len(rows) == 0:
        raise DatasetError(f"dataset {name}: the split is empty")
    documents: Sequence[Document] = _HubDocuments(rows, f"dataset {name}")
    if joined:
        # WikiText's rows are lines; the customary evaluation joins them with an empty line between.
        documents = ("\n\n".join(rows["text"]),)
    return Corpus(name, documents, f"datasets:{rows._fingerprint}")


def _digest(parts: Iterable[bytes]) -> str:
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return state.hexdigest()
