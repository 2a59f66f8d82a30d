"""One pass over the blocks feeds several artifacts, each as if it had been made alone, and is continued with all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ids, tiny_model

from llmconvert.engine.discovery import discover
from llmconvert.engine.memory import MemoryEstimate
from llmconvert.engine.skeleton import Skeleton
from llmconvert.phases import Phases
from llmconvert.progress import SILENT
from llmconvert.quantize.execute import Sink, quantize_blocks, resumed_blocks
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.container import ContainerRequest
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import load_quantizer
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.plan import plan_quantization
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.sink import ArtifactSink
from llmconvert.quantize.steps import CalibratedSteps, Outcome
from llmconvert.storage.artifact import build_artifact
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

FORMATS = ("compressed-tensors", "gptq")
SCHEME = Scheme(Int(4), 32)
WINDOWS = ids((24, 16))
BLOCKS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "model", "llama", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, dict[str, bytes]]:
    """The artifact of each format from a run of its own."""
    place = tmp_path_factory.mktemp("alone")
    for name in FORMATS:
        with SafetensorsCheckpoint(source) as checkpoint:
            quantize_checkpoint(
                checkpoint, place / name, method="gptaq", scheme=SCHEME, format=name, windows=WINDOWS, mode="lockstep"
            )
    return {name: content(place / name) for name in FORMATS}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Stopping:
    """A sink that is interrupted when a block shall be made last."""

    def __init__(self, sink: Sink[Outcome], block: int) -> None:
        self.blocks = sink.blocks
        self.take, self.complete = sink.take, sink.complete
        self._sink = sink
        self._block = block

    def commit(self, index: int) -> None:
        if index == self._block:
            raise KeyboardInterrupt
        self._sink.commit(index)


def one_pass(source: Path, place: Path, formats: Sequence[str], stop: int | None = None) -> int:
    """Quantize into all formats; gives the blocks that need not be done again."""
    with SafetensorsCheckpoint(source) as checkpoint, ExitStack() as stack:
        skeleton = Skeleton(checkpoint, torch.device("cpu"), products="fast")
        blocks = discover(skeleton, 24)
        quantizer, phases = load_quantizer("gptaq", {}), Phases()
        plans = [plan_quantization(skeleton, blocks, SCHEME, (), quantizer, load_format(name)) for name in formats]
        steps = CalibratedSteps(
            skeleton,
            quantizer,
            plans[0],
            torch.bfloat16,
            phases,
            blocks,
            tuple(WINDOWS),
            MemoryEstimate("lockstep", {}),
        )
        containers = [
            load_format(name).container(
                checkpoint, place / name, ContainerRequest(quantizer, SCHEME, plan.specs, plan.declared, name)
            )
            for name, plan in zip(formats, plans, strict=True)
        ]
        artifacts = [
            stack.enter_context(build_artifact(place / name, container.layout, name))
            for name, container in zip(formats, containers, strict=True)
        ]
        sinks = [
            ArtifactSink(artifact, skeleton, container, plan, phases)
            for container, plan, artifact in zip(containers, plans, artifacts, strict=True)
        ]
        done = resumed_blocks(sinks)
        into: list[Sink[Outcome]] = list(sinks)
        if stop is not None:
            into[-1] = Stopping(into[-1], stop)
        quantize_blocks(steps, skeleton.block_count, into, artifacts[0].work, SILENT)
        for sink in reversed(sinks):  # the first one has the activations
            sink.publish()
        return done


def test_each_artifact_is_what_it_is_alone(source: Path, alone: Mapping[str, dict[str, bytes]], tmp_path: Path) -> None:
    assert one_pass(source, tmp_path, FORMATS) == 0
    assert {name: content(tmp_path / name) for name in FORMATS} == alone
    assert alone["gptq"] != alone["compressed-tensors"]


def test_a_pass_stopped_between_its_sinks_is_continued(
    source: Path, alone: Mapping[str, dict[str, bytes]], tmp_path: Path
) -> None:
    """The first has a block more than the second, which is done again: the same bytes go to the same places."""
    with pytest.raises(KeyboardInterrupt):
        one_pass(source, tmp_path, FORMATS, stop=1)
    assert one_pass(source, tmp_path, FORMATS) == 1
    assert {name: content(tmp_path / name) for name in FORMATS} == alone


def test_a_sink_that_is_new_takes_the_pass_from_the_start(
    source: Path, alone: Mapping[str, dict[str, bytes]], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        one_pass(source, tmp_path, FORMATS[:1], stop=2)
    assert one_pass(source, tmp_path, FORMATS) == 0
    assert {name: content(tmp_path / name) for name in FORMATS} == alone
