"""Experts one at a time: the resident model's logits to the bit, in the memory of one expert, in the order of stops."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ids
from support.tiny_mixtures import MIXTURES, WHOLE, fuse_experts, load_mixture, tiny_mixture
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from llmconvert.engine.discovery import discover
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.experts import ExpertsSlot
from llmconvert.engine.memory import activation_nbytes, choose_mode
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Mode, Stream
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
LENGTHS = (33, 9, 24)
Mixture = Callable[..., Path]


def windows() -> list[torch.Tensor]:
    return ids(LENGTHS)


def expected(directory: Path) -> list[torch.Tensor]:
    model = load_mixture(directory)
    with torch.no_grad():
        return [model(window, use_cache=False).logits for window in windows()]


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_are_those_of_the_resident_model(mixture: Mixture, kind: str) -> None:
    checkpoint = SafetensorsCheckpoint(mixture(kind))
    found = list(stream_logits(checkpoint, windows(), device=CPU))
    assert all(map(torch.equal, found, expected(mixture(kind))))


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_so_are_they_when_every_stop_is_visited(mixture: Mixture, kind: str, mode: Mode) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture(kind)), CPU)
    stream = Stream(skeleton, windows(), discover(skeleton, max(LENGTHS)), mode=mode, head=True)
    for run in stream.blocks():
        for stop in run.plan.stops:
            arrived = list(run.inputs(stop.linears[0]))
            assert all(value.shape[1] == stop.columns for value in arrived)
            slot = skeleton.holder(run.site(stop.linears[0]))
            if isinstance(slot, ExpertsSlot):
                # Every token goes to as many experts as the config says, and meets each once.
                number = run.site(stop.linears[0]).expert
                assert sum(map(len, arrived)) == run.experts(stop.linears[0]).tokens()[number]
    assert all(map(torch.equal, stream.logits(), expected(mixture(kind))))
    stream.close()


def test_what_reaches_an_expert_is_what_reaches_it_in_the_resident_model(mixture: Mixture) -> None:
    """Oracle: transformers' own batched implementation of experts, token by token."""
    directory = mixture("mixtral")
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    stream = Stream(skeleton, windows()[:1], discover(skeleton, max(LENGTHS)), mode="lockstep")
    run = next(stream.blocks())
    model = load_mixture(directory)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        model(windows()[0])
    hidden, index = seen[0]
    for number in range(6):
        tokens = [token for token in range(len(hidden)) if number in index[token]]
        name = f"model.layers.0.mlp.experts.{number}"
        (given,) = run.inputs(f"{name}.gate_proj")
        assert sorted(map(tuple, given.tolist())) == sorted(map(tuple, hidden[tokens].tolist()))
        (inner,) = run.inputs(f"{name}.down_proj")
        gate, up = (given @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        torch.testing.assert_close(inner, torch.nn.functional.silu(gate) * up)
    stream.close()


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
def test_what_is_installed_is_what_all_batches_meet(mixture: Mixture, mode: Mode) -> None:
    """Half of the stops only are asked for, so that experts in between are passed by."""
    directory = mixture("mixtral")
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    stream = Stream(skeleton, windows(), discover(skeleton, max(LENGTHS)), mode=mode, head=True)
    model = load_mixture(directory)
    for run in stream.blocks():
        experts = model.model.layers[run.plan.index].mlp.experts
        for number in (1, 4):
            name = f"model.layers.{run.plan.index}.mlp.experts.{number}"
            list(run.inputs(f"{name}.down_proj"))
            assert torch.equal(run.weight(f"{name}.up_proj"), experts.gate_up_proj[number, 96:])
            run.install(f"{name}.gate_proj", run.weight(f"{name}.gate_proj") * 2)
            run.install(f"{name}.down_proj", run.weight(f"{name}.down_proj") * 0.5)
            with torch.no_grad():
                experts.gate_up_proj[number, :96] *= 2
                experts.down_proj[number] *= 0.5
    with torch.no_grad():
        wanted = [model(window, use_cache=False).logits for window in windows()]
    assert all(map(torch.equal, stream.logits(), wanted))
    stream.close()


Part = tuple[str, int, str]


def _counted(
    slot: str, read: Callable[[int, str], torch.Tensor], reads: list[Part]
) -> Callable[[int, str], torch.Tensor]:
    def counted(number: int, leaf: str) -> torch.Tensor:
        reads.append((slot, number, leaf))
        return read(number, leaf)

    return counted


def test_an_expert_is_read_once_and_never_beside_another(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("qwen3_moe")), CPU)
    slots = [slot for slots in skeleton.experts for slot in slots.values()]
    reads: list[Part] = []
    for slot in slots:
        slot._read = _counted(slot.name, slot._read, reads)
    stream = Stream(skeleton, windows(), discover(skeleton, max(LENGTHS)), mode="replay", head=True)
    for _ in stream.blocks():
        assert sum(slot.number is not None for slot in slots) == 0
    list(stream.logits())
    stream.close()
    assert len(reads) == len(set(reads)) <= 2 * 6 * 2


def test_the_memory_stated_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    needs = []
    for count in (4, 32):
        directory = tiny_mixture(tmp_path / str(count), "qwen3_moe", num_experts=count)
        skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
        plans = discover(skeleton, 64)
        lengths = [64] * 8
        needs.append(
            [choose_mode(skeleton, plans, lengths, 0, None, mode).total for mode in ("lockstep", "replay")]
            + [activation_nbytes(plans, skeleton, lengths, "replay")]
        )
    # What grows are rows of the routers of two blocks, and the scores that they give tokens.
    router = 2 * 28 * 64 * 2 + 28 * 12 * sum(lengths)
    assert all(more - less <= router for less, more in zip(*needs, strict=True))


def test_a_missing_expert_and_a_wrong_shape_are_named(tmp_path: Path, mixture: Mixture) -> None:
    weights = load_file(mixture("mixtral") / "model.safetensors")
    (tmp_path / "config.json").write_bytes((mixture("mixtral") / "config.json").read_bytes())
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    for change, message in (
        ({}, r"no tensor for 'model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight'"),
        ({name: weights[name].T.contiguous()}, rf"tensor '{re.escape(name)}' has shape \[96, 64\].*\[64, 96\]"),
    ):
        kept = {other: weight for other, weight in weights.items() if other != name}
        save_file({**kept, **change}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            Skeleton(SafetensorsCheckpoint(tmp_path), CPU)


@pytest.mark.parametrize("kind", [*WHOLE, "llama4_text"])
def test_matrices_of_a_tensor_with_all_experts_are_sites_of_their_own(mixture: Mixture, kind: str) -> None:
    checkpoint = SafetensorsCheckpoint(mixture(kind))
    skeleton = Skeleton(checkpoint, CPU)
    stream = Stream(skeleton, windows()[:1], discover(skeleton, max(LENGTHS)), mode="lockstep")
    run = next(stream.blocks())
    stops = [stop for stop in run.plan.stops if run.site(stop.linears[0]).kind == "expert"]
    assert len(stops) == 2 * 4
    for stop in stops:
        (given,) = run.inputs(stop.linears[0])
        for name in stop.linears:
            site = run.site(name)
            assert bool(site.unread) == (kind in WHOLE) and checkpoint.infos[site.tensor].shape[0] in (4, 4 * 32)
            assert site.shape == tuple(run.weight(name).shape) and torch.equal(site.read(checkpoint), run.weight(name))
            assert given.shape[1] == site.columns
    # All of the tensor's numbers are in exactly one matrix of one expert.
    for tensor in {run.site(stop.linears[0]).tensor for stop in stops}:
        sites = [site for site in skeleton.sites_of(0) if site.tensor == tensor]
        read = torch.cat([site.read(checkpoint).flatten() for site in sites])
        assert torch.equal(read.sort().values, checkpoint[tensor].flatten().sort().values)
    stream.close()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nemotron_h", "deepseek_v3"])
def test_a_checkpoint_of_fused_experts_computes_what_one_of_single_ones_does(
    mixture: Mixture, tmp_path: Path, kind: str
) -> None:
    single, fused = (
        SafetensorsCheckpoint(path) for path in (mixture(kind), fuse_experts(mixture(kind), tmp_path / "fused"))
    )
    assert len(fused) < len(single)
    sites, others = (Skeleton(checkpoint, CPU).sites for checkpoint in (single, fused))
    assert sites.keys() == others.keys()
    for site, other in zip(sites.values(), others.values(), strict=True):
        assert torch.equal(site.read(single), other.read(fused))
        assert not other.unread
    found, wanted = (stream_logits(checkpoint, windows(), device=CPU) for checkpoint in (fused, single))
    assert all(map(torch.equal, found, wanted))


def test_one_expert_is_read_at_a_time_from_a_tensor_with_all(mixture: Mixture) -> None:
    checkpoint = SafetensorsCheckpoint(mixture("granitemoe"))
    read_rows, rows = checkpoint.read_rows, []

    def counted(name: str, start: int, stop: int) -> torch.Tensor:
        if len(checkpoint.infos[name].shape) == 3:
            rows.append((name, start, stop))
        return read_rows(name, start, stop)

    checkpoint.read_rows = counted  # type: ignore[method-assign]
    list(stream_logits(checkpoint, windows(), device=CPU))
    assert len(rows) == len(set(rows)) == 2 * 2 * 4
    assert all(stop == start + 1 for _, start, stop in rows)


def test_a_tensor_with_all_experts_of_a_wrong_shape_is_named(tmp_path: Path, mixture: Mixture) -> None:
    source = mixture("gpt_oss")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    save_file({**weights, name: weights[name].transpose(1, 2).contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts\.down_proj' has shape \[4, 64, 32\].*\[4, 32, 64\]"):
        Skeleton(SafetensorsCheckpoint(tmp_path), CPU)


def test_what_would_be_merged_into_an_unknown_layout_is_refused_by_name(
    mixture: Mixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        MixtralExperts, "has_bias", property(lambda self: True, lambda self, value: None), raising=False
    )
    with pytest.raises(UnsupportedError, match=r"tensor '.*experts\.0\.w1\.weight' is made into .* not known here"):
        Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU)


@pytest.mark.parametrize(("kind", "expected"), [("mixtral", True), ("nemotron_h", False), ("gpt_oss", False)])
def test_whether_down_follows_up_neuron_by_neuron_is_tried_out(mixture: Mixture, kind: str, expected: bool) -> None:
    slots = Skeleton(SafetensorsCheckpoint(mixture(kind)), CPU).experts
    assert {slot.is_proportional for found in slots for slot in found.values()} == {expected}


def test_a_limit_of_what_up_gives_is_met(mixture: Mixture) -> None:
    (slot,) = Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU).experts[0].values()

    def limited(self: Any, rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up = torch.nn.functional.linear(rows, self.gate_up_proj[0]).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up.clamp(-7, 7)
        return torch.zeros_like(rows).index_add_(0, index[:, 0], torch.nn.functional.linear(inner, self.down_proj[0]))

    slot._forward = limited
    assert not slot.is_proportional
