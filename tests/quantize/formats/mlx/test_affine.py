"""MLX's affine format against its layout, stated here as one long string of bits per row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_models import VOCABULARY, tiny_llama_dir

from llmconvert.convert.inspection import describe_model
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.formats.mlx.config import with_plain_rope
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import plan_choice
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

MLX = load_format("mlx")
CPU = torch.device("cpu")
BITS = (2, 3, 4, 5, 6, 8)
Stored = dict[str, torch.Tensor]


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, columns]`` as uint32 words: one string of bits per row, the lowest first."""
    string = (codes[:, :, None] >> np.arange(bits)) & 1
    words = string.reshape(len(codes), -1, 32).astype(np.uint64) << np.arange(32, dtype=np.uint64)
    return words.sum(-1).astype(np.uint32)


def layer(bits: int, group: int, rows: int, columns: int, dtype: torch.dtype, seed: int) -> tuple[np.ndarray, Stored]:
    """Codes at random, and what MLX stores for them and floats of any sign."""
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, columns))
    floats = torch.from_numpy(random.standard_normal((2, rows, columns // group))).to(dtype)
    words = torch.from_numpy(packed(codes, bits).view(np.int32)).view(torch.uint32)
    return codes, {"l.weight": words, "l.scales": floats[0].contiguous(), "l.biases": floats[1].contiguous()}


def model(path: Path, tensors: Mapping[str, torch.Tensor], declared: Mapping[str, Any]) -> SafetensorsCheckpoint:
    path.mkdir()
    save_file(dict(tensors), path / "model.safetensors", {"format": "mlx"})
    settings = {"quantization": declared, "quantization_config": declared}
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **settings}))
    return SafetensorsCheckpoint(path)


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from([32, 64, 128]),
    rows=st.integers(1, 40),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1 << 16),
)
def test_the_layout(bits: int, group: int, rows: int, groups: int, dtype: torch.dtype, seed: int) -> None:
    scheme = Scheme.parse(f"w{bits}a16-g{group}-affine")
    codes, stored = layer(bits, group, rows, groups * group, dtype, seed)
    scale, bias = stored["l.scales"], stored["l.biases"]
    held = torch.from_numpy(codes).to(scheme.number.code_dtype)
    tensor = QuantizedTensor(held, scale, None, scheme, offset=bias)
    ours = MLX.pack("l", tensor)
    specs = MLX.specs("l", tensor.shape, scheme, dtype)
    assert {spec.name: (spec.dtype, spec.shape) for spec in specs} == {
        name: (value.dtype, tuple(value.shape)) for name, value in stored.items()
    }
    assert all(torch.equal(ours[name].view(torch.uint8), value.view(torch.uint8)) for name, value in stored.items())
    again = MLX.unpack("l", stored, scheme)
    assert torch.equal(again.codes, held)
    exact = codes.reshape(rows, groups, group) * scale.double().numpy()[..., None] + bias.double().numpy()[..., None]
    np.testing.assert_allclose(again.dequantize(torch.float64).numpy(), exact.reshape(rows, -1), rtol=1e-6, atol=1e-6)


def test_what_mlx_lm_writes_is_read_mixed_layers_included(tmp_path: Path) -> None:
    kinds = {"a": (3, 64), "b": (6, 32), "c": (3, 64)}
    layers = {name: layer(bits, group, 4, 128, torch.bfloat16, bits) for name, (bits, group) in kinds.items()}
    tensors = {key.replace("l.", f"{name}."): value for name, (_, own) in layers.items() for key, value in own.items()}
    tensors["norm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    entries = {"b": {"group_size": 32, "bits": 6, "mode": "affine"}, "norm": False, "c": True}
    view = open_dense(model(tmp_path / "model", tensors, {"group_size": 64, "bits": 3, "mode": "affine", **entries}))
    assert isinstance(view, QuantizedView) and view.config == {"model_type": "llama"}
    assert {name: str(view.scheme_of(f"{name}.weight")) for name in kinds} == {
        "a": "w3a16-g64-affine",
        "b": "w6a16-g32-affine",
        "c": "w3a16-g64-affine",
    }
    for name, (codes, own) in layers.items():
        size = kinds[name][1]
        scale, bias = (own[f"l.{part}"].float().numpy().repeat(size, 1) for part in ("scales", "biases"))
        expected = torch.from_numpy((codes * scale.astype(np.float64) + bias).astype(np.float32)).to(torch.bfloat16)
        assert torch.equal(view[f"{name}.weight"], expected)
        assert torch.equal(view.read_rows(f"{name}.weight", 1, 3), expected[1:3])
    # As mlx-lm wrote it before it had other modes.
    plain = {name: value for name, value in tensors.items() if not name.startswith("b")}
    assert len(open_dense(model(tmp_path / "old", plain, {"group_size": 64, "bits": 3})).infos) == 3


@pytest.mark.parametrize(
    ("declared", "error", "message"),
    [
        ({"group_size": 32, "bits": 4, "mode": "mxfp4"}, UnsupportedError, "quantization.mode is 'mxfp4'"),
        ({"group_size": 64, "bits": 4, "salt": 3}, UnsupportedError, "quantization.salt is 3"),
        ({"group_size": 64, "bits": 7}, CheckpointError, "7 bits in groups of 64"),
        ({"bits": 4}, CheckpointError, "quantization.group_size"),
        ({"group_size": 32, "bits": 4}, CheckpointError, r"'l.weight' has shape \[4, 16\], expected \[4, 8\]"),
        ({"group_size": 64, "bits": 4, "l": False}, CheckpointError, "says that 'l' is dense"),
        (
            {"group_size": 64, "bits": 4, "l": {"bits": 4, "group_size": 64, "x": 1}},
            UnsupportedError,
            "quantization.l.x",
        ),
    ],
)
def test_what_is_not_understood_is_refused(
    declared: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    _, stored = layer(4, 64, 4, 128, torch.bfloat16, 0)
    with pytest.raises(error, match=message):
        open_dense(model(tmp_path / "model", stored, declared))


def test_experts_in_one_tensor_and_tensors_without_the_rest_are_refused(tmp_path: Path) -> None:
    _, stored = layer(4, 64, 4, 128, torch.bfloat16, 0)
    declared = {"group_size": 64, "bits": 4}
    stacked = {name: value.unsqueeze(0) for name, value in stored.items()}
    with pytest.raises(UnsupportedError, match=r"'l\.scales' has shape \[1, 4, 2\], of experts in one tensor"):
        open_dense(model(tmp_path / "stacked", stacked, declared))
    stored.pop("l.biases")
    with pytest.raises(CheckpointError, match=r"has no tensor 'l\.biases'"):
        open_dense(model(tmp_path / "cut", stored, declared))


@pytest.mark.parametrize("name", ["w4a16-g64", "w4a16-g64-asym", "w7a16-g64-affine", "w4a16-g16-affine", "q4_1"])
def test_other_schemes_are_refused(name: str) -> None:
    scheme = Scheme.of_block("Q4_1") if name == "q4_1" else Scheme.parse(name)
    with pytest.raises(UnsupportedError, match="mlx stores affine weights of 2, 3, 4, 5, 6, 8 bits"):
        MLX.check(scheme)


def test_an_artifact_has_its_embedding_and_head_as_overrides_say(tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(tiny_llama_dir(tmp_path / "model", tie_word_embeddings=False))
    scheme, wide = Scheme.parse("w4a16-g32-affine"), Scheme.parse("w8a16-g64-affine")
    overrides = (Override("lm_head", wide), Override("*.k_proj", None), Override("*.down_proj", wide))
    output = tmp_path / "artifact"
    quantize_checkpoint(source, output, method="rtn", scheme=scheme, format="mlx", overrides=overrides)
    written = SafetensorsCheckpoint(output)
    declared = written.config["quantization"]
    assert declared == written.config["quantization_config"]
    own = {"group_size": 64, "bits": 8, "mode": "affine"}
    wider = dict.fromkeys(("lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"), own)
    assert declared == {"group_size": 32, "bits": 4, "mode": "affine", **wider}
    view = open_dense(written)
    assert isinstance(view, QuantizedView)
    assert str(view.scheme_of("model.embed_tokens.weight")) == str(scheme)
    assert str(view.scheme_of("lm_head.weight")) == str(wide)
    assert view.scheme_of("model.layers.0.self_attn.k_proj.weight") is None
    windows = [torch.arange(40).unsqueeze(0)]
    logits = [next(stream_logits(one, windows, device=CPU)).log_softmax(-1) for one in (source, view)]
    assert 0 < float(torch.nn.functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum")) < 0.2 * 40
    summary = describe_model(written)
    assert summary.quantization == "mlx" and summary.unread is None and summary.vocabulary == VOCABULARY
    with pytest.raises(UnsupportedError, match="already quantized"):
        quantize_checkpoint(written, tmp_path / "twice", method="rtn", scheme=scheme, format="mlx")


@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("format", ["mlx", "compressed-tensors"])
def test_a_tied_head_that_is_stored_as_well_is_one_matrix_or_two(tmp_path: Path, format: str, equal: bool) -> None:
    """As transformers decides it, by the values; runtimes that go by the config alone have to come to the same."""
    model = tiny_llama_dir(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone() if equal else embedding.flip(0).contiguous()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    source, scheme = SafetensorsCheckpoint(model), "w8a16-g32-affine" if format == "mlx" else "w8a16-g32"
    overrides = () if format == "mlx" else (Override("head", Scheme.parse(scheme)),)
    output = tmp_path / "artifact"
    quantize_checkpoint(source, output, method="rtn", scheme=Scheme.parse(scheme), format=format, overrides=overrides)
    written = SafetensorsCheckpoint(output)
    codes = {"lm_head.weight", "lm_head.weight_packed"} & {*written.infos}
    assert written.config["tie_word_embeddings"] is equal and bool(codes) is not equal
    windows = [torch.arange(40).unsqueeze(0)]
    logits = [next(stream_logits(one, windows, device=CPU)).log_softmax(-1) for one in (source, open_dense(written))]
    assert float(torch.nn.functional.kl_div(logits[1], logits[0], log_target=True, reduction="sum")) < 0.01 * 40


def test_models_that_mlx_lm_has_no_module_for_are_refused_before_the_work(tmp_path: Path) -> None:
    path = tiny_llama_dir(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())

    def plan(model_type: str, scheme: str = "w4a16-g64-affine") -> tuple[str, ...]:
        (path / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
        request = QuantizeRequest("rtn", Scheme.parse(scheme), "mlx")
        return plan_quantize(SafetensorsCheckpoint(path), tmp_path / "out", request).notes

    assert plan("llama") == ()
    (note,) = plan("mistral")
    assert "computes 'mistral' otherwise than transformers" in note
    (note,) = plan("seed_oss")
    assert "was not seen to load what is written here" in note
    with pytest.raises(UnsupportedError, match=r"'biogpt': mlx-lm [\d.]+ has no module for it"):
        plan("biogpt")
    with pytest.raises(UnsupportedError, match="'qwen2_5_vl' has more than a decoder of text"):
        plan("qwen2_5_vl")
    with pytest.raises(SchemeError, match="group size 128 does not divide the 64 columns"):
        plan("llama", "w4a16-g128-affine")


def test_rotary_positions_are_said_where_mlx_lm_looks_for_them() -> None:
    assert with_plain_rope({"hidden_size": 3}) == {"hidden_size": 3}
    plain = {"rope_type": "default", "rope_theta": 5e5}
    assert with_plain_rope({"rope_parameters": plain}) == {"rope_parameters": plain, "rope_theta": 5e5}
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    told = with_plain_rope({"rope_parameters": scaled})
    assert told["rope_theta"] == 1e4 and told["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    partly = with_plain_rope({"rope_parameters": {**plain, "partial_rotary_factor": 0.5}})
    assert partly["partial_rotary_factor"] == 0.5 and "rope_scaling" not in partly
    layers = {"full_attention": scaled, "sliding_attention": plain}
    told = with_plain_rope({"rope_parameters": layers})
    assert (told["rope_theta"], told["rope_local_base_freq"], told["rope_scaling"]["factor"]) == (1e4, 5e5, 8.0)
    with pytest.raises(UnsupportedError, match="mlx-lm has no names for these"):
        with_plain_rope({"rope_parameters": {"chunked_attention": plain, "full_attention": plain}})


def test_a_budget_chooses_for_the_blocks_and_counts_what_lies_outside(tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(tiny_llama_dir(tmp_path / "model", num_hidden_layers=3))
    windows = [torch.randint(0, VOCABULARY, (1, 48), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    scheme = Scheme.parse("w4a16-g32-affine")
    request = QuantizeRequest("gptq", scheme, "mlx")
    budget = Budget(5.4, bits=(3, 5, 6), group_sizes=(32, 64))
    found = plan_choice(source, tmp_path / "work", budget, request, windows=windows).run()
    asked = replace(request, overrides=found.overrides)
    plan_quantize(source, tmp_path / "out", asked, windows=windows).run()
    view = open_dense(SafetensorsCheckpoint(tmp_path / "out"))
    assert isinstance(view, QuantizedView)
    chosen = {name: str(view.scheme_of(name)) for name in view.quantized}
    assert chosen.pop("model.embed_tokens.weight") == str(scheme)
    assert len(set(chosen.values())) > 1, chosen
    infos = SafetensorsCheckpoint(tmp_path / "out").infos
    stored = sum(infos[part].nbytes for one in view.quantized.values() for part in one.parts)
    weights = sum(view.infos[name].shape[0] * view.infos[name].shape[1] for name in view.quantized)
    assert 8 * stored / weights == pytest.approx(found.bits_per_weight, rel=1e-6) and found.bits_per_weight <= 5.4
