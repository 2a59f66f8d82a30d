"""The perplexity of a model directory, whoever wrote it; started by ``bench/peers.py``.

    python bench/peers/score.py --model DIR --ids FILE.npy --report FILE.json

Weights are dequantized to bfloat16 and run through one and the same evaluator, so that nothing but the weights differs
between artifacts. Losses are computed and summed in float32 and float64.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from gptq_v1 import GptqView

from llmconvert.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.engine.stream import stream_logits
from llmconvert.quantize.reader import open_dense
from llmconvert.validate.perplexity import perplexity


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows = [torch.from_numpy(row).unsqueeze(0) for row in np.load(options.ids)]
    checkpoint = open_any(SafetensorsCheckpoint(options.model))
    logits = stream_logits(checkpoint, windows, device=torch.device("cpu"), dtype=torch.bfloat16)
    result = perplexity(logits, windows)
    report = {"perplexity": result.ppl, "low": result.low, "high": result.high, "tokens": result.tokens}
    options.report.write_text(json.dumps(report))


def open_any(stored: Checkpoint) -> Checkpoint:
    """A dense view of a checkpoint: unquantized, compressed-tensors, or GPTQ v1."""
    declared = stored.config.get("quantization_config") or {}
    return GptqView(stored, torch.bfloat16) if declared.get("quant_method") == "gptq" else open_dense(stored)


if __name__ == "__main__":
    main()
