"""Quantized sources: converted to what their owners dequantize, quantized in one command, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight

from llmconvert.api import convert_model, quantize_model, validate_model
from llmconvert.cli import main
from llmconvert.convert.inspection import inspect_model
from llmconvert.convert.quantized import stored_as
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Report
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

BLOCK = 48


def released(source: Path, directory: Path) -> dict[str, torch.Tensor]:
    """The model in FP8 as DeepSeek's are released, in blocks that don't divide it; gives what it dequantizes to."""
    directory.mkdir()
    for path in source.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    tensors, dense = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        dense[name] = weight.bfloat16()
        tensors[name] = dense[name]
        if not name.endswith("_proj.weight"):
            continue
        rows, columns = weight.shape
        grid = torch.zeros(-(-rows // BLOCK), -(-columns // BLOCK))
        for i in range(len(grid)):
            for j in range(grid.shape[1]):
                part = weight[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK]
                grid[i, j] = part.float().abs().max() / 448
        full = grid.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
        codes = (weight.float() / full).to(torch.float8_e4m3fn)
        tensors[name], tensors[f"{name}_scale_inv"] = codes, grid
        dense[name] = _dequantize_fp8_weight(codes, grid, (BLOCK, BLOCK), torch.float32).bfloat16()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (directory / "config.json").write_text(json.dumps(config))
    return dense


def test_a_release_is_a_source(tiny_llama: Path, tmp_path: Path) -> None:
    """Converted it is what its owner dequantizes, bit for bit; quantized in one command it is the same as from that."""
    dense = released(tiny_llama, tmp_path / "fp8")
    convert_model(tmp_path / "fp8", tmp_path / "dense")
    written = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(written) == set(dense) and all(torch.equal(written[name], dense[name]) for name in dense)
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    quantize_model(tmp_path / "fp8", tmp_path / "w4", scheme="w4a16-g32", method="rtn")
    quantize_model(tmp_path / "dense", tmp_path / "same", scheme="w4a16-g32", method="rtn")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("w4", "same")]
    assert weights[0] == weights[1]
    info = Report.read(tmp_path / "w4" / "llmconvert/report.json").model
    assert (info.stored, info.requantized) == ("fp8, w8a8-g48x48-fp8", False)
    assert "The original is stored in `fp8, w8a8-g48x48-fp8`" in (tmp_path / "w4" / "README.md").read_text()
    checks = validate_model(tmp_path / "w4", tmp_path / "fp8").checks
    assert all(check.ok for check in checks)


def test_it_is_named(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    released(tiny_llama, tmp_path / "fp8")
    found = inspect_model(str(tmp_path / "fp8"))
    assert found.quantization == "fp8" and found.released and found.unread is None
    assert found.mixture["w8a8-g48x48-fp8"].tensors == 14
    main(["inspect", str(tmp_path / "fp8")], standalone_mode=False)
    assert "8-bit floats (E4M3), one scale per block of 48 × 48" in " ".join(capsys.readouterr().out.split())


def test_what_was_quantized_for_deployment_is_quantized_again_on_request_alone(
    tiny_llama: Path, tmp_path: Path
) -> None:
    quantize_model(tiny_llama, tmp_path / "ours", scheme="w4a16-g32", method="rtn")
    with pytest.raises(
        UsageError, match=r"ours: was quantized for deployment \(compressed-tensors, w4a16-g32-sym\).*--requantize"
    ):
        quantize_model(tmp_path / "ours", tmp_path / "out", scheme="w8a16-g32", method="rtn")
    assert not (tmp_path / "out").exists()
    quantize_model(tmp_path / "ours", tmp_path / "out", scheme="w8a16-g32", method="rtn", requantize=True)
    info = Report.read(tmp_path / "out" / "llmconvert/report.json").model
    assert (info.stored, info.requantized) == ("compressed-tensors, w4a16-g32-sym", True)
    assert "**Its weights were rounded twice**" in (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load((tmp_path / "out" / "llmconvert/recipe.yaml").read_text())["requantize"] is True
    convert_model(tmp_path / "ours", tmp_path / "dense")  # reading it asks for nothing


@pytest.mark.parametrize(
    ("format", "scheme", "released"),
    [
        ("compressed-tensors", "w4a16-g32", True),
        ("compressed-tensors", "fp8", True),
        ("compressed-tensors", "w8a8", False),
        ("compressed-tensors", "w4a16-g32-asym", False),
        ("gptq", "w4a16-g32", False),
        ("bitsandbytes", "nf4", False),
    ],
)
def test_what_counts_as_a_release(tiny_llama: Path, tmp_path: Path, format: str, scheme: str, released: bool) -> None:
    source = SafetensorsCheckpoint(tiny_llama)
    quantize_checkpoint(source, tmp_path / "m", method="rtn", scheme=Scheme.parse(scheme), format=format)
    found = stored_as(SafetensorsCheckpoint(tmp_path / "m"))
    assert found is not None and (found.method, found.released) == (format, released)
    assert stored_as(source) is None


def test_gguf_counts_by_its_bits(tiny_llama: Path, tmp_path: Path) -> None:
    quantize_model(tiny_llama, tmp_path / "q8.gguf", scheme="q8_0", format="gguf")
    quantize_model(tiny_llama, tmp_path / "q4.gguf", scheme="q4_0", format="gguf")
    quantize_model(tmp_path / "q8.gguf", tmp_path / "w4", scheme="w4a16-g32", method="rtn")
    with pytest.raises(UsageError, match=r"quantized for deployment \(gguf, q4_0\)"):
        quantize_model(tmp_path / "q4.gguf", tmp_path / "again", scheme="w4a16-g32", method="rtn")


def test_codes_that_a_file_takes_over_are_not_rounded_again(tiny_llama: Path, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(tiny_llama)
    quantize_checkpoint(source, tmp_path / "m", method="rtn", scheme=Scheme.parse("w8a16-g32"), format="gptq")
    quantize_model(tmp_path / "m", tmp_path / "same.gguf", scheme="q8_0", format="gguf")
    with pytest.raises(UsageError, match="quantized for deployment"):
        quantize_model(tmp_path / "m", tmp_path / "other.gguf", scheme="q4_0", format="gguf")


def test_an_unknown_method_is_refused_before_the_work(tiny_llama: Path, tmp_path: Path) -> None:
    released(tiny_llama, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "quark"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    message = r"quantized with 'quark'.*known are .*fp8"
    with pytest.raises(UnsupportedError, match=message):
        convert_model(tmp_path / "m", tmp_path / "out")
    with pytest.raises(UnsupportedError, match=message):
        quantize_model(tmp_path / "m", tmp_path / "out", scheme="w4a16-g32", method="rtn")
    assert not (tmp_path / "out").exists()
