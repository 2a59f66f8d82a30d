"""What a quantized cache costs: against transformers' model with and without it, by position."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peak import on_linux, peak
from support.tiny_models import tiny_llama_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmconvert.context import Context
from llmconvert.engine.memory import BASE_NBYTES
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import CacheKind
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokenizer import load_tokenizer
from llmconvert.text.tokens import draw_windows
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.long_inputs.cache_cost import CacheCostCheck
from llmconvert.validate.measurement import Subject

TEXT, LENGTH, LONG = "pydoc-topics:test", 96, 2048
# What is printed first is what the plan says it needs.
PROGRAM = f"""
import sys
from pathlib import Path
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.artifact import plan_validation
from llmconvert.validate.long_inputs.cache_cost import CacheCostCheck

plan = plan_validation(Path(sys.argv[1]), [CacheCostCheck("{TEXT}", {LONG})], reference=None)
(check,) = plan.run()
assert check.value and check.detail["length"] == {LONG}
print(plan.needs.memory)
"""


def with_scales(source: Path, artifact: Path, kind: CacheKind) -> tuple[torch.Tensor, ...]:
    """Write an artifact whose cache is quantized; the windows that its cost is measured on."""
    with SafetensorsCheckpoint(source) as checkpoint:
        windows = draw_windows(
            load_tokenizer(checkpoint), load_dataset_text(TEXT), samples=2, length=LENGTH, order="sequential"
        ).windows
        quantize_checkpoint(
            checkpoint, artifact, method="rtn", scheme=Scheme.parse("w8a16-g32"), windows=windows[1:], kv_cache=kind
        )
    return windows


def measured(artifact: Path) -> list[Check]:
    with SafetensorsCheckpoint(artifact) as stored:
        subject = Subject(artifact, stored, open_dense(stored), None, None, None, torch.device("cpu"))
        return CacheCostCheck(TEXT, LENGTH).measure(subject)


@pytest.mark.parametrize("kind", ["fp8", "fp8-head"])
def test_the_cost_is_that_of_the_loaded_model(tmp_path: Path, kind: CacheKind) -> None:
    source, artifact = tiny_llama_dir(tmp_path / "source", dtype=torch.float32, hidden_size=64), tmp_path / "artifact"
    windows = with_scales(source, artifact, kind)
    (check,) = measured(artifact)

    rounded = AutoModelForCausalLM.from_pretrained(artifact)
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (artifact / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(artifact)
    costs = []
    for window in windows:
        with torch.no_grad():
            before, after = (model(window).logits[0, :-1].log_softmax(-1) for model in (plain, rounded))
        costs.append((before.exp() * (before - after)).sum(-1))
    expected = torch.stack(costs).double().mean(0)
    assert check.value == pytest.approx(float(expected.mean()), rel=1e-3) and float(expected.mean()) > 0
    (section,) = check.sections
    found = [row[1] for row in section.rows]
    edges = [(LENGTH - 1) * index // 8 for index in range(9)]
    assert found == pytest.approx(
        [float(expected[low:high].mean()) for low, high in itertools.pairwise(edges)], rel=1e-2
    )
    # Two layers of keys and values, two heads of 16.
    assert f"{LENGTH * 2 * 2 * 2 * 16:,} bytes instead of {2 * LENGTH * 2 * 2 * 2 * 16:,}" in check.text
    # Without scales of a cache there is nothing to measure.
    assert not measured(artifact)


@on_linux
def test_its_memory_is_stated(tmp_path: Path) -> None:
    """Of a model whose logits are most of it."""
    artifact = tmp_path / "artifact"
    source = tiny_llama_dir(
        tmp_path / "source", dtype=torch.bfloat16, max_position_embeddings=8192, vocab_size=32_000, tokenizer=False
    )
    tiny_tokenizer().save_pretrained(source)
    with_scales(source, artifact, "fp8")
    stated, used = peak(PROGRAM, str(artifact))
    assert 0.6 * stated < used < stated, (stated, used)

    def planned(**given: Any) -> int:
        return plan_validation(artifact, [CacheCostCheck(TEXT, LONG)], reference=None, **given).needs.memory

    assert planned() == stated
    # With less, windows are shorter; of what has no such scales nothing is measured.
    assert planned(context=Context(memory=stated - 1)) < 0.9 * stated
    assert planned(cached=False) == BASE_NBYTES


def test_nan_fails_the_check(tmp_path: Path) -> None:
    source, artifact = tiny_llama_dir(tmp_path / "source", dtype=torch.float32), tmp_path / "artifact"
    with_scales(source, artifact, "fp8")
    weights = load_file(artifact / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, artifact / "model.safetensors", {"format": "pt"})
    (check,) = measured(artifact)
    assert not check.ok and check.value is None and "in 16 bits, the artifact computes no usable" in check.text
