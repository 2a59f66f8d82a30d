"""How a model directory predicts a text, whoever wrote it; started by ``bench/peers.py`` and ``bench/quality.py``.

    python bench/peers/score.py --model DIR --ids FILE.npy --report FILE.json [--keep FILE | --reference FILE]

Weights are dequantized to bfloat16, inputs are quantized as an artifact says, and all run through one and the same
evaluator, so that nothing but the artifacts differs. Losses are computed and summed in float32 and float64. ``--keep``
writes the logits as well (bfloat16, two bytes for every token of the text and of the vocabulary); with such a file of
the original as ``--reference``, the divergence from it and the share of equal predictions are reported too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptq_v1 import GptqView

from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.validate.predictions.perplexity import PerplexityResult, compare_logits, perplexity


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    windows = [torch.from_numpy(row).unsqueeze(0) for row in np.load(options.ids)]
    checkpoint = open_any(SafetensorsCheckpoint(options.model))
    logits = stream_logits(checkpoint, windows, device=torch.device("cpu"), dtype=torch.bfloat16)
    if options.reference is not None:
        found = compare_logits(zip(kept(options.reference, windows), logits, strict=True), windows)
        more = {
            "kl_mean": found.kl_mean,
            "kl_p99": found.kl_p99,
            "top1_agreement": found.top1_agreement,
            "increase": found.increase,
        }
        report = scores(found.artifact) | more
    elif options.keep is not None:
        report = scores(perplexity(keep(logits, options.keep), windows))
    else:
        report = scores(perplexity(logits, windows))
    options.report.write_text(json.dumps(report))


def scores(result: PerplexityResult) -> dict[str, Any]:
    return {"perplexity": result.ppl, "low": result.low, "high": result.high, "tokens": result.tokens}


def keep(logits: Iterable[torch.Tensor], path: Path) -> Iterator[torch.Tensor]:
    """Pass logits on and write them; the file gets its name when all of them are there."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        for window in logits:
            file.write(window.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
            yield window
    part.rename(path)


def kept(path: Path, windows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
    """What :func:`keep` wrote, window after window."""
    size = path.stat().st_size // sum(window.shape[1] for window in windows)
    with path.open("rb") as file:
        for window in windows:
            data = bytearray(file.read(size * window.shape[1]))
            yield torch.frombuffer(data, dtype=torch.bfloat16).view(1, window.shape[1], -1)


def open_any(stored: Checkpoint) -> Checkpoint:
    """A dense view of a checkpoint: unquantized, or in a format that we read; GPTQ's by a reader of the bench's own."""
    declared = stored.config.get("quantization_config") or {}
    return GptqView(stored, torch.bfloat16) if declared.get("quant_method") == "gptq" else open_dense(stored)


if __name__ == "__main__":
    main()
