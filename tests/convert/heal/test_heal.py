"""Healing: gradients against plain autograd on transformers' own models, resuming to the bit, refusals before work."""

from __future__ import annotations

import multiprocessing
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.disguised_heads import grouped_model
from support.healing import QUICK, WINDOWS, heal, heal_until_killed
from support.tiny_architectures import ids
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.gqa.weights import attention_tensors
from llmconvert.convert.heal.lora import merge_adapter
from llmconvert.convert.heal.options import HealOptions, TrainedWeights
from llmconvert.errors import CapacityError, DatasetError, UnsupportedError, UsageError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.storage.shared import share_tensors
from llmconvert.training.loss import hidden_divergence, prediction_divergence
from llmconvert.training.model import ResidentModel
from llmconvert.training.state import TrainingState, load_state, save_state


def pair(directory: Path, kind: str = "llama", **config: Any) -> tuple[Path, Path]:
    """An original, and itself merged to one key-value head."""
    original = grouped_model(directory / "original", kind, kv_heads=4, **config)
    with SafetensorsCheckpoint(original) as checkpoint:
        convert_attention(checkpoint, directory / "merged", kv_heads=1)
    return original, directory / "merged"


def trained(directory: Path) -> list[str]:
    with SafetensorsCheckpoint(directory) as checkpoint:
        geometry = read_geometry(checkpoint)
        return [name for i in range(geometry.layers) for name in attention_tensors(checkpoint, geometry, i)]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"head_dim": 8}),
        ("llama", {"head_dim": 8, "everything": True, "tie_word_embeddings": True}),
        ("llama", {"head_dim": 8, "everything": True, "tie_word_embeddings": False}),
        ("cohere", {"logit_scale": 0.3}),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 3.0}),
        ("granite", {"head_dim": 8, "logits_scaling": 2.0}),
        ("phi3", {"hidden_size": 64}),
        ("qwen2", {"hidden_size": 64}),
    ],
)
def test_gradients_are_those_of_the_plain_loss(kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    """The loss in pieces, with its known gradient, equals transformers' models, whole logits and autograd."""
    everything = config.pop("everything", False)
    original, merged = pair(tmp_path, kind, **config)
    names = list(load_file(merged / SINGLE_NAME)) if everything else trained(merged)
    window = ids((24,), seed=8)[0]
    with SafetensorsCheckpoint(original) as first, SafetensorsCheckpoint(merged) as second:
        views = share_tensors((first, second), frozenset(names), torch.device("cpu"), torch.float32)
        teacher, student = (ResidentModel(view, torch.device("cpu"), torch.float32) for view in views)
        parameters = student.train(names)
        with torch.no_grad():
            target_final, targets = teacher.decode(window)
        final, states = student.decode(window)
        kl, slope = prediction_divergence(teacher, student, target_final, final, gradient=True)
        hidden = hidden_divergence(targets, states)
        torch.autograd.backward([final, hidden], [slope, torch.tensor(0.7)])

    attention = "eager" if kind == "gemma2" else "sdpa"
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        for path in (original, merged)
    ]
    blocks: list[list[torch.Tensor]] = [[], []]
    for model, seen in zip(models, blocks, strict=True):
        for block in model.model.layers:
            block.register_forward_hook(
                lambda _, __, out, seen=seen: seen.append(out[0] if isinstance(out, tuple) else out)
            )
    with torch.no_grad():
        expected = models[0](window).logits[0].log_softmax(-1)
    found = models[1](window).logits[0].log_softmax(-1)
    plain = kl_div(found, expected, log_target=True, reduction="sum") / window.shape[1]

    def share(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return error / (error + size)

    apart = torch.stack(
        [share((b - a).square().sum(-1), a.square().sum(-1)).mean() for a, b in zip(*blocks, strict=True)]
    ).mean()
    (plain + 0.7 * apart).backward()
    assert kl == pytest.approx(float(plain.detach()), rel=1e-4) and kl > 1e-3
    assert float(hidden.detach()) == pytest.approx(float(apart.detach()), rel=1e-4)
    wanted = dict(models[1].named_parameters())
    for name, parameter in parameters.items():
        gradient = wanted[name].grad
        assert parameter.grad is not None and gradient is not None
        scale = float(gradient.abs().max())
        assert float((parameter.grad - gradient).abs().max()) < 2e-3 * scale, name


def test_healing_brings_the_model_closer_to_the_original(tmp_path: Path) -> None:
    original, merged = pair(tmp_path, head_dim=8)
    windows = ids((64,) * 244, seed=4)
    options = HealOptions(steps=60, batch=4, learning_rate=3e-2, held_out=4, evaluate_every=20)
    report = heal(original, merged, tmp_path / "healed", windows=windows, options=options)
    assert report.before is not None and report.after is not None
    assert report.after < 0.8 * report.before
    assert report.steps == 60 and report.tokens == 60 * 4 * 64
    before, after = load_file(merged / SINGLE_NAME), load_file(tmp_path / "healed" / SINGLE_NAME)
    names = set(trained(merged))
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert (tmp_path / "healed" / "config.json").read_bytes() == (merged / "config.json").read_bytes()


@pytest.mark.parametrize("train", ["all", "lora"])
def test_what_learns_is_written_and_nothing_else(tmp_path: Path, train: TrainedWeights) -> None:
    """Also where the run is stopped between two states: the same bytes come of it."""
    original, merged = pair(tmp_path, head_dim=8)
    options = replace(QUICK, train=train, learning_rate=3e-2, rank=3, alpha=2.0)
    state = tmp_path / "state.safetensors"
    report = heal(original, merged, tmp_path / "healed", options=options, state=state)
    assert report.before is not None and report.after is not None and report.after < report.before
    before, after = load_file(merged / SINGLE_NAME), load_file(tmp_path / "healed" / SINGLE_NAME)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linears = {name for name in before if name.endswith("_proj.weight")}
    assert changed == (set(before) if train == "all" else linears)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    if train == "lora":
        kept = {name.removeprefix("best/"): tensor for name, tensor in load_file(state).items()}
        assert report.trained == sum(len(kept[f"{n}.lora_A"]) * sum(before[n].shape) for n in linears)
        for name in linears:
            a, b = kept[f"{name}.lora_A"], kept[f"{name}.lora_B"]
            assert a.shape == (3, before[name].shape[1])
            merge = before[name].double() + 2 / 3 * (b.double() @ a.double())
            assert torch.equal(after[name], merge.to(before[name].dtype))

    def stop_at_the_second(path: Path, current: TrainingState) -> None:
        if current.step > QUICK.save_every:
            raise KeyboardInterrupt
        save_state(path, current)

    stopped = {"options": options, "state": tmp_path / "stopped.safetensors"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("llmconvert.training.output.save_state", stop_at_the_second)
        heal(original, merged, tmp_path / "stopped", **stopped)
    assert not (tmp_path / "stopped").exists()
    assert heal(original, merged, tmp_path / "stopped", **stopped).resumed_at == QUICK.save_every
    assert (tmp_path / "stopped" / SINGLE_NAME).read_bytes() == (tmp_path / "healed" / SINGLE_NAME).read_bytes()


def test_adapters_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    generator = torch.Generator().manual_seed(2)
    base = torch.nn.Linear(24, 16, bias=False)
    model = peft.get_peft_model(
        torch.nn.Sequential(base), peft.LoraConfig(r=3, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
    )
    layer = model.base_model.model[0]
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    inputs = torch.randn(5, 24, generator=generator)
    merged = merge_adapter(base.weight.detach(), {"w.lora_A": a, "w.lora_B": b}, "w", 2 / 3)
    torch.testing.assert_close(merged, model.merge_and_unload()[0].weight.detach())
    torch.testing.assert_close(inputs @ merged.T, layer(inputs))


def test_the_best_weights_are_written_and_steps_in_vain_are_not_taken(tmp_path: Path) -> None:
    original, merged = pair(tmp_path, head_dim=8)
    options = HealOptions(steps=40, learning_rate=10.0, held_out=4, evaluate_every=2, patience=3)
    report = heal(original, merged, tmp_path / "healed", options=options)
    # At step 26 the third look of the second half is no better than the first of all.
    assert report.steps == 26 and report.best_step == 0 and report.after == report.before
    assert (tmp_path / "healed" / SINGLE_NAME).read_bytes() == (merged / SINGLE_NAME).read_bytes()


@pytest.mark.slow
def test_a_killed_healing_continues_to_the_bit(tmp_path: Path) -> None:
    original, merged = pair(tmp_path, head_dim=8)
    context = multiprocessing.get_context("spawn")

    def run(name: str, kill_at: int) -> int | None:
        process = context.Process(
            target=heal_until_killed,
            args=(original, merged, tmp_path / name, tmp_path / f"{name}.safetensors", kill_at),
        )
        process.start()
        process.join()
        return process.exitcode

    assert run("whole", 0) == 0
    assert run("killed", 2) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert load_state(tmp_path / "killed.safetensors", "another job") is None
    assert run("killed", 0) == 0
    for leaf in (SINGLE_NAME, "config.json"):
        assert (tmp_path / "killed" / leaf).read_bytes() == (tmp_path / "whole" / leaf).read_bytes()
    with torch.no_grad():
        states = [load_file(tmp_path / f"{name}.safetensors") for name in ("killed", "whole")]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_job_does_not_take_up_the_state(tmp_path: Path) -> None:
    original, merged = pair(tmp_path, head_dim=8)
    state = tmp_path / "state.safetensors"
    heal(original, merged, tmp_path / "one", state=state)
    assert heal(original, merged, tmp_path / "two", state=state).resumed_at == QUICK.steps
    changed = replace(QUICK, learning_rate=1e-4)
    assert heal(original, merged, tmp_path / "three", state=state, options=changed).resumed_at == 0


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, merged = pair(tmp_path, head_dim=8)
    other = grouped_model(tmp_path / "other", "llama", kv_heads=4, head_dim=8, intermediate_size=96)
    with pytest.raises(UsageError, match=r"mlp.* is not the same"):
        heal(other, merged, tmp_path / "out")
    mixture = grouped_model(tmp_path / "mixture", "mixtral", kv_heads=4, head_dim=8)
    with pytest.raises(UnsupportedError, match=r"'mixtral' is a mixture of experts.*set attention\.heal\.train"):
        heal(mixture, mixture, tmp_path / "out", options=replace(QUICK, train="all"))
    with pytest.raises(DatasetError, match="4 windows"):
        heal(original, merged, tmp_path / "out", windows=WINDOWS[:4])
    monkeypatch.setattr("llmconvert.training.needs.available_nbytes", lambda device: 1000)
    with pytest.raises(CapacityError, match="healing needs about"):
        heal(original, merged, tmp_path / "out")
    with pytest.raises(CapacityError, match=r"train attention alone \(attention\.heal\.train: attention\)"):
        heal(original, merged, tmp_path / "out", options=replace(QUICK, train="all"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "mixture", "original", "other"]
