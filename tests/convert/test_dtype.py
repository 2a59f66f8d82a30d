"""Dtype conversion: every value as torch casts it, and refusals before any work."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.bare_models import RowsOnly, make_model

from llmconvert.convert.cast import CastView, cast_into, with_dtype
from llmconvert.convert.dtype import DtypeRequest, convert_dtype, plan_dtype
from llmconvert.convert.pipeline import BUFFER_NBYTES
from llmconvert.engine.memory import LOADED_NBYTES
from llmconvert.errors import CheckpointError, OutputError, UnsupportedError
from llmconvert.report.steps import DtypeReport
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint, TensorInfo
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PAIRS = list(itertools.product(FLOATS, FLOATS))


def label(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def varied(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Scalars, empty, one-dimensional and odd shapes, and dtypes that pass through."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "scalar": normal(),
        "empty": normal(0, 7),
        "empty_rows": normal(7, 0),
        "vector": normal(1_300_003),  # longer than a block
        "odd": normal(37, 3, 11),
        "long_row": normal(1, 1_200_001),  # one row longer than a block
        "zeros": torch.zeros(33_000, dtype=dtype),
        "ids": torch.arange(10),
        "flags": torch.tensor([True, False, True]),
    }


def convert(source: Path, output: Path, dtype: torch.dtype, **options: Any) -> DtypeReport:
    with SafetensorsCheckpoint(source) as checkpoint:
        return convert_dtype(checkpoint, output, dtype=dtype, **options)


@pytest.mark.parametrize("path", ["safetensors", "view"])
@pytest.mark.parametrize(("given_dtype", "target"), PAIRS, ids=lambda dtype: label(dtype))
def test_every_value_is_what_torch_casts_it_to(
    tmp_path: Path, given_dtype: torch.dtype, target: torch.dtype, path: str
) -> None:
    tensors = varied(given_dtype)
    with SafetensorsCheckpoint(make_model(tmp_path / "in", tensors, dtype=label(given_dtype))) as checkpoint:
        source: Checkpoint = checkpoint if path == "safetensors" else RowsOnly(checkpoint)
        report = convert_dtype(source, tmp_path / "out", dtype=target, max_shard_bytes=3_000_000)
        assert report.bytes_read == source.nbytes
    with SafetensorsCheckpoint(tmp_path / "out") as result:
        assert set(result) == set(tensors)
        for name, tensor in tensors.items():
            expected = tensor.to(target) if tensor.is_floating_point() else tensor
            assert result.infos[name].dtype == expected.dtype
            assert torch.equal(result[name], expected), name
        assert result.config["dtype"] == label(target)
    assert (tmp_path / "out" / INDEX_NAME).exists()
    assert report.tensors == len(tensors)
    assert report.cast == (0 if given_dtype == target else 7)
    assert (
        report.bytes_written
        == sum(p.stat().st_size for p in (tmp_path / "out").iterdir() if p.name != INDEX_NAME)
        + (tmp_path / "out" / INDEX_NAME).stat().st_size
    )
    errors = {
        name: ((tensor.to(target).double() - tensor.double()).abs() / tensor.double().abs()).nan_to_num().max().item()
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    assert report.largest_relative_error == pytest.approx(max(errors.values()), rel=1e-3, abs=0)
    if max(errors.values()):
        assert errors[str(report.largest_error_tensor)] == pytest.approx(max(errors.values()), rel=1e-3)
    else:
        assert report.largest_error_tensor is None


def test_the_same_dtype_is_copied_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(0, 1 << 16, (100_000,), generator=torch.Generator().manual_seed(1)).to(torch.uint16)
    tensors = {"w": bits.view(torch.bfloat16)}  # NaNs of every payload included
    convert(make_model(tmp_path / "in", tensors), tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / SINGLE_NAME)["w"]
    assert torch.equal(written.view(torch.uint16), bits)


def test_the_memory_that_is_stated_is_that_of_the_dtypes(tmp_path: Path) -> None:
    """Buffers have room for eight bytes a number; pages that two-byte numbers never reach are not in memory."""
    stated = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        source = make_model(tmp_path / str(dtype), {"a.weight": torch.ones(4, 4, dtype=dtype)})
        plan = plan_dtype(SafetensorsCheckpoint(source), tmp_path / "out", DtypeRequest(torch.float32))
        stated[dtype] = plan.needs.memory - LOADED_NBYTES
        rows = plan_dtype(RowsOnly(SafetensorsCheckpoint(source)), tmp_path / "out", DtypeRequest(torch.float32))
        assert rows.needs.memory - LOADED_NBYTES == BUFFER_NBYTES
    # Two bytes in and four out; four that stay; eight in and four out.
    assert stated[torch.bfloat16] * 4 == stated[torch.float32] * 6 and stated[torch.float64] <= BUFFER_NBYTES
    assert stated[torch.float32] < stated[torch.bfloat16] < stated[torch.float64]


def test_files_and_config_are_kept_right(tmp_path: Path) -> None:
    nested = {"text_config": {"torch_dtype": "float32", "hidden_size": 3}, "torch_dtype": "float32", "vocab_size": 9}
    source = make_model(tmp_path / "in", {"w": torch.ones(2, 2)}, **nested)
    (source / "pytorch_model.bin").write_bytes(b"old")
    convert(source, tmp_path / "out", torch.float16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {
        "model_type": "llama",
        "text_config": {"torch_dtype": "float16", "hidden_size": 3},
        "torch_dtype": "float16",
        "vocab_size": 9,
    }
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["config.json", "generation_config.json", SINGLE_NAME, "tokenizer.json"]
    for name in ("generation_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_config_without_dtype_gets_one() -> None:
    assert with_dtype({"a": 1}, torch.bfloat16) == {"a": 1, "dtype": "bfloat16"}
    assert with_dtype({"dtype": "x", "torch_dtype": "y"}, torch.float32) == {
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def test_tied_weights_stay_tied(tmp_path: Path, tiny_llama_tied: Path) -> None:
    from transformers import AutoModelForCausalLM

    convert(tiny_llama_tied, tmp_path / "out", torch.bfloat16)
    with SafetensorsCheckpoint(tmp_path / "out") as result:
        assert "lm_head.weight" not in result
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    original = AutoModelForCausalLM.from_pretrained(tiny_llama_tied).to(torch.bfloat16)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.fixture
def tiny_llama_tied(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(**shape, num_attention_heads=2, vocab_size=64, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    return tmp_path / "tied"


def test_overflow_is_an_error_that_names_the_tensor(tmp_path: Path) -> None:
    tensors = {"fine": torch.ones(4), "layers.3.big": torch.tensor([1.0, -70_000.0, 66_000.0])}
    source = make_model(tmp_path / "in", tensors)
    with pytest.raises(UnsupportedError, match=r"layers\.3\.big: holds -70000, beyond float16's largest value 65504"):
        convert(source, tmp_path / "out", torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_overflow_is_clipped_on_request(tmp_path: Path) -> None:
    values = torch.tensor([1.0, -70_000.0, 66_000.0, 65_519.0, math.inf, -math.inf, math.nan, 1e-9])
    source = make_model(tmp_path / "in", {"w": values})
    report = convert(source, tmp_path / "out", torch.float16, overflow="clip")
    written = load_file(tmp_path / "out" / SINGLE_NAME)["w"]
    expected = torch.tensor([1.0, -65_504, 65_504, 65_504, math.inf, -math.inf, math.nan, 0.0], dtype=torch.float16)
    assert torch.equal(written.nan_to_num(nan=9.0), expected.nan_to_num(nan=9.0))
    assert (report.clipped, report.non_finite, report.non_finite_tensor, report.underflows) == (2, 3, "w", 1)
    assert report.largest_relative_error == 1.0


@pytest.mark.parametrize("target", FLOATS, ids=label)
def test_nan_and_infinity_stay_what_they_are(tmp_path: Path, target: torch.dtype) -> None:
    source = make_model(tmp_path / "in", {"w": torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0])})
    report = convert(source, tmp_path / "out", target)
    written = load_file(tmp_path / "out" / SINGLE_NAME)["w"].tolist()
    assert math.isnan(written[0])
    assert written[1:] == [math.inf, -math.inf, 0.0, -0.0, 2.0]
    assert math.copysign(1, written[4]) == -1
    assert report.clipped == 0
    assert report.non_finite == (0 if target == torch.float32 else 3)  # not looked at where nothing is cast


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=50),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.sampled_from(FLOATS),
)
@settings(max_examples=150, deadline=None)
def test_cast_errors_are_exact(values: list[float], given_dtype: torch.dtype, target: torch.dtype) -> None:
    source = torch.tensor(values).to(given_dtype)
    out = torch.empty(len(values), dtype=target)
    errors = cast_into(source, out)
    wide, cast = source.double(), source.to(target)
    finite = wide.isfinite()
    over = finite & cast.isinf()
    limit = torch.finfo(target).max
    assert errors.overflows == int(over.sum())
    assert errors.non_finite == int((~finite).sum())
    assert errors.underflows == int(((wide != 0) & (cast == 0)).sum())
    assert torch.equal(out[~over].nan_to_num(nan=5.0), cast[~over].nan_to_num(nan=5.0))
    assert torch.equal(out[over].double(), wide[over].sign() * limit)
    ordinary = finite & ~over & (wide != 0)
    relative = ((cast.double() - wide).abs() / wide.abs())[ordinary]
    largest = relative.max().item() if len(relative) else 0.0
    assert errors.largest_relative == pytest.approx(largest, rel=1e-6)


def test_a_cast_view_equals_the_converted_checkpoint(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", varied(torch.float32), torch_dtype="float32")
    convert(source, tmp_path / "out", torch.bfloat16)
    with (
        SafetensorsCheckpoint(tmp_path / "out") as written,
        CastView(SafetensorsCheckpoint(source), torch.bfloat16) as view,
    ):
        assert view.config == written.config
        for name in view:
            assert view.infos[name].dtype == written.infos[name].dtype
            assert torch.equal(view[name], written[name])
        assert torch.equal(view.read_rows("odd", 5, 9), written.read_rows("odd", 5, 9))


def test_a_cast_view_checks_the_range(tmp_path: Path) -> None:
    source = SafetensorsCheckpoint(make_model(tmp_path / "in", {"w": torch.tensor([1.0, 1e9])}))
    with pytest.raises(UnsupportedError, match="tensor w"):
        CastView(source, torch.float16)["w"]
    assert CastView(source, torch.float16, "clip")["w"].tolist() == [1.0, 65_504.0]


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"w": torch.ones(2)},
            {"quantization_config": {"quant_method": "hqq"}},
            r"quantized with 'hqq' .*; known are compressed-tensors",
        ),
        ({"w": torch.ones(2)}, {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"l.qweight": torch.ones(2, 2, dtype=torch.int32)}, {}, r"tensor l\.qweight is torch\.int32"),
        ({"l.weight": torch.ones(2, 2, dtype=torch.int8), "l.SCB": torch.ones(2)}, {}, "already quantized"),
        ({"l.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, {}, r"torch\.float8_e4m3fn"),
        ({"l.weight_packed": torch.ones(2, 2, dtype=torch.int32)}, {}, "weight_packed"),
    ],
)
def test_a_quantized_model_is_refused(
    tmp_path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any], message: str
) -> None:
    source = make_model(tmp_path / "in", tensors, **config)
    with pytest.raises((UnsupportedError, CheckpointError), match=message):
        convert(source, tmp_path / "out", torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_bad_requests_are_refused_before_any_work(tmp_path: Path) -> None:
    source = make_model(tmp_path / "in", {"w": torch.ones(2)})
    with pytest.raises(UnsupportedError, match="is no target"):
        convert(source, tmp_path / "out", torch.int8)
    with pytest.raises(OutputError, match="not empty"):
        convert(source, source, torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_layout_follows_the_source(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.ones(8, 8) for i in range(6)}
    with SafetensorsCheckpoint(make_model(tmp_path / "in", tensors)) as source:
        infos: Mapping[str, TensorInfo] = source.infos
        convert_dtype(source, tmp_path / "out", dtype=torch.float16, max_shard_bytes=256)
        weight_map = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
        assert [weight_map[name] for name in infos] == [
            f"model-{1 + i // 2:05d}-of-00003.safetensors" for i in range(6)
        ]
