"""What merging key-value heads costs: perplexity, time and memory of every method, each in a process of its own.

Example::

    python bench/gqa.py --model out/SmolLM2-135M --calibration wikitext2-valid.txt --evaluation wikitext2-test.txt \
        --dir /tmp/scratch

First the model's key-value heads are expanded to one per query head (MHA) and merged back; then they are merged to
``--kv-heads``, by every method, without and with a refit. Perplexity is measured on the first ``--windows`` windows of
512 tokens of the evaluation text, in bfloat16, by transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmconvert.checkpoint import SINGLE_NAME, SafetensorsCheckpoint
from llmconvert.convert.attention import read_geometry
from llmconvert.convert.attention_weights import config_with_kv_heads, layer_tensors, read_layer
from llmconvert.convert.gqa_job import convert_attention
from llmconvert.writer import write_json, write_side_files

LENGTH = 512


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; seconds and peak memory are those of the merge."""

    name: str
    perplexity: float
    seconds: float | None = None
    peak_rss_bytes: int | None = None
    output_loss: float | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a directory in Hugging Face layout")
    parser.add_argument("--calibration", type=Path, required=True, help="a text file")
    parser.add_argument("--evaluation", type=Path, required=True, help="another text file")
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 512 tokens (default 64)")
    parser.add_argument("--windows", type=int, default=32, help="evaluation windows (default 32)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(run_one(options, json.loads(options.one)))))
        return
    options.dir.mkdir(parents=True, exist_ok=True)
    rows = [run(options, {"name": "original"})]
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        wide = expand(options.model, Path(scratch) / "mha")
        with SafetensorsCheckpoint(options.model) as checkpoint:
            heads = read_geometry(checkpoint).kv_heads
        back = f"expanded to MHA, merged back to {heads}: svd"
        jobs: list[dict[str, object]] = [{"name": back, "source": str(wide), "kv_heads": heads}]
        to = f"{heads} → {options.kv_heads}"
        jobs += [
            {"name": f"{to}: {method}{', refit' if refit else ''}", "method": method, "refit": refit}
            for method in ("mean", "first", "svd")
            for refit in (False, True)
        ]
        for job in jobs:
            rows.append(run(options, job))
            print(f"{rows[-1].name}: {rows[-1].perplexity:,.2f}", file=sys.stderr, flush=True)
    print_table(rows, options.samples)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))


def expand(model: Path, directory: Path) -> Path:
    """The model with a key-value head of its own for every query head."""
    directory.mkdir()
    with SafetensorsCheckpoint(model) as checkpoint:
        geometry = read_geometry(checkpoint)
        tensors = dict(checkpoint)
        for layer in range(geometry.layers):
            weights = read_layer(checkpoint, geometry, layer)
            ratio = weights.queries_per_kv
            key, value = (part.repeat_interleave(ratio, 0) for part in (weights.key, weights.value))
            wide = replace(weights, key=key, value=value)
            tensors.update(layer_tensors(checkpoint, geometry, layer, wide))
        save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
        write_side_files(directory, checkpoint.files)
        write_json(directory / "config.json", config_with_kv_heads(checkpoint.config, geometry.query_heads))
    return directory


def run(options: argparse.Namespace, job: dict[str, object]) -> Row:
    """Run one job in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    for key in ("model", "calibration", "evaluation", "dir", "kv_heads", "samples", "windows"):
        command += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Row(**json.loads(output.splitlines()[-1]))


def run_one(options: argparse.Namespace, job: dict[str, object]) -> Row:
    if "method" not in job and "source" not in job:
        return Row(str(job["name"]), perplexity(options.model, options))
    with tempfile.TemporaryDirectory(dir=options.dir) as scratch:
        output = Path(scratch) / "merged"
        with SafetensorsCheckpoint(str(job.get("source", options.model))) as checkpoint:
            windows = read_windows(options.model, options.calibration, options.samples)
            report = convert_attention(
                checkpoint,
                output,
                kv_heads=int(str(job.get("kv_heads", options.kv_heads))),
                method=str(job.get("method", "svd")),
                windows=windows,
                refit=bool(job.get("refit", False)),
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        losses = [layer.output_loss or 0.0 for layer in report.layers]
        mean = sum(losses) / len(losses)
        return Row(str(job["name"]), perplexity(output, options), report.seconds, peak, mean)


def read_windows(model: Path, text: Path, count: int) -> list[torch.Tensor]:
    tokens = AutoTokenizer.from_pretrained(model)(text.read_text(), return_tensors="pt").input_ids[0]
    return [window[None] for window in tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)[:count]]


def perplexity(model: Path, options: argparse.Namespace) -> float:
    windows = read_windows(options.model, options.evaluation, options.windows)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    total = 0.0
    with torch.no_grad():
        for window in windows:
            scores = network(window, use_cache=False).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(scores, window[0, 1:]))
    return math.exp(total / len(windows))


def print_table(rows: list[Row], samples: int) -> None:
    print(f"{samples} calibration windows of {LENGTH} tokens\n")
    print("| what | perplexity | attention output lost | seconds | peak RSS |")
    print("|---|---|---|---|---|")
    for row in rows:
        lost = f"{row.output_loss:.1%}" if row.output_loss is not None else ""
        seconds = f"{row.seconds:,.0f}" if row.seconds is not None else ""
        peak = f"{row.peak_rss_bytes / 1e6:,.0f} MB" if row.peak_rss_bytes is not None else ""
        print(f"| {row.name} | {row.perplexity:,.2f} | {lost} | {seconds} | {peak} |")


if __name__ == "__main__":
    main()
