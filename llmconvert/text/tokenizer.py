"""The tokenizer among a checkpoint's files, wherever these come from: a directory, a GGUF file, the Hub."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llmconvert.errors import SourceError
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.writer import write_json, write_side_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["load_tokenizer"]

# What the names of tokenizers' files begin with, of every kind that transformers knows.
_TOKENIZER_FILES = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "tekken")
_LONGEST_REASON = 300


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer by transformers. Code that comes with a model is never run.

    Raises:
        SourceError: there is none, or transformers cannot load it.
    """
    from transformers import AutoTokenizer

    if not any(Path(name).name.startswith(_TOKENIZER_FILES) for name in checkpoint.files):
        raise SourceError(
            "the model has no tokenizer beside its weights (tokenizer.json, for example); copy its original's there"
        )
    with tempfile.TemporaryDirectory(prefix="llmconvert-") as directory:
        write_side_files(Path(directory), checkpoint.files)
        write_json(Path(directory) / "config.json", dict(checkpoint.config))
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizer classes fail in ways of their own
            reason = " ".join(str(error).replace(directory, "the model").split())[:_LONGEST_REASON]
            raise SourceError(f"the model's tokenizer cannot be loaded: {type(error).__name__}: {reason}") from error
    return tokenizer
