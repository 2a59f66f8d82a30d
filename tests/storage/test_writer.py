"""Writing safetensors: files the reference library reads, whole or not at all, also on a full disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmconvert.errors import CapacityError, OutputError
from llmconvert.storage.checkpoint import DTYPES, SafetensorsCheckpoint, TensorSpec
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME
from llmconvert.storage.writer import (
    TensorWriter,
    check_output_directory,
    json_bytes,
    plan_layout,
    publish_directory,
    staging_directory,
    write_file,
    write_json,
    write_side_files,
)

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KINDS = st.lists(st.tuples(st.sampled_from(sorted(DTYPES.values(), key=str)), SHAPES), max_size=8)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    size = torch.empty(shape, dtype=dtype).nbytes
    return torch.randint(0, 256, (size,), dtype=torch.uint8).view(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@given(KINDS, st.integers(1, 200), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_reference_library_reads_what_is_written(
    tmp_path_factory: pytest.TempPathFactory,
    kinds: list[tuple[torch.dtype, tuple[int, ...]]],
    shard_bytes: int,
    random: object,
) -> None:
    directory = tmp_path_factory.mktemp("out")
    tensors = {f"t{i}": random_tensor(dtype, shape) for i, (dtype, shape) in enumerate(kinds)}
    layout = plan_layout((TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in tensors.items()), shard_bytes)
    order = sorted(tensors)
    random.shuffle(order)  # type: ignore[attr-defined]
    with TensorWriter(directory, layout) as writer:
        for name in order:
            writer.write(name, tensors[name])
        writer.sync()
    loaded: dict[str, torch.Tensor] = {}
    for shard in layout.shards:
        assert (directory / shard.name).stat().st_size == shard.nbytes
        loaded |= load_file(directory / shard.name)
    assert {n: (t.dtype, t.shape, raw(t)) for n, t in loaded.items()} == {
        n: (t.dtype, t.shape, raw(t)) for n, t in tensors.items()
    }
    # And back through our own reader, index included.
    write_json(directory / "config.json", {})
    with SafetensorsCheckpoint(directory) as checkpoint:
        assert {n: raw(checkpoint[n]) for n in checkpoint} == {n: raw(t) for n, t in tensors.items()}
    if len(layout.shards) > 1:
        index = json.loads((directory / INDEX_NAME).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert set(index["weight_map"]) == set(tensors)
        assert (directory / INDEX_NAME).read_bytes() == json_bytes(index)


def test_transformers_reads_shards_and_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    layout = plan_layout((TensorSpec(n, t.dtype, tuple(t.shape)) for n, t in state.items()), max_shard_bytes=20_000)
    assert len(layout.shards) > 2
    with TensorWriter(tmp_path, layout) as writer:
        for name, tensor in state.items():
            writer.write(name, tensor)
    write_json(tmp_path / "config.json", {**config.to_dict(), "architectures": ["LlamaForCausalLM"]})
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_a_tensor_larger_than_a_shard_gets_its_own() -> None:
    specs = [TensorSpec(name, torch.float32, (size,)) for name, size in (("a", 1), ("b", 100), ("c", 1), ("d", 1))]
    layout = plan_layout(specs, max_shard_bytes=40)
    assert [sorted(shard.offsets) for shard in layout.shards] == [["a"], ["b"], ["c", "d"]]
    assert layout.shards[0].name == "model-00001-of-00003.safetensors"


def test_no_tensors_at_all_still_make_a_readable_file(tmp_path: Path) -> None:
    TensorWriter(tmp_path, plan_layout([])).close()
    assert load_file(tmp_path / SINGLE_NAME) == {}


def test_two_specs_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' is laid out twice"):
        plan_layout([TensorSpec("a", torch.int8, (1,)), TensorSpec("a", torch.int8, (2,))])


def test_what_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    with TensorWriter(tmp_path, plan_layout([TensorSpec("a", torch.float32, (4, 2))])) as writer:
        with pytest.raises(ValueError, match="shape"):
            writer.write("a", torch.ones(2, 4))
        with pytest.raises(ValueError, match=r"torch\.float16"):
            writer.write_rows("a", 0, torch.ones(4, 2, dtype=torch.float16))
        with pytest.raises(ValueError, match="do not lie within"):
            writer.write_rows("a", 3, torch.ones(2, 2))
        with pytest.raises(ValueError, match="do not lie within"):
            writer.write_bytes("a", -1, memoryview(b"12"))
        with pytest.raises(KeyError):
            writer.write("b", torch.ones(1))


def test_opening_again_keeps_what_was_written(tmp_path: Path) -> None:
    layout = plan_layout([TensorSpec("a", torch.float32, (3, 2)), TensorSpec("b", torch.int32, (5,))], 24)
    with TensorWriter(tmp_path, layout) as writer:
        writer.write_rows("a", 1, torch.full((2, 2), 7.0))
        writer.write("b", torch.arange(5, dtype=torch.int32))
    with TensorWriter(tmp_path, layout) as writer:
        writer.write_rows("a", 0, torch.full((1, 2), 3.0))
    write_json(tmp_path / "config.json", {})
    with SafetensorsCheckpoint(tmp_path) as checkpoint:
        assert checkpoint["a"].tolist() == [[3, 3], [7, 7], [7, 7]]
        assert checkpoint["b"].tolist() == [0, 1, 2, 3, 4]


def test_strided_tensors_are_written_in_order(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    with TensorWriter(tmp_path, plan_layout([TensorSpec("t", torch.float32, (4, 3))])) as writer:
        writer.write("t", tensor.T)
        writer.drop_cache("t", 0, 48)
    assert torch.equal(load_file(tmp_path / SINGLE_NAME)["t"], tensor.T)


FULL = """
import resource, sys
from pathlib import Path
import torch
from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.errors import CapacityError
from llmconvert.storage.writer import TensorWriter, plan_layout, write_file
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
for attempt in (
    lambda: TensorWriter(Path(sys.argv[1]), plan_layout([TensorSpec("a", torch.int8, (2 << 20,))])),
    lambda: write_file(Path(sys.argv[1]) / "big", bytes(2 << 20)),
):
    try:
        attempt()
    except CapacityError as error:
        print(error)
"""


def test_a_file_size_limit_counts_as_no_space(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, tmp_path], check=True, capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert f"{SINGLE_NAME}: no space for 2,097," in first
    assert "big: no space for 2,097,152 bytes" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == [SINGLE_NAME]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB of its own."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    yield mount_point
    subprocess.run(["umount", str(mount_point)], check=True)


def test_a_full_disk_is_noticed_before_any_tensor_is_written(small_disk: Path) -> None:
    layout = plan_layout([TensorSpec(name, torch.int8, (3 << 20,)) for name in "ab"], max_shard_bytes=3 << 20)
    with pytest.raises(CapacityError, match=r"model-00002-of-00002\.safetensors: no space for .* bytes are free"):
        TensorWriter(small_disk, layout)
    with pytest.raises(CapacityError, match=r"tokenizer\.json"):
        write_side_files(small_disk, {"tokenizer.json": bytes(5 << 20)})
    assert not list(small_disk.glob("*tokenizer*"))


def test_a_missing_directory_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be created"):
        TensorWriter(tmp_path / "nowhere", plan_layout([]))


def test_side_files_come_from_paths_or_bytes(tmp_path: Path) -> None:
    (tmp_path / "source.txt").write_bytes(b"12345")
    out = tmp_path / "out"
    out.mkdir()
    assert write_side_files(out, {"a.txt": tmp_path / "source.txt", "b.txt": b"xy"}) == 7
    assert (out / "a.txt").read_bytes() == b"12345"
    assert (out / "b.txt").read_bytes() == b"xy"


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"ä": 1})
    write_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_output_directory_must_be_new_or_empty(tmp_path: Path) -> None:
    check_output_directory(tmp_path / "new" / "deep")
    check_output_directory(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="exists and is not empty"):
        check_output_directory(tmp_path)
    with pytest.raises(OutputError, match="is no directory"):
        check_output_directory(tmp_path / "file")
    with pytest.raises(OutputError, match="not a writable directory"):
        check_output_directory(tmp_path / "file" / "below")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="is no directory"):
        check_output_directory(tmp_path / "dangling")


def test_an_output_with_backslashes_is_answered_with_the_path_that_is_meant(tmp_path: Path) -> None:
    for output in (tmp_path / r"out\w4", tmp_path / r"out\w4" / "deep"):
        with pytest.raises(OutputError, match=r"has a backslash; folders are divided by slashes here: .*/out/w4"):
            check_output_directory(output)
    (tmp_path / r"so\called").mkdir()
    check_output_directory(tmp_path / r"so\called" / "new")


def test_an_output_directory_appears_whole(tmp_path: Path) -> None:
    output = tmp_path / "a" / "out"
    staging = staging_directory(output)
    (staging / "x").write_text("1")
    assert not output.exists()
    publish_directory(staging, output)
    assert [p.name for p in output.iterdir()] == ["x"]
    assert [p.name for p in output.parent.iterdir()] == ["out"]


def test_a_filled_output_directory_is_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "out"
    staging = staging_directory(output)
    output.mkdir()
    (output / "mine").write_text("1")
    with pytest.raises(OutputError, match="the result is in"):
        publish_directory(staging, output)
    assert (output / "mine").exists()
