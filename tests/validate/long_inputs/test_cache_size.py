"""The cache on shapes alone, held against the formula and against a cache with real memory."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.multimodal_families import FAMILIES, family_config
from support.tiny_architectures import ARCHITECTURES, tiny_model
from support.tiny_models import tiny_llama_dir
from transformers import AutoConfig, AutoModelForCausalLM

from llmconvert.convert.kv_cache import cache_layout
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.report.report import Check
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.validate.long_inputs import cache_size
from llmconvert.validate.long_inputs.cache_size import CACHE_DTYPES, CacheCheck, measured_cache_nbytes
from llmconvert.validate.long_inputs.prefill import cache_nbytes
from llmconvert.validate.measurement import Subject
from llmconvert.validate.runtimes.isolated import UnmeasuredError


def measure(directory: Path, check: CacheCheck) -> Check:
    with SafetensorsCheckpoint(directory) as stored:
        subject = Subject(directory, stored, open_dense(stored), None, None, None, torch.device("cpu"))
        (found,) = check.measure(subject)
        return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_alone_give_the_formula(name: str) -> None:
    config = AutoConfig.for_model(ARCHITECTURES[name].model_type, **copy.deepcopy(ARCHITECTURES[name].config))
    for dtype, itemsize in CACHE_DTYPES.items():
        for context, batch in ((5, 1), (60, 3)):
            try:
                found = measured_cache_nbytes(config.to_dict(), context, batch, dtype)
            except UnmeasuredError as error:
                assert dtype == "fp8" and "full attention" in str(error)
                continue
            assert found == cache_layout(Architecture.of(config)).nbytes(context, batch, itemsize)


def test_shapes_alone_give_what_real_memory_holds() -> None:
    config = AutoConfig.for_model("mistral", **copy.deepcopy(ARCHITECTURES["mistral"].config))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        cache = model(torch.randint(90, (2, 50)), use_cache=True).past_key_values
    assert cache_nbytes(cache) == measured_cache_nbytes(config.to_dict(), 50, 2, "bfloat16")


def test_the_table(tmp_path: Path) -> None:
    check = measure(tiny_llama_dir(tmp_path / "m"), CacheCheck((64, 256), (1, 4)))
    assert check.ok and check.value == 2 * 2 * 2 * 16 * 2, "keys and values × layers × heads × width × 2 bytes"
    rows = check.sections[0].rows
    assert len(rows) == 3 * 2 * 2 and all(row[3] == row[4] and row[5] == "measured" for row in rows)


def test_scales_of_the_artifact_halve_it(tmp_path: Path) -> None:
    with SafetensorsCheckpoint(tiny_llama_dir(tmp_path / "m")) as source:
        scheme, windows = Scheme.parse("w8a16-channel"), [torch.arange(12).unsqueeze(0)]
        quantize_checkpoint(source, tmp_path / "q", method="rtn", scheme=scheme, windows=windows, kv_cache="fp8")
    check = measure(tmp_path / "q", CacheCheck((64,), (1,)))
    assert check.value == 2 * 2 * 2 * 16 and "8 bits" in check.label and "E4M3" in check.text


def test_contexts_beyond_learned_positions_are_left_out(tmp_path: Path) -> None:
    check = measure(tiny_model(tmp_path / "m", "opt", max_position_embeddings=64), CacheCheck((32, 4096), (1,)))
    assert {row[2] for row in check.sections[0].rows} == {32.0} and "64 positions" in check.text


def test_a_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_size, "measured_cache_nbytes", lambda *_: 1)
    check = measure(tiny_llama_dir(tmp_path / "m"), CacheCheck((64,), (1,)))
    assert not check.ok and "instead of" in check.text


def test_layers_that_attend_to_images_keep_nothing_of_the_text() -> None:
    config = family_config(FAMILIES["mllama"])
    layout = cache_layout(Architecture.of(config))
    assert [layer.values > 0 for layer in layout.layers] == [True, False, True, False]
    assert layout.nbytes(50) == measured_cache_nbytes(config.to_dict(), 50)
