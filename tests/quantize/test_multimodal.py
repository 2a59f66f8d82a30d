"""Multimodal checkpoints: the decoder is quantized, all else keeps its bytes, and transformers loads the whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from support.multimodal_families import FAMILIES, image_features, save_family
from support.tiny_architectures import ids
from support.tiny_checkpoints import save_tiny_checkpoint
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from llmconvert.engine.evaluation import stream_logits
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import Override
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.runtimes.transformers import not_loaded

CPU = torch.device("cpu")
SCHEME = Scheme.parse("w4a16-g32")
WINDOWS = ids((24,))
# One of every mechanism: names that differ, towers of their own kind, blocks for images, several inputs, experts.
FAST = ("llava", "mllama", "qwen2_5_vl")
# Formats hold no experts of classes that load all of a layer as one tensor.
DENSE = {"qwen3_vl_moe": (Override("*.experts.*", None),)}
# transformers multiplies these families' experts in an order of its own: the last bits differ, of the original too.
ABOUT = ("qwen3_vl_moe", "llama4")
# Classes whose experts vLLM alone has names for: their type, and one layer's.
CLASSES = {"Qwen3VLMoe": "qwen3_vl_moe", "Step3p7": "step3p7"}
PACKED = ("weight_packed", "weight_scale", "weight_shape")
EACH = {"Qwen3VLMoe": "model.language_model.layers.0.mlp.experts", "Step3p7": "model.layers.3.moe.experts"}


def load(directory: Path) -> PreTrainedModel:
    """What transformers makes of a directory, with nothing missing, unexpected or of another shape."""
    model, info = AutoModelForMultimodalLM.from_pretrained(
        directory, output_loading_info=True, experts_implementation="eager"
    )
    assert not any(info.values()), info
    loaded: PreTrainedModel = model.eval()
    return loaded


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES],
)
def test_the_decoder_is_quantized_and_the_rest_keeps_its_bytes(tmp_path: Path, name: str) -> None:
    source, output = save_family(tmp_path / "model", name), tmp_path / "out"
    overrides = DENSE.get(name, ())
    quantize_checkpoint(SafetensorsCheckpoint(source), output, method="rtn", scheme=SCHEME, overrides=overrides)
    model, dense = load(output), open_dense(SafetensorsCheckpoint(output))
    assert type(model).__name__ in json.loads((output / "config.json").read_text())["architectures"]
    with torch.no_grad():
        theirs = model(input_ids=WINDOWS[0], use_cache=False).logits
    ours = next(iter(stream_logits(dense, WINDOWS, device=CPU)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 if name in ABOUT else 0)
    seen, before = image_features(model, name), image_features(load(source), name)
    assert before and all(map(torch.equal, seen, before))
    assert isinstance(dense, QuantizedView)
    original = SafetensorsCheckpoint(source)
    # Llama 4 holds a layer's experts in two tensors; its artifact holds them one by one.
    kept = {tensor for tensor in original if tensor not in dense.quantized and not joined(tensor, dense)}
    assert dense.quantized and kept <= set(dense) and set(dense) - set(original) <= dense.quantized.keys()
    assert all(torch.equal(dense[tensor], original[tensor]) for tensor in kept)


def joined(tensor: str, dense: QuantizedView) -> bool:
    """Whether a tensor holds experts that ``dense`` has one by one."""
    experts, _, _ = tensor.rpartition(".")
    return experts.endswith(".experts") and f"{experts}.0.down_proj.weight" in dense


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_both_runtimes_find_their_names(tmp_path: Path, name: str) -> None:
    """Checkpoints of these have names of before transformers 5, which other runtimes go by."""
    source, output = save_family(tmp_path / "model", name), tmp_path / "out"
    overrides = (Override("*.0.mlp.down_proj", Scheme.parse("w8a16-g32")), Override("*.1.mlp.down_proj", None))
    quantize_checkpoint(SafetensorsCheckpoint(source), output, method="rtn", scheme=SCHEME, overrides=overrides)
    declared = json.loads((output / "config.json").read_text())["quantization_config"]
    skeleton = Skeleton(SafetensorsCheckpoint(source), CPU)
    dense = [site for site in skeleton.sites.values() if site.name.endswith(".1.mlp.down_proj")]
    other = [site for site in skeleton.sites.values() if site.name.endswith(".0.mlp.down_proj")]
    assert dense[0].name != dense[0].stored
    assert {dense[0].name, dense[0].stored} <= set(declared["ignore"])
    assert [other[0].name, other[0].stored] in [group["targets"] for group in declared["config_groups"].values()]
    with torch.no_grad():
        theirs = load(output)(input_ids=WINDOWS[0], use_cache=False).logits
    view = open_dense(SafetensorsCheckpoint(output))
    assert torch.equal(theirs, next(iter(stream_logits(view, WINDOWS, device=CPU))))


def test_blocks_that_attend_to_images_stay_as_they_are(tmp_path: Path) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(save_family(tmp_path, "mllama")), CPU)
    assert skeleton.reach.positions == (0, 2) and skeleton.block_count == 2
    assert skeleton.prefix(1) == "model.language_model.layers.2."
    assert skeleton.holds("model.language_model.layers.2.mlp") and skeleton.reach.needs("lm_head.weight")
    for name in ("model.language_model.layers.1.mlp.up_proj", "model.vision_model.transformer.layers.0.mlp.fc1"):
        assert not skeleton.holds(name) and name in skeleton.reach.idle and not skeleton.reach.needs(f"{name}.weight")


def test_towers_are_never_loaded(tmp_path: Path) -> None:
    skeleton = Skeleton(SafetensorsCheckpoint(save_family(tmp_path, "internvl")), CPU)
    skeleton.restore_buffers()
    skeleton.load_outer(head=True)
    tower = dict(skeleton.model.get_submodule("model.vision_tower").named_parameters())
    assert tower and all(value.untyped_storage().nbytes() <= 4 for value in tower.values())
    embedding, norm = skeleton.architecture.vocab_size * skeleton.hidden_size, skeleton.hidden_size
    assert skeleton.outer_nbytes(head=True) == 4 * (embedding + norm)


def test_models_that_need_an_image_are_refused(tmp_path: Path) -> None:
    from transformers import BlipConfig, BlipForConditionalGeneration

    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": 64, "encoder_hidden_size": 32}
    config = BlipConfig(text_config=text, vision_config={**small, "image_size": 16, "patch_size": 8})
    BlipForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match=r"'blip'.* cannot be traced on text alone: .*pixel_values"):
        Skeleton(SafetensorsCheckpoint(tmp_path), CPU)


@pytest.mark.parametrize("name", ["Qwen3VLMoe", pytest.param("Step3p7", marks=pytest.mark.slow)])
def test_experts_that_transformers_has_no_names_for_are_written_for_vllm(tmp_path: Path, name: str) -> None:
    """Judged by compressed-tensors' own decompression, and by the class with these weights in its parameters."""
    source, output = tmp_path / "model", tmp_path / "out"
    save_tiny_checkpoint(source, CLASSES[name], f"{name}ForConditionalGeneration")
    options: dict[str, Any] = {"method": "rtn", "scheme": SCHEME}
    with pytest.raises(UnsupportedError, match=r"scheme: none\), .*; or .* for vLLM alone, .*runtime: vllm"):
        quantize_checkpoint(SafetensorsCheckpoint(source), output, **options)
    quantize_checkpoint(SafetensorsCheckpoint(source), output, runtime="vllm", **options)
    stored = SafetensorsCheckpoint(output)
    view = open_dense(stored)
    declared = QuantizationConfig.model_validate(stored.config["quantization_config"])
    compressor: Any = BaseCompressor.get_value_from_registry(declared.format)
    model = AutoModelForMultimodalLM.from_pretrained(source, experts_implementation="eager").eval()
    skeleton = Skeleton(SafetensorsCheckpoint(source), CPU)
    with torch.no_grad():
        for site in skeleton.sites.values():
            if f"{site.stored}.weight_packed" not in stored:
                continue
            parts = {part: stored[f"{site.stored}.{part}"] for part in PACKED}
            weight = compressor.decompress(parts, declared.config_groups["group_0"])["weight"]
            assert torch.equal(weight, view[f"{site.stored}.weight"])
            if site.experts is None:
                model.get_parameter(site.parameter).copy_(weight)
            else:
                matrix = site.experts.layout.matrices[site.projection]
                matrix.of(model.get_parameter(f"{site.layer}.{matrix.leaf}")[site.expert]).copy_(weight)
        theirs = model(input_ids=WINDOWS[0], use_cache=False).logits
    assert {f"{EACH[name]}.1.{part}_proj.weight_packed" for part in ("gate", "up", "down")} <= set(stored)
    torch.testing.assert_close(next(iter(stream_logits(view, WINDOWS, device=CPU))), theirs, rtol=0, atol=1e-5)
    assert "no names for single experts" in not_loaded(view, CPU) and not not_loaded(SafetensorsCheckpoint(source), CPU)
    with pytest.raises(UnsupportedError, match="runtime vllm: gptq is the same for all"):
        quantize_checkpoint(SafetensorsCheckpoint(source), output, format="gptq", runtime="vllm", **options)
