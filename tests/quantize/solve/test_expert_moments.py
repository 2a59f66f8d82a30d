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
from llmconvert.engine.states import MemoryStates
from llmconvert.engine.stream import Stream
from llmconvert.quantize.solve.expert_moments import ExpertMoments
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((48, 40, 56))
Mixture = Callable[[str], Path]


@pytest.mark.parametrize(("prior", "whole"), [(0.0, False), (0.25, False), (2.0, False), (0.25, True)])
def test_moments_are_what_they_are_defined_as(mixture: Mixture, prior: float, whole: bool) -> None:
    """Those of the expert's tokens or of all, with a share of the diagonal that is κ's, and 0.6 at most."""
    directory = mixture("mixtral")
    skeleton = Skeleton(SafetensorsCheckpoint(directory), CPU)
    stream = Stream(skeleton, WINDOWS, discover(skeleton, 56), mode="lockstep")
    run = next(stream.blocks())
    moments = ExpertMoments(run, None, CPU, prior, every=whole)
    seen = visits(model := load_mixture(directory), 0, WINDOWS)
    experts = model.model.layers[0].mlp.experts
    every = torch.cat([hidden for hidden, _ in seen])
    shares = set()
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
        kappa = prior * stop.columns
        wanted = used.T @ used / count
        wanted[~torch.eye(len(wanted), dtype=torch.bool)] *= max(0.4, count / (count + kappa))
        shares.add(kappa / (count + kappa) > 0.6)
        found = moments.hessian(stop)
        assert found.tokens == count and moments.tokens(stop.linears[0]) == len(rows)
        torch.testing.assert_close(found.matrix, wanted, rtol=2e-2, atol=2e-2 * float(wanted.diagonal().mean()))
    assert (True in shares) == (prior > 0 and not whole) or whole
    stream.close()


def test_tokens_that_moments_lack_are_such_as_both_models_agree_on(mixture: Mixture) -> None:
    """``H' - C'`` is the share of ``H - C`` that the tokens have; the original's experts get other inputs here."""
    runs = []
    for scale in (1.0, 1.5):
        skeleton = Skeleton(SafetensorsCheckpoint(mixture("mixtral")), CPU)
        stream = Stream(skeleton, WINDOWS, discover(skeleton, 56), mode="lockstep", states=MemoryStates())
        run = next(stream.blocks())
        name = "model.layers.0.self_attn.v_proj"
        for stop in run.plan.stops:
            if name in stop.linears:
                list(run.inputs(name))
                run.install(name, run.weight(name) * scale)
        runs.append((stream, run))
    (first, run), (second, original) = runs
    own, drawn = (ExpertMoments(run, original, CPU, prior) for prior in (0.0, 0.25))
    stop = next(stop for stop in run.plan.stops if run.site(stop.linears[0]).kind == "expert")
    before, after = own.hessian(stop), drawn.hessian(stop)
    assert before.cross is not None and after.cross is not None
    difference = before.matrix - before.cross
    assert float(difference.norm()) > 0.01 * float(before.matrix.norm())
    share = before.tokens / (before.tokens + 0.25 * stop.columns)
    torch.testing.assert_close(after.matrix - after.cross, share * difference, rtol=1e-4, atol=1e-6)
    for stream in (first, second):
        stream.close()
