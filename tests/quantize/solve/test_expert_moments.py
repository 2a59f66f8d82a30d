"""Moments of experts' inputs against their definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.tiny_architectures import ids
from support.tiny_mixtures import load_mixture, visits

from llmconvert.engine.discovery import discover
from llmconvert.engine.skeleton import Skeleton
from llmconvert.engine.stream import Stream
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((48, 40, 56))
Mixture = Callable[[str], Path]


@pytest.mark.parametrize("whole", [False, True])
def test_moments_are_what_they_are_defined_as(mixture: Mixture, whole: bool) -> None:
    """Those of the expert's tokens or of all."""
    directory = mixture("mixtral")
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    stream = Stream(skeleton, WINDOWS, discover(skeleton, 56), mode="lockstep")
    run = next(stream.blocks())
    moments = ExpertMoments(run, None, CPU, every=whole)
    seen = visits(model := load_mixture(directory), 0, WINDOWS)
    experts = model.model.layers[0].mlp.experts
    every = torch.cat([hidden for hidden, _ in seen])
    for stop in run.plan.stops:
        site = run.site(stop.linears[0])
        if site.kind != "expert":
            continue
        rows = torch.cat([hidden[(index == site.expert).any(1)] for hidden, index in seen])
        assert 0 < len(rows) < len(every)
        used = every if whole else rows
        count = len(used)
        if site.projection == "down_proj":
            weight = experts.gate_up_proj[site.expert].detach()
            gate, up = (used.bfloat16() @ weight.T).chunk(2, dim=-1)
            used = (torch.nn.functional.silu(gate) * up).float()
        wanted = used.T @ used / count
        found = moments.hessian(stop)
        assert found.tokens == count and moments.tokens(stop.linears[0]) == len(rows)
        torch.testing.assert_close(found.matrix, wanted, rtol=2e-2, atol=2e-2 * float(wanted.diagonal().mean()))
    stream.close()
