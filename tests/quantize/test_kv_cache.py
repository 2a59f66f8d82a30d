"""An FP8 cache: its scales against the keys and values of transformers' own cache, its values in the loaded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_architectures import ids
from transformers import AutoModelForCausalLM

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CalibrationError, UnsupportedError
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.plan import CacheKind
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
WINDOWS = ids((24, 16, 20))
Tiny = Callable[..., Path]


def logits(directory: Path, *, cache: bool = True) -> list[torch.Tensor]:
    view = open_dense(SafetensorsCheckpoint(directory))
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

    # Without the cache's scheme transformers keeps what the weights give: keys after their rotation.
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"] = None
    (output / "config.json").write_text(json.dumps(config))
    plain = AutoModelForCausalLM.from_pretrained(output)
    with torch.no_grad():
        caches = [plain(input_ids=window, use_cache=True).past_key_values for window in WINDOWS]
    stored = load_file(output / "model.safetensors")
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
