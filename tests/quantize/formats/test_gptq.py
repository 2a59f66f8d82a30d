"""The GPTQ format against its layout, stated here as one long string of bits per output."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantized import random_tensor, write_quantized
from support.tiny_models import tiny_llama_dir

from llmconvert import __version__
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import load_format
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import plan_quantize, quantize_checkpoint
from llmconvert.quantize.numbers import Int
from llmconvert.quantize.pack import pack_words
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.scheme import Scheme
from llmconvert.quantize.tensor import QuantizedTensor
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

GPTQ = load_format("gptq")
BITS = (2, 3, 4, 8)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned ``values [n, m]`` packed along ``n``, lowest bits first, as uint32 ``[n · bits / 32, m]``."""
    string = ((values[:, None, :] >> np.arange(bits)[None, :, None]) & 1).reshape(-1, 32, values.shape[1])
    return (string.astype(np.uint64) << np.arange(32, dtype=np.uint64)[None, :, None]).sum(1).astype(np.uint32)


def minus_one(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned zero points ``[rows, groups]`` as they are stored: one less in every place of every word."""
    if bits == 3:
        return words((zeros - 1) % 8, bits).T
    return words(zeros, bits).T - np.uint32(sum(1 << place for place in range(0, 32, bits)))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.sampled_from([32, 64, 96]),
    columns=st.sampled_from([32, 64, 128]),
    group=st.sampled_from([None, 16, 32]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_the_layout(bits: int, rows: int, columns: int, group: int | None, symmetric: bool, seed: int) -> None:
    scheme = Scheme(Int(bits, symmetric), group)
    tensor = random_tensor(scheme, rows, columns, torch.float16, seed)
    packed = GPTQ.pack("l", tensor)
    half = 1 << (bits - 1)
    zeros = np.zeros(tuple(tensor.scale.shape), np.int64) if tensor.zero is None else tensor.zero.numpy().astype(int)
    codes = tensor.codes.numpy().astype(np.int64)
    assert np.array_equal(packed["l.qweight"].numpy().view(np.uint32), words(codes.T + half, bits))
    assert np.array_equal(packed["l.qzeros"].numpy().view(np.uint32), minus_one(zeros + half, bits))
    assert torch.equal(packed["l.scales"], tensor.scale.T)
    assert packed["l.g_idx"].tolist() == [column // (group or columns) for column in range(columns)]
    found = GPTQ.unpack("l", packed, scheme)
    assert torch.equal(found.codes, tensor.codes) and torch.equal(found.scale, tensor.scale)
    assert tensor.zero is None or (found.zero is not None and torch.equal(found.zero, tensor.zero))


def test_symmetric_zero_points_are_the_middle() -> None:
    packed = GPTQ.pack("l", random_tensor(Scheme(Int(4), 32), 32, 64, torch.float16))
    assert set(packed["l.qzeros"].flatten().tolist()) == {0x77777777}


@pytest.mark.parametrize("name", ["w5a16-g32", "w4a8-channel", "w4a16-g48", "w8a8"])
def test_other_schemes_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedError, match=f"scheme {Scheme.parse(name)}: gptq"):
        GPTQ.check(Scheme.parse(name))


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)])
def test_shapes_that_no_word_holds_are_refused_by_name(shape: tuple[int, int]) -> None:
    with pytest.raises(UnsupportedError, match=r"a\.b: a weight of shape .* multiples of 32 in both dimensions"):
        GPTQ.specs("a.b", shape, Scheme(Int(4)), torch.float16)


def test_a_scale_beyond_float16_is_named() -> None:
    tensor = random_tensor(Scheme(Int(4)), 32, 32, torch.bfloat16)
    beyond = QuantizedTensor(tensor.codes, tensor.scale * 1e7, None, tensor.scheme)
    with pytest.raises(UnsupportedError, match=r"a\.b: one of its scales is beyond float16 .* compressed-tensors"):
        GPTQ.pack("a.b", beyond)


def test_the_config_says_what_differs_by_linear() -> None:
    four, eight = Scheme(Int(4), 32), Scheme(Int(8), 32)
    layer = "model.layers.1"
    schemes = {f"{layer}.mlp.down_proj": eight, f"{layer}.self_attn.q_proj": eight}
    schemes |= {f"{layer}.{leaf}": four for leaf in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")}
    declared = GPTQ.quantization_config(schemes, [f"{layer}.self_attn.k_proj", "lm_head"])
    assert (declared["bits"], declared["group_size"], declared["sym"], declared["desc_act"]) == (4, 32, True, False)
    rules = declared["dynamic"]

    def rule(name: str) -> tuple[str, int | None]:
        """As GPTQModel and vLLM apply them: the first rule whose pattern matches."""
        for pattern, values in rules.items():
            if re.match(pattern[2:], name):
                return pattern[:2], values.get("bits")
        return "", None

    assert rule(f"{layer}.mlp.down_proj") == ("+:", 8)
    assert rule(f"{layer}.self_attn.q_proj") == ("+:", 8)
    assert rule(f"{layer}.self_attn.k_proj") == ("-:", None)
    assert rule(f"{layer}.self_attn.o_proj") == ("", None)
    assert rule("model.layers.11.mlp.down_proj") == ("", None)
    assert rule("lm_head") == ("", None)


def test_the_producer_is_named_first_and_zero_points_as_gptqmodel_stores_them_where_there_are_any() -> None:
    producers = {
        symmetric: GPTQ.quantization_config({"a": Scheme(Int(4, symmetric), 32)}, [])["meta"]["quantizer"]
        for symmetric in (True, False)
    }
    assert producers[True] == [f"llmconvert:{__version__}"]
    assert producers[False] == [f"llmconvert:{__version__}", "gptqmodel:0.9.0"]


def test_linears_that_a_runtime_fuses_are_found_under_its_name() -> None:
    schemes = {"model.layers.0.mlp.gate_proj": Scheme(Int(8), 32), "model.layers.0.mlp.up_proj": Scheme(Int(8), 32)}
    schemes |= {f"model.layers.{index}.mlp.down_proj": Scheme(Int(4), 32) for index in range(3)}
    rules = GPTQ.quantization_config(schemes, [])["dynamic"]
    assert any(re.match(pattern[2:], "model.layers.0.mlp.gate_up_proj") for pattern in rules)


def test_two_symmetries_in_one_model_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="one symmetry per model"):
        GPTQ.quantization_config({"a": Scheme(Int(4), 32), "b": Scheme(Int(4, symmetric=False), 32)}, [])


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    version=st.sampled_from(["gptq", "gptq_v2"]),
    order=st.sampled_from(["groups", "scattered", "none"]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_what_others_wrote_is_read(
    folders: Iterator[Path], bits: int, version: str, order: str, symmetric: bool, seed: int
) -> None:
    """Versions 1 and 2, activation order, and checkpoints without ``g_idx``."""
    scheme = Scheme(Int(bits, symmetric), 32)
    tensor = random_tensor(scheme, 64, 96, torch.float16, seed)
    stored = GPTQ.pack("l", tensor)
    if version == "gptq_v2":
        half = 1 << (bits - 1)
        zero = torch.zeros(64, 3, dtype=torch.int8) if tensor.zero is None else tensor.zero
        stored["l.qzeros"] = pack_words((zero.int() + half).to(torch.uint8).T.contiguous(), bits)
    expected = tensor.dequantize(torch.float32)
    if order == "scattered":
        group = torch.randperm(96, generator=torch.Generator().manual_seed(seed)) // 32
        stored["l.g_idx"] = group.to(torch.int32)
        offset = 0.0 if tensor.zero is None else tensor.zero.float()[:, group]
        expected = (tensor.codes.float() - offset) * tensor.scale.float()[:, group]
    elif order == "none":
        del stored["l.g_idx"]
    declared = {"quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric, "checkpoint_format": version}
    view = open_dense(write_quantized(next(folders), stored, declared), torch.float32)
    assert isinstance(view, QuantizedView)
    assert list(view) == ["l.weight"] and view.scheme_of("l.weight") == scheme
    assert torch.equal(view["l.weight"], expected)
    assert torch.equal(view.read_rows("l.weight", 5, 33), expected[5:33])
    if order == "scattered":
        with pytest.raises(UnsupportedError, match="l: its groups are scattered columns"):
            view.read_quantized("l.weight")
    else:
        found = view.read_quantized("l.weight")
        assert torch.equal(found.codes, tensor.codes)
        assert tensor.zero is None or (found.zero is not None and torch.equal(found.zero, tensor.zero))


def test_linears_of_several_widths(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic`` rules are not looked up: the tensors show it."""
    tensors = {name: random_tensor(Scheme(Int(bits), 32), 64, 96, torch.float16) for name, bits in (("a", 4), ("b", 8))}
    stored = {name: part for linear in tensors for name, part in GPTQ.pack(linear, tensors[linear]).items()}
    view = open_dense(write_quantized(tmp_path / "m", stored, {"quant_method": "gptq", "bits": 4, "sym": True}))
    assert all(torch.equal(view[f"{name}.weight"], tensors[name].dequantize(torch.bfloat16)) for name in tensors)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format: marlin; this reader"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype: int16; this reader"),
    ],
)
def test_other_versions_are_refused_by_name(tmp_path: Path, declared: dict[str, Any], message: str) -> None:
    stored = GPTQ.pack("l", random_tensor(Scheme(Int(4), 32), 32, 32, torch.float16))
    with pytest.raises(UnsupportedError, match=message):
        open_dense(write_quantized(tmp_path / "m", stored, declared))


@pytest.mark.parametrize("part", ["qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    stored = GPTQ.pack("a.b", random_tensor(Scheme(Int(4), 32), 32, 32, torch.float16))
    del stored[f"a.b.{part}"]
    with pytest.raises(CheckpointError, match=rf"quantized linear 'a\.b' has no tensor 'a\.b\.{part}'"):
        open_dense(write_quantized(tmp_path / "m", stored, {"quant_method": "gptq", "bits": 4}))


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16-g64"])
def test_a_head_of_its_own_is_stored_and_said(tmp_path: Path, scheme: str) -> None:
    """``lm_head`` of the config is what makes readers look for it; where it differs, ``dynamic`` says how."""
    source = tiny_llama_dir(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=False, hidden_size=64)
    window = torch.arange(24).reshape(1, 24)
    head = Scheme.parse(scheme)
    with SafetensorsCheckpoint(source) as checkpoint:
        weight = checkpoint["lm_head.weight"]
        quantize_checkpoint(
            checkpoint,
            tmp_path / "made",
            method="gptq",
            format="gptq",
            scheme=Scheme.parse("w4a16-g32"),
            overrides=[Override("head", head)],
            windows=[window],
        )
    with SafetensorsCheckpoint(tmp_path / "made") as checkpoint:
        declared = checkpoint.config["quantization_config"]
        assert declared["lm_head"] is True
        told = declared.get("dynamic", {})
        expected = {"bits": 8, "group_size": 64, "sym": True, "desc_act": False}
        assert told == ({r"+:^lm_head$": expected} if scheme == "w8a16-g64" else {})
        assert {"lm_head.qweight", "lm_head.qzeros", "lm_head.scales", "lm_head.g_idx"} <= {*checkpoint.infos}
        assert "lm_head.weight" not in checkpoint.infos and "model.embed_tokens.weight" in checkpoint.infos
        dense = open_dense(checkpoint)
        found = dense["lm_head.weight"]
        # By GPTQModel's definition: codes, moved by the middle, times the scale of their group.
        half, per_word = 1 << (head.bits - 1), 32 // head.bits
        packed, scales = checkpoint["lm_head.qweight"], checkpoint["lm_head.scales"].float()
        codes = torch.stack([(packed >> (head.bits * place)) & (2 * half - 1) for place in range(per_word)], 1)
        values = (codes.flatten(0, 1) - half) * scales[checkpoint["lm_head.g_idx"].long()]
        assert torch.equal(found, values.T.to(torch.bfloat16))
        assert (found - weight).norm() < 0.2 * weight.norm()


@pytest.mark.parametrize(
    ("tied", "given", "words"),
    [
        (True, {"head": "w4a16-g32"}, "embedding and head, one matrix, and no reader of gptq"),
        (False, {"embedding": "w8a16-g32"}, "is an embedding, and no reader of gptq"),
        (False, {"head": "w3a16-g32"}, "symmetric ones of 4 and 8 bits"),
    ],
)
def test_what_no_reader_takes_outside_the_blocks_is_refused(
    tmp_path: Path, tied: bool, given: dict[str, str], words: str
) -> None:
    source = tiny_llama_dir(tmp_path / "source", dtype=torch.bfloat16, tie_word_embeddings=tied, hidden_size=64)
    overrides = tuple(Override(match, Scheme.parse(scheme)) for match, scheme in given.items())
    request = QuantizeRequest("rtn", Scheme.parse("w4a16-g32"), "gptq", overrides)
    with SafetensorsCheckpoint(source) as checkpoint, pytest.raises(UnsupportedError, match=words):
        plan_quantize(checkpoint, tmp_path / "never", request)
