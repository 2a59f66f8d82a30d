"""GGUF files in several parts, what they say of the model, and importance matrices in llama.cpp's files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from support.gguf_models import IDS, built, next_token
from support.importance import collect_importance
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import tiny_model
from support.tiny_models import tiny_tokenizer

from llmconvert.errors import CheckpointError, OutputError
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.gguf.ggml.blocks import load_codec
from llmconvert.gguf.records.importance import ImportanceMatrix, read_importance, write_importance
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import parse_scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

WINDOWS = [torch.randint(3, 320, (1, 48), generator=torch.Generator().manual_seed(i)) for i in range(3)]
CARD = """---
license: other
license_name: tiny
language: [en, de, no]
tags: [small]
base_model: org/Tiny-Base
datasets: [org/words]
---
Text.
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama").save_pretrained(directory)
    tiny_tokenizer(320).save_pretrained(directory)
    (directory / "README.md").write_text(CARD)
    return directory


def made(
    model: Path, output: Path, method: str = "rtn", windows: Sequence[torch.Tensor] = (), **more: Any
) -> QuantizeResult:
    request = QuantizeRequest(method, parse_scheme("q4_0"), "gguf", name="tiny", **more)
    with SafetensorsCheckpoint(model) as source:
        return plan_quantize(source, output, request, windows=windows).run()


def test_a_split_model_is_the_whole_one_for_us_and_for_llama_cpp(model: Path, tmp_path: Path) -> None:
    whole = made(model, tmp_path / "tiny.gguf")
    split = made(model, tmp_path / "parts", split_nbytes=20_000)
    count = len(split.files)
    assert count > 2 and split.files == tuple(f"tiny-Q4_0-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1))
    for number, name in enumerate(split.files):
        reader = gguf.GGUFReader(tmp_path / "parts" / name)
        fields = {key: reader.fields[key] for key in ("split.no", "split.count", "split.tensors.count")}
        assert [fields[key].contents() for key in fields] == [number, count, 21]
        kinds = [gguf.GGUFValueType.UINT16, gguf.GGUFValueType.UINT16, gguf.GGUFValueType.INT32]
        assert [fields[key].types[0] for key in fields] == kinds
        assert ("general.architecture" in reader.fields) == (number == 0)
    first = tmp_path / "parts" / split.files[0]
    with open_gguf(first) as found, open_gguf(whole.output) as expected:
        assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
        ours = next_token(built(found))
    assert (LlamaCpp(first).log_probabilities(IDS[0].tolist(), 320) - ours).square().mean().sqrt() < 0.1
    with pytest.raises(OutputError, match=r"split into \d files of 20,000 bytes; name a directory for them"):
        made(model, tmp_path / "one.gguf", split_nbytes=20_000)


def test_files_say_what_the_models_card_says(model: Path, tmp_path: Path) -> None:
    made(model, tmp_path / "tiny.gguf", "imatrix", WINDOWS, text="words.txt")
    fields = gguf.GGUFReader(tmp_path / "tiny.gguf").fields
    found = {key: field.contents() for key, field in fields.items() if key.startswith(("general.", "quantize."))}
    numbers = sum(parameter.numel() for parameter in tiny_model("llama").parameters())
    assert found.pop("general.size_label") == gguf.size_label(numbers, numbers, 0, 0)
    assert {
        key: found[key] for key in found if key.split(".")[1] not in ("architecture", "type", "name", "file_type")
    } == {
        "general.license": "other",
        "general.license.name": "tiny",
        "general.tags": ["small"],
        "general.languages": ["en", "de", "no"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Tiny Base",
        "general.base_model.0.organization": "org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Tiny-Base",
        "general.dataset.count": 1,
        "general.dataset.0.name": "words",
        "general.dataset.0.organization": "org",
        "general.dataset.0.repo_url": "https://huggingface.co/datasets/org/words",
        "general.quantization_version": 2,
        "quantize.imatrix.dataset": "words.txt",
        "quantize.imatrix.entries_count": 16,
        "quantize.imatrix.chunks_count": 3,
    }


@pytest.mark.parametrize("suffix", [".dat", ".gguf"])
def test_an_importance_matrix_takes_the_place_of_text(suffix: str, model: Path, tmp_path: Path) -> None:
    """Written and read again, and the blocks encoded under what was read."""
    with SafetensorsCheckpoint(model) as source:
        importance = collect_importance(source, WINDOWS)
        names = {name: place.spec.name for name, place in _planned(model, tmp_path).items()}
    squares = {names[name]: values.numpy() for name, values in importance.items()}
    tokens = {name: np.array([144], np.float32) for name in squares}
    file = tmp_path / f"imatrix{suffix}"
    write_importance(file, ImportanceMatrix(squares, tokens, ("words.txt",), 3, 48))
    back = read_importance(file)
    assert back.datasets == ("words.txt",) and back.chunks == 3
    for name, values in squares.items():
        np.testing.assert_allclose(back.squares[name], values, rtol=1e-6)
    made(model, tmp_path / "read.gguf", "imatrix", options={"file": str(file)})
    reader = gguf.GGUFReader(tmp_path / "read.gguf")
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    state, codec = tiny_model("llama").state_dict(), load_codec("Q4_0")
    for part, own in (("attn_v", "self_attn.v_proj"), ("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
        name, weight = f"blk.1.{part}.weight", state[f"model.layers.1.{own}.weight"].numpy()
        assert np.array_equal(stored[name], codec.encode(weight, back.squares[name])), name
        assert not np.array_equal(stored[name], codec.encode(weight, np.ones(weight.shape[1], np.float32))), name
    assert reader.fields["quantize.imatrix.file"].contents() == file.name
    assert reader.fields["quantize.imatrix.dataset"].contents() == "words.txt"
    assert reader.fields["quantize.imatrix.entries_count"].contents() == 14


def _planned(model: Path, tmp_path: Path) -> Any:
    from llmconvert.gguf.file import plan_file
    from llmconvert.gguf.ggml.mix import GgmlMix

    with SafetensorsCheckpoint(model) as source:
        parts = plan_file(source, "x.gguf", "tiny", GgmlMix.parse("q4_0"), importance=True).parts
        return {name: places[0][0] for name, places in parts.items()}


def test_llama_cpps_own_layouts_are_read(tmp_path: Path) -> None:
    sums = np.array([2, 4, 8], np.float32)
    entry = struct.pack("<i", 18) + b"blk.0.attn_q.weigh" + struct.pack("<ii", 2, 3) + sums.tobytes()
    (tmp_path / "old.dat").write_bytes(struct.pack("<i", 1) + entry + struct.pack("<ii", 2, 4) + b"text")
    found = read_importance(tmp_path / "old.dat")
    assert found.squares["blk.0.attn_q.weigh"].tolist() == [1, 2, 4] and found.datasets == ("text",)
    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a", "b"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor("blk.0.ffn_up_exps.weight.in_sum2", np.array([[2, 4], [9, 3]], np.float32))
    writer.add_tensor("blk.0.ffn_up_exps.weight.counts", np.array([[2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_importance(tmp_path / "new.gguf")
    assert found.squares["blk.0.ffn_up_exps.weight"].tolist() == [[1, 2], [1, 1]]  # nothing reached the second
    assert (found.datasets, found.chunks, found.chunk_tokens) == (("a", "b"), 2, 512)


def test_files_that_are_no_importance_matrix_of_the_model_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.dat").write_bytes(struct.pack("<ii", 3, 9) + b"blk")
    with pytest.raises(CheckpointError, match=r"no importance matrix of llama.cpp, or cut off at byte 8"):
        read_importance(tmp_path / "cut.dat")
    made(model, tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=r"general.type is 'model', expected 'imatrix'"):
        read_importance(tmp_path / "model.gguf")
    file, one = tmp_path / "other.dat", np.array([3], np.float32)
    write_importance(
        file, ImportanceMatrix({"blk.0.attn_q.weight": np.ones(64, np.float32)}, {"blk.0.attn_q.weight": one})
    )
    with pytest.raises(CheckpointError, match=r"has no importance of blk.0.attn_\w.weight; it is of another model"):
        made(model, tmp_path / "tiny.gguf", "imatrix", options={"file": str(file)})
    write_importance(
        file, ImportanceMatrix({"blk.0.attn_q.weight": -np.ones(64, np.float32)}, {"blk.0.attn_q.weight": one})
    )
    with pytest.raises(CheckpointError, match=r"importance of blk.0.attn_q.weight is negative or not finite"):
        made(model, tmp_path / "tiny.gguf", "imatrix", options={"file": str(file)})
    assert not (tmp_path / "tiny.gguf").exists()
