"""What ``llmconvert validate`` takes beside transformers alone: perplexity against a reference, and generation.

    python bench/evaluate.py --model DIR --artifact DIR --text FILE --work DIR
        [--windows 16] [--window 2048] [--threads 2] [--rounds 2] [--markdown FILE]

Whole processes in turns, start-up and imports included. Perplexity, divergence and everything else that ``validate``
says of an artifact with a reference, against two plain forward passes over the same windows, of one model that is
loaded once; with ``--generation`` against greedy ``generate`` by the original and by the artifact.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from measured import Cost, markdown_table, megabytes, run_measured

_RUNNER = Path(__file__).parent / "peers" / "plain_transformers.py"
_WINDOWS = Path(__file__).parent / "peers" / "windows.py"
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the original, in bfloat16")
    parser.add_argument("--artifact", type=Path, required=True, help="what was made of it")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["perplexity", "generation"])
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    ids, report = options.work / "evaluation.npy", options.work / "plain.json"
    cut: list[str | Path] = [sys.executable, _WINDOWS, "--model", options.model, "--text", options.text, "--ids", ids]
    cut += ["--samples", str(options.windows), "--length", str(options.window)]
    run_measured(cut, threads=options.threads, log=options.work / "windows.log", extra=_ENVIRONMENT)
    ours = [Path(sys.executable).with_name("llmconvert"), "validate", options.artifact, "--reference", options.model]
    plain = [sys.executable, _RUNNER, "--report", report, "--threads", str(options.threads), "--model", options.model]
    text = ["--text", options.text, "--window", str(options.window), "--max-windows", str(options.windows), "--quiet"]
    commands: dict[str, tuple[list[str | Path], list[str | Path]]] = {
        "perplexity": ([*ours, *text], [*plain, "--ids", ids]),
        "generation": ([*ours, "--generation", "--quiet"], [*plain, "--model", options.artifact]),
    }
    rows: list[list[str]] = []
    for name, pair in commands.items():
        if options.only not in (None, name):
            continue
        costs: tuple[list[Cost], list[Cost]] = ([], [])
        parts: list[dict[str, float]] = []
        for _ in range(options.rounds):
            for own, command in zip(costs, pair, strict=True):
                log = options.work / f"{name}.log"
                own.append(run_measured(command, threads=options.threads, log=log, extra=_ENVIRONMENT))
            parts.append(json.loads(report.read_text()))
        middle = [statistics.median(cost.seconds for cost in own) for own in costs]
        computing = ", ".join(f"{part['computing']:.1f} ({part['tokens']:,.0f} tokens)" for part in parts)
        for who, own, seconds in zip(("llmconvert validate", "transformers alone"), costs, middle, strict=True):
            times = ", ".join(f"{cost.seconds:.1f}" for cost in own)
            memory = megabytes(max(cost.peak_rss for cost in own))
            detail = computing if own is costs[1] else ""
            rows.append([f"{name}: {who}", times, f"{seconds / middle[1]:.2f}", memory, detail])
    table = markdown_table(["", "whole process, s", "ratio", "peak RSS", "of it computing, s"], rows)
    print(table)
    if options.markdown:
        options.markdown.write_text(table + "\n")


if __name__ == "__main__":
    main()
