"""Models that ``mlx_lm.convert`` made: we read the weights that MLX dequantizes, and compute with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from environments import interpreter, run_script
from safetensors.torch import load_file
from samples import sample_model

from llmconvert.convert.inspection import describe_model
from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.formats.dense_view import QuantizedView, open_dense
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

#: What each is asked for, and the schemes that it then has.
MADE = {
    "plain": ({"q_bits": 4, "q_group_size": 64}, {"w4a16-g64-affine"}),
    "three": ({"q_bits": 3, "q_group_size": 32, "dtype": "float16"}, {"w3a16-g32-affine"}),
    "mixed": (
        {"q_bits": 4, "q_group_size": 128, "quant_predicate": "mixed_2_6"},
        {"w2a16-g128-affine", "w6a16-g128-affine"},
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_converted_models_are_read(tmp_path: Path) -> None:
    interpreter("mlx")
    source = sample_model(tmp_path / "model", torch.bfloat16)
    models = {
        str(tmp_path / name): {"dense": str(tmp_path / f"{name}.safetensors"), "options": options}
        for name, (options, _) in MADE.items()
    }
    log = run_script("make_mlx_lm", "mlx", tmp_path / "run", {"source": str(source), "models": models})
    for name, (_, schemes) in MADE.items():
        assert (tmp_path / f"{name}.safetensors").exists(), log[-3000:]
        theirs = load_file(tmp_path / f"{name}.safetensors")
        made = SafetensorsCheckpoint(tmp_path / name)
        view = open_dense(made, torch.float32)
        assert isinstance(view, QuantizedView)
        assert set(theirs) == set(view.quantized) and len(theirs) == 16
        assert {str(view.scheme_of(weight)) for weight in theirs} == schemes
        for weight, values in theirs.items():
            # MLX multiplies and adds in one rounding or in two, as its compiler has it.
            torch.testing.assert_close(view[weight], values, rtol=1e-6, atol=1e-7)
        summary = describe_model(made)
        assert summary.quantization == "mlx" and schemes <= set(summary.mixture)
        logits = next(stream_logits(open_dense(made), [torch.arange(16).unsqueeze(0)], device=torch.device("cpu")))
        assert bool(torch.isfinite(logits).all())
