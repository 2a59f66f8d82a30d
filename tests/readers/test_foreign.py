"""Artifacts that other tools made, each in its own environment: we read the weights that they themselves dequantize.

bitsandbytes' and llama.cpp's are in tests/quantize/formats/test_readers.py and tests/gguf/test_checkpoint.py, where the
package's own environment has them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from environments import interpreter, run_script
from safetensors.torch import load_file
from samples import VOCABULARY, sample_model

from llmconvert.convert.dtype import convert_dtype
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

GPTQMODEL = {
    "ordered": {"bits": 4, "group_size": 64, "desc_act": True, "act_group_aware": False},
    "asymmetric": {"bits": 3, "group_size": 32, "sym": False, "desc_act": False},
    "version-2": {"bits": 4, "group_size": 64, "sym": False, "desc_act": False, "format": "gptq_v2"},
    "awq": {"bits": 4, "group_size": 64, "sym": False, "quant_method": "awq", "format": "gemm"},
}
LLMCOMPRESSOR = {
    "w4a16": {"scheme": "W4A16", "targets": "Linear"},
    "w4a16-asym": {"scheme": "W4A16_ASYM", "targets": "Linear"},
    "w8a8": {"scheme": "W8A8", "targets": "Linear"},
}
AUTOAWQ = {"gemm": {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}}
#: Tool and environment → the dtype in which it dequantizes, and what is asked of it.
TOOLS: dict[tuple[str, str], tuple[torch.dtype, dict[str, Any]]] = {
    ("gptqmodel", "gptqmodel"): (torch.float16, GPTQMODEL),
    ("llmcompressor", "llmcompressor"): (torch.bfloat16, LLMCOMPRESSOR),
    ("autoawq", "autogptq"): (torch.float16, AUTOAWQ),
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("tool", "environment"), TOOLS)
def test_artifacts_of_another_tool(tool: str, environment: str, tmp_path: Path) -> None:
    interpreter(environment)
    dtype, wanted = TOOLS[tool, environment]
    source = sample_model(tmp_path / "model", torch.bfloat16)
    models = {
        str(tmp_path / name): {"dense": str(tmp_path / "dense" / name), "options": options}
        for name, options in wanted.items()
    }
    (tmp_path / "dense").mkdir()
    job = {"source": str(source), "vocabulary": VOCABULARY, "models": models}
    log = run_script(f"make_{tool}", environment, tmp_path / "run", job)
    for name in wanted:
        expected = tmp_path / "dense" / f"{name}.safetensors"
        assert expected.exists(), log[-3000:]
        theirs = load_file(expected)
        view = open_dense(SafetensorsCheckpoint(tmp_path / name), dtype)
        assert isinstance(view, QuantizedView)
        assert set(theirs) == set(view.quantized) and len(theirs) == 14, (name, log[-3000:])
        for weight, values in theirs.items():
            assert values.dtype == dtype and torch.equal(view[weight], values), (name, weight)
        # And `llmconvert convert` writes them, with everything else.
        convert_dtype(SafetensorsCheckpoint(tmp_path / name), tmp_path / f"{name}-dense", dtype=torch.float32)
        dense = SafetensorsCheckpoint(tmp_path / f"{name}-dense")
        assert all(torch.equal(dense[weight].to(dtype), values) for weight, values in theirs.items())
        assert set(dense) == set(SafetensorsCheckpoint(source))
    if tool == "gptqmodel":
        group = SafetensorsCheckpoint(tmp_path / "ordered")["model.layers.0.mlp.up_proj.g_idx"]
        assert not torch.equal(group, group.sort().values), "no activation order"
