"""A mixture takes the memory of one expert, however many it has: seen from outside, as a process's peak."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.peak import on_linux, peak
from transformers import AutoConfig, AutoModelForCausalLM

WIDTH, LAYERS, WINDOWS, LENGTH = 512, 1, 4, 128
EXPERT_NBYTES = 3 * WIDTH * WIDTH * 2

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


def random_mixture(directory: Path, experts: int, *, whole: bool) -> Path:
    """A mixture of seeded weights, those of its experts in a tensor each or in one for all of a layer."""
    settings = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=128,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=2,
        moe_intermediate_size=WIDTH,
    )
    settings.architectures, settings.dtype = ["Qwen3MoeForCausalLM"], "bfloat16"
    with torch.device("meta"):
        states = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).state_dict()
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for name, state in states.items():
        value = (0.05 * torch.randn(state.shape[-2:])).bfloat16()
        if state.dim() == 1:
            value = 1 + value
        if state.dim() < 3:
            weights[name] = value
        elif whole:
            weights[name] = torch.stack([value.roll(number, 0) for number in range(experts)])
        else:
            halves = value.chunk(2) if name.endswith("gate_up_proj") else (value,)
            leaves = ("gate_proj", "up_proj") if len(halves) == 2 else ("down_proj",)
            for leaf, half in zip(leaves, halves, strict=True):
                stem = name.rpartition(".")[0]
                for number in range(experts):
                    weights[f"{stem}.{number}.{leaf}.weight"] = half.roll(number, 0).contiguous()
    directory.mkdir()
    settings.save_pretrained(directory)
    save_file(weights, directory / "model.safetensors")
    return directory


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
