"""Scaled rotary positions: what the config says, and what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_llama_dir
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.convert.dtype import convert_dtype
from llmconvert.convert.rope_factor import RopeScaling
from llmconvert.convert.rope_scaling import RopeScalingView, scale_positions
from llmconvert.errors import UnsupportedError, UsageError
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


def config_of(model_type: str, **settings: Any) -> dict[str, Any]:
    found: dict[str, Any] = AutoConfig.for_model(model_type, **settings).to_dict()
    return found


def frequencies(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory)
    found: torch.Tensor = model.model.rotary_emb.inv_freq
    return found


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_transformers_reads_the_scaling(tmp_path: Path, kind: str) -> None:
    directory = tiny_llama_dir(tmp_path / "in", max_position_embeddings=256)
    with SafetensorsCheckpoint(directory) as source:
        convert_dtype(source, tmp_path / "out", dtype=torch.float32, rope_scaling=RopeScaling.parse(f"{kind}:4"))
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert (config.rope_parameters["rope_type"], config.rope_parameters["factor"]) == (kind, 4.0)
    assert config.rope_parameters["rope_theta"] == AutoConfig.from_pretrained(directory).rope_parameters["rope_theta"]
    assert config.max_position_embeddings == (256 if kind == "dynamic" else 1024)
    before, after = frequencies(directory), frequencies(tmp_path / "out")
    if kind == "linear":
        torch.testing.assert_close(after, before / 4)
    elif kind == "dynamic":
        torch.testing.assert_close(after, before, msg="nothing changes up to the trained length")
    else:
        # The fastest pairs stay, the slowest are interpolated, and those between lie between.
        assert after[0] == before[0] and torch.isclose(after[-1], before[-1] / 4)
        assert ((after <= before) & (after >= before / 4 * 0.999)).all()


def test_dynamic_scaling_starts_after_the_trained_length(tmp_path: Path) -> None:
    directory = tiny_llama_dir(tmp_path / "in", max_position_embeddings=64)
    with SafetensorsCheckpoint(directory) as source:
        convert_dtype(source, tmp_path / "out", dtype=torch.float32, rope_scaling=RopeScaling("dynamic", 2.0))
    ids = torch.randint(300, (1, 96), generator=torch.Generator().manual_seed(0))
    plain, scaled = (AutoModelForCausalLM.from_pretrained(path) for path in (directory, tmp_path / "out"))
    with torch.inference_mode():
        assert torch.equal(plain(ids[:, :64]).logits, scaled(ids[:, :64]).logits)
        assert not torch.allclose(plain(ids).logits, scaled(ids).logits)


def test_a_config_in_the_older_spelling() -> None:
    config = {**config_of("llama", max_position_embeddings=128), "rope_theta": 5e5, "rope_scaling": None}
    del config["rope_parameters"]
    scaled = scale_positions(config, RopeScaling("yarn", 2.0))
    assert scaled["rope_parameters"]["rope_theta"] == 5e5
    assert scaled["rope_parameters"]["original_max_position_embeddings"] == 128
    assert "rope_scaling" not in scaled and scaled["max_position_embeddings"] == 256
    assert config["rope_scaling"] is None, "the source's config is left alone"


def test_layers_with_sliding_windows_keep_their_positions() -> None:
    config = config_of("gemma3_text", num_hidden_layers=6, max_position_embeddings=512)
    rope = scale_positions(config, RopeScaling("linear", 8.0))["rope_parameters"]
    assert rope["full_attention"]["rope_type"] == "linear" and rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"] == config["rope_parameters"]["sliding_attention"]


def test_a_view_changes_the_config_and_no_tensor(tiny_llama: Path) -> None:
    with SafetensorsCheckpoint(tiny_llama) as base:
        view = RopeScalingView(base, RopeScaling("yarn", 2.0))
        assert view.config["max_position_embeddings"] == 2 * base.config["max_position_embeddings"]
        name = next(iter(base.infos))
        assert view.infos == base.infos and torch.equal(view[name], base[name])


@pytest.mark.parametrize(
    ("model_type", "settings", "reason"),
    [
        ("gpt2", {}, "no rotary positions"),
        ("bloom", {}, "no rotary positions"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled already"),
    ],
)
def test_what_cannot_be_scaled(model_type: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        scale_positions(json.loads(json.dumps(config_of(model_type, **settings))), RopeScaling("yarn", 2.0))


@pytest.mark.parametrize("text", ["yarn", "yarn:1", "yarn:0.5", "ntk:2", "yarn:x", ""])
def test_what_is_no_scaling(text: str) -> None:
    with pytest.raises(UsageError):
        RopeScaling.parse(text)


def test_it_prints_as_it_is_written() -> None:
    assert str(RopeScaling.parse("yarn:2.0")) == "yarn:2" and RopeScaling.parse("linear:1.5").factor == 1.5


@pytest.mark.parametrize("text", ["yarn:" + "9" * 400, "linear:1000001", "dynamic:1.0"])
def test_a_factor_that_no_model_has_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^.{,100}the factor must be above 1 and at most 1,000,000$"):
        RopeScaling.parse(text)


@pytest.mark.parametrize("factor", [1.23456789, 2.0, 1.0000001, 123456.75, 1e6])
def test_a_factor_is_read_back_from_its_name(factor: float) -> None:
    scaling = RopeScaling("yarn", factor)
    assert RopeScaling.parse(str(scaling)) == scaling
