"""Released checkpoints in FP8, NVFP4, MXFP4, MXFP8 and int4, read as their owners' libraries dequantize them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file
from support.quantized import write_quantized
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, _dequantize_fp8_weight
from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.pack import pack_words
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

E4M3 = torch.float8_e4m3fn
E8M0 = torch.float8_e8m0fnu
Tensors = dict[str, torch.Tensor]


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    """Every E4M3 number that is finite, at random."""
    raw = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    return torch.where((raw & 127) == 127, 126, raw).to(torch.uint8).view(E4M3)


def some_bytes(*shape: int, low: int = 0, high: int = 256, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def scales(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 0.01 + 1e-4


def require_view(path: Path, tensors: Tensors, declared: Mapping[str, Any], expected: Tensors, scheme: str) -> None:
    """Read whole, in rows from anywhere, in bfloat16 and float32: bit for bit, and named."""
    checkpoint = write_quantized(path, tensors, declared)
    for dtype in (torch.bfloat16, torch.float32):
        view = open_dense(checkpoint, dtype)
        assert isinstance(view, QuantizedView) and "quantization_config" not in view.config
        assert set(view) == set(expected)
        for name, weight in expected.items():
            wanted = weight.to(dtype)
            assert view.infos[name].shape == tuple(weight.shape) and str(view.scheme_of(name)) == scheme
            assert torch.equal(view[name], wanted), name
            for start, stop in ((0, 1), (1, len(weight)), (len(weight) // 2, len(weight)), (3, 3)):
                assert torch.equal(view.read_rows(name, start, stop), wanted[start:stop])
    # In the dtype that the config declares, without being asked for one.
    assert {info.dtype for info in open_dense(checkpoint).infos.values()} <= {torch.bfloat16, torch.float32}


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (200, 300), (300, 130), (64, 64)])
def test_fp8_in_blocks(tmp_path: Path, rows: int, columns: int) -> None:
    """As transformers multiplies; of shapes that 128 doesn't divide it can't derive the blocks, and another of its
    functions is told them."""
    weight, scale = codes(rows, columns), scales(-(-rows // 128), -(-columns // 128))
    tensors = {"a.b.weight": weight, "a.b.weight_scale_inv": scale}
    expected = _dequantize_fp8_weight(weight, scale, (128, 128), torch.float32)
    if rows % 128 == columns % 128 == 0:
        assert torch.equal(Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32), expected)
    require_view(tmp_path / "m", tensors, BLOCKS, {"a.b.weight": expected}, "w8a8-g128x128-fp8")


@pytest.mark.parametrize("name", ["a.b.scale", "a.b.qscale_weight"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, E8M0])
def test_fp8_with_scales_of_other_names_and_dtypes(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    weight, raw = codes(256, 128), some_bytes(2, 1, low=110, high=140)
    scale = raw.view(E8M0) if dtype == E8M0 else scales(2, 1).bfloat16()
    expected = Fp8Dequantize(None)._dequantize_one(weight, raw if dtype == E8M0 else scale, torch.float32)
    tensors = {"a.b.weight": weight, name: scale}
    require_view(tmp_path / "m", tensors, BLOCKS, {"a.b.weight": expected}, "w8a8-g128x128-fp8")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_fp8_per_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    weight, scale = codes(50, 70), scales(*shape)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "a.activation_scale": torch.ones(shape)}
    declared = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    expected = _dequantize_fp8_weight(weight, scale, None, torch.float32)
    require_view(tmp_path / "m", tensors, declared, {"a.weight": expected}, "w8a8-tensor-fp8")


def test_fp8_experts_in_one_tensor(tmp_path: Path) -> None:
    weight, scale = codes(3, 256, 384), scales(3, 2, 3)
    tensors = {"a.experts.gate_up_proj": weight, "a.experts.gate_up_proj_scale_inv": scale}
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    require_view(tmp_path / "m", tensors, BLOCKS, {"a.experts.gate_up_proj": expected}, "w8a8-g128x128-fp8")


@pytest.mark.parametrize("dtype", [torch.uint8, E8M0])
def test_mxfp8(tmp_path: Path, dtype: torch.dtype) -> None:
    weight, scale = codes(40, 96), some_bytes(40, 3, low=90, high=160)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale.view(dtype)}
    require_view(tmp_path / "m", tensors, {"quant_method": "mxfp8"}, {"a.weight": expected}, "w8a8-g32-mxfp8")


def test_experts_packed_beside_fp8(tmp_path: Path) -> None:
    packed, scale = some_bytes(48, 64).view(torch.int8), some_bytes(48, 4, low=100, high=140)
    expected = Fp8Dequantize(None)._dequantize_one(packed, scale, torch.float32)
    tensors = {"a.experts.0.w1.weight": packed, "a.experts.0.w1.scale": scale.view(E8M0)}
    declared = {**BLOCKS, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}
    require_view(tmp_path / "m", tensors, declared, {"a.experts.0.w1.weight": expected}, "w4a8-g32-mxfp4")


def test_fbgemm(tmp_path: Path) -> None:
    """By its definition: transformers has kernels for GPUs alone. Experts have their outputs last."""
    weight, scale = codes(48, 64), scales(48, 1)
    fused, last = codes(2, 64, 96), scales(2, 1, 96)
    tensors = {
        "a.weight": weight,
        "a.weight_scale": scale,
        "a.input_scale_ub": torch.tensor(1200.0),
        "b.experts.gate_up_proj": fused,
        "b.experts.gate_up_proj_scale": last,
    }
    expected = {"a.weight": weight.float() * scale, "b.experts.gate_up_proj": fused.float() * last}
    declared = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    require_view(tmp_path / "m", tensors, declared, expected, "w8a8-channel-fp8")


def test_gpt_oss(tmp_path: Path) -> None:
    """Experts of gpt-oss: every code under scales from nearly the smallest to nearly the largest."""
    blocks, scale = some_bytes(3, 80, 4, 16), some_bytes(3, 80, 4, low=0, high=250)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scale, f"{name}_bias": torch.ones(3, 80)}
    checkpoint = write_quantized(tmp_path / "m", tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]})
    expected = _convert_moe_packed_tensors(blocks, scale, dtype=torch.bfloat16)
    view = open_dense(checkpoint)
    assert set(view) == {name, f"{name}_bias"} and view.infos[name].dtype == torch.bfloat16
    assert expected.shape == (3, 128, 80) and torch.equal(view[name], expected)
    assert torch.equal(view.read_rows(name, 1, 2), expected[1:2])
    assert isinstance(view, QuantizedView) and str(view.scheme_of(name)) == "w4a16-g32-mxfp4"


def nvfp4_by_modelopt(packed: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """As NVIDIA's library has it: both scales multiplied first, then the codes' values, in float32."""
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    levels = torch.tensor([*positive, 0, *(-value for value in positive[1:])])
    unpacked = torch.empty(packed.shape[0], 2 * packed.shape[1])
    unpacked[:, 1::2], unpacked[:, 0::2] = levels[(packed >> 4).long()], levels[(packed & 15).long()]
    grouped = unpacked.view(len(packed), -1, 16) * (scale.float() * factor).unsqueeze(-1)
    return grouped.reshape(unpacked.shape)


@pytest.mark.parametrize("beside", ["config.json", "hf_quant_config.json"])
def test_modelopt(tmp_path: Path, beside: str) -> None:
    packed, scale = some_bytes(48, 40), codes(48, 5).float().abs().to(E4M3)
    factor = torch.tensor(3.7e-5)
    tensors = {
        "a.weight": packed,
        "a.weight_scale": scale,
        "a.weight_scale_2": factor,
        "a.input_scale": torch.tensor(0.1),
        "a.k_scale": torch.tensor(1.0),
    }
    expected = nvfp4_by_modelopt(packed, scale, factor)
    algorithm = {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"], "kv_cache_quant_algo": "FP8", "group_size": 16}
    if beside == "config.json":
        declared = {"quant_method": "modelopt", "producer": {"name": "modelopt"}, **algorithm}
        require_view(tmp_path / "m", tensors, declared, {"a.weight": expected}, "w4a4-g16-nvfp4")
        return
    checkpoint = write_quantized(tmp_path / "m", tensors, {})
    told = (
        b'{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}'
    )
    checkpoint.files = {beside: told}
    view = open_dense(checkpoint, torch.float32)
    assert torch.equal(view["a.weight"], expected) and beside not in view.files


@pytest.mark.parametrize(
    ("scale", "scheme"),
    [(scales(), "w8a8-tensor-fp8"), (scales(160), "w8a8-channel-fp8"), (scales(2, 1, 3, 1), "w8a8-g128x128-fp8")],
)
def test_modelopt_in_fp8(tmp_path: Path, scale: torch.Tensor, scheme: str) -> None:
    weight = codes(160, 300)
    grid = scale.reshape(Scheme.parse(scheme).scale_shape(160, 300))
    height, width = (160 if len(grid) == 1 else 1 if len(grid) == 160 else 128), 300 if grid.shape[1] == 1 else 128
    expected = _dequantize_fp8_weight(weight, grid, (height, width), torch.float32)
    tensors = {"a.weight": weight, "a.weight_scale": scale}
    declared = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    require_view(tmp_path / "m", tensors, declared, {"a.weight": expected}, scheme)


def compressed(weights: Mapping[str, Any], layout: str, inputs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "format": layout}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}}


FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
IN_GROUPS = {**STATIC, "strategy": "group", "group_size": 128, "dynamic": True}
FP4 = {**FLOAT, "num_bits": 4}


def fp8(scale: torch.Tensor) -> Callable[[int, int], Tensors]:
    return lambda rows, columns: {"weight": codes(rows, columns), "weight_scale": scale}


def packed(scale: torch.Tensor, **more: torch.Tensor) -> Callable[[int, int], Tensors]:
    return lambda rows, columns: {"weight_packed": some_bytes(rows, columns // 2), "weight_scale": scale, **more}


def int4(rows: int, columns: int) -> Tensors:
    """As Kimi is released: groups of 32 and scales in bfloat16."""
    return {
        "weight_packed": pack_words(some_bytes(rows, columns, high=16), 4),
        "weight_scale": scales(rows, columns // 32).bfloat16(),
        "weight_shape": torch.tensor([rows, columns]),
    }


COMPRESSED: dict[str, tuple[dict[str, Any], Callable[[int, int], Tensors], tuple[int, int], str]] = {
    "fp8 per tensor": (
        compressed({**FLOAT, "strategy": "tensor"}, "float-quantized", STATIC),
        fp8(scales(1)),
        (50, 70),
        "w8a8-tensor-fp8",
    ),
    "fp8 per channel": (
        compressed(
            {**FLOAT, "strategy": "channel"}, "float-quantized", {**STATIC, "strategy": "token", "dynamic": True}
        ),
        fp8(scales(50, 1).bfloat16()),
        (50, 70),
        "w8a8-channel-fp8",
    ),
    "fp8 in blocks": (
        compressed({**FLOAT, "strategy": "block", "block_structure": [128, 128]}, "float-quantized", IN_GROUPS),
        fp8(scales(3, 2)),
        (300, 130),
        "w8a8-g128x128-fp8",
    ),
    "mxfp8": (
        compressed({**FLOAT, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "mxfp8-quantized"),
        fp8(some_bytes(50, 3, low=90, high=160)),
        (50, 96),
        "w8a16-g32-mxfp8",
    ),
    "nvfp4": (
        compressed(
            {**FP4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
            "nvfp4-pack-quantized",
            {**FP4, "strategy": "tensor_group", "group_size": 16, "dynamic": "local"},
        ),
        packed(codes(50, 5).float().abs().to(E4M3), weight_global_scale=torch.tensor([1371.3])),
        (50, 80),
        "w4a4-g16-nvfp4",
    ),
    "mxfp4": (
        compressed(
            {**FP4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "mxfp4-pack-quantized"
        ),
        packed(some_bytes(50, 3, low=90, high=160)),
        (50, 96),
        "w4a16-g32-mxfp4",
    ),
    "int4": (
        compressed(
            {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}, "pack-quantized"
        ),
        int4,
        (50, 96),
        "w4a16-g32-sym",
    ),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(tmp_path: Path, kind: str) -> None:
    """As compressed-tensors' own compressors decompress them."""
    declared, make, (rows, columns), scheme = COMPRESSED[kind]
    stored = make(rows, columns)
    group = declared["config_groups"]["group_0"]
    of_linear = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs.model_validate(group["weights"]))
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    expected = compressor.decompress(dict(stored), of_linear)["weight"]
    tensors = {f"a.b.{part}": tensor for part, tensor in stored.items()}
    if (group.get("input_activations") or {}).get("dynamic", True) is not True:
        tensors |= {f"a.b.{part}": torch.tensor([2.0]) for part in ("input_scale", "input_global_scale")}
    checkpoint = write_quantized(tmp_path / "m", tensors, declared)
    view = open_dense(checkpoint, torch.bfloat16)
    assert list(view) == ["a.b.weight"] and isinstance(view, QuantizedView)
    assert str(view.scheme_of("a.b.weight")) == scheme
    assert torch.equal(view["a.b.weight"], expected.bfloat16())
    assert torch.equal(view.read_rows("a.b.weight", 7, 41), expected[7:41].bfloat16())
    tensor = view.read_quantized("a.b.weight")
    assert str(tensor.scheme) == scheme and torch.equal(tensor.dequantize(torch.bfloat16), expected.bfloat16())


def test_scales_in_another_shard(tmp_path: Path) -> None:
    weight, scale = codes(256, 128), scales(2, 1)
    whole = write_quantized(tmp_path / "one", {"a.weight": weight, "a.weight_scale_inv": scale}, BLOCKS)
    split = tmp_path / "two"
    split.mkdir()
    (split / "config.json").write_bytes((tmp_path / "one" / "config.json").read_bytes())
    save_file({"a.weight": weight}, split / "model-00001-of-00002.safetensors")
    save_file({"a.weight_scale_inv": scale}, split / "model-00002-of-00002.safetensors")
    (split / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a.weight": "model-00001-of-00002.safetensors", '
        '"a.weight_scale_inv": "model-00002-of-00002.safetensors"}}'
    )
    assert torch.equal(open_dense(SafetensorsCheckpoint(split))["a.weight"], open_dense(whole)["a.weight"])


def test_a_config_may_lie_in_that_of_the_language_model(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(128, 128), "a.weight_scale_inv": scales(1, 1)}
    checkpoint = write_quantized(tmp_path / "m", tensors, {})
    checkpoint.config = {"text_config": {"model_type": "x", "quantization_config": BLOCKS}, "vision_config": {}}
    view = open_dense(checkpoint)
    assert isinstance(view, QuantizedView) and view.config == {"text_config": {"model_type": "x"}, "vision_config": {}}


FAULTS: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "no scales": ({"a.weight": codes(8, 8)}, BLOCKS, "there is no tensor 'a.weight_scale_inv' with their scales"),
    "another grid": (
        {"a.weight": codes(300, 128), "a.weight_scale_inv": scales(2, 1)},
        BLOCKS,
        "'a.weight_scale_inv' has shape [2, 1]; 'a.weight' of [300, 128] in w8a8-g128x128-fp8 needs [3, 1]",
    ),
    "an unknown key": (
        {"a.weight": codes(8, 8), "a.weight_scale_inv": scales(1, 1)},
        {**BLOCKS, "rotation": "hadamard"},
        'quantization_config.rotation is "hadamard"',
    ),
    "scales of nothing": (
        {"a.weight": codes(8, 8), "a.weight_scale_inv": scales(1, 1), "b.weight_scale_inv": scales(1, 1)},
        BLOCKS,
        "tensor 'b.weight_scale_inv' (float32 [1, 1]) looks like part of a quantized weight",
    ),
    "another dtype": (
        {"a.weight": codes(8, 8), "a.weight_scale_inv": torch.ones(1, 1).int()},
        BLOCKS,
        "'a.weight_scale_inv' is int32; this reader knows scales in float16",
    ),
    "e5m2": ({"a.weight": codes(8, 8).view(torch.float8_e5m2)}, BLOCKS, "'a.weight' is float8_e5m2"),
    "blocks of another size": (
        {"a_blocks": some_bytes(2, 4, 3, 8), "a_scales": some_bytes(2, 4, 3)},
        {"quant_method": "mxfp4"},
        "expected uint8 [experts, outputs, groups, 16]",
    ),
    "inputs that are multiplied": (
        {"a.weight": some_bytes(4, 16), "a.weight_scale": codes(4, 2), "a.weight_scale_2": scales()}
        | {"a.pre_quant_scale": scales(32)},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        "tensor 'a.pre_quant_scale' (float32 [32]) looks like part",
    ),
    "another algorithm": ({}, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, 'quant_algo is "W4A16_AWQ"'),
    "an unknown method": (
        {},
        {"quant_method": "quark"},
        "quantized with 'quark' (quant_method in its config); known are",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    tensors, declared, message = FAULTS[fault]
    checkpoint = write_quantized(tmp_path / "m", {"c.weight": torch.ones(1), **tensors}, declared)
    with pytest.raises((UnsupportedError, CheckpointError), match=re.escape(message)):
        open_dense(checkpoint)
