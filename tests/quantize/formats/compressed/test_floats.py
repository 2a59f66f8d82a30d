"""Floats with 8-bit or shared scales in compressed-tensors: transformers computes our logits, the library our weights.

Each scheme is written by a calibrated method, its config parsed by the library's own classes, its weights decompressed
by it tensor by tensor, and the whole loaded by transformers, which quantizes inputs as our evaluation does.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmconvert.engine.coroutine import record_inputs
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CalibrationError, CheckpointError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.compressed.config import read_config, written_config
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Override, Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = [torch.randint(0, 96, (1, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
LAYER = "model.layers.0"
# What the library calls them, and what chooses the codes here.
SCHEMES = {
    "nvfp4": ("NVFP4", "gptaq"),
    "nvfp4a16": ("NVFP4A16", "rtn"),
    "mxfp4": ("MXFP4", "awq"),
    "mxfp4a16": ("MXFP4A16", "gptq"),
    "mxfp8": ("MXFP8", "gptq"),
    "fp8-block": ("FP8_BLOCK", "gptq"),
    "fp8-static": ("FP8", "rtn"),
    "w4afp8": ("W4AFP8", "smoothquant"),
    "fp8-dynamic": ("FP8_DYNAMIC", "signround"),
}
OPTIONS = {"signround": {"steps": 2}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    model.save_pretrained(directory)
    return directory


def logits(directory: Path) -> torch.Tensor:
    view = open_dense(SafetensorsCheckpoint(directory))
    return torch.cat(list(stream_logits(view, WINDOWS[:2], device=CPU)))


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_and_the_library_read_what_is_written(source: Path, tmp_path: Path, name: str) -> None:
    preset, method = SCHEMES[name]
    output, scheme = tmp_path / "out", Scheme.parse(name)
    options = OPTIONS.get(method)
    checkpoint = SafetensorsCheckpoint(source)
    quantize_checkpoint(checkpoint, output, method=method, scheme=scheme, windows=WINDOWS, options=options)

    declared = json.loads((output / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(declared).config_groups.values()
    known = preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        found, wanted = getattr(group, part), getattr(known, part)
        assert (found is None) == (wanted is None)
        for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype"):
            assert found is None or getattr(found, key) == getattr(wanted, key), (part, key)
        assert found is None or found.block_structure == wanted.block_structure

    view = open_dense(SafetensorsCheckpoint(output))
    assert isinstance(view, QuantizedView)
    for weight, linear in view.quantized.items():
        assert linear.scheme == scheme
        assert torch.equal(decompressed(output, linear.linear, group), view[weight])

    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        expected = torch.cat([model(input_ids=window, use_cache=False).logits for window in WINDOWS[:2]])
    assert torch.equal(logits(output), expected)
    assert not torch.equal(expected, logits(source))
    # Other formats take its codes over, and this one writes them as they were.
    tensor = view.read_quantized(f"{LAYER}.mlp.down_proj.weight")
    packed = load_format("compressed-tensors").pack(f"{LAYER}.mlp.down_proj", tensor)
    stored = load_file(output / "model.safetensors")
    assert all(torch.equal(value.view(torch.uint8), stored[key].view(torch.uint8)) for key, value in packed.items())


def decompressed(directory: Path, linear: str, group: QuantizationScheme) -> torch.Tensor:
    """The weight as compressed-tensors itself restores it."""
    tensors = load_file(directory / "model.safetensors")
    parts = {key.removeprefix(f"{linear}."): value for key, value in tensors.items() if key.startswith(f"{linear}.")}
    assert group.format is not None
    weight = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)["weight"]
    assert isinstance(weight, torch.Tensor)
    return weight.to(torch.bfloat16)


@pytest.mark.parametrize(("name", "part"), [("nvfp4", "input_global_scale"), ("fp8-static", "input_scale")])
@pytest.mark.parametrize("method", ["gptaq", "signround", "rtn"])
def test_what_is_fixed_for_inputs_is_their_largest_magnitude(
    source: Path, tmp_path: Path, name: str, part: str, method: str
) -> None:
    """Of the first linears: nothing before them is quantized, so it is that of the original model."""
    output = tmp_path / "out"
    options = OPTIONS.get(method)
    scheme = Scheme.parse(name)
    quantize_checkpoint(
        SafetensorsCheckpoint(source), output, method=method, scheme=scheme, windows=WINDOWS, options=options
    )
    model = AutoModelForCausalLM.from_pretrained(source)
    largest: list[float] = []
    block = model.model.layers[0]
    seen = lambda _, value: largest.append(float(value.abs().max()))  # noqa: E731
    with torch.no_grad(), record_inputs(block, ["self_attn.q_proj"], seen):
        for window in WINDOWS:
            model(input_ids=window)
    tensors = load_file(output / "model.safetensors")
    found = {key: tensors[f"{LAYER}.self_attn.{key}_proj.{part}"] for key in "qkv"}
    expected = torch.tensor([448 * 6 / max(largest)])
    if part == "input_scale":
        expected = torch.tensor([max(largest) / 448]).to(torch.bfloat16)
    assert all(torch.equal(value, expected) for value in found.values())
    assert not torch.equal(tensors[f"{LAYER}.mlp.down_proj.{part}"], expected)


@pytest.mark.parametrize("method", ["gptq", "rtn", "awq", "signround"])
def test_fused_linears_share_the_scales_of_their_tensors_and_inputs(source: Path, tmp_path: Path, method: str) -> None:
    """vLLM takes the largest of those that it joins for all of them, and says no more than a warning."""
    output, scheme, options = tmp_path / "out", Scheme.parse("nvfp4"), OPTIONS.get(method)
    checkpoint = SafetensorsCheckpoint(source)
    quantize_checkpoint(checkpoint, output, method=method, scheme=scheme, windows=WINDOWS, options=options)
    tensors = load_file(output / "model.safetensors")
    for part in ("weight_global_scale", "input_global_scale"):
        divisors = {key: value for key, value in tensors.items() if key.endswith(part)}
        of = {key.split(".")[-2]: float(value) for key, value in divisors.items()}
        assert of["q_proj"] == of["k_proj"] == of["v_proj"] and of["gate_proj"] == of["up_proj"]
        assert all(torch.isfinite(value).all() for value in divisors.values())
        assert part == "input_global_scale" or len({*of.values()}) == 4


def test_fused_linears_share_the_scale_of_their_tensors_without_text(source: Path, tmp_path: Path) -> None:
    """Linears are read one by one then, and a divisor that leaves room for all of them is no less exact for any."""
    output, scheme = tmp_path / "out", Scheme.parse("nvfp4a16")
    quantize_checkpoint(SafetensorsCheckpoint(source), output, method="rtn", scheme=scheme)
    tensors, weights = load_file(output / "model.safetensors"), load_file(source / "model.safetensors")
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        largest = max(float(weights[f"{LAYER}.{name}.weight"].abs().max()) for name in names)
        found = {float(tensors[f"{LAYER}.{name}.weight_global_scale"]) for name in names}
        assert len(found) == 1 and found.pop() == pytest.approx(448 * 6 / largest)


@pytest.mark.parametrize(
    ("name", "dtype", "factor"), [("nvfp4", torch.bfloat16, 1e-37), ("fp8-static", torch.float16, 1e-6)]
)
def test_inputs_next_to_nothing_have_no_fixed_scale(
    source: Path, tmp_path: Path, name: str, dtype: torch.dtype, factor: float
) -> None:
    """Its inverse, or what is divided by it, would be infinite: in vLLM every token that meets it comes out as NaN."""
    model = LlamaForCausalLM.from_pretrained(source).to(dtype)
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight.mul_(factor)
    model.save_pretrained(tmp_path / "faint")
    with pytest.raises(UnsupportedError, match=r"gate_proj: its inputs reach .* so that it has no scale for them"):
        quantize_checkpoint(
            SafetensorsCheckpoint(tmp_path / "faint"), tmp_path / "out", method="rtn", scheme=Scheme.parse(name),
            windows=WINDOWS, overrides=[Override("*.down_proj", None)],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w4a16-g32-nvfp4", r"nvfp4 has groups of 16, and inputs of 16 or 4 bits: nvfp4a16 or nvfp4"),
        ("w4a8-g32-mxfp4", r"mxfp4 has groups of 32, and inputs of 16 or 4 bits"),
        ("w8a8-g64x64-fp8", r"per block of 128 × 128 \(fp8-block\)"),
        ("w8afp8-g128", r"runtimes read E4M3 inputs beside symmetric 4-bit integers \(w4afp8\)"),
    ],
)
def test_what_no_runtime_reads_is_refused(scheme: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load_format("compressed-tensors").check(Scheme.parse(scheme))


def test_what_does_not_fit_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"in groups of 128, which does not divide the 576 columns of q; .*fp8-dyn"):
        Scheme.parse("fp8-block").check_fits("q", 576)
    with pytest.raises(SchemeError, match=r"groups are of 32, which does not divide the 48 columns of q; leave it"):
        Scheme.parse("mxfp4a16").check_fits("q", 48)
    Scheme.parse("w8a16-g128x128-fp8").check_fits("q", 576)
    scheme = Scheme.parse("fp8-static")
    with pytest.raises(CalibrationError, match="w8a8-tensor-fp8 needs calibration text and was given none"):
        quantize_checkpoint(SafetensorsCheckpoint(source), tmp_path / "out", method="rtn", scheme=scheme)
    with pytest.raises(SchemeError, match="E4M3 activations go beside integer weights"):
        Scheme.parse("w8afp8-channel-fp8")


def test_a_fixed_scale_that_is_missing_is_named(source: Path, tmp_path: Path) -> None:
    output, scheme = tmp_path / "out", Scheme.parse("fp8-static")
    quantize_checkpoint(SafetensorsCheckpoint(source), output, method="rtn", scheme=scheme, windows=WINDOWS)
    declared = json.loads((output / "config.json").read_text())["quantization_config"]
    checkpoint = SafetensorsCheckpoint(output)
    name = f"{LAYER}.mlp.up_proj.input_scale"
    checkpoint.infos = {key: info for key, info in checkpoint.infos.items() if key != name}
    with pytest.raises(CheckpointError, match=r"there is no tensor 'model\.layers\.0\.mlp\.up_proj\.input_scale'"):
        QuantizedView(checkpoint, declared)


@pytest.mark.parametrize(
    ("version", "read"), [("0.13.0", False), ("0.12.3a20251114", False), ("0.14.0", True), (None, True)]
)
def test_exponents_that_the_library_wrote_too_small_are_refused(version: str | None, read: bool) -> None:
    """compressed-tensors 0.13: ``127 + floor(log2(scale)) - 2`` of a scale that had its two taken off already."""
    declared = {**written_config({"a.b": Scheme.parse("mxfp4a16")}, ()), "version": version}
    if read:
        assert str(read_config(declared).groups[0].scheme) == "w4a16-g32-mxfp4"
        return
    with pytest.raises(UnsupportedError, match=r"quantization_config\.version is .* two exponents too small"):
        read_config(declared)
    read_config({**written_config({"a.b": Scheme.parse("nvfp4a16")}, ()), "version": version})
