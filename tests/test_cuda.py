"""What a GPU computes is what the CPU computes, but for the order of sums; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.disguised_heads import grouped_model
from support.quantized import hessian_of, random_inputs, random_weight
from support.tiny_architectures import ARCHITECTURES, ids
from support.tiny_models import tiny_llama_dir
from transformers import AutoModelForCausalLM

from llmconvert.context import Context
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.heal.job import heal_attention
from llmconvert.convert.heal.options import HealOptions
from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.statistics import Hessian
from llmconvert.quantize.catalog.methods import METHODS, needs_calibration
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.matrix import Combination, combinations
from llmconvert.quantize.methods.base import Quantizer, Solution, Target, load_method, load_quantizer
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import plan_choice
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.plan import QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs.agreement import compare_backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

Tiny = Callable[..., Path]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
WINDOWS = ids((24, 16, 24))
# GGML's types are encoded on the CPU.
SCHEMES = [one for one in combinations() if isinstance(one.scheme, Scheme)]
QUANTIZERS = [name for name in METHODS if isinstance(load_method(name, {}), Quantizer)]
CALIBRATED = [name for name in QUANTIZERS if needs_calibration(name)]


def quantize(source: Path, output: Path, device: torch.device, **options: Any) -> QuantizeResult:
    settings: dict[str, Any] = {"method": "gptq", "scheme": Scheme.parse("w4a16-g32"), "windows": WINDOWS, **options}
    return quantize_checkpoint(SafetensorsCheckpoint(source), output, device=device, **settings)


def weights(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix in (".safetensors", ".json")}


def form(weight: torch.Tensor, tensor: QuantizedTensor, matrix: torch.Tensor) -> float:
    """The squared output error."""
    error = tensor.dequantize(torch.float64).cpu() - weight.double()
    return float((error @ matrix.double() * error).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_logits_are_those_of_the_resident_model(tiny: Tiny, name: str, dtype: torch.dtype) -> None:
    directory = tiny(name, dtype)
    attention = "eager" if name == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention)
    model.to(CUDA).eval()
    streamed = stream_logits(SafetensorsCheckpoint(directory), WINDOWS, device=CUDA)
    with torch.no_grad():
        for window, logits in zip(WINDOWS, streamed, strict=True):
            assert torch.equal(logits, model(input_ids=window.to(CUDA), use_cache=False).logits)


@pytest.mark.parametrize("one", SCHEMES, ids=lambda one: f"{one.method}-{one.scheme}-{one.format}")
def test_every_combination_comes_to_the_same_error(one: Combination) -> None:
    method, layout, scheme = load_quantizer(one.method, {}), load_format(one.format), one.scheme
    assert isinstance(scheme, Scheme)
    scale_dtype = layout.scale_dtype(scheme, torch.bfloat16)
    weight, matrix = random_weight(64, 128), hessian_of(random_inputs(512, 128)).matrix

    def solution(device: torch.device) -> Solution:
        copies = (matrix.to(device, copy=True) for _ in range(2))
        hessian = Hessian(next(copies), 512, next(copies)) if method.calibration != "none" else None
        return method.quantize([Target("l", weight.to(device), scheme)], hessian, scale_dtype)["l"]

    own, other = solution(CPU), solution(CUDA)
    assert other.tensor.codes.device.type == "cuda"
    assert form(weight, other.tensor, matrix) == pytest.approx(form(weight, own.tensor, matrix), rel=0.05)
    if own.error is not None:
        assert other.error == pytest.approx(own.error, rel=0.05)
    stored = layout.pack("l", other.tensor)
    again = layout.unpack("l", {name: part.cpu() for name, part in stored.items()}, scheme)
    assert torch.equal(again.codes.view(torch.uint8), other.tensor.codes.cpu().view(torch.uint8))
    assert torch.equal(again.scale, other.tensor.scale.cpu())


@pytest.mark.parametrize("method", QUANTIZERS)
def test_artifacts_come_out_alike(tiny: Tiny, method: str, tmp_path: Path) -> None:
    source = tiny("llama", torch.bfloat16)
    own, other = (quantize(source, tmp_path / device.type, device, method=method) for device in (CPU, CUDA))
    assert [layer.name for layer in own.layers] == [layer.name for layer in other.layers]
    here, there = ([layer.error for layer in result.layers] for result in (own, other))
    assert all((error is None) == (expected is None) for error, expected in zip(there, here, strict=True))
    if None not in here:
        assert there[0] == pytest.approx(here[0], rel=0.02)
        # A rounding that falls to the other side sends all linears behind it another way.
        assert sum(filter(None, there)) == pytest.approx(sum(filter(None, here)), rel=0.1)
    names = {path.name for path in (tmp_path / "cpu").iterdir()}
    assert {path.name for path in (tmp_path / "cuda").iterdir()} == names


@pytest.mark.parametrize("method", CALIBRATED)
def test_both_modes_and_a_second_run_give_the_same_bytes(tiny: Tiny, method: str, tmp_path: Path) -> None:
    source = tiny("qwen2", torch.bfloat16)
    for name, mode in (("first", "lockstep"), ("second", "lockstep"), ("replay", "replay")):
        quantize(source, tmp_path / name, CUDA, method=method, mode=mode)
    first = weights(tmp_path / "first")
    assert weights(tmp_path / "second") == first
    assert weights(tmp_path / "replay") == first


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_quantized(tiny: Tiny, name: str, tmp_path: Path) -> None:
    result = quantize(tiny(name, torch.bfloat16), tmp_path / "out", CUDA, method="gptaq")
    assert all(layer.error is not None and 0 < layer.error < 0.2 for layer in result.layers)


def test_a_budget_chooses_alike(tiny: Tiny, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(tiny("llama", torch.bfloat16))
    request = QuantizeRequest("gptq", Scheme.parse("w4a16"))
    own, other = (
        plan_choice(
            source, tmp_path / device.type, Budget(5.5), request, windows=WINDOWS, context=Context(device)
        ).run()
        for device in (CPU, CUDA)
    )
    assert other.bits_per_weight == pytest.approx(own.bits_per_weight, abs=0.25)


def test_heads_are_merged_and_healed(tmp_path: Path) -> None:
    original = grouped_model(tmp_path / "original", "llama", kv_heads=4, head_dim=8)
    windows = ids((24,) * 20, seed=3)
    reports = {}
    with SafetensorsCheckpoint(original) as source:
        for device in (CPU, CUDA):
            merged, healed = tmp_path / f"merged-{device.type}", tmp_path / f"healed-{device.type}"
            report = convert_attention(source, merged, kv_heads=2, windows=windows, device=device)
            with SafetensorsCheckpoint(merged) as student:
                options = HealOptions(steps=6, held_out=4, evaluate_every=3, save_every=2)
                healing = heal_attention(source, student, healed, windows=windows, options=options, device=device)
            reports[device.type] = [layer.output_loss for layer in report.layers], healing
    (here, own), (there, other) = reports["cpu"], reports["cuda"]
    assert there == pytest.approx(here, rel=0.05)
    assert other.before == pytest.approx(own.before, rel=0.1)
    assert other.after == pytest.approx(own.after, rel=0.2)


def test_attention_backends_agree(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "m", dtype=torch.bfloat16, num_key_value_heads=4)
    windows = [window[0].tolist() for window in ids((64, 48))]
    names = ["eager", "math", "flash", "efficient"]
    found = compare_backends(str(directory), names, windows, device="cuda", prompts=["Say hello."], max_new_tokens=8)
    assert any("flash" in kernel for kernel in found["backends"]["flash"]["kernels"])
    assert "float32_max_abs_diff" not in found["backends"]["flash"], "it has no float32 there"
    for scores in found["backends"].values():
        assert scores["perplexity"] == pytest.approx(found["reference"]["perplexity"], rel=1e-2)
