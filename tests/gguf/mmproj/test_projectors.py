"""Vision towers and projectors in llama.cpp's layout: it sees an image as transformers does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support.image_families import LOOKS, TEXT, after_image, picture, png, save_images_family
from support.llama_cpp import LlamaCpp
from support.multimodal_families import save_family
from support.tiny_models import VOCABULARY

from llmconvert.errors import UnsupportedError
from llmconvert.gguf.checkpoint import open_artifact, open_gguf
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import read_gguf_header
from llmconvert.gguf.mmproj.registry import MODEL_TYPES
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

TOLERANCE = 0.01
PAGE = Path(__file__).parents[3] / "docs" / "gguf.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def written(directory: Path, output: Path, mix: str) -> QuantizeResult:
    with SafetensorsCheckpoint(directory) as source:
        return quantize_checkpoint(source, output, method="rtn", scheme=MIXES[mix], format="gguf", name="tiny")


def seen(result: QuantizeResult, image: np.ndarray) -> tuple[np.ndarray, int]:
    model, projector = (result.output / file for file in result.files)
    found, count = LlamaCpp(model, projector=projector).after_image(png(image), TEXT, VOCABULARY)
    return found.numpy(), count


@pytest.mark.parametrize("name", LOOKS)
def test_llama_cpp_sees_an_image_as_transformers_does(name: str, tmp_path: Path) -> None:
    directory = save_images_family(tmp_path / "model", name)
    image = picture(LOOKS[name].size)
    wanted, count = after_image(directory, name, image)
    result = written(directory, tmp_path / "out", "f32")
    assert result.files[1] == "mmproj-tiny-f32.gguf"
    found, evaluated = seen(result, image)
    assert evaluated == count
    assert np.abs(found - wanted.numpy()).max() < TOLERANCE
    assert np.abs(found - seen(result, np.zeros_like(image))[0]).max() > 10 * TOLERANCE
    with open_artifact(result.output) as stored:
        assert stored.config["vocab_size"] == VOCABULARY


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_vl"])
def test_matrices_have_16_bits_beside_a_quantized_model(name: str, tmp_path: Path) -> None:
    """Convolutions, merged patches and Gemma's transposed matrix have types that llama.cpp can work with."""
    directory = save_images_family(tmp_path / "model", name)
    image = picture(LOOKS[name].size)
    wanted, _ = after_image(directory, name, image)
    for mix, kind in (("q8_0", "f16"), ("bf16", "bf16")):
        result = written(directory, tmp_path / mix, mix)
        assert result.files[1] == f"mmproj-tiny-{kind}.gguf"
        assert result.nbytes == sum((result.output / file).stat().st_size for file in result.files)
        header = read_gguf_header(result.output / result.files[1])
        types = {name: tensor.qtype.name for name, tensor in header.tensors.items()}
        assert types["v.blk.0.attn_out.weight"] == kind.upper()
        assert types["v.patch_embd.weight"] == ("F16" if kind == "f16" else "F32")
        assert np.abs(seen(result, image)[0] - wanted.numpy()).max() < 10 * TOLERANCE


def test_what_has_no_such_file_is_said_by_name(tmp_path: Path) -> None:
    directory = save_images_family(tmp_path / "model", "smolvlm")
    single = written(directory, tmp_path / "one.gguf", "q8_0")
    assert any("name a directory as output to have them beside it" in note for note in single.notes)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "relu"
    (directory / "config.json").write_text(json.dumps(config))
    (note,) = written(directory, tmp_path / "relu", "q8_0").notes
    assert "no mmproj file, because vision_config.hidden_act is 'relu'; llama.cpp has gelu_pytorch_tanh" in note
    (directory / "preprocessor_config.json").unlink()
    (note,) = written(directory, tmp_path / "unprepared", "q8_0").notes
    assert "no preprocessor_config.json or processor_config.json with image_mean" in note
    assert "janus" not in MODEL_TYPES
    (note, *_) = written(save_family(tmp_path / "next", "llava_next"), tmp_path / "other", "q8_0").notes
    assert "no mmproj file is written of model type 'llava_next', only of gemma3, idefics3" in note
    (note, *_) = written(save_family(tmp_path / "llava", "llava"), tmp_path / "clip", "q8_0").notes
    assert "the tower is a 'clip_vision_model', and of LLaVA an mmproj file is written with Pixtral's alone" in note


def test_a_projector_is_no_model(tmp_path: Path) -> None:
    result = written(save_images_family(tmp_path / "model", "smolvlm"), tmp_path / "out", "q8_0")
    with pytest.raises(UnsupportedError, match=r"mmproj-tiny-f16.gguf: is a model's part for images .* name the file"):
        open_gguf(result.output / result.files[1])


def test_the_page_has_every_model_type_and_nothing_beyond_the_tolerance() -> None:
    _, _, text = PAGE.read_text().partition("\n## Vision towers")
    rows = re.findall(r"^\| (`.+) \| `[\w.]+` \| ([\d.]+) \|$", text, re.MULTILINE)
    assert {kind for kinds, _ in rows for kind in re.findall(r"`(\w+)`", kinds)} == set(MODEL_TYPES)
    assert all(float(found) < TOLERANCE for _, found in rows)
