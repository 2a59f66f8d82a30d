"""Artifacts of classes that transformers loads in a way of their own: what is written so that it can."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.tiny_checkpoints import FIRST_TEXT_TOKEN, VOCABULARY, save_tiny_checkpoint

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
DENSE = (Override("*.experts.*", None),)


def test_packed_weights_that_a_class_asks_for_are_loaded_dense_where_one_scheme_has_them(tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(save_tiny_checkpoint(tmp_path / "model", "falcon", "FalconForCausalLM"))
    scheme = Scheme.parse("w4a16-g32")
    made = quantize_checkpoint(source, tmp_path / "one", method="rtn", scheme=scheme)
    artifact = SafetensorsCheckpoint(tmp_path / "one")
    assert artifact.config["quantization_config"]["dequantize"] is True
    assert sum(name.endswith(".weight_packed") for name in artifact) == 4 * 4
    assert any("dequantize: true" in note for note in made.notes)
    # transformers would unpack all of them by the first group.
    other = [Override("*.0.mlp.*", Scheme.parse("w8a16-g32"))]
    made = quantize_checkpoint(source, tmp_path / "two", method="rtn", scheme=scheme, overrides=other)
    artifact = SafetensorsCheckpoint(tmp_path / "two")
    assert "dequantize" not in artifact.config["quantization_config"]
    assert sum(name.endswith(".weight_packed") for name in artifact) == 2
    assert any("14 linears stay dense" in note for note in made.notes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "class_name", "overrides"),
    [
        ("molmo2", "Molmo2ForConditionalGeneration", ()),
        ("unlimited_ocr", "UnlimitedOcrForConditionalGeneration", ()),
        # A tower with experts of its own, in tensors that transformers would drop; experts for images in the blocks.
        ("dots3_note", "Dots3NoteForConditionalGeneration", ()),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoeForConditionalGeneration", DENSE),
    ],
)
def test_tensors_that_transformers_makes_of_others_are_written_as_it_makes_them(
    tmp_path: Path, model_type: str, class_name: str, overrides: Sequence[Override]
) -> None:
    kind, scheme = getattr(transformers, class_name), Scheme.parse("w4a16-g32")
    source, output = save_tiny_checkpoint(tmp_path / "model", model_type, class_name), tmp_path / "out"
    checkpoint, window = SafetensorsCheckpoint(source), torch.randint(FIRST_TEXT_TOKEN, VOCABULARY, (1, 24))
    quantize_checkpoint(checkpoint, output, method="rtn", scheme=scheme, overrides=overrides)
    before = kind.from_pretrained(source, dtype=torch.float32).state_dict()
    model, info = kind.from_pretrained(output, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(input_ids=window, use_cache=False).logits
    dense = open_dense(SafetensorsCheckpoint(output))
    assert isinstance(dense, QuantizedView) and dense.quantized
    torch.testing.assert_close(next(iter(stream_logits(dense, [window], device=CPU))), theirs)
    for_images = [name for name in before if "vision" in name]
    assert for_images and all(torch.equal(before[name], model.state_dict()[name]) for name in for_images)


def test_weights_of_a_tower_that_become_several_have_no_place_without_quantized_namesakes(tmp_path: Path) -> None:
    name = "UnlimitedOcrForConditionalGeneration"
    source = SafetensorsCheckpoint(save_tiny_checkpoint(tmp_path / "model", "unlimited_ocr", name))
    options: dict[str, Any] = {"method": "rtn", "scheme": Scheme.parse("w4a16-g32")}
    with pytest.raises(UnsupportedError, match=r"makes several weights .*of 'qkv_proj\.weight' .* take another"):
        quantize_checkpoint(source, tmp_path / "out", overrides=[Override("*.self_attn.*", None)], **options)
    assert not (tmp_path / "out").exists()
