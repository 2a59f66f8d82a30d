"""Every architecture written as GGUF: llama.cpp computes what transformers does, and the file reads back the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.gguf_families import GGUF_FAMILIES, REFUSED_FAMILIES, save_family
from support.gguf_models import IDS, next_token
from support.llama_cpp import LlamaCpp
from support.multimodal_families import FAMILIES, family_config
from transformers import AutoModelForCausalLM

from llmconvert.errors import LlmconvertError, UnsupportedError
from llmconvert.gguf.architectures.decoder import WHOLES
from llmconvert.gguf.architectures.registry import ARCHITECTURES
from llmconvert.gguf.checkpoint import describe_model, open_gguf
from llmconvert.gguf.export import export_checkpoint
from llmconvert.gguf.ggml.mix import MIXES
from llmconvert.gguf.header import GgufHeader, Metadata, read_gguf_header
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.inventory import take_inventory

#: Nat, over all log probabilities of the token after 40 random ones.
TOLERANCE = 0.01
# One of each way in which a file has tensors; the others are slow by their number.
FAST = ("mixtral", "gemma3_text", "gpt_oss", "deepseek_v3", "granitemoeshared", "gpt2", "falcon", "falcon_h1")
PAGE = Path(__file__).parents[3] / "docs" / "gguf.md"
pytestmark = pytest.mark.filterwarnings("ignore")


def written(directory: Path) -> Path:
    path = directory.with_suffix(".gguf")
    with SafetensorsCheckpoint(directory) as source:
        return quantize_checkpoint(source, path, method="rtn", scheme=MIXES["f32"], format="gguf", name="tiny").output


def predicts(directory: Path) -> torch.Tensor:
    model, found = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not found["missing_keys"] and not found["unexpected_keys"]
    return next_token(model.eval())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GGUF_FAMILIES]
)
def test_llama_cpp_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES[name])
    expected = predicts(directory)
    path = written(directory)
    found = LlamaCpp(path).log_probabilities(IDS[0].tolist(), len(expected))
    assert (found - expected).abs().max() < TOLERANCE
    back = tmp_path / "back"
    back.mkdir()
    with open_gguf(path) as checkpoint:
        save_file(
            {key: value.contiguous() for key, value in checkpoint.items()}, back / "model.safetensors", {"format": "pt"}
        )
        (back / "config.json").write_text(json.dumps(dict(checkpoint.config)))
        assert checkpoint.config["model_type"] == GGUF_FAMILIES[name][0]
    torch.testing.assert_close(predicts(back), expected, rtol=0, atol=1e-4)


def test_a_head_behind_several_streams_is_weighed_by_its_inputs(tmp_path: Path) -> None:
    directory, path = save_family(tmp_path / "model", *GGUF_FAMILIES["gemma3n_text"]), tmp_path / "tiny.gguf"
    with SafetensorsCheckpoint(directory) as source:
        mix = MIXES["q4_0"]
        quantize_checkpoint(source, path, method="imatrix", scheme=mix, format="gguf", windows=[IDS], name="tiny")
        with open_gguf(path) as checkpoint:
            inventory = take_inventory(source, checkpoint, checkpoint)
            assert not inventory.problems and set(inventory.counts) == {"changed", "kept"}


@pytest.mark.parametrize("name", REFUSED_FAMILIES)
def test_what_llama_cpp_computes_otherwise_is_refused(name: str, tmp_path: Path) -> None:
    kind, settings, message = REFUSED_FAMILIES[name]
    with pytest.raises(UnsupportedError, match=message):
        written(save_family(tmp_path / "model", kind, settings))
    assert not list(tmp_path.glob("*.gguf"))


def test_names_may_lack_their_first_part(tmp_path: Path) -> None:
    """As GPT-2 and BLOOM were published."""
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES["gpt2"])
    expected = written(directory).read_bytes()
    tensors = load_file(directory / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, directory / "model.safetensors", {"format": "pt"})
    directory.with_suffix(".gguf").unlink()
    assert written(directory).read_bytes() == expected


def test_layers_that_predict_several_tokens_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES["glm4_moe"])
    expected = written(directory).read_bytes()
    tensors = load_file(directory / "model.safetensors")
    more = {"model.layers.2.eh_proj.weight": torch.ones(64, 128)}
    save_file(tensors | more, directory / "model.safetensors", {"format": "pt"})
    directory.with_suffix(".gguf").unlink()
    with SafetensorsCheckpoint(directory) as source:
        assert "1 tensors of layers that predict several tokens" in export_checkpoint(source, "tiny").notes[0]
    assert written(directory).read_bytes() == expected


def test_layers_that_the_config_does_not_count_are_not_told_as_such_that_predict_ahead(tmp_path: Path) -> None:
    directory = save_family(tmp_path / "model", *GGUF_FAMILIES["llama"])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] - 1}))
    with SafetensorsCheckpoint(directory) as source:
        note = export_checkpoint(source, "tiny").notes[0]
    assert note.startswith("config.json counts 1 layers; 9 tensors of layers behind them (model.layers.1.")


def test_the_page_has_every_architecture_and_nothing_beyond_the_tolerance() -> None:
    text, _, _ = PAGE.read_text().partition("\n## Vision towers")
    rows = re.findall(r"^\| `(\w+)` \| `([\w.-]+)` \| ([\d.]+|refused: .+) \|$", text, re.MULTILINE)
    assert {(kind, name) for kind, name, _ in rows} == {(arch.model_type, arch.name) for arch in ARCHITECTURES}
    for kind, _, found in rows:
        refused = {gap for arch in ARCHITECTURES if arch.model_type == kind and (gap := arch.gap)}
        assert refused == {found.removeprefix("refused: ")} if refused else float(found) < TOLERANCE


@pytest.mark.parametrize("name", ["deepseek_v3", "falcon_h1", pytest.param("qwen3_next", marks=pytest.mark.slow)])
def test_metadata_of_any_kind_is_read_or_refused(name: str, tmp_path: Path) -> None:
    header = read_gguf_header(written(save_family(tmp_path / "model", *GGUF_FAMILIES[name])))
    arch = header.metadata["general.architecture"]
    opened = 0
    for key in (key for key in header.metadata if key.startswith(arch)):
        for value in (None, 0, 3, 1 << 20, -1.5, "x", True, np.array([0, 7], np.int32), np.array([], np.int32)):
            values = {**header.metadata, key: value}
            if value is None:
                del values[key]
            changed = GgufHeader(header.path, Metadata(header.path, values), header.tensors, header.parts)
            try:
                describe_model(changed, lambda tensor: np.ones(tensor.shape, np.float32))
                opened += 1
            except LlmconvertError as error:
                assert str(header.path) in str(error)
    assert opened


def test_every_architecture_is_tried() -> None:
    tried = {kind for kind, _ in GGUF_FAMILIES.values()}
    tried |= {family_config(FAMILIES[name]).get_text_config().model_type for name in WHOLES & FAMILIES.keys()}
    assert tried == {arch.model_type for arch in ARCHITECTURES if not arch.gap}
    assert {arch.model_type for arch in ARCHITECTURES if arch.gap} <= {kind for kind, *_ in REFUSED_FAMILIES.values()}
