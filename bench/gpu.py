"""Quantizing on a GPU: seconds by phase, what of its memory is taken, and what the artifact's perplexity is.

    python bench/gpu.py --model DIR --work DIR [--methods gptq,gptaq] [--scheme w4a16-g64] [--device cuda]
        [--calibration TEXT] [--samples 32] [--length 512] [--evaluation TEXT] [--windows 16] [--window 2048]
        [--markdown FILE]

Without calibration text the tokens are random, for models of random weights (``bench/random_llama.py``). Every method
runs twice, and the second run counts: the first one compiles kernels.
"""

from __future__ import annotations

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from measured import markdown_table, megabytes
from transformers import AutoTokenizer

from llmconvert.engine.evaluation import stream_logits
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.passes.run import QuantizeResult
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import draw_windows
from llmconvert.validate.predictions.perplexity import perplexity

_PHASES = ("reading", "forward", "Hessians", "solving", "packing", "writing", "copying")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--methods", default="gptq,gptaq")
    parser.add_argument("--scheme", type=Scheme.parse, default=Scheme.parse("w4a16-g64"))
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--calibration", help="text to calibrate on; random tokens without")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluation", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    calibration = windows_of(options.model, options.calibration, options.samples, options.length)
    evaluation = windows_of(options.model, options.evaluation, options.windows, options.window)

    def score(directory: Path) -> str:
        return f"{perplexity_of(directory, evaluation, options.device):.2f}" if options.evaluation else ""

    rows = [("unquantized", "", *[""] * len(_PHASES), "", "", score(options.model))]
    for method in options.methods.split(","):
        output = options.work / method
        for _ in range(2):
            shutil.rmtree(output, ignore_errors=True)
            result, peak = quantize(options, method, calibration, output)
        phases = [f"{result.phases.get(phase, 0):.1f}" for phase in _PHASES]
        memory = megabytes(peak) if peak else "", megabytes(result.memory.total)
        rows.append((method, f"{result.seconds:.1f}", *phases, *memory, score(output)))
        shutil.rmtree(output)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU"
    header = (name, "seconds", *_PHASES, "peak", "stated", "perplexity")
    text = markdown_table(header, rows)
    print(text)
    if options.markdown:
        options.markdown.write_text(text + "\n")


def windows_of(model: Path, text: str | None, samples: int, length: int) -> Sequence[torch.Tensor]:
    """The first windows of a text, or random tokens."""
    if text is None:
        with SafetensorsCheckpoint(model) as source:
            size = int(source.config["vocab_size"])
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(size, (1, length), generator=generator) for _ in range(samples)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return draw_windows(tokenizer, load_dataset_text(text), samples=samples, length=length, order="sequential").windows


def quantize(
    options: argparse.Namespace, method: str, windows: Sequence[torch.Tensor], output: Path
) -> tuple[QuantizeResult, int]:
    """One run, and the most it held of a GPU's memory; 0 on a CPU."""
    cuda = options.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(options.device)
    with SafetensorsCheckpoint(options.model) as source:
        result = quantize_checkpoint(
            source, output, method=method, scheme=options.scheme, windows=windows, device=options.device
        )
    return result, torch.cuda.max_memory_allocated(options.device) if cuda else 0


def perplexity_of(directory: Path, windows: Sequence[torch.Tensor], device: torch.device) -> float:
    """Of an artifact or a dense model, dequantized and streamed through the device."""
    with SafetensorsCheckpoint(directory) as stored:
        streamed = stream_logits(open_dense(stored), windows, device=device)
        losses = [
            perplexity([logits.float().cpu()], [window]).nll for logits, window in zip(streamed, windows, strict=True)
        ]
    return math.exp(sum(losses) / len(losses))


if __name__ == "__main__":
    main()
