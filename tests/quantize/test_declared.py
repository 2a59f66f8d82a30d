"""What a config declares, held against the class that runtimes load: every linear that is left dense is named."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.multimodal import AHEAD, tiny_qwen35_dir
from support.tiny_architectures import ids
from support.tiny_mixtures import load_mixture, tiny_mixture
from transformers import Qwen3_5ForConditionalGeneration

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.runtimes.transformers import runtime

CPU = torch.device("cpu")
WINDOWS = ids((24,))
OVERRIDES = (
    Override("*.0.mlp.down_proj", Scheme.parse("w8a16-g32")),
    Override("*.1.mlp.down_proj", None),
)


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen35_dir(tmp_path_factory.mktemp("multimodal") / "qwen")


def quantized(
    source: Path, output: Path, scheme: str, format: str = "compressed-tensors", overrides: Sequence[Override] = ()
) -> dict[str, Any]:
    quantize_checkpoint(
        SafetensorsCheckpoint(source),
        output,
        method="rtn",
        scheme=Scheme.parse(scheme),
        format=format,
        overrides=overrides,
    )
    declared: dict[str, Any] = json.loads((output / "config.json").read_text())["quantization_config"]
    return declared


def matrices(source: Path) -> set[str]:
    """Every module of a checkpoint that holds a matrix, embeddings apart."""
    found = {
        name.removesuffix(".weight")
        for name, info in SafetensorsCheckpoint(source).infos.items()
        if name.endswith(".weight") and len(info.shape) == 2
    }
    return {name for name in found if "embed" not in name}


def test_a_vision_tower_and_layers_that_predict_ahead_are_declared_dense(multimodal: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    declared = quantized(multimodal, output, "w4a16-g32", overrides=OVERRIDES)
    view = open_dense(SafetensorsCheckpoint(output))
    assert isinstance(view, QuantizedView)
    inside = {name.removesuffix(".weight") for name in view.quantized}
    assert set(declared["ignore"]) >= matrices(multimodal) - inside
    assert not set(declared["ignore"]) & inside
    assert {"mtp.fc", "mtp.layers.0.mlp.up_proj", "model.visual.blocks.0.attn.qkv"} <= set(declared["ignore"])
    assert "model.language_model.layers.1.mlp.down_proj" in declared["ignore"]
    named = [group["targets"] for group in declared["config_groups"].values()]
    assert named == [["model.language_model.layers.0.mlp.down_proj"], ["Linear"]]
    assert str(view.scheme_of("model.language_model.layers.0.mlp.down_proj.weight")) == "w8a16-g32-sym"
    assert view.scheme_of("model.language_model.layers.1.mlp.down_proj.weight") is None

    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(output, dtype="auto", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(input_ids=WINDOWS[0], use_cache=False).logits
    assert torch.equal(theirs, next(iter(stream_logits(view, WINDOWS, device=CPU))))
    source = SafetensorsCheckpoint(multimodal)
    tower = {f"model.visual.{name}": value for name, value in model.model.visual.state_dict().items()}
    assert tower and all(torch.equal(value, source[name]) for name, value in tower.items())
    assert all(torch.equal(view[name], source[name]) for name in AHEAD)


def test_experts_that_predict_ahead_are_declared_dense_and_no_others(tmp_path: Path) -> None:
    """One tensor for all of a layer, as Qwen3.5's are published; runtimes ask for each of them by name."""
    source, output, ahead = tiny_mixture(tmp_path / "in", "qwen3_5_moe_text"), tmp_path / "out", "mtp.layers.0.mlp"
    tensors = load_file(source / "model.safetensors")
    more = {f"{ahead}.experts.gate_up_proj": torch.ones(4, 64, 64), f"{ahead}.experts.down_proj": torch.ones(4, 64, 32)}
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    for overrides, dense in (((), False), ([Override("*.experts.*", None)], True)):
        ignored = quantized(source, output, "w4a16-g32", overrides=overrides)["ignore"]
        shutil.rmtree(output)
        patterns = [re.compile(name.removeprefix("re:")) for name in ignored if name.startswith("re:")]
        for name in (f"{ahead}.experts.0.gate_proj", f"{ahead}.experts.3.down_proj"):
            assert any(pattern.match(name) for pattern in patterns)
        assert any(pattern.match("model.layers.0.mlp.experts.0.gate_proj") for pattern in patterns) == dense


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_a_layer_behind_the_last_is_carried_with_its_experts(tmp_path: Path, kind: str) -> None:
    """As DeepSeek V3 and GLM 4.5 are published: it predicts ahead, with experts a tensor each, and no class has it."""
    source, output = tiny_mixture(tmp_path / "in", kind), tmp_path / "out"
    tensors = load_file(source / "model.safetensors")
    more = {name.replace("layers.1.", "layers.2."): tensors[name].clone() for name in tensors if "layers.1." in name}
    more["model.layers.2.eh_proj.weight"] = torch.ones(64, 128).bfloat16()
    save_file(tensors | more, source / "model.safetensors", {"format": "pt"})
    ignored = quantized(source, output, "w4a16-g16")["ignore"]
    stored = load_file(output / "model.safetensors")
    assert all(torch.equal(stored[name], more[name]) for name in more)
    assert {name.removesuffix(".weight") for name in more if more[name].dim() == 2} <= set(ignored)
    view = open_dense(SafetensorsCheckpoint(output))
    with torch.no_grad():
        theirs = load_mixture(output)(WINDOWS[0]).logits
    assert torch.equal(theirs, next(iter(stream_logits(view, WINDOWS, device=CPU))))


def problems_of(directory: Path) -> tuple[str, ...]:
    """What the runtime finds wrong: it decompresses what no tensor was loaded into, where shapes may be anything."""
    try:
        with runtime(directory, device=CPU) as loaded:
            return tuple(problem for problem in loaded.problems if "model.visual.blocks.0.attn.qkv.weight" in problem)
    except UnsupportedError as error:
        return (str(error),)


def test_validation_loads_the_class_that_the_config_names(multimodal: Path, tmp_path: Path) -> None:
    """So that a tower that is declared quantized and stored dense is a problem."""
    output = tmp_path / "out"
    quantized(multimodal, output, "w4a16-g32")
    with runtime(output, device=CPU) as loaded:
        assert type(loaded.model) is Qwen3_5ForConditionalGeneration and not loaded.problems
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (output / "config.json").write_text(json.dumps(config))
    assert problems_of(output)


@pytest.mark.parametrize(
    ("scheme", "format", "key"),
    [("w4a16-g32", "gptq", "dynamic"), ("w4a16-g32-asym", "awq", "modules_to_not_convert")],
)
def test_other_formats_declare_the_same(multimodal: Path, tmp_path: Path, scheme: str, format: str, key: str) -> None:
    small = Override("*.in_proj_*", None)  # some have four outputs
    declared = quantized(multimodal, tmp_path / "out", scheme, format, (small,))
    listed = str(declared[key]).replace("\\", "")
    for name in ("model.visual.blocks.0.attn.proj", "mtp.fc", "model.language_model.layers.0.linear_attn.in_proj_a"):
        assert name in listed


def test_asymmetric_artifacts_load_as_the_readme_says(tiny_llama: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantized(tiny_llama, output, "w4a16-g32-asym")
    with runtime(output, device=CPU) as loaded:
        assert not loaded.problems
        with torch.no_grad():
            theirs = loaded.model(input_ids=WINDOWS[0], use_cache=False).logits
    ours = next(iter(stream_logits(open_dense(SafetensorsCheckpoint(output)), WINDOWS, device=CPU)))
    assert torch.equal(theirs, ours)


def test_mixed_artifacts_load_without_a_warning(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """compressed-tensors looks for the first target that matches, and warns of each that is left over."""
    output = tmp_path / "out"
    quantized(tiny_llama, output, "w4a16-g32", overrides=(Override("*.down_proj", Scheme.parse("w8a16-g32")),))
    with caplog.at_level(logging.WARNING), runtime(output, device=CPU) as loaded:
        assert not loaded.problems
    assert [record.getMessage() for record in caplog.records] == []
    config = json.loads((output / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    config["quantization_config"]["config_groups"] = dict(reversed(groups.items()))
    (output / "config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING), runtime(output, device=CPU) as loaded:
        assert not loaded.problems
    assert "Could not match `model.layers.0.mlp.down_proj`" in caplog.text
