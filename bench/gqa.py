"""What merging key-value heads costs: perplexity, time and memory of every method, each in a process of its own.

Example::

    python bench/gqa.py --model out/SmolLM2-135M --calibration wikitext2-valid.txt --evaluation wikitext2-test.txt \
        --dir /tmp/scratch

First the model's key-value heads are expanded to one per query head (MHA) and merged back; then they are merged to
``--kv-heads``, by every method, without and with a refit, and at last healed in ``--heal-steps`` steps on other windows
of the calibration text. ``aligned`` is head alignment after Jin et al. 2024 (arXiv 2412.20677), as far as their text
tells: orthogonal Procrustes of the values, rotations of the keys' frequency pairs, both on the weights, then the mean;
without the training of masks that follows there. Perplexity is that of the first ``--windows`` windows of 512 tokens
of the evaluation text, in bfloat16, by transformers.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmconvert.convert.gqa.geometry import read_geometry
from llmconvert.convert.gqa.job import convert_attention
from llmconvert.convert.gqa.weights import LayerWeights, layer_tensors, read_layer
from llmconvert.convert.heal.job import heal_attention
from llmconvert.convert.heal.options import HealOptions
from llmconvert.engine.architecture.config import with_kv_heads
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.storage.directory import SINGLE_NAME
from llmconvert.storage.writer import write_json, write_side_files

LENGTH = 512
# Turns of every head towards the mean of the others.
ROUNDS = 5


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; seconds and peak memory are those of the merge, with healing."""

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
    parser.add_argument("--heal-steps", type=int, default=0, help="steps of healing (default 0)")
    parser.add_argument("--only", help="run only jobs whose name contains this")
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
        aligned = align(options.model, Path(scratch) / "aligned", options.kv_heads)
        jobs += [
            {
                "name": f"{to}: {name}{', refit' if refit else ''}",
                "source": str(source),
                "method": method,
                "refit": refit,
            }
            for name, method, source in (
                ("mean", "mean", options.model),
                ("first", "first", options.model),
                ("aligned, then mean", "mean", aligned),
                ("svd", "svd", options.model),
            )
            for refit in (False, True)
        ]
        if options.heal_steps:
            healed = {"refit": True, "heal": options.heal_steps}
            jobs.append({"name": f"{to}: svd, refit, healed in {options.heal_steps} steps", "method": "svd", **healed})
        jobs = [job for job in jobs if not options.only or options.only in str(job["name"])]
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
        write_json(directory / "config.json", with_kv_heads(checkpoint.config, geometry.query_heads))
    return directory


def align(model: Path, directory: Path, kv_heads: int) -> Path:
    """The same model, with key-value heads of neighbouring groups turned towards their mean; it computes the same."""
    directory.mkdir()
    with SafetensorsCheckpoint(model) as checkpoint:
        geometry = read_geometry(checkpoint)
        tensors = dict(checkpoint)
        for layer in range(geometry.layers):
            weights = read_layer(checkpoint, geometry, layer)
            ratio, half = weights.queries_per_kv, geometry.head_dim // 2
            key, value = torch.complex(weights.key[:, :half], weights.key[:, half:]), weights.value.clone()
            query = torch.complex(weights.query[:, :half], weights.query[:, half:]).unflatten(0, (-1, ratio))
            output = weights.output.unflatten(0, (-1, ratio)).clone()
            for group in torch.arange(geometry.kv_heads).view(kv_heads, -1):
                for _ in range(ROUNDS):
                    for head in group:
                        others = group[group != head]
                        phase = torch.sgn((key[others].mean(0) * key[head].conj()).sum(-1, keepdim=True))
                        key[head], query[head] = phase * key[head], phase * query[head]
                        left, _, right = torch.linalg.svd(value[others].mean(0) @ value[head].mT)
                        turn = left @ right
                        value[head], output[head] = turn @ value[head], output[head] @ turn.mT
            query = query.flatten(0, 1)
            turned = LayerWeights(
                torch.cat([query.real, query.imag], dim=1),
                torch.cat([key.real, key.imag], dim=1),
                value,
                output.flatten(0, 1),
            )
            tensors.update(layer_tensors(checkpoint, geometry, layer, turned))
        save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
        write_side_files(directory, checkpoint.files)
        write_json(directory / "config.json", dict(checkpoint.config))
    return directory


def heal(options: argparse.Namespace, merged: Path, output: Path, steps: int) -> None:
    """Heal on windows from the end of the calibration text, which the merge has not seen, two at a time.

    None are held out: the time that is given goes into steps.
    """
    settings = HealOptions(steps=steps, batch=2, held_out=0, save_every=steps)
    count = steps * settings.batch + settings.held_out
    windows = read_windows(options.model, options.calibration, 10**9)[options.samples :][-count:]
    with SafetensorsCheckpoint(options.model) as original, SafetensorsCheckpoint(merged) as student:
        heal_attention(original, student, output, windows=windows, options=settings)


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
            begin = time.perf_counter()
            report = convert_attention(
                checkpoint,
                output,
                kv_heads=int(str(job.get("kv_heads", options.kv_heads))),
                method=str(job.get("method", "svd")),
                windows=windows,
                refit=bool(job.get("refit", False)),
            )
        if job.get("heal"):
            heal(options, output, Path(scratch) / "healed", int(str(job["heal"])))
            output = Path(scratch) / "healed"
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        losses = [layer.output_loss or 0.0 for layer in report.layers]
        mean = sum(losses) / len(losses)
        return Row(str(job["name"]), perplexity(output, options), seconds, peak, mean)


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
    print("| what | perplexity | lost of what attention should add | seconds | peak RSS |")
    print("|---|---|---|---|---|")
    for row in rows:
        lost = f"{row.output_loss:.1%}" if row.output_loss is not None else ""
        seconds = f"{row.seconds:,.0f}" if row.seconds is not None else ""
        peak = f"{row.peak_rss_bytes / 1e6:,.0f} MB" if row.peak_rss_bytes is not None else ""
        print(f"| {row.name} | {row.perplexity:,.2f} | {lost} | {seconds} | {peak} |")


if __name__ == "__main__":
    main()
