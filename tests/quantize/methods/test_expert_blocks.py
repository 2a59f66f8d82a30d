"""Experts as blocks of their own: what they learn from is what reaches and leaves them in the resident model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from support.tiny_architectures import ids
from support.tiny_mixtures import load_mixture
from torch import nn

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.states import MemoryStates
from llmconvert.engine.statistics import Hessian
from llmconvert.engine.stream import Mode, Stream
from llmconvert.quantize.methods.base import BlockData, Calibration, Numbers, Solution, Target
from llmconvert.quantize.methods.expert_blocks import OriginalAnswers, learn_experts
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.methods.signround import SignRound
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((48, 40, 56))
Mixture = Callable[..., Path]


@dataclass(frozen=True)
class Watching:
    """Rounds to nearest, and keeps what it was to learn from."""

    seen: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = field(default_factory=dict)

    calibration: ClassVar[Calibration] = "block"
    original: ClassVar[bool] = True
    numbers: ClassVar[Numbers] = "even"

    def quantize(
        self, targets: Sequence[Target], hessian: Hessian | None, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        return Rtn().quantize(targets, None, scale_dtype)

    def nbytes(self, rows: int, columns: int) -> int:
        return 0

    def quantize_block(
        self, targets: Sequence[Target], data: BlockData, scale_dtype: torch.dtype
    ) -> dict[str, Solution]:
        raise AssertionError("asked for experts alone")

    def refine(
        self, targets: Sequence[Target], started: Mapping[str, Solution], data: BlockData
    ) -> dict[str, Solution]:
        every = range(len(data.tokens))
        inputs = [hidden for hidden, _ in data.entries(every)]
        assert tuple(map(len, inputs)) == data.tokens
        self.seen[targets[0].name.rpartition(".")[0]] = inputs, list(data.outputs(every))
        return dict(started)

    def block_nbytes(self, weights: int, batch: int) -> int:
        return 0


def streams(directory: Path, mode: Mode) -> list[Stream]:
    found = []
    for _ in range(2):
        skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
        found.append(Stream(skeleton, WINDOWS, discover(skeleton, 56), mode=mode, states=MemoryStates()))
    return found


@pytest.mark.parametrize("every", [False, True])
def test_experts_learn_what_the_originals_give_for_their_tokens(mixture: Mixture, every: bool) -> None:
    first, second = streams(mixture("mixtral"), "lockstep")
    run, other = next(first.blocks()), next(second.blocks())
    method, moments = Watching(), ExpertMoments(run, other, CPU, every=every)
    schemes = dict.fromkeys(first.skeleton.sites, Scheme(Int(8), 16))
    solved = dict(learn_experts(run, other, moments, method, schemes, torch.bfloat16))
    model = load_mixture(mixture("mixtral"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for window in WINDOWS:
            model(window)
    counts = [sum(int((index == number).sum()) for _, index in seen) for number in range(6)]
    assert min(counts) < 64, "too few for the columns: one expert at least is shown all tokens"
    for number in range(6):
        name = f"model.layers.0.mlp.experts.{number}"
        inputs, outputs = (torch.cat(values) for values in method.seen[name])
        whole = every or counts[number] < 64
        rows = torch.cat([hidden if whole else hidden[(index == number).any(1)] for hidden, index in seen])
        assert sorted(map(tuple, inputs.tolist())) == sorted(map(tuple, rows.tolist()))
        gate, up = (inputs @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
        wanted = (nn.functional.silu(gate) * up) @ experts.down_proj[number].T
        torch.testing.assert_close(outputs, wanted, rtol=2e-2, atol=1e-2)
        assert solved[f"{name}.up_proj"].tokens == counts[number]
    for stream in (first, second):
        stream.close()


def test_an_experts_output_is_differentiated_by_each_of_its_matrices(mixture: Mixture) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(mixture("qwen3_moe")), CPU, torch.float32)
    slot = skeleton.experts[1]["model.layers.1.mlp.experts"]
    slot.load(4)
    rows = torch.randn((9, 64), generator=torch.Generator().manual_seed(0))
    parts = ("gate_proj", "up_proj", "down_proj")
    matrices = {part: (2 * slot.value(4, part)).requires_grad_() for part in parts}
    slot.output(rows, matrices).square().sum().backward()
    own = {part: (2 * slot.value(4, part)).requires_grad_() for part in parts}
    inner = nn.functional.silu(rows @ own["gate_proj"].T) * (rows @ own["up_proj"].T)
    (inner @ own["down_proj"].T).square().sum().backward()
    for part in parts:
        torch.testing.assert_close(matrices[part].grad, own[part].grad)
    torch.testing.assert_close(slot.output(rows), slot.output(rows, {p: slot.value(4, p) for p in parts}))


@pytest.mark.parametrize("mode", ["lockstep", "replay"])
def test_a_block_runs_with_what_the_originals_experts_give(mixture: Mixture, mode: Mode) -> None:
    """In either model, whatever became of its experts; the original's own output is its own."""
    first, second = streams(mixture("deepseek_v3"), mode)
    for run, other in zip(first.blocks(), second.blocks(), strict=True):
        index = run.plan.index
        if not run.slots:
            continue
        answers = OriginalAnswers(other)
        outputs = [call.output(hidden) for hidden, call in answers.entries(other)(range(3))]
        here = [call.output(hidden) for hidden, call in answers.entries(run)(range(3))]
        second.cross(index)
        left = [second.state(index + 1, batch) for batch in range(3)]
        assert all(map(torch.equal, outputs, left)) and all(map(torch.equal, here, left))
    for stream in (first, second):
        stream.close()


def test_training_brings_experts_nearer(mixture: Mixture) -> None:
    first, second = streams(mixture("mixtral"), "replay")
    run, other = next(first.blocks()), next(second.blocks())
    schemes = dict.fromkeys(first.skeleton.sites, Scheme(Int(3), 32))
    errors = []
    for steps in (0, 30):
        method = SignRound(steps=steps, batch=2)
        moments = ExpertMoments(run, other, CPU)
        solved = dict(learn_experts(run, other, moments, method, schemes, torch.bfloat16))
        errors.append(solved["model.layers.0.mlp.experts.3.down_proj"].error)
    assert errors[0] is not None and errors[1] is not None and 0 < errors[1] < 0.9 * errors[0]
    for stream in (first, second):
        stream.close()
