"""Weights and scales are held against the range of what stores them, at both ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantized import random_tensor

from llmconvert.convert.cast import CastView
from llmconvert.convert.dtype import convert_dtype
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.methods.base import Target
from llmconvert.quantize.methods.rtn import Rtn
from llmconvert.quantize.narrow import coarse_share
from llmconvert.quantize.scheme import Scheme, parse_scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
FADING = "model.layers.1.mlp.up_proj"
FITTING = "model.layers.0.mlp.up_proj"


def scaled(source: Path, output: Path, factor: float, *, rows: int | None = None) -> SafetensorsCheckpoint:
    """A copy whose one linear (or its first rows) is scaled down."""
    output.mkdir()
    for path in source.iterdir():
        (output / path.name).write_bytes(path.read_bytes())
    tensors = load_file(output / "model.safetensors")
    tensors[f"{FADING}.weight"][:rows] *= factor
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    return SafetensorsCheckpoint(output)


def quantize(source: SafetensorsCheckpoint, output: Path, scheme: str, format: str) -> SafetensorsCheckpoint:
    quantize_checkpoint(source, output, method="rtn", scheme=parse_scheme(scheme), format=format)
    return SafetensorsCheckpoint(output)


NARROW = [("w4a16-g32", "gptq"), ("w4a16-g32-asym", "awq"), ("llm.int8", "bitsandbytes")]


@pytest.mark.parametrize(("scheme", "format"), NARROW)
def test_a_layer_whose_scales_fade_is_refused_and_other_formats_hold_it(
    tiny: Tiny, tmp_path: Path, scheme: str, format: str
) -> None:
    source = scaled(tiny("llama", torch.bfloat16), tmp_path / "source", 1e-9)
    with pytest.raises(UnsupportedError, match=rf"{FADING}: .* 100% of it .* too small .*float16.*compressed-tensors"):
        quantize(source, tmp_path / "out", scheme, format)
    assert not (tmp_path / "out").exists()
    held = open_dense(quantize(source, tmp_path / "held", "w4a16-g32", "compressed-tensors"))[f"{FADING}.weight"]
    weight = source[f"{FADING}.weight"].float()
    assert float((held.float() - weight).norm() / weight.norm()) < 0.2


@pytest.mark.parametrize(("scheme", "format"), [("w4a16-g32", "compressed-tensors"), ("w8a8", "compressed-tensors")])
def test_scales_in_the_models_own_float16_are_held_against_it(
    tiny: Tiny, tmp_path: Path, scheme: str, format: str
) -> None:
    source = scaled(tiny("llama", torch.float16), tmp_path / "source", 1e-7)
    with pytest.raises(UnsupportedError, match=rf"{FADING}: scales of .* too small .* model in bfloat16 or float32"):
        quantize(source, tmp_path / "out", scheme, format)


@pytest.mark.parametrize(("scheme", "format"), NARROW)
def test_rows_that_are_next_to_nothing_may_fade(tiny: Tiny, tmp_path: Path, scheme: str, format: str) -> None:
    """Dead neurons are no reason to refuse a model."""
    source = scaled(tiny("llama", torch.bfloat16), tmp_path / "source", 1e-9, rows=5)
    dense = open_dense(quantize(source, tmp_path / "out", scheme, format))[f"{FADING}.weight"]
    assert not dense[:5].float().abs().gt(1e-6).any() and dense[5:].any(1).all()


@pytest.mark.parametrize("format", ["gptq", "awq"])
@pytest.mark.parametrize(("factor", "message"), [(1e7, "beyond float16"), (1e-7, "too small"), (3e-6, "too small")])
def test_both_ends_of_float16(format: str, factor: float, message: str) -> None:
    """Scales of about 0.05: at 3e-6 of them float16 has two or three steps left."""
    tensor = random_tensor(Scheme.parse("w4a16-g32-asym"), 32, 64, torch.bfloat16)
    moved = QuantizedTensor(tensor.codes, tensor.scale * factor, tensor.zero, tensor.scheme)
    with pytest.raises(UnsupportedError, match=message):
        load_format(format).pack("a.b", moved)
    fitting = QuantizedTensor(tensor.codes, tensor.scale * 1e-3, tensor.zero, tensor.scheme)
    load_format(format).pack("a.b", fitting)


@pytest.mark.parametrize("scheme", ["nvfp4a16", "fp8-static"])
def test_digits_lost_below_one_large_weight_are_counted(scheme: str) -> None:
    """Beside E4M3's own definition: normal numbers begin at 2⁻⁶. What is zero before loses nothing."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    weight[16:] = 0

    def share(largest: float) -> float | None:
        weight[0, 0] = largest
        target = Target("a.b", weight, Scheme.parse(scheme))
        tensor = Rtn().quantize([target], None, torch.float32)["a.b"].tensor
        found = coarse_share(tensor, lambda: weight)
        if found:
            values = tensor.scale if tensor.divisor is not None else tensor.codes.float()
            assert found == pytest.approx(float((values[:16].abs() < 2**-6).float().mean()))
        return found

    assert share(4.0) == 0 or scheme == "fp8-static"
    few, some, most = share(1e3), share(6e4), share(3e5)
    assert few is not None and some is not None and most is not None
    assert few < 0.1 < 0.25 < some < most <= 1
    other = Rtn().quantize([Target("a.b", weight, Scheme.parse("mxfp4a16"))], None, torch.float32)["a.b"].tensor
    assert coarse_share(other, lambda: weight) is None


def test_linears_with_coarse_scales_are_named(tiny: Tiny, tmp_path: Path) -> None:
    """The gate too, which has the same float32 scale as the projection with the large weight."""
    source = scaled(tiny("llama", torch.bfloat16), tmp_path / "source", 1e5, rows=1)
    result = quantize_checkpoint(source, tmp_path / "out", method="rtn", scheme=parse_scheme("nvfp4a16"))
    lost = {layer.name for layer in result.layers if (layer.coarse or 0) > 0.25}
    assert lost == {FADING, FADING.replace("up", "gate")}
    (note,) = (note for note in result.notes if note.startswith("coarse scales"))
    gate = FADING.replace("up", "gate")
    assert f"{gate}, {FADING} (100% of {gate})" in note and "mxfp4 for nvfp4" in note
    plain = quantize_checkpoint(source, tmp_path / "mx", method="rtn", scheme=parse_scheme("mxfp4a16"))
    assert not any("coarse" in note for note in plain.notes) and plain.layers[0].coarse is None


@pytest.mark.parametrize("scheme", ["q8_0", "q4_0", "q4_k_m", "f16"])
def test_a_tensor_that_a_gguf_type_makes_zero_is_refused(tmp_path: Path, tiny_llama: Path, scheme: str) -> None:
    source = scaled(tiny_llama, tmp_path / "source", 1e-9)
    with pytest.raises(UnsupportedError, match=rf"'{FADING}\.weight': 100% of it .* makes them zero .* bf16 or f32"):
        quantize_checkpoint(source, tmp_path / "m.gguf", method="rtn", scheme=parse_scheme(scheme), format="gguf")
    quantize_checkpoint(source, tmp_path / "held.gguf", method="rtn", scheme=parse_scheme("bf16"), format="gguf")
    few = scaled(tiny_llama, tmp_path / "few", 1e-9, rows=5)
    quantize_checkpoint(few, tmp_path / "few.gguf", method="rtn", scheme=parse_scheme(scheme), format="gguf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_conversion_to_float16_refuses_a_tensor_that_fades(tiny: Tiny, tmp_path: Path, dtype: torch.dtype) -> None:
    source = scaled(tiny("llama", dtype), tmp_path / "source", 1e-8)
    with pytest.raises(UnsupportedError, match=rf"tensor {FADING}\.weight: \d+% of it .*bfloat16 or float32.*overflow"):
        convert_dtype(source, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedError, match=rf"tensor {FADING}\.weight"):
        CastView(source, torch.float16)[f"{FADING}.weight"]
    clipped = convert_dtype(source, tmp_path / "clipped", dtype=torch.float16, overflow="clip")
    assert clipped.underflows > 1000
    convert_dtype(source, tmp_path / "wide", dtype=torch.bfloat16)


def test_single_values_below_the_range_are_no_reason_to_refuse(tiny: Tiny, tmp_path: Path) -> None:
    """Every model has some; they are counted."""
    source = scaled(tiny("llama", torch.bfloat16), tmp_path / "source", 1e-10, rows=3)
    assert convert_dtype(source, tmp_path / "out", dtype=torch.float16).underflows > 100


def test_infinities_and_zeros_do_not_count_as_faded(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    values = torch.tensor([0.0, float("inf"), float("nan"), 1.0, -0.0, 1e-9])
    save_file({"w": values, "z": torch.zeros(7), "e": torch.zeros(0)}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text("{}")
    report = convert_dtype(SafetensorsCheckpoint(tmp_path / "m"), tmp_path / "out", dtype=torch.float16)
    assert (report.non_finite, report.underflows) == (2, 1)
