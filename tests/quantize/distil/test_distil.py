"""Distillation: steps against autograd and torch's Adam, files that keep their layout, resuming, refusals."""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.distilling import QUICK, WINDOWS, distil, distil_until_killed, held_out_divergence, quantized
from torch import nn
from transformers import AutoModelForCausalLM

from llmconvert.context import Context
from llmconvert.errors import CapacityError, DatasetError, UnsupportedError, UsageError
from llmconvert.quantize.distil.optimizer import StoredAdam
from llmconvert.quantize.distil.trained import LearnedValue, Trained
from llmconvert.quantize.distil.weights import LearnedWeight
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.scheme import Override, Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.training.pair import ResidentPair


@pytest.mark.parametrize("name", ["w3a16-g16", "w4a16-g16-asym", "w8a8-channel-fp8", "w4a16-g32-affine", "nvfp4a16"])
def test_steps_are_adams_on_what_autograd_passes_through_the_roundings(name: str) -> None:
    """An oracle of torch's own: roundings by ``x + (round(x) - x).detach()``, ``torch.optim.Adam`` on the rest."""
    scheme = Scheme.parse(name)
    moving = scheme.number.even
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(8, 32, generator=generator)
    inputs, wanted = torch.randn(20, 32, generator=generator), torch.randn(20, 8, generator=generator)
    start = Rtn().quantize([Target("w", own, scheme)], None, torch.bfloat16)["w"].tensor
    norm = nn.Parameter(torch.rand(32, generator=generator) + 0.5)
    value = nn.Parameter(start.dequantize(torch.float32))
    learned = LearnedWeight(start, value, torch.float32, torch.bfloat16, own if moving else None)
    trained: dict[str, Trained] = {"w": learned, "n": LearnedValue(norm.detach().clone(), norm)}
    ours = StoredAdam(trained, lr=0.02, code_rate=0.1)

    groups = start.scale.shape[1]
    codes = start.scheme.number.values(start.codes).view(8, groups, -1)
    zero = 0 if start.zero is None else start.zero.float().unsqueeze(-1)
    divisor = 1.0 if start.divisor is None else start.divisor
    scale, size = start.scale.float().unsqueeze(-1) / divisor, norm.detach().clone()
    added = torch.zeros_like(scale) if start.offset is None else start.offset.float().unsqueeze(-1)
    place = ours.state[value].get("place", codes).clone().requires_grad_(moving)
    factor, shift = torch.zeros_like(scale, requires_grad=True), torch.zeros_like(scale, requires_grad=True)
    delta = torch.zeros_like(size, requires_grad=True)
    adam = torch.optim.Adam(
        [factor, shift, delta] if start.offset is not None else [factor, delta], lr=0.02, betas=(0.9, 0.95), eps=1e-12
    )
    other = torch.optim.Adam([place], lr=0.1, betas=(0.9, 0.95), eps=1e-12) if moving else None
    low, high = scheme.number.limits

    def through(exact: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return exact + (rounded - exact).detach()

    for _ in range(5):
        (inputs * norm @ value.T - wanted).square().mean().backward()
        ours.step()
        ours.zero_grad()
        exact, moved = scale * (1 + factor), added + scale * shift
        stored = scheme.number.round_scale(exact * divisor, torch.bfloat16).float() / divisor
        code = through(place, place.round().clamp(low, high)) if moving else codes
        weight = (code - zero) * through(exact, stored) + through(moved, moved.bfloat16().float())
        weight = weight.view(8, 32)
        (inputs * (size + size * delta) @ weight.T - wanted).square().mean().backward()
        for optimizer in (adam, other):
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
        if moving:  # no further than to the neighbours
            place.data.clamp_((codes - 1).clamp(min=low) - 0.49, (codes + 1).clamp(max=high) + 0.49)
    torch.testing.assert_close(ours.state[value]["factor"], factor.detach().squeeze(-1), rtol=0, atol=2e-3)
    if start.offset is not None:
        torch.testing.assert_close(ours.state[value]["shift"], shift.detach().squeeze(-1), rtol=0, atol=2e-3)
    torch.testing.assert_close(norm.detach(), size + size * delta.detach(), rtol=0, atol=2e-3)
    if moving:
        # Means of the places are kept in bfloat16.
        torch.testing.assert_close(ours.state[value]["place"], place.detach(), rtol=0, atol=2e-2)
        assert not torch.equal(ours.stored(learned)["codes"], start.codes)


@pytest.mark.parametrize(
    ("format", "scheme", "parts"),
    [
        ("compressed-tensors", "w3a16-g32", {"weight_scale"}),
        ("compressed-tensors", "nvfp4a16", {"weight_scale"}),
        ("gptq", "w3a16-g32", {"scales"}),
        ("awq", "w4a16-g32-asym", {"scales"}),
        ("mlx", "w3a16-g32-affine", {"scales", "biases"}),
    ],
)
def test_scales_learn_and_nothing_else_changes(
    format: str, scheme: str, parts: set[str], tiny_llama: Path, tmp_path: Path
) -> None:
    before = quantized(tiny_llama, tmp_path / "w4", scheme, format)
    options = replace(QUICK, code_rate=0.0, norms=False, learning_rate=5e-3)
    if scheme == "nvfp4a16":  # whose scales lie 6 to 12 % apart
        options = replace(options, steps=20, batch=4)
    report = distil(tiny_llama, before, tmp_path / "out", options)
    assert report.before is not None and report.after is not None and report.after < report.before
    assert (report.moved, report.norms) == (0, 0)
    first, second = load_file(before / SINGLE_NAME), load_file(tmp_path / "out" / SINGLE_NAME)
    assert {name: (t.dtype, t.shape) for name, t in first.items()} == {n: (t.dtype, t.shape) for n, t in second.items()}
    changed = {name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])}
    assert changed == parts
    assert (tmp_path / "out" / SINGLE_NAME).stat().st_size == (before / SINGLE_NAME).stat().st_size
    assert (tmp_path / "out" / "config.json").read_bytes() == (before / "config.json").read_bytes()


def _divergence(original: Path, artifact: Path) -> float:
    models = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (original, artifact))
    return held_out_divergence(*models)


def test_a_quantized_head_is_what_the_scales_learn_for(tiny_llama: Path, tmp_path: Path) -> None:
    """The student has the head that its file has, not the original's."""
    with SafetensorsCheckpoint(tiny_llama) as source:
        scheme = Scheme.parse("w4a16-g32")
        quantize_checkpoint(source, tmp_path / "w4", method="rtn", scheme=scheme, overrides=[Override("head", scheme)])
    report = distil(tiny_llama, tmp_path / "w4", tmp_path / "out", replace(QUICK, steps=1, code_rate=0.0))
    assert report.before == pytest.approx(_divergence(tiny_llama, tmp_path / "w4"), rel=0.02)


def test_codes_move_to_their_neighbours_and_transformers_reads_what_was_measured(
    tiny_llama: Path, tmp_path: Path
) -> None:
    before = quantized(tiny_llama, tmp_path / "w3")
    report = distil(tiny_llama, before, tmp_path / "out", replace(QUICK, held_out=0))
    assert 0 < report.moved < report.codes
    moved = 0
    with SafetensorsCheckpoint(before) as first, SafetensorsCheckpoint(tmp_path / "out") as second:
        views = open_dense(first), open_dense(second)
        assert isinstance(views[0], QuantizedView) and isinstance(views[1], QuantizedView)
        for name in views[0].quantized:
            ours, theirs = views[0].read_quantized(name).codes.int(), views[1].read_quantized(name).codes.int()
            assert int((ours - theirs).abs().max()) <= 1
            moved += int((ours != theirs).sum())
        assert report.norms == sum(not torch.equal(first[name], second[name]) for name in first if "norm" in name)
    assert moved == report.moved

    again = distil(tiny_llama, tmp_path / "out", tmp_path / "again", replace(QUICK, learning_rate=1e-9, code_rate=0.0))
    assert _divergence(tiny_llama, tmp_path / "out") == pytest.approx(again.before, rel=0.02)


@pytest.mark.parametrize(
    ("looks", "steps"),
    [([1.0, 1.2, 1.3, 1.4, 1.1, 0.9], 5), ([1.0, 0.9, 1.2, 1.3, 1.2, 1.1], 5), ([1.0] + [2.0] * 9, 7)],
)
def test_it_stops_early_when_rates_have_fallen_and_nothing_is_gained(
    looks: list[float], steps: int, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At first a student may stand behind where it began; what it comes to is seen when rates are lower."""
    before, told = quantized(tiny_llama, tmp_path / "w3"), iter(looks)
    monkeypatch.setattr(ResidentPair, "divergence", lambda pair, numbers: next(told))
    options = replace(QUICK, steps=len(looks) - 1, evaluate_every=1, patience=3, batch=1)
    report = distil(tiny_llama, before, tmp_path / "out", options)
    assert report.steps == steps
    assert [look["kl"] for look in report.held_out] == looks[: steps + 1]


@pytest.mark.slow
def test_a_killed_distillation_continues_to_the_bit(tiny_llama: Path, tmp_path: Path) -> None:
    artifact = quantized(tiny_llama, tmp_path / "w3")
    context = multiprocessing.get_context("spawn")

    def run(name: str, kill_at: int) -> int | None:
        places = tmp_path / name, tmp_path / f"{name}.safetensors"
        process = context.Process(target=distil_until_killed, args=(tiny_llama, artifact, *places, kill_at))
        process.start()
        process.join()
        return process.exitcode

    assert run("whole", 0) == 0
    assert run("killed", 3) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert run("killed", 0) == 0
    assert (tmp_path / "killed" / SINGLE_NAME).read_bytes() == (tmp_path / "whole" / SINGLE_NAME).read_bytes()


def test_refusals_leave_nothing_behind(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w4 = quantized(tiny_llama, tmp_path / "w4", "w4a16-g32")
    nf4 = quantized(tiny_llama, tmp_path / "nf4", "nf4", "bitsandbytes")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="not quantized"):
        distil(tiny_llama, tiny_llama, out)
    with pytest.raises(
        UnsupportedError, match="whose scales are those of several rows, powers of two, nested or prescribed"
    ):
        distil(tiny_llama, nf4, out)
    with pytest.raises(DatasetError, match="4 windows"):
        distil(tiny_llama, w4, out, windows=WINDOWS[:4])
    with pytest.raises(CapacityError, match=r"code_rate: 0.*or leave out"):
        distil(tiny_llama, w4, out, context=Context(memory=1000))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nf4", "w4"]
