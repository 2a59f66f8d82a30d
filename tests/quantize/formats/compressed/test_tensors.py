"""Compressed-tensors against the real runtime: the logits of transformers are those of the dense view."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ARCHITECTURES, ids
from transformers import AutoModel, AutoModelForCausalLM, CompressedTensorsConfig

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16))
SYMMETRIC = ["w3a16-g32", "w2a16-g32", "w5a16-channel", "w8a16-channel", "w8a16-g32"]
ASYMMETRIC = ["w4a16-g32-asym", "w3a16-channel-asym", "w2a16-g32-asym", "w8a16-g32-asym"]
SCHEMES = [*SYMMETRIC, *ASYMMETRIC]
Tiny = Callable[..., Path]


def artifact(source: Path, output: Path, name: str, **overrides: str | None) -> Path:
    """Round a tiny model to a scheme; ``overrides`` map patterns to schemes."""
    quantize_checkpoint(
        SafetensorsCheckpoint(source),
        output,
        method="rtn",
        scheme=Scheme.parse(name),
        overrides=[Override(match, Scheme.parse(text) if text else None) for match, text in overrides.items()],
    )
    return output


def runtime_logits(directory: Path, *, dequantize: bool = False) -> list[torch.Tensor]:
    """What transformers computes, compressed-tensors decompressing at the first forward or while loading.

    Packed zero points load only the second way: for the first, compressed-tensors (0.20) prepares parameters of the
    unpacked shape, and transformers replaces what it reads by new ones.
    """
    attention = "eager" if "gemma2" in directory.name else "sdpa"
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype="auto", attn_implementation=attention, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    model.eval()
    with torch.no_grad():
        return [model(input_ids=window, use_cache=False).logits for window in WINDOWS]


def our_logits(checkpoint: Checkpoint) -> list[torch.Tensor]:
    return list(stream_logits(open_dense(checkpoint), WINDOWS, device=CPU))


def assert_runtime_agrees(directory: Path, *, dequantize: bool = False) -> None:
    ours = our_logits(SafetensorsCheckpoint(directory))
    assert all(map(torch.equal, ours, runtime_logits(directory, dequantize=dequantize)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_runs_as_we_read_it(tiny: Tiny, name: str, tmp_path: Path) -> None:
    directory = artifact(tiny(name, torch.bfloat16), tmp_path / name, "w4a16-g32")
    assert_runtime_agrees(directory)
    dense = our_logits(SafetensorsCheckpoint(tiny(name, torch.bfloat16)))
    assert not torch.equal(our_logits(SafetensorsCheckpoint(directory))[0], dense[0]), "nothing was quantized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_runs_as_we_read_it(tiny: Tiny, scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = artifact(tiny("llama", dtype), tmp_path / "out", scheme)
    assert_runtime_agrees(directory, dequantize=scheme in ASYMMETRIC)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w8a16-fp8"])
def test_quantized_activations_are_those_of_the_runtime(
    tiny: Tiny, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = artifact(tiny("llama", dtype), tmp_path / "out", scheme)
    assert_runtime_agrees(directory)
    weights_alone = open_dense(SafetensorsCheckpoint(directory))
    weights_alone.quantized_inputs = {}
    changed = not torch.equal(
        next(stream_logits(weights_alone, WINDOWS[:1], device=CPU)), our_logits(SafetensorsCheckpoint(directory))[0]
    )
    assert changed == (scheme != "w8a16-fp8")


@pytest.mark.parametrize("name", ["llama", "opt", "phi3"])
def test_several_schemes_in_one_artifact(tiny: Tiny, name: str, tmp_path: Path) -> None:
    down = ARCHITECTURES[name].shared[-1][0]
    overrides = {f"*.1.{down}": None, f"*.{down}": "w8a16-channel", "*.2.self_attn.o*": "w3a16-g32"}
    directory = artifact(tiny(name, torch.bfloat16), tmp_path / "out", "w4a16-g32", **overrides)
    assert_runtime_agrees(directory)
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView)
    prefix = "model.decoder.layers" if name == "opt" else "model.layers"
    assert [str(view.scheme_of(f"{prefix}.{index}.{down}.weight")) for index in range(3)] == [
        "w8a16-channel-sym",
        "None",
        "w8a16-channel-sym",
    ]


@pytest.mark.parametrize("name", ["llama-tied", "opt"])
def test_artifacts_of_checkpoints_without_the_model_prefix(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """Tensors keep the checkpoint's names, the config names modules, and the readers bring them together."""
    AutoModel.from_pretrained(tiny(name, torch.bfloat16)).save_pretrained(tmp_path / "base")
    down = ARCHITECTURES[name].shared[-1][0]
    directory = artifact(tmp_path / "base", tmp_path / "out", "w4a16-g32", **{f"*.{down}": "w8a16-channel"})
    assert not any(name.startswith("model.") for name in SafetensorsCheckpoint(directory))
    assert_runtime_agrees(directory)


@pytest.mark.parametrize("scheme", [*SCHEMES, "w8a8"])
def test_rows_are_those_of_the_whole(tiny: Tiny, scheme: str, tmp_path: Path) -> None:
    view = open_dense(SafetensorsCheckpoint(artifact(tiny("llama"), tmp_path / "out", scheme)))
    name = "model.layers.1.mlp.gate_proj.weight"
    whole = view[name]
    assert whole.shape == (96, 64) and view.infos[name].shape == (96, 64)
    for start, stop in ((0, 1), (31, 33), (5, 96), (95, 96), (7, 7)):
        assert torch.equal(view.read_rows(name, start, stop), whole[start:stop])


def test_the_canonical_tensor_can_be_read(tiny: Tiny, tmp_path: Path) -> None:
    view = open_dense(SafetensorsCheckpoint(artifact(tiny("llama"), tmp_path / "out", "w3a16-g32-asym")))
    assert isinstance(view, QuantizedView)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensor = view.read_quantized(name)
    assert str(tensor.scheme) == "w3a16-g32-asym"
    assert torch.equal(tensor.dequantize(torch.float32), view[name])


def test_what_is_dense_is_passed_on(tiny: Tiny, tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(tiny("llama"))
    assert open_dense(source) is source
    view = open_dense(SafetensorsCheckpoint(artifact(tiny("llama"), tmp_path / "out", "w4a16-g32")))
    assert set(view) == set(source)
    assert "quantization_config" not in view.config
    assert torch.equal(view["model.embed_tokens.weight"], source["model.embed_tokens.weight"])


def compress(source: Path, output: Path, groups: dict[str, Any], ignore: Sequence[str] = ("lm_head",)) -> Path:
    """An artifact made by the compressed-tensors package alone."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = QuantizationConfig.model_validate(
        {"config_groups": groups, "ignore": list(ignore), "format": "pack-quantized", "quantization_status": "frozen"}
    )
    apply_quantization_config(model, config)
    for index, module in enumerate(model.modules()):
        if hasattr(module, "weight_scale"):
            rows, count = module.weight_scale.shape
            grouped = module.weight.data.reshape(rows, count, -1)
            module.weight_scale.data = grouped.abs().amax(-1) / 6
            if hasattr(module, "weight_zero_point"):
                choice = torch.randint(-2, 3, (rows, count), generator=torch.Generator().manual_seed(index))
                symmetric = module.quantization_scheme.weights.symmetric
                module.weight_zero_point.data = (0 * choice if symmetric else choice).to(torch.int8)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(output)
    compressor.update_config(output)
    return output


@pytest.mark.parametrize("symmetric", [True, False])
def test_artifacts_of_the_compressed_tensors_package_are_read(tiny: Tiny, symmetric: bool, tmp_path: Path) -> None:
    weights = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": symmetric}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    directory = compress(tiny("llama"), tmp_path / "out", groups)
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView) and len(view.quantized) == 21
    assert_runtime_agrees(directory, dequantize=not symmetric)


def test_groups_named_by_patterns_are_read(tiny: Tiny, tmp_path: Path) -> None:
    four = {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}
    eight = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    groups = {
        "group_0": {"targets": ["re:.*self_attn.*"], "weights": four},
        "group_1": {"targets": ["re:.*mlp.*"], "weights": eight},
    }
    directory = compress(tiny("llama"), tmp_path / "out", groups)
    view = open_dense(SafetensorsCheckpoint(directory))
    assert isinstance(view, QuantizedView)
    assert str(view.scheme_of("model.layers.0.mlp.up_proj.weight")) == "w8a16-channel-sym"
    assert str(view.scheme_of("model.layers.0.self_attn.o_proj.weight")) == "w4a16-g32-sym"
    assert_runtime_agrees(directory)


def changed(directory: Path, change: Callable[[dict[str, Any]], None]) -> SafetensorsCheckpoint:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))
    return SafetensorsCheckpoint(directory)


def test_other_formats_are_refused_by_name(tiny: Tiny, tmp_path: Path) -> None:
    directory = artifact(tiny("llama"), tmp_path / "out", "w4a16-g32")
    checkpoint = changed(
        directory, lambda config: config["config_groups"]["group_0"]["weights"].update(type="float", num_bits=6)
    )
    with pytest.raises(UnsupportedError, match="weights of 6-bit type 'float' with strategy 'group'"):
        open_dense(checkpoint)
    checkpoint = changed(directory, lambda config: config.update(quant_method="hqq"))
    with pytest.raises(
        UnsupportedError,
        match=r"quantized with 'hqq' .*; known are compressed-tensors, gptq.*, fp8, .*; take the unquantized model",
    ):
        open_dense(checkpoint)


def test_a_quantization_that_no_tensor_shows_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    directory = artifact(tiny("llama"), tmp_path / "out", "w4a16-g32")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes"}})
    )
    checkpoint = SafetensorsCheckpoint(directory)
    with pytest.raises(CheckpointError, match=r"config\.json says quantized with 'bitsandbytes', and no tensor is"):
        open_dense(checkpoint)


def test_a_quantized_linear_that_no_group_names_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    directory = artifact(tiny("llama"), tmp_path / "out", "w4a16-g32")
    checkpoint = changed(directory, lambda config: config["config_groups"]["group_0"].update(targets=["re:nothing"]))
    with pytest.raises(CheckpointError, match=r"'model\.layers\.0\..*' is stored quantized, but no config group"):
        open_dense(checkpoint)


@pytest.mark.parametrize("part", ["weight_scale", "weight_zero_point", "weight_shape"])
def test_a_missing_part_is_named(tiny: Tiny, part: str, tmp_path: Path) -> None:
    directory = artifact(tiny("llama"), tmp_path / "out", "w4a16-g32-asym")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"model.layers.0.mlp.up_proj.{part}"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'model\.layers\.0\.mlp\.up_proj' has no tensor '.*\.{part}'"):
        our_logits(SafetensorsCheckpoint(directory))


def test_a_shape_that_contradicts_the_words_is_an_error(tiny: Tiny, tmp_path: Path) -> None:
    directory = artifact(tiny("llama"), tmp_path / "out", "w4a16-g32")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight_shape"] = torch.tensor([96, 6400])
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj"):
        open_dense(SafetensorsCheckpoint(directory))
