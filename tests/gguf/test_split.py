"""Models over several GGUF files, as the gguf package and llama-gguf-split write them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.gguf_models import IDS, built, next_token
from support.llama_cpp import LlamaCpp
from support.tiny_gguf import byte_level_metadata, model_metadata, stored_tensors, tiny_model, write_gguf

from llmconvert.cli import main
from llmconvert.convert.source import open_source, source_fingerprint
from llmconvert.errors import CheckpointError
from llmconvert.gguf.checkpoint import open_artifact, open_gguf
from llmconvert.gguf.split import gguf_models, part_paths, without_part
from llmconvert.recipes.stages.artifact import model_stem
from llmconvert.validate.size import measure_sizes


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """The first of a tiny model's files."""
    model = tiny_model("llama")
    metadata = model_metadata(model) | byte_level_metadata()
    write_gguf(tmp_path / "parts" / "tiny.gguf", metadata, stored_tensors(model), split_max_tensors=6)
    return tmp_path / "parts" / "tiny-00001-of-00004.gguf"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()


def test_all_parts_are_one_model_whichever_is_named(first: Path) -> None:
    state = tiny_model("llama").state_dict()
    parts = part_paths(first)
    assert sorted(path.name for path in first.parent.iterdir()) == [path.name for path in parts]
    for path in (first, parts[3], first.parent):
        with open_artifact(path) as checkpoint:
            assert set(checkpoint) == set(state)
            assert {checkpoint.infos[name].shard for name in checkpoint} == {part.name for part in parts}
            for name in checkpoint:
                assert torch.equal(checkpoint[name], state[name]), name
    with open_gguf(parts[1]) as checkpoint:
        predicted = LlamaCpp(first).log_probabilities(IDS[0].tolist(), 320)
        assert (next_token(built(checkpoint)) - predicted).abs().max() < 0.02
    assert measure_sizes(first).weights == sum(part.stat().st_size for part in parts)
    assert gguf_models(first.parent) == [first]


def test_it_converts_and_each_part_counts_for_the_models_identity(first: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["convert", str(first.parent), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "model.safetensors").exists()
    with open_source(str(first)).checkpoint as before:
        identity, print_before = before.identity, source_fingerprint(open_source(str(first)))
    last = part_paths(first)[-1]
    raw = last.read_bytes()
    last.write_bytes(raw)
    with open_source(str(first)).checkpoint as after:
        assert after.identity != identity and source_fingerprint(open_source(str(first))) != print_before


def test_parts_that_do_not_belong_together(first: Path) -> None:
    parts = part_paths(first)
    moved = parts[2].rename(parts[2].with_suffix(".kept"))
    with pytest.raises(
        CheckpointError, match=r"1 of the model's 4 parts are not there, first tiny-00003-of-00004.gguf"
    ):
        open_gguf(first)
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(
        CheckpointError, match=r"tiny-00003-of-00004.gguf: says that it is part 2 of 4, expected 3 of 4"
    ):
        open_gguf(first)
    moved.rename(parts[2])
    alone = first.rename(first.with_name("model.gguf"))
    with pytest.raises(CheckpointError, match=r"one of 4 parts .* expected one like model-00001-of-00004.gguf"):
        open_gguf(alone)


@pytest.mark.parametrize(("key", "message"), [("split.tensors.count", "counts 22 tensors in all parts, there are 21")])
def test_counts_are_checked(key: str, message: str, first: Path) -> None:
    raw = bytearray(first.read_bytes())
    at = raw.index(key.encode()) + len(key) + 4
    raw[at : at + 4] = struct.pack("<i", 22)
    first.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        open_gguf(first)


def test_names() -> None:
    assert without_part("m-Q4_0-00002-of-00003.gguf") == "m-Q4_0" and without_part("m.gguf") == "m"
    assert model_stem("dir/m-Q4_0-00002-of-00003.gguf") == "m"
    for name in ("m.gguf", "m-00000-of-00003.gguf", "m-00004-of-00003.gguf", "m-1-of-3.gguf"):
        assert part_paths(Path(name)) == (Path(name),)
