"""Readers of all formats understand what stands in config and checkpoint, or refuse it by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from support.heard import Heard
from support.quantized import random_tensor, write_quantized
from transformers import AutoModelForCausalLM

from llmconvert.convert.dtype import convert_dtype
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

Tiny = Callable[..., Path]
ROWS, COLUMNS, SIZE = 48, 96, 32


def declared(
    *, weights: dict[str, Any] | None = None, group: dict[str, Any] | None = None, **config: Any
) -> dict[str, Any]:
    """A config as llm-compressor writes it, with changes."""
    numbers = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": SIZE,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {**numbers, **(weights or {})}, **(group or {})}
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": 1.9,
        **config,
    }


def stored(scheme: str = "w4a16-g32", seed: int = 0) -> dict[str, torch.Tensor]:
    return load_format("compressed-tensors").pack(
        "a.b", random_tensor(Scheme.parse(scheme), ROWS, COLUMNS, torch.bfloat16, seed)
    )


def reference(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, group_index: np.ndarray) -> np.ndarray:
    """What compressed-tensors 0.10 computes: columns sorted by group, one group after the other, and put back."""
    order = np.argsort(group_index, kind="stable")
    sorted_codes = codes[:, order].astype(np.float32)
    sizes = np.unique(group_index, return_counts=True)[1]
    start = 0
    for number, size in enumerate(sizes):
        part = sorted_codes[:, start : start + size]
        if zero is not None:
            part -= zero[:, number : number + 1].astype(np.float32)
        part *= scale[:, number : number + 1]
        start += size
    return sorted_codes[:, np.argsort(order, kind="stable")]


@pytest.mark.parametrize("actorder", ["group", "dynamic", True])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, False)])
def test_columns_in_another_order_are_read_in_it(
    tmp_path: Path, bits: int, symmetric: bool, actorder: str | bool
) -> None:
    rng = np.random.default_rng(bits)
    half, groups = 1 << (bits - 1), COLUMNS // SIZE
    codes = rng.integers(-half, half, (ROWS, COLUMNS)).astype(np.int8)
    scale = torch.from_numpy(rng.uniform(0.01, 0.1, (ROWS, groups)).astype(np.float32))
    zero = rng.integers(-half, half, (ROWS, groups)).astype(np.int8)
    group_index = rng.permutation(COLUMNS) // SIZE
    tensors = {
        "a.b.weight_packed": pack_to_int32(torch.from_numpy(codes), bits),
        "a.b.weight_scale": scale,
        "a.b.weight_shape": torch.tensor([ROWS, COLUMNS]),
        "a.b.weight_g_idx": torch.from_numpy(group_index.astype(np.int32)),
    }
    if not symmetric:
        tensors["a.b.weight_zero_point"] = pack_to_int32(torch.from_numpy(zero), bits, packed_dim=0).contiguous()
    config = declared(weights={"num_bits": bits, "symmetric": symmetric, "actorder": actorder})
    view = open_dense(write_quantized(tmp_path / "m", tensors, config))
    expected = torch.from_numpy(reference(codes, scale.numpy(), None if symmetric else zero, group_index))
    assert list(view) == ["a.b.weight"]
    assert torch.equal(view["a.b.weight"], expected)
    assert torch.equal(view.read_rows("a.b.weight", 5, 33), expected[5:33])
    assert isinstance(view, QuantizedView)
    with pytest.raises(UnsupportedError, match=r"a\.b: its groups are scattered columns"):
        view.read_quantized("a.b.weight")


@pytest.mark.parametrize("actorder", [None, "weight", "static", "group"])
def test_an_order_that_is_none_changes_nothing(tmp_path: Path, actorder: str | None) -> None:
    plain = open_dense(write_quantized(tmp_path / "plain", stored(), declared()))["a.b.weight"]
    for index, order in enumerate((torch.arange(COLUMNS) // SIZE, torch.full((COLUMNS,), -1))):
        tensors = {**stored(), "a.b.weight_g_idx": order.int()}
        config = declared(weights={"actorder": actorder})
        assert torch.equal(open_dense(write_quantized(tmp_path / str(index), tensors, config))["a.b.weight"], plain)


@pytest.mark.parametrize(
    ("order", "actorder", "message"),
    [
        (None, "group", r"'a\.b' has no tensor 'a\.b\.weight_g_idx', and actorder is 'group'"),
        ((torch.arange(COLUMNS) % 3), None, r"'a\.b\.weight_g_idx' puts columns into groups .* no actorder 'group'"),
        ((torch.arange(COLUMNS) % 2), "group", r"'a\.b\.weight_g_idx' does not put 32 columns into each of 3 groups"),
        ((torch.arange(64) // SIZE), "group", r"'a\.b\.weight_g_idx' has shape \[64\], expected \[96\]"),
    ],
)
def test_an_order_that_contradicts_the_config_is_an_error(
    tmp_path: Path, order: torch.Tensor | None, actorder: str | None, message: str
) -> None:
    tensors = stored() if order is None else {**stored(), "a.b.weight_g_idx": order.int()}
    with pytest.raises(CheckpointError, match=message):
        open_dense(write_quantized(tmp_path / "m", tensors, declared(weights={"actorder": actorder})))


def rotations(*locations: str) -> dict[str, Any]:
    places = [
        {"targets": ["re:.*down_proj$"], "location": place, "inverse": False, "ignore": []} for place in locations
    ]
    return {"config_groups": {"R": {"type": "hadamard", "apply": places, "randomize": False, "head_dim": None}}}


@pytest.mark.parametrize("location", ["input", "output", "k_cache", "q_attn"])
def test_rotations_that_run_with_the_model_are_refused_and_fused_ones_read(tmp_path: Path, location: str) -> None:
    plain = open_dense(write_quantized(tmp_path / "plain", stored(), declared()))["a.b.weight"]
    fused = declared(transform_config=rotations("weight_input", "weight_output"))
    assert torch.equal(open_dense(write_quantized(tmp_path / "fused", stored(), fused))["a.b.weight"], plain)
    online = declared(transform_config=rotations("weight_output", location))
    with pytest.raises(UnsupportedError, match=rf'transform_config\.config_groups\.R turns .* \(location "{location}"'):
        open_dense(write_quantized(tmp_path / "online", stored(), online))


@pytest.mark.parametrize(
    "name",
    ["m.self_attn.k_scale", "m.self_attn.v_scale", "m.self_attn.k_proj.k_scale", "m.self_attn.v_proj.output_scale"],
)
def test_scales_of_the_cache_are_left_out_and_told(tmp_path: Path, name: str) -> None:
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    tensors = {**stored(), name: torch.tensor([0.02])}
    heard = Heard()
    view = open_dense(write_quantized(tmp_path / "m", tensors, declared(kv_cache_scheme=cache)), progress=heard)
    assert list(view) == ["a.b.weight"]
    assert len(heard.lines) == 1
    assert f"a quantized key-value cache is left out, 1 scales ({name}, …)" in heard.lines[0]
    open_dense(write_quantized(tmp_path / "dynamic", stored(), declared(kv_cache_scheme=cache)), progress=heard)
    assert heard.lines[1].startswith("a quantized key-value cache is left out: what is measured")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.b.weight_global_scale", torch.ones(1)),
        ("a.b.perm", torch.arange(COLUMNS)),
        ("a.b.weight", torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)),
        ("c.weight_scale", torch.ones(4, 1)),
        ("c.q_scale", torch.ones(1)),
        ("c.weight_bitmask", torch.zeros(4, 1, dtype=torch.uint8)),
        ("c.weight", torch.zeros(4, 4, dtype=torch.int32)),
    ],
)
def test_tensors_that_nothing_is_known_of_are_refused_by_name(tmp_path: Path, name: str, value: torch.Tensor) -> None:
    with pytest.raises((UnsupportedError, CheckpointError), match=name.replace(".", r"\.")):
        open_dense(write_quantized(tmp_path / "m", {**stored(), name: value}, declared()))


def test_what_is_dense_beside_quantized_linears_is_read(tmp_path: Path) -> None:
    dense = {"a.b.bias": torch.ones(ROWS), "c.weight": torch.ones(4, 4), "d.position_ids": torch.zeros(1, 4).long()}
    assert set(open_dense(write_quantized(tmp_path / "m", {**stored(), **dense}, declared()))) == {"a.b.weight", *dense}


INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            declared(sparsity_config={"format": "sparse-24-bitmask"}),
            r'sparsity_config\.format is "sparse-24-bitmask".*; take the unquantized model',
        ),
        (declared(format="marlin-24"), 'compressed-tensors format "marlin-24"'),
        (declared(group={"format": "mxfp6-pack-quantized"}), 'compressed-tensors format "mxfp6-pack-quantized"'),
        (declared(moe_sparsity_config={"method": "prune"}), r"quantization_config\.moe_sparsity_config"),
        (declared(group={"scales_of": "rows"}), r"quantization_config\.config_groups\.group_0\.scales_of"),
        (declared(weights={"lut": 3}), r"config_groups\.group_0\.weights\.lut is 3"),
        (declared(weights={"strategy": "block", "block_structure": [16, 16]}), "with strategy 'block'"),
        (declared(weights={"scale_dtype": "torch.uint8"}), r"group_0\.weights\.scale_dtype is torch\.uint8"),
        (declared(group={"weights": None, "input_activations": INPUTS}), "quantizes activations .* and no weights"),
        (declared(group={"output_activations": INPUTS}), r"group_0\.output_activations"),
        (declared(group={"input_activations": {**INPUTS, "num_bits": 4}}), r"input_activations\.num_bits is 4"),
        (
            declared(group={"input_activations": {**INPUTS, "strategy": "tensor", "dynamic": False}}),
            r'input_activations\.strategy is "tensor"',
        ),
    ],
)
def test_settings_that_are_not_understood_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_dense(write_quantized(tmp_path / "m", stored(), config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (declared(config_groups=[1]), r"quantization_config\.config_groups: input should be a valid dict"),
        ({"quant_method": "compressed-tensors"}, r"quantization_config\.config_groups: field required"),
        (declared(weights={"num_bits": "many"}), r'group_0\.weights\.num_bits: input should be .*, found "many"'),
        (declared(weights={"group_size": None}), r"group_0\.weights\.group_size: expected a positive number"),
        ({"quant_method": "gptq"}, r"quantization_config\.bits: field required"),
    ],
)
def test_settings_of_another_kind_are_errors_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_dense(write_quantized(tmp_path / "m", stored(), config))


def test_a_config_that_is_no_object_is_an_error(tmp_path: Path) -> None:
    checkpoint = write_quantized(tmp_path / "m", stored(), {})
    checkpoint.config = {"quantization_config": "gptq"}
    with pytest.raises(CheckpointError, match="quantization_config holds a JSON str, expected an object"):
        open_dense(checkpoint)


def test_a_zero_point_that_the_config_denies_is_an_error(tmp_path: Path) -> None:
    for value in (0, 1):
        zeros = torch.full((ROWS, COLUMNS // SIZE), value, dtype=torch.int8)
        checkpoint = write_quantized(tmp_path / str(value), {**stored(), "a.b.weight_zero_point": zeros}, declared())
        if not value:
            assert torch.isfinite(open_dense(checkpoint)["a.b.weight"]).all()
            continue
        with pytest.raises(CheckpointError, match=r"a\.b: config\.json says symmetric, .*weight_zero_point"):
            open_dense(checkpoint)["a.b.weight"]


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("w4a16-g32", {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}),
    "awq": ("w4a16-g32-asym", {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}),
    "bitsandbytes": ("w8a8", {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
}


@pytest.mark.parametrize("format", OTHERS)
def test_other_formats_refuse_keys_and_tensors_that_they_do_not_know(tmp_path: Path, format: str) -> None:
    scheme, config = OTHERS[format]
    tensor = random_tensor(Scheme.parse(scheme), 64, 64, torch.float16)
    tensors = load_format(format).pack("a.b", tensor)
    usual = {"tokenizer": None, "backend": None, **config}
    assert list(open_dense(write_quantized(tmp_path / "usual", tensors, usual))) == ["a.b.weight"]
    with pytest.raises(UnsupportedError, match=r'quantization_config\.rotation is "hadamard"'):
        open_dense(write_quantized(tmp_path / "key", tensors, {**config, "rotation": "hadamard"}))
    with pytest.raises(UnsupportedError, match=r"tensor 'a\.b\.column_scales' .* looks like part"):
        beside = {**tensors, "a.b.column_scales": torch.ones(64)}
        open_dense(write_quantized(tmp_path / "tensor", beside, config))


def test_gptq_in_activation_order_needs_the_order(tmp_path: Path) -> None:
    scheme, config = OTHERS["gptq"]
    tensors = load_format("gptq").pack("a.b", random_tensor(Scheme.parse(scheme), 64, 64, torch.float16))
    del tensors["a.b.g_idx"]
    with pytest.raises(CheckpointError, match=r"'a\.b' has no tensor 'a\.b\.g_idx', and desc_act is true"):
        open_dense(write_quantized(tmp_path / "m", tensors, {**config, "desc_act": True}))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**OTHERS["gptq"][1], "is_marlin_format": True}, "GPTQ checkpoint with is_marlin_format: True"),
        ({**OTHERS["awq"][1], "version": "gemv"}, "AWQ checkpoint with version: gemv"),
        ({"quant_method": "awq", "w_bit": 3, "version": "GEMM"}, "AWQ checkpoint with version: GEMM, w_bit: 3"),
        (
            {**OTHERS["bitsandbytes"][1], "bnb_4bit_quant_storage": "bfloat16"},
            "bitsandbytes checkpoint with bnb_4bit_quant_storage: bfloat16",
        ),
    ],
)
def test_layouts_of_other_formats_that_are_not_read_are_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_dense(write_quantized(tmp_path / "m", stored(), config))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a8"])
def test_what_transformers_decompressed_and_saved_is_dense(tiny: Tiny, tmp_path: Path, scheme: str) -> None:
    """As ``save_pretrained`` writes a model that was run: dense weights, with scales and shapes beside them."""
    made = tmp_path / "made"
    source = SafetensorsCheckpoint(tiny("llama", torch.bfloat16))
    quantize_checkpoint(source, made, method="rtn", scheme=Scheme.parse(scheme))
    model = AutoModelForCausalLM.from_pretrained(made, dtype="auto")
    window = torch.arange(16)[None]
    with torch.no_grad():
        expected = model(input_ids=window, use_cache=False).logits
    model.save_pretrained(tmp_path / "saved")
    saved = SafetensorsCheckpoint(tmp_path / "saved")
    assert saved.config["quantization_config"]["quantization_status"] == "decompressed"
    view, before = open_dense(saved), open_dense(SafetensorsCheckpoint(made))
    assert set(view) == set(source) and view.infos["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert all(torch.equal(view[name], before[name]) for name in view)
    assert view.quantized_inputs == before.quantized_inputs
    assert torch.equal(next(iter(stream_logits(view, [window], device=torch.device("cpu")))), expected)
    report = convert_dtype(saved, tmp_path / "dense", dtype=torch.bfloat16)
    assert report.tensors == len(source)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert set(dense) == set(source) and all(torch.equal(dense[name], before[name]) for name in dense)


def test_weights_that_are_rounded_while_the_model_runs_are_refused(tmp_path: Path) -> None:
    tensors = {"a.b.weight": torch.ones(4, 32), "a.b.weight_scale": torch.ones(4, 1)}
    config = declared(quantization_status="frozen")
    with pytest.raises(
        UnsupportedError, match=r"'a\.b\.weight' is float32 with scales .* 'frozen'.*compress the model"
    ):
        open_dense(write_quantized(tmp_path / "m", tensors, config))


def test_a_file_that_was_left_beside_a_dense_model_says_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    for path in tiny_llama.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 128}')
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert open_dense(checkpoint) is checkpoint


@pytest.mark.parametrize("sharded", [False, True])
def test_autogptqs_old_file_names_are_read(tiny: Tiny, tmp_path: Path, sharded: bool) -> None:
    """Weights called after bits and group size, and no ``quantization_config`` in config.json."""
    directory = tmp_path / "m"
    quantize_checkpoint(
        SafetensorsCheckpoint(tiny("llama", torch.bfloat16)),
        directory,
        method="rtn",
        scheme=Scheme.parse("w4a16-g32"),
        format="gptq",
    )
    expected = {name: value.clone() for name, value in open_dense(SafetensorsCheckpoint(directory)).items()}
    config = json.loads((directory / "config.json").read_text())
    said = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    old = {key: said[key] for key in ("bits", "group_size", "desc_act", "sym", "true_sequential")}
    old |= {"damp_percent": 0.01, "static_groups": False, "model_file_base_name": "gptq_model-4bit-32g"}
    (directory / "quantize_config.json").write_text(json.dumps(old))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if sharded:
        names = sorted(tensors)
        parts = {f"gptq_model-4bit-32g-0000{n + 1}-of-00002.safetensors": names[n::2] for n in range(2)}
        for file, held in parts.items():
            save_file({name: tensors[name] for name in held}, directory / file, {"format": "pt"})
        where = {name: file for file, held in parts.items() for name in held}
        index = directory / "gptq_model-4bit-32g.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    else:
        save_file(tensors, directory / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
    view = open_dense(SafetensorsCheckpoint(directory))
    assert set(view) == set(expected) and "quantize_config.json" not in view.files
    assert all(torch.equal(view[name], expected[name].to(view.infos[name].dtype)) for name in view)
