"""Dtype conversion that fails, is interrupted or has little room: constant memory, and the same call continues."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.bare_models import RowsOnly, make_model, make_sparse

from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import CapacityError, CheckpointError
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint


class Failing(RowsOnly):
    """Fails on the second tensor, after the first has been written."""

    def __init__(self, base: Checkpoint, error: BaseException) -> None:
        super().__init__(base)
        self._error = error

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name == "b":
            raise self._error
        return super().read_rows(name, start, stop)


def test_a_damaged_source_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", {"a": torch.ones(100), "b": torch.ones(100)})
    with SafetensorsCheckpoint(source) as checkpoint, pytest.raises(CheckpointError, match="gone"):
        convert_dtype(Failing(checkpoint, CheckpointError("gone")), tmp_path / "out", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Remembering(RowsOnly):
    """Remembers which tensors were read."""

    def __init__(self, base: Checkpoint) -> None:
        super().__init__(base)
        self.read: set[str] = set()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        self.read.add(name)
        return super().read_rows(name, start, stop)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_interrupted_call_goes_on_where_it_was(tmp_path: Path, error: BaseException) -> None:
    source = make_model(tmp_path / "in", {"a": torch.rand(100), "b": torch.rand(100)})
    with SafetensorsCheckpoint(source) as checkpoint:
        whole = convert_dtype(RowsOnly(checkpoint), tmp_path / "whole", dtype=torch.float16)
        with pytest.raises(type(error)):
            convert_dtype(Failing(checkpoint, error), tmp_path / "out", dtype=torch.float16)
        again = Remembering(checkpoint)
        report = convert_dtype(again, tmp_path / "out", dtype=torch.float16)
    assert again.read == {"b"}
    assert report.model_copy(update={"seconds": whole.seconds}) == whole, "what the first call found is kept"
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert files[0] == files[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_another_source_starts_anew(tmp_path: Path) -> None:
    """Tensors look alike; the files tell."""
    for name in ("one", "two"):
        make_model(tmp_path / name, {"a": torch.rand(100), "b": torch.rand(100)})
    with SafetensorsCheckpoint(tmp_path / "one") as checkpoint, pytest.raises(KeyboardInterrupt):
        convert_dtype(Failing(checkpoint, KeyboardInterrupt()), tmp_path / "out", dtype=torch.float16)
    with SafetensorsCheckpoint(tmp_path / "two") as checkpoint:
        again = Remembering(checkpoint)
        convert_dtype(again, tmp_path / "out", dtype=torch.float16)
    assert again.read == {"a", "b"}


def test_what_a_killed_run_left_is_cleared(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", {"w": torch.ones(100)})
    leftover = tmp_path / ".out.partial"
    (leftover / "sub").mkdir(parents=True)
    (leftover / "model-00001-of-00002.safetensors").write_bytes(b"x")
    with SafetensorsCheckpoint(source) as checkpoint:
        convert_dtype(checkpoint, tmp_path / "out", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    assert not (tmp_path / "out" / "sub").exists()


INTERRUPTED = """
import signal, sys
from pathlib import Path
import torch
from llmconvert.storage.checkpoint import CheckpointView, SafetensorsCheckpoint
from llmconvert.convert.dtype import convert_dtype

class Slow(CheckpointView):
    def read_rows(self, name, start, stop):
        print("reading", flush=True)
        import time; time.sleep(0.2)
        return super().read_rows(name, start, stop)

# A process started under nohup, or in the background of a script, inherits that SIGINT is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
convert_dtype(Slow(SafetensorsCheckpoint(sys.argv[1])), Path(sys.argv[2]), dtype=torch.float16)
"""


def test_an_interrupt_ends_it_soon_and_the_same_call_goes_on(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", {f"t{i}": torch.ones(10) for i in range(100)})
    command = [sys.executable, "-c", INTERRUPTED, str(source), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert (tmp_path / ".out.partial").is_dir()
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors
    assert time.monotonic() - begin < 10
    assert not (tmp_path / "out").exists()
    with SafetensorsCheckpoint(source) as checkpoint:
        convert_dtype(checkpoint, tmp_path / "out", dtype=torch.float16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@contextmanager
def small_disk(mount_point: Path) -> Iterator[None]:
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(mount_point)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system takes root")
    try:
        yield
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", {f"t{i}": torch.ones(1 << 18) for i in range(6)})
    disk = tmp_path / "disk"
    with small_disk(disk):
        with SafetensorsCheckpoint(source) as checkpoint, pytest.raises(CapacityError, match="no space for"):
            convert_dtype(checkpoint, disk / "out", dtype=torch.float32, max_shard_bytes=1 << 20)
        assert list(disk.iterdir()) == []


MEASURE = """
import json, sys
from pathlib import Path
import torch

def peak():
    return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))

idle = peak()
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.convert.dtype import convert_dtype
with SafetensorsCheckpoint(sys.argv[1]) as source:
    convert_dtype(source, Path(sys.argv[2]), dtype=getattr(torch, sys.argv[3]))
print(json.dumps({"above_idle": (peak() - idle) * 1024}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "width", "target"), [("F32", 4, "bfloat16"), ("BF16", 2, "float32")])
def test_memory_does_not_grow_with_the_model_or_its_largest_tensor(
    tmp_path: Path, dtype: str, width: int, target: str
) -> None:
    # An embedding of 800 MB, and stacked experts whose single row is 400 MB: far beyond what may be held.
    rows = 400_000_000 // width // 1000
    make_sparse(tmp_path / "in", {"embed": (2 * rows, 1000), "experts": (2, rows, 1000)}, dtype, width)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "in"), str(tmp_path / "out"), target]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert json.loads(done.stdout)["above_idle"] < 300e6
