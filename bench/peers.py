"""Our GPTQ against llm-compressor's and GPTQModel's: time, memory and perplexity, in one go.

    python bench/peers.py --model DIR --calibration FILE --evaluation FILE --work DIR \\
        --llm-compressor-python A/bin/python --gptqmodel-python B/bin/python \\
        [--profile] [--rounds 3] [--json FILE] [--markdown FILE]

``python`` is one that has llmconvert. Each peer lives in an environment of its own, made with:

    python3.11 -m venv A && A/bin/pip install torch==2.13.0 llmcompressor==0.14.0
    python3.11 -m venv B && B/bin/pip install torch==2.14.1 GPTQModel==7.7.0

Calibration is the first ``--samples`` windows of ``--length`` tokens of a text, tokenized once and saved; every run
gets that same file. Runs alternate (ours, peer, peer, ours, …), each in a fresh process with ``--threads`` threads. A
run's time goes from loaded tokenizer and token ids to the complete artifact: for ours all of ``quantize_checkpoint``,
fsync included; for a peer loading the model, quantizing and saving, which it doesn't force to disk. A whole process
is start-up and imports too. With ``--command`` ours runs as ``llmconvert quantize`` besides, which also tokenizes the
text, as nobody else does here. Peak memory is the process's, as ``wait4`` reports it. Perplexity, and the divergence
of the predictions from the unquantized model's, are those of the dequantized weights in bfloat16, by one evaluator for
all; they are measured for every artifact whose weights differ from those of an earlier round. ``--our-method gptaq``
runs another method of ours beside gptq. Models may be mixtures of experts (``bench/moe.py``); ``--mixture`` has ours
run without shrinking moments too, and llm-compressor with the tokens that routers send to each expert alone. What
llm-compressor's model predicts in memory, before it is saved, is in its report (``--json``).

``--profile`` shows first where our time goes, by phase, and the floor of each phase on this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measured import markdown_table, megabytes, run_measured

_RUNNERS = Path(__file__).parent / "peers"
# The runner of a tool that is started as a user starts it.
_COMMAND = "command"
# On two cores GPTQModel does not start with the number of workers it chooses itself.
_ENVIRONMENT = {"GPTQMODEL_CPU_WORKERS": "2", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Tool:
    """A quantizer under test: the name shown, its interpreter, and its runner."""

    name: str
    python: str
    runner: str
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One run: times in seconds (of the whole process too), sizes in bytes, and a digest of the weight files."""

    tool: str
    seconds: float
    process_seconds: float
    quantize_seconds: float
    peak_rss: int
    artifact_nbytes: int
    digest: str
    report: dict[str, Any]


def main() -> None:
    options = parse_arguments()
    options.work.mkdir(parents=True, exist_ok=True)
    calibration = cut_windows(options, options.calibration, options.samples, options.length, "calibration")
    text = [
        f"{options.model.name}, {options.samples}×{options.length} tokens, W{options.bits} g{options.group_size} "
        f"symmetric, {options.threads} threads; {machine()}"
    ]
    results: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(options).items()}}
    ours = Tool("llmconvert", sys.executable, "ours.py")
    if options.profile:
        results["profile"] = profile(options, ours, calibration)
        text.append(profile_table(results["profile"]))
        print("\n\n".join(text), flush=True)
    tools = [
        ours,
        *(Tool(f"llmconvert, {name}", sys.executable, "ours.py", ("--method", name)) for name in options.our_method),
    ]
    if options.command:
        tools.append(Tool("`llmconvert quantize`", sys.executable, _COMMAND))
    if options.llm_compressor_python:
        tools.append(Tool("llm-compressor, `mse` observer", options.llm_compressor_python, "llm_compressor.py"))
    if options.mixture:
        tools.append(Tool("llmconvert, κ = 0", sys.executable, "ours.py", ("--options", '{"shrinkage": 0}')))
    if options.mixture and options.llm_compressor_python:
        tools.append(
            Tool("llm-compressor, tokens as routed", options.llm_compressor_python, "llm_compressor.py", ("--routed",))
        )
    if options.gptqmodel_python:
        tools.append(Tool("GPTQModel, `mse=2.4`", options.gptqmodel_python, "gptq_model.py"))
    if len(tools) > 1:
        evaluation = cut_windows(options, options.evaluation, options.windows, options.window, "evaluation")
        runs, scores = compare(options, tools, calibration, evaluation)
        results |= {"runs": [asdict(run) for run in runs], "scores": scores}
        text.append(comparison_table(tools, runs, scores))
        print("\n" + text[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))
    if options.markdown:
        options.markdown.write_text("\n\n".join(text) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="an unquantized model directory")
    parser.add_argument("--calibration", required=True, help="text to calibrate on")
    parser.add_argument("--evaluation", help="text to measure perplexity on")
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--our-method", action="append", default=[], help="another method of ours to run beside gptq")
    parser.add_argument("--command", action="store_true", help="ours as a command too, which tokenizes the text itself")
    parser.add_argument("--mixture", action="store_true", help="both settings of each tool for experts with few tokens")
    parser.add_argument("--llm-compressor-python", help="interpreter that has llm-compressor")
    parser.add_argument("--gptqmodel-python", help="interpreter that has GPTQModel")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows (default 32)")
    parser.add_argument("--length", type=int, default=512, help="tokens of each (default 512)")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows (default 16)")
    parser.add_argument("--window", type=int, default=2048, help="tokens of each (default 2048)")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="threads of every run (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each tool (default 3)")
    parser.add_argument("--profile", action="store_true", help="first show our time by phase, with floors")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    if (options.llm_compressor_python or options.gptqmodel_python) and not options.evaluation:
        parser.error("a comparison needs --evaluation")
    return options


def machine() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}"


def cut_windows(options: argparse.Namespace, text: str, samples: int, length: int, name: str) -> Path:
    ids: Path = options.work / f"{name}.npy"
    command = [
        sys.executable,
        _RUNNERS / "windows.py",
        "--model",
        options.model,
        "--text",
        text,
        "--ids",
        ids,
        "--samples",
        str(samples),
        "--length",
        str(length),
    ]
    run_measured(command, threads=options.threads, log=options.work / f"{name}.log", extra=_ENVIRONMENT)
    return ids


def quantize(options: argparse.Namespace, tool: Tool, ids: Path, output: Path, evaluation: Path | None = None) -> Run:
    """One timed run of a tool; the artifact is left in ``output``."""
    shutil.rmtree(output, ignore_errors=True)
    report, log = output.with_suffix(".json"), output.with_suffix(".log")
    if tool.runner == _COMMAND:
        command = our_command(options, tool, output)
    else:
        command = [
            tool.python,
            _RUNNERS / tool.runner,
            "--model",
            options.model,
            "--ids",
            ids,
            "--output",
            output,
            "--report",
            report,
            "--bits",
            str(options.bits),
            "--group-size",
            str(options.group_size),
            "--threads",
            str(options.threads),
            *tool.extra,
        ]
    if tool.runner == "llm_compressor.py" and options.mixture and evaluation is not None:
        command += ["--evaluation-ids", str(evaluation)]
    cost = run_measured(command, threads=options.threads, log=log, extra=_ENVIRONMENT)
    found = {"version": "command", **json.loads((log if tool.runner == _COMMAND else report).read_text())}
    weights = sorted(output.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    size = sum(path.stat().st_size for path in weights)
    alone = found.get("quantize_seconds", found["seconds"])
    return Run(tool.name, found["seconds"], cost.seconds, alone, cost.peak_rss, size, digest.hexdigest(), found)


def our_command(options: argparse.Namespace, tool: Tool, output: Path) -> list[str | Path]:
    """Ours as a user starts it: the same windows, cut from the text in the same process."""
    program = Path(tool.python).with_name("llmconvert")
    quantize = [program, "quantize", options.model, output, "--method", "gptq"]
    scheme = f"w{options.bits}a16-g{options.group_size}-sym"
    windows = ["--samples", str(options.samples), "--length", str(options.length), "--order", "sequential"]
    return [*quantize, "--scheme", scheme, "--calibration", options.calibration, *windows, "--quiet", "--json"]


def compare(
    options: argparse.Namespace, tools: Sequence[Tool], ids: Path, evaluation: Path
) -> tuple[list[Run], dict[str, list[dict[str, Any]]]]:
    """All rounds of all tools; and how each one's distinct artifacts predict, in their order."""
    original = options.work / "original.logits"
    scores = {"unquantized": [score(options, options.model, evaluation, "--keep", original)]}
    seen: set[tuple[str, str]] = set()
    runs: list[Run] = []
    for number in range(options.rounds):
        for position, tool in enumerate(tools):
            output = options.work / f"artifact-{position}"
            run = quantize(options, tool, ids, output, evaluation)
            runs.append(run)
            note = f"round {number + 1}, {tool.name}: {run.seconds:.1f} of {run.process_seconds:.1f} s"
            note += f", {megabytes(run.peak_rss)}"
            if (tool.name, run.digest) not in seen:
                seen.add((tool.name, run.digest))
                found = score(options, output, evaluation, "--reference", original)
                scores.setdefault(tool.name, []).append(found)
                note += f", perplexity {found['perplexity']:.2f}, KL {found['kl_mean']:.4f}"
            print(note, file=sys.stderr, flush=True)
    return runs, scores


def score(options: argparse.Namespace, model: Path, ids: Path, *logits: str | Path) -> dict[str, Any]:
    report = options.work / "score.json"
    command = [
        sys.executable,
        _RUNNERS / "score.py",
        "--model",
        model,
        "--ids",
        ids,
        "--report",
        report,
        "--threads",
        str(options.threads),
        *logits,
    ]
    run_measured(command, threads=options.threads, log=options.work / "score.log", extra=_ENVIRONMENT)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def comparison_table(tools: Sequence[Tool], runs: Sequence[Run], scores: dict[str, list[dict[str, Any]]]) -> str:
    base = [run for run in runs if run.tool == tools[0].name]
    reference = statistics.median(run.seconds for run in base)
    reference_rss = statistics.median(run.peak_rss for run in base)
    rows = [["unquantized", *[""] * 7, f"{scores['unquantized'][0]['perplexity']:.2f}", "", ""]]
    whole = statistics.median(run.process_seconds for run in base)
    for tool in tools:
        own = [run for run in runs if run.tool == tool.name]
        seconds = statistics.median(run.seconds for run in own)
        rss = statistics.median(run.peak_rss for run in own)
        process = [run.process_seconds for run in own]
        alone = statistics.median(run.quantize_seconds for run in own)
        found = scores[tool.name]
        perplexity = f"{statistics.median(one['perplexity'] for one in found):.2f}" + (
            f" ({len(found)} artifacts)" if len(found) > 1 else ""
        )
        rows.append(
            [
                f"{tool.name} ({own[0].report['version']})",
                f"{statistics.median(process):.1f} ({min(process):.1f}–{max(process):.1f})",
                f"{statistics.median(process) / whole:.2f}",
                f"{seconds:.1f} ({min(run.seconds for run in own):.1f}–{max(run.seconds for run in own):.1f})",
                f"{seconds / reference:.2f}",
                f"{alone:.1f}",
                megabytes(rss),
                f"{rss / reference_rss:.2f}",
                perplexity,
                f"{statistics.median(one['kl_mean'] for one in found):.4f}",
                megabytes(own[0].artifact_nbytes),
            ]
        )
    header = [
        "",
        "whole process, s: median (range)",
        "ratio",
        "from tokens to artifact, s",
        "ratio",
        "quantizing alone",
        "peak RSS",
        "ratio",
        "perplexity",
        "KL",
        "weights",
    ]
    return markdown_table(header, rows) + f"\n\n{len(base)} alternating rounds."


def profile(options: argparse.Namespace, ours: Tool, ids: Path) -> dict[str, Any]:
    """Our run by phase, and the floors, measured right after it."""
    output = options.work / "profile"
    run = quantize(options, ours, ids, output)
    report = options.work / "floors.json"
    command = [
        sys.executable,
        _RUNNERS / "floors.py",
        "--model",
        options.model,
        "--ids",
        ids,
        "--run",
        output.with_suffix(".json"),
        "--report",
        report,
        "--artifact-bytes",
        str(run.artifact_nbytes),
        "--scratch",
        options.work,
        "--threads",
        str(options.threads),
    ]
    run_measured(command, threads=options.threads, log=options.work / "floors.log", extra=_ENVIRONMENT)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def profile_table(found: dict[str, Any]) -> str:
    total = found["seconds"]
    rows = []
    for phase in found["phases"]:
        floor, seconds = phase["floor"], phase["seconds"]
        known = floor is not None
        rows.append(
            [
                phase["name"],
                f"{seconds:.2f}",
                f"{seconds / total:.1%}",
                f"{floor:.2f}" if known else "",
                f"{seconds / floor:.1f}" if known and floor > 0 else "",
                phase["work"],
            ]
        )
    floors = sum(phase["floor"] or 0 for phase in found["phases"])
    rows.append(["all", f"{total:.2f}", "100.0%", f"{floors:.2f}", f"{total / floors:.1f}", ""])
    gemm = [
        [f"{g['m']:,}×{g['k']:,} · {g['k']:,}×{g['n']:,}", g["dtype"], f"{g['gflops']:,.0f}"]
        for g in sorted(found["gemm"], key=lambda g: (g["dtype"], g["m"], g["k"], g["n"]))
    ]
    disk = found["disk"]
    return "\n\n".join(
        (
            markdown_table(["phase", "seconds", "share", "floor", "× floor", "work"], rows),
            "Floors rest on these rates, measured right after:",
            markdown_table(["matrix product", "dtype", "GFLOP/s"], gemm),
            f"Reading from the page cache {disk['read'] / 1e9:.1f} GB/s, copying in memory "
            f"{disk['memory'] / 1e9:.1f} GB/s, writing with fsync {disk['write'] / 1e9:.2f} GB/s.",
        )
    )


if __name__ == "__main__":
    main()
