"""A mixture takes the memory of one expert, however many it has: seen from outside, as a process's peak."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.peak import on_linux, peak
from support.random_mixtures import EXPERT_NBYTES, random_mixture

WINDOWS, LENGTH = 4, 128

# What is printed first is what the job says it needs.
PROGRAM = f"""
import sys
from pathlib import Path
import torch
from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

source, output, method = sys.argv[1:]
generator = torch.Generator().manual_seed(0)
windows = [torch.randint(128, (1, {LENGTH}), generator=generator) for _ in range({WINDOWS})]
checkpoint = SafetensorsCheckpoint(source)
if method == "evaluate":
    assert all(logits.isfinite().all() for logits in stream_logits(checkpoint, windows, device=torch.device("cpu")))
else:
    request = QuantizeRequest(method, Scheme.parse("w4a16-g64"))
    plan = plan_quantize(checkpoint, Path(output), request, windows=windows)
    assert plan.run().quantized == len(plan.decisions.schemes)
    print(plan.needs.memory)
"""


@pytest.mark.slow
@on_linux
def test_128_experts_take_the_memory_of_32(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {}
    for experts in (32, 128):
        # Both ways of reading and both jobs, in two of the four pairs: a job doesn't know how experts are stored.
        for whole, method in ((True, "gptq"), (False, "evaluate")):
            source = random_mixture(tmp_path / f"{experts}-{whole}", experts, whole=whole)
            *stated, used = peak(PROGRAM, str(source), str(tmp_path / f"{method}-{experts}-{whole}"), method)
            assert method == "evaluate" or used < 1.15 * stated[0]
            peaks.setdefault(method, []).append(used)
    more = {name: second - first for name, (first, second) in peaks.items()}
    # 96 experts more in each layer: 151 MB.
    assert max(more.values()) < 0.2 * 96 * EXPERT_NBYTES, peaks
