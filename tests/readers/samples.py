"""The model whose artifacts the readers' tests load: small, with sizes that real kernels take."""

from __future__ import annotations

from pathlib import Path

import torch
from support.tiny_models import VOCABULARY, tiny_llama_dir

from llmconvert.gguf.ggml.mix import GgmlMix
from llmconvert.quantize.gguf_job import write_gguf
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["PROMPTS", "VOCABULARY", "artifact", "sample_model"]

#: Token ids of the prompts that every reader continues.
PROMPTS = [[(7 * index + 3 * place * place) % VOCABULARY for place in range(24)] for index in range(4)]


def sample_model(directory: Path, dtype: torch.dtype) -> Path:
    """A Llama of hidden size 256 with grouped heads of 64, two layers."""
    return tiny_llama_dir(
        directory,
        dtype=dtype,
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )


def artifact(source: Path, output: Path, layout: str, scheme: str) -> Path:
    """``source`` rounded to a scheme and stored in a format: a directory, or a GGUF file."""
    with SafetensorsCheckpoint(source) as checkpoint:
        if layout == "gguf":
            path = output.parent / f"{output.name}.gguf"
            return write_gguf(checkpoint, path, mix=GgmlMix.parse(scheme)).path
        quantize_checkpoint(checkpoint, output, method="rtn", scheme=Scheme.parse(scheme), format=layout)
    return output
