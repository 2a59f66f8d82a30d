"""What an artifact computes by our own reading of it."""

from __future__ import annotations

from pathlib import Path

import torch
from support.agreement import Forward
from support.gguf_models import built, round_inputs

from llmconvert.compute.activations import ActivationRuntime
from llmconvert.engine.evaluation import stream_logits
from llmconvert.gguf.checkpoint import open_gguf
from llmconvert.quantize.formats.dense_view import open_dense, served_by
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["our_forward"]


def our_forward(path: Path, windows: list[torch.Tensor], runtime: ActivationRuntime = "transformers") -> Forward:
    """Of the dequantized model: in float32, and as the runtimes round; inputs quantized by a runtime's formulas."""
    if path.suffix == ".gguf":
        with open_gguf(path) as checkpoint, torch.no_grad():
            exact, rounding = built(checkpoint), built(checkpoint)
            round_inputs(rounding, checkpoint)
            ids = torch.cat(windows)
            return Forward(*(model(ids).logits.float().log_softmax(-1) for model in (exact, rounding)))
    view = served_by(open_dense(SafetensorsCheckpoint(path)), runtime)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = stream_logits(view, windows, device=torch.device("cpu"), dtype=dtype)
        results.append(torch.cat(list(logits)).float().log_softmax(-1))
    return Forward(*results)
