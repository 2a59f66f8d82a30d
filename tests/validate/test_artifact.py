"""All checks of one artifact, measured on tiny models and held against the resident model's own numbers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import tiny_llama_dir, tiny_tokenizer
from transformers import AutoModelForCausalLM

from llmconvert.errors import CalibrationError, UsageError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import TokenWindows, draw_windows
from llmconvert.validate.artifact import validate_artifact
from llmconvert.validate.generation.behaviour import BehaviourCheck, GenerationOptions
from llmconvert.validate.inventory import InventoryCheck
from llmconvert.validate.measurement import why_not_loadable
from llmconvert.validate.predictions.quality import QualityCheck
from llmconvert.validate.runtimes.vllm import VllmCheck
from llmconvert.validate.size import SizeCheck
from llmconvert.validate.vocabulary import VocabularyCheck

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def windows() -> TokenWindows:
    corpus = load_dataset_text("pydoc-topics:test")
    return draw_windows(tiny_tokenizer(), corpus, samples=3, length=40, order="sequential")


def measure(
    artifact: Path,
    original: Path | None,
    *,
    windows: TokenWindows | None = None,
    generation: GenerationOptions | None = None,
    size: SizeCheck = SizeCheck(),  # noqa: B008 (frozen)
    quality: QualityCheck = QualityCheck(),  # noqa: B008 (frozen)
) -> dict[str, Check]:
    """What is measured on every artifact, by name."""
    reference = None if original is None else SafetensorsCheckpoint(original)
    always = [VocabularyCheck(), size, InventoryCheck(), quality, BehaviourCheck(generation), VllmCheck()]
    checks = validate_artifact(artifact, always, reference=reference, windows=windows, device=CPU)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def log_softmax(directory: Path, windows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Float64 ``[predictions, vocabulary]`` of the model as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
    with torch.no_grad():
        return torch.cat([model(window).logits[0, :-1].double().log_softmax(-1) for window in windows])


def test_everything_at_once(original: Path, quantized: Path, windows: TokenWindows) -> None:
    found = measure(
        quantized,
        original,
        windows=windows,
        generation=GenerationOptions(max_new_tokens=4),
        size=SizeCheck(10**9),
        quality=QualityCheck(max_increase=10, max_kl=10, min_top1=0, overlap=0.01),
    )
    assert list(found) == [
        "size_bytes",
        "bits_per_weight",
        "inventory",
        "perplexity",
        "kl_mean",
        "kl_p99",
        "kl_p999",
        "top1_agreement",
        "block_divergence",
        "runtime",
        "fidelity.max_abs_diff",
        "generation.agreement",
        "generation.looping",
        "generation.ended",
        "speed.prefill",
        "speed.decode",
    ]
    assert all(check.ok for check in found.values())
    p, q = log_softmax(original, windows.windows), log_softmax(quantized, windows.windows)
    targets = torch.cat([window[0, 1:] for window in windows.windows])
    rows = torch.arange(len(targets))
    perplexity = found["perplexity"]
    assert perplexity.reference == pytest.approx(math.exp(-p[rows, targets].mean().item()), rel=1e-3)
    assert perplexity.value == pytest.approx(math.exp(-q[rows, targets].mean().item()), rel=1e-3)
    divergence = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).numpy()
    assert found["kl_mean"].value == pytest.approx(divergence.mean(), rel=2e-2)
    assert found["kl_p99"].value == pytest.approx(np.quantile(divergence, 0.99), rel=2e-2)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert found["top1_agreement"].value == pytest.approx(agreement)
    assert found["fidelity.max_abs_diff"].value == 0
    assert found["size_bytes"].value == (quantized / "model.safetensors").stat().st_size
    assert perplexity.detail["tokens"] == 3 * 39 and perplexity.detail["overlap"] == 0.01
    worst = found["kl_p99"].detail["worst"][0]
    assert worst["kl"] == pytest.approx(divergence.max(), rel=2e-2)
    window = windows.windows[worst["window"]][0]
    assert worst["next"] == tiny_tokenizer().decode(window[worst["position"] + 1 : worst["position"] + 2])
    assert len(found["generation.agreement"].detail["texts"]) == 8


def test_limits_fail_with_a_reason(original: Path, quantized: Path, windows: TokenWindows) -> None:
    quality = QualityCheck(max_increase=-0.5, max_kl=0, min_top1=1)
    generation = GenerationOptions(max_new_tokens=2, min_agreement=1.01)
    found = measure(quantized, original, windows=windows, generation=generation, size=SizeCheck(100), quality=quality)
    failed = {name for name, check in found.items() if not check.ok}
    assert failed == {"size_bytes", "perplexity", "kl_mean", "top1_agreement", "generation.agreement"}
    assert found["size_bytes"].text.endswith("bytes, allowed are 100")
    assert found["perplexity"].text.startswith("perplexity rose by") and "allowed are -50 %" in found["perplexity"].text


def test_an_original_does_not_differ_from_itself(original: Path, windows: TokenWindows) -> None:
    found = measure(original, original, windows=windows, quality=QualityCheck(max_increase=0, max_kl=0, min_top1=1))
    assert all(check.ok for check in found.values())
    assert found["kl_mean"].value == 0 and found["inventory"].detail["counts"] == {"kept": 20}


def test_without_an_original(quantized: Path, windows: TokenWindows) -> None:
    found = measure(quantized, None, windows=windows, generation=GenerationOptions(max_new_tokens=2))
    assert "inventory" not in found and "kl_mean" not in found
    assert found["perplexity"].value is not None and found["perplexity"].reference is None
    assert len(found["generation.looping"].detail["texts"]) == 8


def damaged(original: Path, directory: Path, name: str, value: float | None) -> Path:
    """A copy with one tensor dropped, or holding ``value`` in one place."""
    shutil.copytree(original, directory)
    weights = load_file(directory / "model.safetensors")
    if value is None:
        del weights[name]
    else:
        weights[name].view(-1)[7] = value
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_an_artifact_that_computes_nan_fails_and_gives_no_number(
    original: Path, windows: TokenWindows, tmp_path: Path
) -> None:
    broken = damaged(original, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight", math.nan)
    found = measure(broken, original, windows=windows)
    assert not found["perplexity"].ok and found["perplexity"].value is None
    assert "finite" in found["perplexity"].text and "kl_mean" not in found
    assert "model.layers.1.mlp.up_proj.weight" in found["inventory"].text


def test_an_artifact_that_lost_a_tensor_fails(original: Path, tmp_path: Path) -> None:
    broken = damaged(original, tmp_path / "lost", "model.layers.0.mlp.down_proj.weight", None)
    found = measure(broken, original, generation=GenerationOptions(max_new_tokens=2))
    assert not found["inventory"].ok and not found["runtime"].ok
    assert "model.layers.0.mlp.down_proj.weight" in found["inventory"].text
    assert "missing: model.layers.0.mlp.down_proj.weight" in found["runtime"].text


@pytest.mark.parametrize("compared", [True, False])
def test_text_is_not_scored_by_an_artifact_that_lost_a_tensor(
    original: Path, windows: TokenWindows, tmp_path: Path, compared: bool
) -> None:
    broken = damaged(original, tmp_path / "lost", "model.layers.0.mlp.down_proj.weight", None)
    found = measure(broken, original if compared else None, windows=windows)
    assert not found["perplexity"].ok and found["perplexity"].value is None
    assert "the artifact can't be run" in found["perplexity"].text
    assert "model.layers.0.mlp.down_proj.weight" in found["perplexity"].text


def test_a_model_too_large_for_the_memory_is_not_loaded(
    quantized: Path, windows: TokenWindows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmconvert.validate.runtimes.transformers.available_nbytes", lambda device: 1000)
    found = measure(quantized, None, windows=windows)
    assert found["runtime"].ok and found["runtime"].value is None
    assert "1,000 are free" in found["runtime"].text and "fidelity.max_abs_diff" not in found


def test_an_artifact_that_transformers_refuses_fails(original: Path, tmp_path: Path) -> None:
    broken = tmp_path / "refused"
    shutil.copytree(original, broken)
    config = json.loads((broken / "config.json").read_text()) | {"model_type": "nonesuch"}
    (broken / "config.json").write_text(json.dumps(config))
    found = measure(broken, None, generation=GenerationOptions(max_new_tokens=2))
    assert not found["runtime"].ok and "nonesuch" in found["runtime"].text


def test_what_mlx_reads_is_measured_without_transformers(
    original: Path, quantized: Path, windows: TokenWindows, tmp_path: Path
) -> None:
    """It has a config.json and no name of a method in it; every measurement that loads a model says why it does not."""
    with SafetensorsCheckpoint(original) as source:
        quantize_checkpoint(
            source, tmp_path / "mlx", method="rtn", scheme=Scheme.parse("w4a16-g32-affine"), format="mlx"
        )
    found = measure(tmp_path / "mlx", original, windows=windows)
    assert all(check.ok for check in found.values())
    assert found["kl_mean"].value is not None and found["kl_mean"].value > 0
    assert found["runtime"].value is None and "mlx-lm" in found["runtime"].text
    assert why_not_loadable(tmp_path / "mlx") and not why_not_loadable(original) and not why_not_loadable(quantized)


def test_models_too_large_for_the_memory_are_continued_and_judged_by_streaming(
    original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = GenerationOptions(max_new_tokens=4)
    loaded = measure(quantized, original, generation=options)
    monkeypatch.setattr("llmconvert.validate.runtimes.transformers.available_nbytes", lambda device: 1000)
    found = measure(quantized, original, generation=options)
    agreement = found["generation.agreement"]
    assert "in one streamed pass" in agreement.text and agreement.detail["runtime"] == "llmconvert, streamed"
    written = [text["artifact"] for text in agreement.detail["texts"]]
    assert written == [text["artifact"] for text in loaded["generation.agreement"].detail["texts"]]
    assert agreement.detail["prefix"] == pytest.approx(loaded["generation.agreement"].detail["prefix"])
    itself = measure(original, original, generation=options)
    assert itself["generation.agreement"].value == 1
    alone = measure(quantized, None, generation=options)
    assert len(alone["generation.looping"].detail["texts"]) == 8


def test_an_original_that_is_too_large_reads_what_the_artifact_wrote(
    original: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([10**12, 10**12, 1000])  # asked by the plan, for the artifact, and for the original
    monkeypatch.setattr("llmconvert.validate.runtimes.transformers.available_nbytes", lambda device: next(answers))
    found = measure(quantized, original, generation=GenerationOptions(max_new_tokens=4))
    assert "1,000 are free" in found["generation.agreement"].text
    assert found["speed.decode"].value and found["speed.decode"].reference is None


def test_the_block_that_was_damaged_is_named(original: Path, windows: TokenWindows, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(original, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"].neg_()
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    found = measure(broken, original, windows=windows)["block_divergence"]
    assert found.text.startswith("after the last block; by itself model.layers.1 errs most")
    assert [block["error"] > 0 for block in found.detail["blocks"]] == [False, True]


def test_nan_names_the_first_block(original: Path, windows: TokenWindows, tmp_path: Path) -> None:
    broken = damaged(original, tmp_path / "nan", "model.layers.1.mlp.up_proj.weight", math.nan)
    assert "block 1 (model.layers.1)" in measure(broken, original, windows=windows)["perplexity"].text
    with pytest.raises(CalibrationError, match=r"block 1 \(model\.layers\.1\)"):
        measure(original, broken, windows=windows)


def test_a_reference_with_another_vocabulary_is_refused_before_the_work(original: Path, tmp_path: Path) -> None:
    larger = tiny_llama_dir(tmp_path / "larger", vocab_size=400)
    with pytest.raises(UsageError, match="vocabulary of 400 tokens, the artifact one of 320"):
        measure(original, larger)
    renamed = tmp_path / "renamed"
    shutil.copytree(original, renamed)
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match=r"is token '[ab]' in the reference's tokenizer, '[ab]' in"):
        measure(original, renamed)


@pytest.mark.parametrize("stride", [12, 39])
def test_overlapping_windows_are_scored_once_in_every_number(
    original: Path, quantized: Path, windows: TokenWindows, stride: int
) -> None:
    """Against both models resident, a window at a time."""
    text = torch.cat(windows.windows, dim=1)[0]
    cut = tuple(text[i : i + 40].unsqueeze(0) for i in range(0, len(text) - 39, stride))
    overlapping = replace(windows, windows=cut, requested=len(cut), stride=stride)
    found = measure(quantized, original, windows=overlapping)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (original, quantized)]
    losses: list[list[float]] = [[], []]
    divergences: list[float] = []
    for index, window in enumerate(cut):
        first = 0 if index == 0 else 39 - stride
        with torch.no_grad():
            p, q = (model(window).logits[0, first:39].double().log_softmax(-1) for model in models)
        for kept, scores in zip(losses, (p, q), strict=True):
            kept += (-scores.gather(1, window[0, first + 1 :].unsqueeze(1))).flatten().tolist()
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
    check = found["perplexity"]
    assert check.reference == pytest.approx(math.exp(np.mean(losses[0])), rel=1e-3)
    assert check.value == pytest.approx(math.exp(np.mean(losses[1])), rel=1e-3)
    assert found["kl_mean"].value == pytest.approx(np.mean(divergences), rel=0.02)
    told = {key: check.detail[key] for key in ("window", "stride", "windows", "tokens")}
    assert told == {"window": 40, "stride": stride, "windows": len(cut), "tokens": len(divergences)}
    alone = measure(quantized, None, windows=overlapping)["perplexity"]
    assert alone.value == pytest.approx(check.value) and alone.detail["tokens"] == len(divergences)


def test_numbers_that_mean_little_carry_a_warning(original: Path, quantized: Path, windows: TokenWindows) -> None:
    found = measure(quantized, original, windows=windows, quality=QualityCheck(overlap=0.2))["perplexity"]
    assert "20.0 % of this text was calibrated on" in found.text
    # A random model predicts this text worse than guessing.
    assert (found.reference or 0) > 320 and "worse than guessing" in found.text
    assert found.ok


def test_endings_that_are_lost_fail(original: Path, tmp_path: Path) -> None:
    """Without its last norm a model finds all tokens equally likely, and token 0, the first, ends a text."""
    ending = tmp_path / "ending"
    shutil.copytree(original, ending)
    weights = load_file(ending / "model.safetensors")
    weights["model.norm.weight"].zero_()
    save_file(weights, ending / "model.safetensors", {"format": "pt"})
    options = GenerationOptions(max_new_tokens=3, prompts=("One.", "Two."))
    lost = measure(original, ending, generation=options)["generation.ended"]
    assert not lost.ok and (lost.value, lost.reference) == (0, 2)
    assert lost.text == "0 of 2 texts end by themselves, 2 before"
    kept = measure(ending, ending, generation=options)
    assert kept["generation.ended"].ok and kept["generation.ended"].value == 2
    assert [text["prompt"] for text in kept["generation.agreement"].detail["texts"]] == ["One.", "Two."]
