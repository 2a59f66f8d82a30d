"""Distillation one block at a time: gradients, losses and steps of the resident one, and when it is chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.bare_models import make_sparse
from support.distilling import QUICK, WINDOWS, distil, interrupted_at, quantized, subject_of
from transformers import LlamaConfig, LlamaForCausalLM

from llmconvert.context import Context
from llmconvert.errors import CapacityError
from llmconvert.quantize.distil import job
from llmconvert.quantize.distil.memory import DistilMemory, foresee_distil
from llmconvert.quantize.distil.options import DistilOptions
from llmconvert.quantize.distil.resident import ResidentStudent
from llmconvert.quantize.distil.streamed import StreamedStudent
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME

_STILL = replace(QUICK, code_rate=0.0)


@pytest.mark.parametrize(
    ("architecture", "scheme", "format"),
    [
        ("llama", "w3a16-g32", "compressed-tensors"),
        ("gemma2", "w3a16-g32", "compressed-tensors"),
        ("qwen3", "w4a16-g32-affine", "mlx"),
        ("gpt_neox", "w4a16-g32-asym", "compressed-tensors"),
    ],
)
def test_gradients_are_the_resident_students(
    architecture: str, scheme: str, format: str, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    original = tiny(architecture)
    artifact = quantized(original, tmp_path / "w", scheme, format)
    positions = slice(1, None, 2)
    with SafetensorsCheckpoint(original) as first, SafetensorsCheckpoint(artifact) as second:
        subject = subject_of(first, second, _STILL)
        whole = ResidentStudent(subject, WINDOWS[:3])
        parts = StreamedStudent(subject, WINDOWS[:3], tmp_path)
        assert parts.pair.divergence([2, 0]) == pytest.approx(whole.pair.divergence([2, 0]), rel=1e-5)
        losses = [one.pair.differentiate([0, 2], positions=positions, hidden=0.0) for one in (whole, parts)]
        assert losses[1].kl == pytest.approx(losses[0].kl, rel=1e-5) and losses[0].kl > 0
        optimizer = whole.learner.optimizer
        for name in (*subject.weights, *subject.norms):
            value, found = whole.learner.parameters[name], parts.learner.parameters[name].grad
            assert value.grad is not None and found is not None, name
            wanted = value.grad
            if name in subject.weights:
                learned = subject.artifact.weight(name, value, None)
                slopes = learned.slopes(optimizer.state[value]).values()
                wanted = torch.cat([slope.flatten() for slope in slopes])
            assert float((found - wanted).abs().max()) < 2e-4 * float(wanted.abs().max()), name


def _streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "distil_memory", lambda *_: DistilMemory(10**9, 10**6, streamed=True))


def test_the_artifact_is_the_resident_students(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = quantized(tiny_llama, tmp_path / "w3")
    options = replace(_STILL, clip=1e9, learning_rate=5e-3)  # the norm that is clipped is that of other gradients
    resident = distil(tiny_llama, before, tmp_path / "resident", options)
    _streamed(monkeypatch)
    streamed = distil(tiny_llama, before, tmp_path / "streamed", options)
    assert (resident.streamed, streamed.streamed) == (False, True)
    assert streamed.after is not None and streamed.before is not None and streamed.after < streamed.before
    assert streamed.before == pytest.approx(resident.before, rel=1e-5)
    assert streamed.after == pytest.approx(resident.after, rel=1e-3)
    assert (streamed.moved, streamed.norms, streamed.codes) == (0, resident.norms, resident.codes)
    first, second, start = (load_file(tmp_path / name / SINGLE_NAME) for name in ("resident", "streamed", "w3"))
    assert {name: (t.dtype, t.shape) for name, t in second.items()} == {n: (t.dtype, t.shape) for n, t in start.items()}
    for name, tensor in first.items():
        # A step of Adam begins at the sign of a gradient: where that is nothing but noise, the two may part.
        far = (tensor.float() - second[name].float()).abs() > 1e-3 * tensor.float().abs()
        assert float(far.float().mean()) < 0.01, name
        assert name.endswith("weight_scale") or "norm" in name or torch.equal(second[name], start[name]), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resident", "streamed", "w3"]


def test_an_interrupted_one_continues_to_the_bit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _streamed(monkeypatch)
    artifact, state = quantized(tiny_llama, tmp_path / "w3"), tmp_path / "state"
    distil(tiny_llama, artifact, tmp_path / "whole", _STILL)
    with interrupted_at(5):
        distil(tiny_llama, artifact, tmp_path / "again", _STILL, state=state)
    report = distil(tiny_llama, artifact, tmp_path / "again", _STILL, state=state)
    assert report.resumed_at == 4
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (tmp_path / "whole" / SINGLE_NAME).read_bytes()


def test_it_is_chosen_where_both_models_do_not_fit(tmp_path: Path) -> None:
    config = LlamaConfig()  # of 7 billion weights
    with torch.device("meta"):
        shapes = {name: tuple(state.shape) for name, state in LlamaForCausalLM(config).state_dict().items()}
    make_sparse(tmp_path / "7b", shapes, "BF16", 2)
    config.save_pretrained(tmp_path / "7b")
    with SafetensorsCheckpoint(tmp_path / "7b") as original:
        options = DistilOptions(steps=10)
        needs = [
            foresee_distil(original, options, 512, context=Context(memory=memory), scheme=Scheme.parse("w4a16-g64"))
            for memory in (10**12, 16 * 10**9)
        ]
        # In float32, where the processor has no instructions for bfloat16, it is 8.7 GB.
        assert needs[1].memory < 9e9 < 50e9 < needs[0].memory
        with pytest.raises(CapacityError, match="a block of each model"):
            foresee_distil(original, options, 512, context=Context(memory=10**9))
        with pytest.raises(CapacityError, match=r"without code_rate \(quantize.distil.code_rate: 0\) one block"):
            foresee_distil(original, replace(options, code_rate=0.1), 512, context=Context(memory=16 * 10**9))
