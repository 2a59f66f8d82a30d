"""The tokenizer among a checkpoint's files, wherever these come from: a directory, a GGUF file, the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from llmconvert.errors import LlmconvertError, SourceError, UnsupportedError, one_line
from llmconvert.machine import of_machine
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_json, write_side_files
from llmconvert.text.confinement import Confinement, ConfinementError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["has_tokenizer", "load_tokenizer", "tokenizer_errors", "try_tokenizer"]

# What the names of tokenizers' files begin with, of every kind that transformers knows.
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
# What transformers reads tokenizer.model with.
_SENTENCEPIECE = ("sentencepiece", "google.protobuf")
# Digests of the files that were tried in this process.
_TRIED: set[str] = set()


def has_tokenizer(checkpoint: Checkpoint) -> bool:
    """Whether any of a checkpoint's files is a tokenizer's."""
    return any(Path(name).name.startswith(_TOKENIZER_FILES) for name in checkpoint.files)


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer by transformers. Code that comes with a model is never run.

    Raises:
        UnsupportedError: it is known not to be readable, and why.
        SourceError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if checkpoint.without_tokenizer:
        raise UnsupportedError(f"{checkpoint.without_tokenizer}. Nothing that needs the tokenizer can be done")
    if not has_tokenizer(checkpoint):
        raise SourceError(
            "the model has no tokenizer beside its weights (tokenizer.json, for example); copy its original's there"
        )
    if "tokenizer.model" in checkpoint.files and "tokenizer.json" not in checkpoint.files:
        _require_sentencepiece()
    with tempfile.TemporaryDirectory(prefix="llmconvert-") as directory:
        write_side_files(Path(directory), checkpoint.files)
        write_json(Path(directory) / "config.json", dict(checkpoint.config))
        if "tokenizer.json" in checkpoint.files:
            try_tokenizer(Path(directory) / "tokenizer.json")
        try:
            with tokenizer_errors():
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    directory, trust_remote_code=False, local_files_only=True
                )
        except SourceError as error:
            raise SourceError(str(error).replace(directory, "the model")) from error
    return tokenizer


@contextlib.contextmanager
def tokenizer_errors() -> Iterator[None]:
    """Whatever a tokenizer raises, as an error of this package: its classes fail in ways of their own.

    Raises:
        SourceError: with what it says.
        OSError: the machine failed.
    """
    try:
        yield
    except BaseException as error:
        # A panic of compiled code is no Exception, so that nobody takes it for an error to go on from.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, LlmconvertError) or of_machine(error):
            raise
        raise SourceError(f"the model's tokenizer cannot be used: {one_line(error)}") from error


def try_tokenizer(path: Path) -> None:
    """Load a ``tokenizer.json`` and let it read a line, where a loop or an abort ends a child; each file once.

    Raises:
        SourceError: it fails.
    """
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest in _TRIED:
        return
    with Confinement("try_tokenizer") as confinement:
        try:
            confinement.ask(path=str(path))
        except ConfinementError as error:
            raise SourceError(f"the model's tokenizer cannot be used: {error}") from error
    _TRIED.add(digest)


def _require_sentencepiece() -> None:
    if any(_absent(package) for package in _SENTENCEPIECE):
        raise SourceError(
            "the model's tokenizer is tokenizer.model alone, which transformers reads with two more packages: "
            "pip install sentencepiece protobuf, or put its tokenizer.json there"
        )


def _absent(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ModuleNotFoundError:  # the package around it
        return True
