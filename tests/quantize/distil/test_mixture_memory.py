"""Distilling a mixture takes the memory of one expert and of all experts' scales: seen from outside, as a peak."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.peak import on_linux, peak
from support.random_mixtures import EXPERT_NBYTES, random_mixture

LENGTH = 128

# What is printed first is what the plan says it needs; quantizing is a process of its own, which may take more.
PROGRAM = f"""
import sys
from pathlib import Path
import torch
from llmconvert.quantize.distil.job import plan_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

source, artifact, output, job = sys.argv[1:]
checkpoint = SafetensorsCheckpoint(source)
if job == "quantize":
    quantize_checkpoint(checkpoint, Path(artifact), method="rtn", scheme=Scheme.parse("w4a16-g128"))
else:
    generator = torch.Generator().manual_seed(0)
    windows = [torch.randint(128, (1, {LENGTH}), generator=generator) for _ in range(6)]
    options = DistilOptions(steps=2, batch=2, held_out=2)
    plan = plan_distil(checkpoint, SafetensorsCheckpoint(artifact), Path(output), options, windows=windows)
    assert plan.streamed
    print(plan.needs.memory)
    report = plan.run()
    assert report.steps == 2 and report.trained > 0
"""


@pytest.mark.slow
@on_linux
def test_128_experts_take_the_memory_of_32_and_their_scales(tmp_path: Path) -> None:
    used, stated = [], []
    for experts in (32, 128):
        source, artifact, output = (str(tmp_path / f"{name}-{experts}") for name in ("source", "artifact", "output"))
        random_mixture(Path(source), experts, whole=False)
        peak(PROGRAM, source, artifact, output, "quantize")
        told, found = peak(PROGRAM, source, artifact, output, "distil")
        assert found < 1.05 * told
        used.append(found)
        stated.append(told)
    # 96 experts more: 151 MB in 16 bits, 14 MB of what is remembered of their scales, and 19 of holes between that.
    scales = 96 * EXPERT_NBYTES // 2 // 128
    more = 24 * scales + 96 * 3 * (64 << 10)
    assert stated[1] - stated[0] == pytest.approx(more, abs=2_000_000)
    assert used[1] - used[0] < 24 * scales + 0.2 * 96 * EXPERT_NBYTES, (used, stated)
