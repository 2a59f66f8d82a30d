"""Reading safetensors: the same tensors as the reference library, and every corruption named before use."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llmconvert.errors import CheckpointError
from llmconvert.storage.checkpoint import DTYPES, CheckpointView, SafetensorsCheckpoint, read_header
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME, is_weight_file
from llmconvert.storage.writer import write_side_files

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def make_model(directory: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return directory


def make_sharded(directory: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for shard, tensors in shards.items():
        save_file(tensors, directory / shard)
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text("{}")
    return directory


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@given(st.lists(st.tuples(st.sampled_from(sorted(DTYPES.values(), key=str)), SHAPES), max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_reads_what_the_reference_library_writes(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, tuple[int, ...]]]
) -> None:
    tensors = {f"t{i}": random_tensor(dtype, shape) for i, (dtype, shape) in enumerate(kinds)}
    with SafetensorsCheckpoint(make_model(tmp_path_factory.mktemp("m"), tensors)) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.nbytes == sum(tensor.nbytes for tensor in tensors.values())
        for name, tensor in tensors.items():
            assert same_bytes(checkpoint[name], tensor)
            if tensor.dim() and len(tensor) > 1:
                assert same_bytes(checkpoint.read_rows(name, 1, len(tensor)), tensor[1:])


def test_reads_any_byte_range(tmp_path: Path) -> None:
    tensor = torch.arange(24, dtype=torch.int32).reshape(2, 12)
    with SafetensorsCheckpoint(make_model(tmp_path, {"a": torch.ones(3), "t": tensor})) as checkpoint:
        buffer = bytearray(20)
        checkpoint.read_bytes("t", 28, memoryview(buffer))
        assert bytes(buffer) == tensor.numpy().tobytes()[28:48]


def test_a_view_is_the_identity_until_overridden(tmp_path: Path) -> None:
    base = SafetensorsCheckpoint(make_model(tmp_path, {"a": torch.arange(6.0).reshape(3, 2)}))
    with CheckpointView(base) as view:
        assert list(view) == ["a"]
        assert torch.equal(view.read_rows("a", 1, 2), torch.tensor([[2.0, 3.0]]))


def test_side_files_are_listed_without_weights_and_hidden_ones(tmp_path: Path) -> None:
    make_model(tmp_path, {"a": torch.ones(1)})
    for name in (
        "tokenizer.json",
        "README.md",
        "pytorch_model.bin",
        "model.gguf",
        ".gitattributes",
        "x.bin.index.json",
    ):
        (tmp_path / name).write_text("x")
    (tmp_path / "onnx").mkdir()
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.files) == ["README.md", "tokenizer.json"]
        assert checkpoint.read_file("README.md") == b"x"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("t")
    (tmp_path / "additional_chat_templates" / "notes.txt").write_text("n")
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert sorted(checkpoint.files) == ["README.md", "additional_chat_templates/tools.jinja", "tokenizer.json"]
        write_side_files(tmp_path / "copy", checkpoint.files)
    assert (tmp_path / "copy" / "additional_chat_templates" / "tools.jinja").read_text() == "t"
    assert is_weight_file("model-00001-of-00002.safetensors")
    assert is_weight_file(INDEX_NAME)
    assert not is_weight_file("tokenizer.json")


def test_links_lead_into_the_model_or_a_hubs_cache(tmp_path: Path) -> None:
    """Whatever else a link points to would be copied under a name of the model's, and published."""
    make_model(tmp_path / "model", {"a": torch.ones(1)})
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    for name in ("special_tokens_map.json", "additional_chat_templates"):
        link = tmp_path / "model" / name
        link.symlink_to(secret if name.endswith("json") else tmp_path)
        with pytest.raises(CheckpointError, match=f"{name}: is a link to .*, no part of the model"):
            SafetensorsCheckpoint(tmp_path / "model")
        link.unlink()
    (tmp_path / "model" / "LICENSE").write_text("l")
    (tmp_path / "model" / "LICENSE.md").symlink_to("LICENSE")
    blob = tmp_path / "models--org--name" / "blobs" / "abc"
    blob.parent.mkdir(parents=True)
    blob.write_text("{}")
    (tmp_path / "model" / "tokenizer.json").symlink_to(blob)
    (tmp_path / "latest").symlink_to("model")
    with SafetensorsCheckpoint(tmp_path / "latest") as checkpoint:
        assert sorted(checkpoint.files) == ["LICENSE", "LICENSE.md", "tokenizer.json"]
    blob.unlink()
    with pytest.raises(CheckpointError, match="which does not exist"):
        SafetensorsCheckpoint(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    moved = tmp_path / "elsewhere.safetensors"
    (tmp_path / "model" / "model.safetensors").rename(moved)
    (tmp_path / "model" / "model.safetensors").symlink_to(moved)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link"):
        SafetensorsCheckpoint(tmp_path / "model")


def test_code_goes_with_what_maps_it(tmp_path: Path) -> None:
    make_model(tmp_path, {"a": torch.ones(1)})
    (tmp_path / "modeling_x.py").write_text("")
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert "modeling_x.py" not in checkpoint.files
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["modeling_x.X", null]}}')
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert "modeling_x.py" in checkpoint.files


def test_a_repeated_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path, {"a.safetensors": {"w": torch.ones(1)}, "b.safetensors": {"w": torch.ones(1)}})
    index = {"weight_map": {"w": "a.safetensors", "v": "b.safetensors"}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"'w' is in a\.safetensors and in b\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


def test_weights_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    """transformers would read the one, vLLM the other; an index may name the one itself."""
    make_sharded(tmp_path, {SINGLE_NAME: {"w": torch.ones(1)}, "a.safetensors": {"w": torch.zeros(1)}})
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": "a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"weights twice, in model\.safetensors, .* names \(a\.safetensors, …\)"):
        SafetensorsCheckpoint(tmp_path)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": SINGLE_NAME}}))
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert torch.equal(checkpoint["w"], torch.ones(1))


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a\\b", "a\0b"])
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, shard: str) -> None:
    make_sharded(tmp_path / "model", {"a.safetensors": {"w": torch.ones(1)}})
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    (tmp_path / "model" / INDEX_NAME).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="outside the model's directory"):
        SafetensorsCheckpoint(tmp_path / "model")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_sharded(tmp_path, {"a.safetensors": {"w": torch.ones(1)}, "b.safetensors": {"v": torch.ones(1)}})
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 missing shard\(s\), first b\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "index", ["[]", "{}", "not json", '{"weight_map": 3}', '{"weight_map": {"w": 3}}', '{"weight_map": ["w"]}']
)
def test_a_broken_index_is_refused(tmp_path: Path, index: str) -> None:
    make_sharded(tmp_path, {"a.safetensors": {"w": torch.ones(1)}})
    (tmp_path / INDEX_NAME).write_text(index)
    with pytest.raises(CheckpointError, match="is not an index"):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    make_sharded(tmp_path, {"a.safetensors": {"w": torch.ones(1)}, "b.safetensors": {"v": torch.ones(1)}})
    weight_map = {"w": "b.safetensors", "v": "a.safetensors"}
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="does not hold it"):
        SafetensorsCheckpoint(tmp_path)


def raw_file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(begin: Any, end: Any, shape: list[Any], dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


ENTRY_0_4, ENTRY_4_8 = (json.dumps(entry(begin, begin + 4, [4])).encode() for begin in (0, 4))

CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "shorter than its prefix": (b"\x01\x02", "too short"),
    "header longer than the file": (struct.pack("<Q", 1 << 40) + b"{}", "header claims"),
    "header one byte too long": (struct.pack("<Q", 3) + b"{}", "header claims"),
    "not json": (raw_file(b"{nope}"), "header is not JSON"),
    "not utf-8": (raw_file(b"\xff\xfe\xfa"), "header is not JSON"),
    "not an object": (raw_file([1]), "expected an object"),
    "data cut off": (raw_file({"a": entry(0, 4, [4])}, b"123"), "the file has"),
    "bytes left over": (raw_file({"a": entry(0, 4, [4])}, b"12345"), "the file has"),
    "overlap": (raw_file({"a": entry(0, 4, [4]), "b": entry(2, 6, [4])}, b"123456"), "'b'.*expected to start at 4"),
    "gap": (raw_file({"a": entry(0, 2, [2]), "b": entry(4, 6, [2])}, b"123456"), "'b'.*expected to start at 2"),
    "two at one place": (raw_file({"a": entry(0, 4, [4]), "b": entry(0, 4, [4])}, b"1234"), "expected to start at 4"),
    "size against shape": (raw_file({"a": entry(0, 4, [5])}, b"1234"), "'a'.*5 bytes"),
    "negative offset": (raw_file({"a": entry(-4, 0, [4])}, b""), "malformed"),
    "unknown dtype": (raw_file({"a": entry(0, 4, [4], "U7")}, b"1234"), "dtype 'U7'"),
    "no dtype": (raw_file({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), "malformed"),
    "offsets of strings": (raw_file({"a": entry("a", "b", [4])}), "malformed"),
    "shape of strings": (
        raw_file({"a": {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 4]}}, b"1234"),
        "malformed",
    ),
    "shape of negatives": (raw_file({"a": entry(0, 4, [-2, -2])}, b"1234"), "malformed"),
    "offsets of floats": (
        raw_file({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4.0]}}, b"1234"),
        "malformed",
    ),
    "one name twice": (raw_file(b'{"a":%s,"a":%s}' % (ENTRY_0_4, ENTRY_4_8), b"12345678"), "expected to start at 0"),
    "entry no object": (raw_file({"a": 3}), "malformed"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_file_is_refused_when_opened(tmp_path: Path, case: str) -> None:
    content, message = CORRUPT[case]
    make_model(tmp_path, {"a": torch.ones(1)})
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsCheckpoint(tmp_path)
    assert SINGLE_NAME in str(caught.value)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_header_never_reads_outside_the_file(tmp_path: Path, data: st.DataObject) -> None:
    good = raw_file({"a": entry(0, 4, [2, 2]), "b": entry(4, 12, [2], "F32")}, bytes(12))
    at = data.draw(st.integers(0, len(good) - 13))
    bad = good[:at] + bytes([data.draw(st.integers(0, 255))]) + good[at + 1 :]
    path = tmp_path / SINGLE_NAME
    path.write_bytes(bad)
    try:
        infos, offsets, _ = read_header(path)
    except CheckpointError:
        return
    for name, info in infos.items():
        assert 8 <= offsets[name] <= offsets[name] + info.nbytes <= len(bad)


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    with SafetensorsCheckpoint(make_model(tmp_path, {"a": torch.ones(1000)})) as checkpoint:
        with (tmp_path / SINGLE_NAME).open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(CheckpointError, match="the file ended inside a"):
            checkpoint["a"]


def remove_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def break_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def list_config(directory: Path) -> None:
    (directory / "config.json").write_text("[]")


def only_pickle(directory: Path) -> None:
    (directory / SINGLE_NAME).rename(directory / "pytorch_model.bin")


def no_weights(directory: Path) -> None:
    (directory / SINGLE_NAME).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_config, "no config.json"),
        (break_config, "cannot be read"),
        (list_config, "expected an object"),
        (only_pickle, "--allow-pickle"),
        (no_weights, "has neither model.safetensors nor"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(make_model(tmp_path, {"a": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsCheckpoint(tmp_path)


def test_tensors_are_read_ahead(tmp_path: Path) -> None:
    """Dropped from the system's cache, they come back without anybody reading them."""
    save_file({"a": torch.zeros(1 << 20), "b": torch.ones(1 << 20), "empty": torch.empty(0)}, tmp_path / SINGLE_NAME)
    (tmp_path / "config.json").write_text("{}")
    with SafetensorsCheckpoint(tmp_path) as checkpoint, (tmp_path / SINGLE_NAME).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        middle = (tmp_path / SINGLE_NAME).stat().st_size - (1 << 21)

        def cached() -> bool:
            try:
                return os.preadv(file.fileno(), [bytearray(4096)], middle, os.RWF_NOWAIT) == 4096
            except BlockingIOError:
                return False

        if cached():
            pytest.skip("this file system keeps everything in memory")
        CheckpointView(checkpoint).prefetch(["b", "empty", "not there"])
        deadline = time.monotonic() + 20
        while not cached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
