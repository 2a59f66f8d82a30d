"""An FP8 cache: its scales against the keys and values of transformers' own cache, its values in the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_architectures import ids
from support.tiny_models import tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache

from llmconvert.compute.activations import ActivationRuntime
from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CalibrationError, CheckpointError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense, served_by
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import CacheKind
from llmconvert.quantize.scheme import Override, Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16, 20))
Tiny = Callable[..., Path]


class RoundingCache(DynamicCache):  # type: ignore[misc]
    """transformers' cache, given what vLLM's kernels on GPUs put into one of FP8 and take out of it."""

    def __init__(self, stored: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.stored = stored

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        rounded = []
        for part, name in ((key, "k_scale"), (value, "v_scale")):
            scale = self.stored[f"model.layers.{layer_idx}.self_attn.{name}"].float()
            codes = (part.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
            rounded.append((codes.float() * scale).to(part.dtype))
        return super().update(*rounded, layer_idx, *args, **kwargs)


def logits(directory: Path, *, cache: bool = True, runtime: ActivationRuntime = "transformers") -> list[torch.Tensor]:
    view = served_by(open_dense(SafetensorsCheckpoint(directory)), runtime)
    if not cache:
        view.quantized_cache = {}
    return list(stream_logits(view, WINDOWS, device=CPU))


@pytest.mark.parametrize(("method", "name", "kind"), [("gptq", "llama", "fp8"), ("rtn", "qwen3", "fp8-head")])
def test_the_loaded_model_has_our_scales_and_gives_our_logits(
    tiny: Tiny, tmp_path: Path, method: str, name: str, kind: CacheKind
) -> None:
    source, output = SafetensorsCheckpoint(tiny(name, torch.bfloat16)), tmp_path / "out"
    scheme = Scheme.parse("w8a16-g32")
    quantize_checkpoint(source, output, method=method, scheme=scheme, windows=WINDOWS, kv_cache=kind)
    model = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        expected = [model(input_ids=window).logits for window in WINDOWS]
    assert all(map(torch.equal, logits(output), expected))
    assert not torch.equal(logits(output, cache=False)[0], expected[0])
    served = logits(output, runtime="vllm")
    assert not torch.equal(served[0], expected[0])

    # Without the cache's scheme transformers keeps what the weights give: keys after their rotation.
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (output / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        caches = [plain(input_ids=window, use_cache=True).past_key_values for window in WINDOWS]
    stored = load_file(output / "model.safetensors")
    with torch.no_grad():
        by_vllm = [plain(input_ids=window, past_key_values=RoundingCache(stored)).logits for window in WINDOWS]
    assert all(map(torch.equal, served, by_vllm))
    for index, layer in enumerate(model.model.layers):
        for part, kept in (("k_scale", "keys"), ("v_scale", "values")):
            heads = [getattr(cache.layers[index], kept).abs().amax((0, 2, 3)).float() for cache in caches]
            largest = torch.stack(heads).amax(0)
            expected_scale = largest[:, None, None] / 448 if kind == "fp8-head" else largest.amax()[None] / 448
            found = stored[f"model.layers.{index}.self_attn.{part}"]
            assert torch.equal(getattr(layer.self_attn, part).data, found) and found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected_scale, rtol=0.03, atol=0)


def test_what_can_have_no_scales_is_refused_before_the_work(tiny: Tiny, tmp_path: Path) -> None:
    source, scheme, output = SafetensorsCheckpoint(tiny("llama")), Scheme.parse("w4a16-g32"), tmp_path / "out"
    with pytest.raises(UnsupportedError, match="holds no scales of a cache; use format: compressed-tensors"):
        quantize_checkpoint(
            source, output, method="gptq", scheme=scheme, format="gptq", windows=WINDOWS, kv_cache="fp8"
        )
    with pytest.raises(CalibrationError, match="kv_cache needs calibration text and was given none"):
        quantize_checkpoint(source, output, method="rtn", scheme=scheme, kv_cache="fp8")


@pytest.mark.parametrize(("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (0.0, "0"), (-0.5, "-0.5")])
def test_damaged_scales_are_refused_by_name(tiny: Tiny, tmp_path: Path, value: float, shown: str) -> None:
    source, output = SafetensorsCheckpoint(tiny("llama")), tmp_path / "out"
    quantize_checkpoint(
        source, output, method="rtn", scheme=Scheme.parse("w8a16-g32"), windows=WINDOWS[:1], kv_cache="fp8"
    )
    tensors = load_file(output / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"].fill_(value)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"layers.1.self_attn.v_scale' is no scale \({shown}\); the checkpoint"):
        open_dense(SafetensorsCheckpoint(output))


def test_keys_too_small_for_a_scale_are_refused(tmp_path: Path) -> None:
    """In float16 a scale below 2⁻²⁵ is zero, and what is divided by it no number."""
    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].self_attn.k_proj.weight.data.mul_(1e-7)
    model.to(torch.float16).save_pretrained(tmp_path / "source")
    source, scheme = SafetensorsCheckpoint(tmp_path / "source"), Scheme.parse("w8a16-g32")
    overrides = [Override("*.k_proj", None), Override("*.q_proj", None), Override("*.v_proj", None)]
    with pytest.raises(UnsupportedError, match=r"self_attn: its keys reach .* so that it has no scale for them"):
        quantize_checkpoint(
            source, tmp_path / "out", method="rtn", scheme=scheme, windows=WINDOWS, kv_cache="fp8", overrides=overrides
        )
