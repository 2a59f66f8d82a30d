"""The model whose artifacts the readers' tests load: small, with sizes that real kernels take."""

from __future__ import annotations

from pathlib import Path

import torch
from support.tiny_models import VOCABULARY, tiny_llama_dir

from llmconvert.quantize.formats.base import FileFormat, load_format
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import parse_scheme
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
        if isinstance(load_format(layout), FileFormat):
            output = output.parent / f"{output.name}.{layout}"
        # Some schemes have text fix how inputs are quantized.
        windows = [torch.tensor([prompt]) for prompt in PROMPTS]
        quantize_checkpoint(
            checkpoint, output, method="rtn", scheme=parse_scheme(scheme), format=layout, windows=windows
        )
    return output
