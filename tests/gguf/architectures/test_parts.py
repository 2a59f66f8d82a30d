"""Decoders inside models with parts for images: llama.cpp computes a text from their file as the whole model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.gguf_families import GGUF_FAMILIES
from support.gguf_families import save_family as save_text_family
from support.llama_cpp import LlamaCpp
from support.multimodal_families import save_family
from support.tiny_checkpoints import FIRST_TEXT_TOKEN, save_tiny_checkpoint
from support.tiny_models import tiny_tokenizer
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.gguf.architectures.registry import architecture_of
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.export import export_checkpoint
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import read_gguf_header
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.inventory import take_inventory

TOLERANCE = 0.01
# Of text: smaller ones may stand for images.
IDS = torch.randint(FIRST_TEXT_TOKEN, 320, (1, 40), generator=torch.Generator().manual_seed(1))
FAST = ("gemma3", "qwen2_vl", "qwen3_vl_moe")
FAMILIES = (
    *("gemma3", "gemma4", "idefics3", "internvl", "llava", "llava_next", "llava_onevision", "mistral3", "smolvlm"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
)
pytestmark = pytest.mark.filterwarnings("ignore")


def written(directory: Path, mix: str = "f32") -> QuantizeResult:
    path = directory.with_suffix(".gguf")
    path.unlink(missing_ok=True)
    with SafetensorsCheckpoint(directory) as source:
        return quantize_checkpoint(source, path, method="rtn", scheme=MIXES[mix], format="gguf", name="tiny")


def whole(directory: Path) -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForMultimodalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return loaded.eval()


def contents(path: Path) -> tuple[dict[str, str], dict[str, bytes]]:
    """Metadata and tensors, but for the tokenizer, whose class transformers chooses by the model's."""
    header, raw = read_gguf_header(path), path.read_bytes()
    metadata = {key: str(value) for key, value in header.metadata.items() if not key.startswith("tokenizer.")}
    return metadata, {name: raw[one.offset : one.offset + one.nbytes] for name, one in header.tensors.items()}


def save_alone(model: PreTrainedModel, directory: Path, class_name: str) -> Path:
    """The decoder as a checkpoint of its own, by transformers."""
    config = model.config.get_text_config()
    config.tie_word_embeddings = model.config.tie_word_embeddings
    alone = getattr(transformers, class_name)(config)
    alone.model.load_state_dict(model.get_decoder().state_dict())
    alone.get_output_embeddings().load_state_dict(model.get_output_embeddings().state_dict())
    alone.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]
)
def test_llama_cpp_computes_a_text_as_the_whole_model_does(name: str, tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", name)
    model = whole(directory)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits[0, -1].float().log_softmax(-1)
    result = written(directory)
    found = LlamaCpp(result.output).log_probabilities(IDS[0].tolist(), len(expected))
    assert (found - expected).abs().max() < TOLERANCE
    assert any("of parts for images or sound" in note for note in result.notes)
    arch = architecture_of(model.config.get_text_config().to_dict())
    if not arch.read_type:
        alone = save_alone(model, tmp_path / "alone", arch.model_class)
        assert contents(written(alone).output) == contents(result.output)
    with open_gguf(result.output) as stored, SafetensorsCheckpoint(directory) as source:
        inventory = take_inventory(source, stored, stored)
        assert not inventory.problems and set(inventory.counts) <= {"kept", "changed", "quantized"}
        assert all(not record.error or record.error < 1e-6 for record in inventory.tensors)
        (ours,) = (logits[0, -1].log_softmax(-1) for logits in stream_logits(stored, [IDS], device=torch.device("cpu")))
        torch.testing.assert_close(ours.float(), expected, rtol=0, atol=1e-4)


def test_names_of_releases_differ_and_files_do_not(tmp_path: Path) -> None:
    """``model.language_model.…`` of transformers 5, ``language_model.model.…`` of before, a tied head stored or not."""
    directory = save_family(tmp_path / "model", "gemma3")
    expected = written(directory, "q8_0").output.read_bytes()
    tensors = load_file(directory / "model.safetensors")
    old = next(name.partition("embed_tokens")[0] for name in tensors if name.endswith("embed_tokens.weight"))
    new = "model.language_model." if old == "language_model.model." else "language_model.model."
    tensors = {new + name.removeprefix(old) if name.startswith(old) else name: part for name, part in tensors.items()}
    head = new.removesuffix("model.") + "lm_head.weight" if new == "language_model.model." else "lm_head.weight"
    tensors[head] = tensors[f"{new}embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert written(directory, "q8_0").output.read_bytes() == expected
    del tensors[f"{new}embed_tokens.weight"], tensors[head]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no embedding of its decoder, .* 'embed_tokens.weight'"):
        written(directory)


def test_gemma_3n_is_written_from_the_whole_that_it_was_published_in(tmp_path: Path) -> None:
    """Its tower needs timm, without which transformers does not build it; a file's plan does without."""
    kind, settings = GGUF_FAMILIES["gemma3n_text"]
    alone = save_text_family(tmp_path / "alone", kind, settings)
    whole = tmp_path / "whole"
    shutil.copytree(alone, whole)
    (whole / "config.json").unlink()
    tensors = load_file(alone / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): values for name, values in tensors.items()}
    inside["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.ones(4, 3, 3, 3)
    save_file(inside, whole / "model.safetensors", {"format": "pt"})
    text = json.loads((alone / "config.json").read_text())
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    (whole / "config.json").write_text(json.dumps(config))
    with SafetensorsCheckpoint(alone) as one, SafetensorsCheckpoint(whole) as other:
        found, expected = export_checkpoint(other, "tiny"), export_checkpoint(one, "tiny")
        assert {key: str(value) for key, value in found.metadata.items()} == {
            key: str(value) for key, value in expected.metadata.items()
        }
        assert found.beside == ("model.vision_tower.timm_model.conv_stem.conv.weight",)
        for ours, theirs in zip(found.tensors, expected.tensors, strict=True):
            assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
            for piece, alone_piece in zip(ours.pieces, theirs.pieces, strict=True):
                assert torch.equal(other[piece.name], one[alone_piece.name])


def test_codes_are_chosen_for_a_decoder_inside(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", "qwen3_vl_moe")
    sizes, errors = [], []
    with SafetensorsCheckpoint(directory) as source:
        (expected,) = stream_logits(source, [IDS], device=torch.device("cpu"))
        # On the text that it is solved on: all that its moments say counts.
        for method, options in (("rtn", {}), ("gptq", {"shrinkage": 0.0})):
            path = tmp_path / f"{method}.gguf"
            quantize_checkpoint(
                source,
                path,
                method=method,
                scheme=MIXES["q4_0"],
                format="gguf",
                windows=[IDS],
                name="tiny",
                options=options,
            )
            with open_gguf(path) as stored:
                (found,) = stream_logits(stored, [IDS], device=torch.device("cpu"))
            sizes.append(path.stat().st_size)
            errors.append(float((found - expected).square().mean()))
    assert sizes[0] == sizes[1] and errors[1] < 0.7 * errors[0]


def test_sections_that_llama_cpp_leaves_unturned_are_refused_or_said(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", "qwen3_vl")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=r"\[2, 3, 3\]; llama.cpp does not turn frequencies 6 of a head"):
        written(directory)
    config["text_config"]["rope_parameters"]["rope_theta"] = 1e9
    (directory / "config.json").write_text(json.dumps(config))
    assert any("does not turn frequencies 6 of a head" in note for note in written(directory).notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        # Its class computes logits without the scale that its decoder alone has.
        ("aya_vision", "architecture 'aya_vision' has other parts beside its decoder, a 'cohere2', and was not tried"),
        ("mllama", "architecture 'mllama_text_model', of which 'mllama' has its decoder, cannot be written"),
    ],
)
def test_wholes_that_compute_otherwise_are_refused(name: str, message: str, tmp_path: Path) -> None:
    if name == "mllama":
        directory = save_family(tmp_path / "model", name)
    else:
        directory = tmp_path / "model"
        save_tiny_checkpoint(directory, name, "AyaVisionForConditionalGeneration")
    with pytest.raises(UnsupportedError, match=message):
        written(directory)
