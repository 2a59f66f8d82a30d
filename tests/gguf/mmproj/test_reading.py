"""A decoder's file and the ``mmproj`` file beside it, read back as the model that both were made of."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.heard import Heard
from support.image_families import LOOKS, after_image, picture, save_images_family
from support.tiny_gguf import write_gguf
from transformers import AutoImageProcessor

from llmconvert.convert.dtype import convert_dtype
from llmconvert.convert.source import open_source, source_fingerprint
from llmconvert.errors import CheckpointError
from llmconvert.gguf.checkpoint import GgufCheckpoint, open_artifact
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import GgufHeader, Metadata, read_gguf_header
from llmconvert.gguf.mmproj import checkpoint
from llmconvert.gguf.mmproj.checkpoint import GgufWhole
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

# Stored with one added, which rounds.
NORMS = ("norm.weight",)
# No image is seen through it.
POOLING = "vision_tower.head."
FAST = ("smolvlm", "internvl", "qwen3_vl_moe")
pytestmark = pytest.mark.filterwarnings("ignore")


def written(source: Checkpoint, output: Path, mix: str = "f32") -> QuantizeResult:
    return quantize_checkpoint(source, output, method="rtn", scheme=MIXES[mix], format="gguf", name="tiny")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_images_family(tmp_path_factory.mktemp("original") / "model", "smolvlm")


@pytest.fixture
def pair(original: Path, tmp_path: Path) -> Path:
    with SafetensorsCheckpoint(original) as source:
        return written(source, tmp_path / "pair").output


def opened(path: Path) -> Checkpoint:
    return open_source(str(path)).checkpoint


def rewrite(
    path: Path, changes: Mapping[str, Any] | None = None, tensors: Mapping[str, np.ndarray | None] | None = None
) -> None:
    """Another file in the place of one of float32: with values of its metadata and tensors changed, None without."""
    header, raw = read_gguf_header(path), path.read_bytes()
    stored = {
        name: np.frombuffer(raw[one.offset : one.offset + one.nbytes], np.float32).reshape(one.shape)
        for name, one in header.tensors.items()
    }
    metadata: dict[str, Any] = {**header.metadata, **(changes or {})}
    values = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()}
    kept = {name: value for name, value in {**stored, **(tensors or {})}.items() if value is not None}
    write_gguf(path, {key: value for key, value in values.items() if value is not None}, kept)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in LOOKS])
def test_a_pair_is_read_as_the_model_it_was_made_of(name: str, tmp_path: Path) -> None:
    directory = save_images_family(tmp_path / "model", name)
    with SafetensorsCheckpoint(directory) as source:
        result = written(source, tmp_path / "out")
        back = opened(result.output / result.files[0])
        assert isinstance(back, GgufWhole)
        assert set(back) == {tensor for tensor in source if not tensor.startswith(POOLING)}
        for tensor, values in back.items():
            rounded = name == "gemma3" and tensor.endswith(NORMS)
            torch.testing.assert_close(values, source[tensor], rtol=0, atol=1e-7 if rounded else 0)
            torch.testing.assert_close(back.read_rows(tensor, 1, 3), values[1:3], rtol=0, atol=0)
            assert back.type_of(tensor) == "f32"
    again = written(back, tmp_path / "again")
    for file in result.files:
        assert (again.output / file).read_bytes() == (result.output / file).read_bytes(), file
    convert_dtype(back, tmp_path / "back", dtype=torch.float32)
    image = picture(LOOKS[name].size)
    expected, _ = after_image(directory, name, image)
    found, _ = after_image(tmp_path / "back", name, image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "back")
    assert list(processor.image_mean) == [0.5, 0.4, 0.3] and list(processor.image_std) == [0.5, 0.25, 0.2]


def test_types_of_a_file_are_read_as_they_are(original: Path, tmp_path: Path) -> None:
    with SafetensorsCheckpoint(original) as source:
        result = written(source, tmp_path / "out", "q8_0")
        with opened(result.output) as back:
            assert isinstance(back, GgufWhole)
            name = "model.vision_model.encoder.layers.0.mlp.fc1.weight"
            assert back.infos[name].dtype == torch.float16 and back.type_of(name) == "f16"
            torch.testing.assert_close(back[name], source[name].half(), rtol=0, atol=0)
            assert back.infos["model.vision_model.post_layernorm.weight"].dtype == torch.float32
            assert back.type_of("model.text_model.layers.0.mlp.up_proj.weight") == "q8_0"
            headers = [read_gguf_header(result.output / file) for file in result.files]
            stored = sum(tensor.nbytes for header in headers for tensor in header.tensors.values())
            assert back.stored_nbytes == stored
    # What is measured of an artifact is its decoder, which is what its text goes through.
    with open_artifact(result.output) as artifact:
        assert not isinstance(artifact, GgufWhole) and "model.embed_tokens.weight" in artifact


def test_the_file_beside_counts_for_the_source(pair: Path) -> None:
    source = open_source(str(pair / "tiny-F32.gguf"))
    before, identity = source_fingerprint(source), source.checkpoint.identity
    rewrite(pair / "mmproj-tiny-f32.gguf", {"clip.vision.image_mean": [0.1, 0.2, 0.3]})
    again = open_source(str(pair / "tiny-F32.gguf"))
    assert source_fingerprint(again) != before and again.checkpoint.identity != identity
    assert json.loads(again.checkpoint.read_file("preprocessor_config.json"))["image_mean"] == [0.1, 0.2, 0.3]
    alone = open_source(str(pair / "tiny-F32.gguf"), decoder_alone=True).checkpoint
    assert type(alone) is GgufCheckpoint and "model.embed_tokens.weight" in alone


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"clip.vision.projection_dim": 96}, {}, r"projects images to 96 values, the decoder beside it takes 64"),
        (
            {"clip.projector_type": "qwen2vl_merger"},
            {},
            r"'qwen2vl_merger', goes with a decoder of .* qwen2vl, and the",
        ),
        ({"general.architecture": "llama"}, {}, r"is called mmproj, and is a model of architecture 'llama'"),
        ({"clip.vision.block_count": 3}, {}, r"has no tensor 'v.blk.2.ln1.weight', which files of kind 'idefics3'"),
        (
            {"clip.vision.feed_forward_length": 48},
            {},
            r"'model.vision_model.encoder.layers.0.mlp.fc1.weight' is read in",
        ),
        ({"clip.vision.image_mean": None}, {}, r"metadata has no clip.vision.image_mean"),
        ({"clip.vision.projector.scale_factor": None}, {}, r"no key of the metadata says scale_factor; the file is"),
        ({"clip.vision.attention.head_count": 0}, {}, r"clip.vision.attention.head_count is 0, expected a positive"),
        ({}, {"v.post_ln.bias": None}, r"has no tensor 'v.post_ln.bias', which files of kind 'idefics3' have"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    changes: dict[str, Any], tensors: dict[str, None], message: str, pair: Path
) -> None:
    rewrite(pair / "mmproj-tiny-f32.gguf", changes, tensors)
    with pytest.raises(CheckpointError, match=message) as refusal:
        open_source(str(pair / "tiny-F32.gguf"))
    assert "mmproj-tiny-f32.gguf: " in str(refusal.value)
    assert "To read the decoder alone, move mmproj-tiny-f32.gguf elsewhere" in str(refusal.value)


def test_truncated_and_ambiguous_files_are_refused(pair: Path) -> None:
    path = pair / "mmproj-tiny-f32.gguf"
    raw = path.read_bytes()
    path.write_bytes(raw[:-100])
    with pytest.raises(CheckpointError, match=r"mmproj-tiny-f32.gguf: .*the download was cut off"):
        open_source(str(pair))
    path.write_bytes(raw)
    (pair / "mmproj-tiny-f16.gguf").write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=r"beside it are 2 files .* mmproj-tiny-f16.gguf and mmproj-tiny-f32.gguf"
    ):
        open_source(str(pair))


@pytest.mark.parametrize(
    ("changes", "tensors", "message"),
    [
        ({"clip.projector_type": "ldp"}, {}, r"clip.projector_type is 'ldp'; read are gemma3, idefics3"),
        ({"clip.has_audio_encoder": True}, {}, r"has a part for sound"),
        ({}, {"v.blk.0.ls1.weight": np.ones(32, np.float32)}, r"'v.blk.0.ls1.weight' has no place in Idefics3"),
    ],
)
def test_what_is_not_read_leaves_the_decoder_and_is_said(
    changes: dict[str, Any], tensors: dict[str, np.ndarray], message: str, pair: Path
) -> None:
    rewrite(pair / "mmproj-tiny-f32.gguf", changes, tensors)
    heard = Heard()
    source = open_source(str(pair / "tiny-F32.gguf"), progress=heard)
    (note,) = heard.lines
    assert note.startswith("note: mmproj-tiny-f32.gguf is not read, and what is read is the decoder alone, because ")
    assert re.search(message, note)
    assert type(source.checkpoint) is GgufCheckpoint


@pytest.mark.parametrize("name", ["smolvlm", pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_metadata_of_any_kind_is_read_or_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with SafetensorsCheckpoint(save_images_family(tmp_path / "model", name)) as source:
        result = written(source, tmp_path / "out")
    decoder, beside = (result.output / file for file in result.files)
    header = read_gguf_header(beside)
    refused = 0
    for key in (key for key in header.metadata if key.startswith("clip.")):
        for value in (None, 0, 3, 1 << 20, -1.5, "x", True, np.array([0, 7], np.int32), np.array([], np.int32)):
            values = {**header.metadata, key: value}
            if value is None:
                del values[key]
            changed = GgufHeader(header.path, Metadata(header.path, values), header.tensors, header.parts)
            monkeypatch.setattr(checkpoint, "read_gguf_header", lambda path, changed=changed: changed)
            try:
                checkpoint.open_whole(decoder).close()
            except CheckpointError:
                refused += 1
    assert refused > 50


def test_settings_that_do_not_come_back_are_not_written(tmp_path: Path) -> None:
    directory = save_images_family(tmp_path / "model", "internvl")
    config = json.loads((directory / "config.json").read_text())
    for place, name, value, message in (
        ("", "projector_hidden_act", "silu", "projector_hidden_act is 'silu'; llama.cpp computes 'gelu'"),
        ("vision_config", "hidden_act", "gelu_new", "hidden_act is 'gelu_new'; llama.cpp's internvl computes 'gelu'"),
    ):
        changed = json.loads(json.dumps(config))
        (changed[place] if place else changed)[name] = value
        (directory / "config.json").write_text(json.dumps(changed))
        with SafetensorsCheckpoint(directory) as source:
            (note,) = written(source, tmp_path / name).notes
        assert "there is no mmproj file, because" in note and message in note
