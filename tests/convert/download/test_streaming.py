"""Converting a model while it downloads: the same bytes as fetching it first, in the disk space of two shards."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.disk_use import DiskUse
from support.hub_server import Fault, HubServer
from support.tiny_models import tiny_llama_dir

from llmconvert.cli import main
from llmconvert.convert.cast import CastView
from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.catalog.methods import METHODS, needs_calibration
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

_CODE = """
import json, random, sys
from pathlib import Path
import torch
from llmconvert.storage import remote
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.convert.download.jobs import stream_convert, stream_quantize
from llmconvert.errors import LlmconvertError
from llmconvert.progress import console_progress
from llmconvert.quantize.scheme import Scheme
torch.set_num_threads(1)

def stream_read(model_id, local, progress, ahead, dtype):
    # Tensors in rows and whole, as the Hub gives them and as they are.
    remote._AHEAD_BYTES = ahead
    draw, pieces, wrong = random.Random(0), 0, []
    with SafetensorsCheckpoint(local) as ours, remote.RemoteCheckpoint(model_id) as theirs:
        assert list(ours.infos.values()) == list(theirs.infos.values())
        for name, info in ours.infos.items():
            rows, start = info.shape[0], 0
            while start < rows:
                stop = min(rows, start + draw.randint(1, rows))
                expected, found = ours.read_rows(name, start, stop), theirs.read_rows(name, start, stop)
                if found.shape != expected.shape or found.dtype != expected.dtype or not torch.equal(found, expected):
                    wrong.append(name)
                pieces, start = pieces + 1, stop
            if not torch.equal(theirs[name], ours[name]):
                wrong.append(name)
    return {"pieces": pieces, "wrong": wrong}

print("ready", flush=True)
for line in sys.stdin:
    kind, output, settings = json.loads(line)
    settings["dtype"] = getattr(torch, settings.get("dtype", "bfloat16"))
    if "scheme" in settings:
        settings["scheme"] = Scheme.parse(settings["scheme"])
    try:
        report = {"convert": stream_convert, "quantize": stream_quantize, "read": stream_read}[kind](
            "org/model", Path(output), progress=console_progress(), **settings
        )
        answer = report if isinstance(report, dict) else report.model_dump(mode="json")
    except LlmconvertError as error:
        answer = {"error": type(error).__name__, "code": error.exit_code, "text": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Streamer:
    """Streams ``org/model`` in a process of its own."""

    def __init__(self, url: str, home: Path) -> None:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            env={**environment, "HF_ENDPOINT": url, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"},
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"

    def send(self, kind: str, output: Path, **settings: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kind, str(output), settings]) + "\n")
        self.process.stdin.flush()

    def __call__(self, kind: str, output: Path, **settings: Any) -> dict[str, Any]:
        self.send(kind, output, **settings)
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4 MB in 9 shards."""
    directory = tmp_path_factory.mktemp("model") / "llama"
    return tiny_llama_dir(
        directory, hidden_size=128, intermediate_size=512, num_hidden_layers=4, max_shard_size="600KB"
    )


@pytest.fixture(scope="module")
def running_hub() -> Iterator[HubServer]:
    with HubServer().running() as server:
        yield server


@pytest.fixture
def hub(running_hub: HubServer, model: Path) -> HubServer:
    running_hub.reset()
    running_hub.add_repo("org/model", {path.name: path.read_bytes() for path in model.iterdir()})
    return running_hub


@pytest.fixture(scope="module")
def streamer(running_hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Streamer]:
    started = Streamer(running_hub.url, tmp_path_factory.mktemp("home"))
    yield started
    started.close()


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def shard_sizes(model: Path) -> list[int]:
    return sorted(path.stat().st_size for path in model.glob("*.safetensors"))


def expected_cast(model: Path, output: Path) -> dict[str, bytes]:
    with SafetensorsCheckpoint(model) as checkpoint:
        convert_dtype(checkpoint, output, dtype=torch.bfloat16)
    return content(output)


def test_conversion_gives_the_same_bytes_as_fetching_first(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path
) -> None:
    report = streamer("convert", tmp_path / "out")
    assert content(tmp_path / "out") == expected_cast(model, tmp_path / "expected")
    with SafetensorsCheckpoint(model) as checkpoint:
        whole = convert_dtype(checkpoint, tmp_path / "again", dtype=torch.bfloat16)
    for key in ("tensors", "cast", "bytes_read", "bytes_written", "largest_relative_error", "largest_error_tensor"):
        assert report[key] == getattr(whole, key), key
    assert sorted(os.listdir(tmp_path)) == ["again", "expected", "out"]
    assert hub.count("GET .*safetensors$") == len(shard_sizes(model)), "each shard came once"


@pytest.mark.parametrize("method", [name for name in METHODS if not needs_calibration(name)])
@pytest.mark.parametrize(
    ("scheme", "layout_format"),
    [
        ("w4a16-g32", "compressed-tensors"),
        ("w8a8", "compressed-tensors"),
        ("fp8", "compressed-tensors"),
        ("nvfp4a16", "compressed-tensors"),
        ("w4a16-g32", "gptq"),
        ("w4a16-g32-asym", "awq"),
    ],
)
def test_rounding_gives_the_same_bytes_as_fetching_first(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path, method: str, scheme: str, layout_format: str
) -> None:
    settings: dict[str, Any] = {"method": method, "format": layout_format}
    with SafetensorsCheckpoint(model) as checkpoint:
        cast = CastView(checkpoint, torch.bfloat16)
        try:
            result = quantize_checkpoint(cast, tmp_path / "expected", scheme=Scheme.parse(scheme), **settings)
        except UnsupportedError as refusal:
            refused = streamer("quantize", tmp_path / "out", scheme=scheme, **settings)
            assert refused["text"] == str(refusal)
            return
    answer = streamer("quantize", tmp_path / "out", scheme=scheme, **settings)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert (answer["layers"], answer["bytes"]) == (len(result.layers), result.nbytes)


def test_a_scale_in_common_wants_its_linears_in_one_shard(hub: HubServer, streamer: Streamer, tmp_path: Path) -> None:
    """NVFP4's float32 scale is one for linears that runtimes fuse: all of them have to be there when one is rounded."""
    apart = tiny_llama_dir(tmp_path / "apart", hidden_size=128, intermediate_size=512, max_shard_size="300KB")
    hub.reset()
    hub.add_repo("org/model", {path.name: path.read_bytes() for path in apart.iterdir()})
    answer = streamer("quantize", tmp_path / "out", method="rtn", scheme="nvfp4a16")
    assert answer["error"] == "UsageError"
    assert "gate_proj, model.layers.0.mlp.up_proj have a float32 scale in common" in answer["text"]


@pytest.mark.parametrize("ahead", [1, 20_000, 1 << 26])
def test_tensors_can_be_read_where_they_lie(hub: HubServer, streamer: Streamer, model: Path, ahead: int) -> None:
    """One request per range asked for, or fewer with reading ahead; what breaks off is taken up again."""
    tensors = sum(1 for _ in SafetensorsCheckpoint(model))
    ranges = r"GET .*safetensors bytes=[1-9]\d*-\d*$"
    hub.faults.append(Fault(ranges, 503, times=1))
    hub.faults.append(Fault(ranges, drop_after=5000, times=2))
    answer = streamer("read", model, ahead=ahead)
    assert answer["wrong"] == []
    assert answer["pieces"] > 2 * tensors
    requests = hub.count(ranges)
    if ahead == 1:
        assert requests >= answer["pieces"] + tensors
    elif ahead == 1 << 26:
        assert requests <= tensors + 10, "the whole tensor came with its first rows"


@pytest.mark.parametrize("kind", ["convert", "quantize"])
def test_disk_need_is_the_output_and_two_shards(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"method": "rtn", "scheme": "w4a16-g32"} if kind == "quantize" else {}
    with DiskUse(tmp_path) as disk:
        # Every look at a moment when a download has just begun, besides the ones at random.
        hub.faults.append(Fault("GET .*safetensors", hook=lambda: disk.look() and None))
        hub.faults.append(Fault("GET .*safetensors", slow_seconds=0.003))
        assert "error" not in streamer(kind, tmp_path / "out", **settings)
    output = disk.look()
    *_, second, largest = shard_sizes(model)
    assert sum(shard_sizes(model)) > 4 * largest, "else the test could not fail"
    blocks = 30 * 4096  # journal, config.json beside each shard, and rounding to blocks
    assert output + shard_sizes(model)[2] < disk.most <= output + largest + second + blocks


def test_a_disk_that_is_too_small_is_named_and_nothing_stays(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path
) -> None:
    output = sum(map(len, expected_cast(model, tmp_path / "expected").values()))
    disk = tmp_path / "disk"
    disk.mkdir()

    def attempt(size: int) -> dict[str, Any]:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small file system takes root")
        try:
            return streamer("convert", disk / "out")
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    room = 30 * 4096
    refused = attempt(output + shard_sizes(model)[-1])
    assert (refused["error"], refused["code"]) == ("CapacityError", 5)
    assert "beside the output, the two largest source shards need" in refused["text"]
    assert hub.count("GET .*safetensors$") == 0
    assert "error" not in attempt(output + sum(shard_sizes(model)[-2:]) + room)


# A shard, from its start or from where it broke off; not its header alone.
SHARD = r"GET .*safetensors( bytes=[1-9]\d*-)?$"


@pytest.mark.slow
def test_killed_anywhere_it_goes_on_without_fetching_anything_twice(
    hub: HubServer, model: Path, tmp_path: Path
) -> None:
    hub.faults.append(Fault(SHARD, slow_seconds=0.02))
    draw = random.Random(0)
    for _ in range(2):
        victim = Streamer(hub.url, tmp_path / "home")
        victim.send("convert", tmp_path / "out")
        before = hub.count(SHARD)
        while hub.count(SHARD) < before + 2:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.2)
        victim.close()
        assert not (tmp_path / "out").exists()
    last = Streamer(hub.url, tmp_path / "home")
    report = last("convert", tmp_path / "out")
    last.close()
    assert content(tmp_path / "out") == expected_cast(model, tmp_path / "expected")
    with SafetensorsCheckpoint(model) as checkpoint:
        whole = convert_dtype(checkpoint, tmp_path / "again", dtype=torch.bfloat16)
    assert report["largest_relative_error"] == whole.largest_relative_error, "what earlier runs found is kept"
    assert hub.count("GET .*safetensors$") <= len(shard_sizes(model)) + 2, "only a shard just begun comes anew"


def test_a_second_one_is_refused_and_disturbs_nothing(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path
) -> None:
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        go.wait(60)

    third = sorted(path.name for path in model.glob("*.safetensors"))[2]
    hub.faults.append(Fault(f"GET .*{third}$", hook=hold))
    first = Streamer(hub.url, tmp_path / "home")
    first.send("convert", tmp_path / "out")
    assert held.wait(60)
    refused = streamer("convert", tmp_path / "out")
    assert (refused["error"], refused["code"]) == ("OutputError", 2)
    assert f"out: another run (process {first.process.pid}) is using it; wait for it" in refused["text"]
    go.set()
    assert first.process.stdout is not None
    assert "error" not in json.loads(first.process.stdout.readline())
    first.close()
    assert content(tmp_path / "out") == expected_cast(model, tmp_path / "expected")
    assert sorted(os.listdir(tmp_path)) == ["expected", "home", "out"]


def test_bad_requests_leave_nothing_behind(hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path) -> None:
    def refused(kind: str, **settings: Any) -> dict[str, Any]:
        answer = streamer(kind, tmp_path / "out", **settings)
        assert list(tmp_path.iterdir()) == []
        return answer

    assert "needs the model's activations" in refused("quantize", method="gptq", scheme="w4a16-g32")["text"]
    assert refused("quantize", method="rtn", scheme="w4a16-g48")["error"] == "SchemeError"
    assert "has no revision" in refused("convert", revision="v9")["text"]
    files = hub.files("org/model")
    del files[next(name for name in files if name.endswith(".safetensors"))]
    hub.reset()
    hub.add_repo("org/model", files)
    assert refused("convert")["error"] == "HubError"


@pytest.mark.parametrize("kind", ["convert", "quantize"])
def test_a_connection_lost_for_good_is_resumed_later(
    hub: HubServer, streamer: Streamer, model: Path, tmp_path: Path, kind: str
) -> None:
    settings = {"method": "rtn", "scheme": "w4a16-g32"} if kind == "quantize" else {}
    assert "error" not in streamer(kind, tmp_path / "expected", **settings)
    third = sorted(path.name for path in model.glob("*.safetensors"))[2]
    hub.faults.append(Fault(f"GET .*{third}$", 403, "blocked"))
    failed = streamer(kind, tmp_path / "out", **settings)
    assert (failed["error"], failed["code"]) == ("HubError", 4)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    hub.log.clear()
    assert "error" not in streamer(kind, tmp_path / "out", **settings)
    assert content(tmp_path / "out") == content(tmp_path / "expected")
    assert hub.count(SHARD) == len(shard_sizes(model)) - 2


@pytest.mark.slow
def test_the_command_line_streams(hub: HubServer, model: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmconvert.cli", "convert", "org/model@main", str(tmp_path / "out"), "--stream"],
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The command adds a card of its own, a report and the recipe.
    wanted = expected_cast(model, tmp_path / "expected")
    assert {"config.json", "model.safetensors"} <= wanted.keys() and "README.md" not in wanted
    assert {name: (tmp_path / "out" / name).read_bytes() for name in wanted} == wanted


def test_only_hub_models_are_streamed(model: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(model), str(tmp_path / "q"), "--stream", "--method", "rtn", "--scheme", "w4a16-g32"]
    refused = CliRunner().invoke(main, arguments)
    assert (refused.exit_code, "only a Hub model (org/name)" in refused.output) == (2, True)
