"""Peak memory of quantizing a 7B-shaped checkpoint, against what was predicted; lockstep against replay, byte by byte.

    python bench/memory.py --work DIR [--layers 32] [--samples 8] [--length 256] [--threads 2] [--trace]
        [--jobs rtn,gptq-lockstep,gptq-replay] [--model DIR] [--json FILE] [--markdown FILE]

Makes the checkpoint with ``bench/random_llama.py`` (13.5 GB for 32 layers; about 22 GB of disk are needed in all), or
takes ``--model``. Quantizes it to W4 g128 in processes of their own: by round-to-nearest, and by GPTQ on random tokens,
once in lockstep and once in replay. Peak memory is what ``wait4`` reports of the process. Fails if a limit is passed:
1.5 GB for RTN, 4 GB for GPTQ, or the estimate that the job itself stated. ``--trace`` shows the lines of code at which
memory was highest.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measured import markdown_table, megabytes, run_measured

_HERE = Path(__file__).parent
_JOBS = (("rtn", None, 1_500_000_000), ("gptq", "lockstep", 4_000_000_000), ("gptq", "replay", 4_000_000_000))


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: what it took, what it said it would take, and what it must not exceed. Bytes and seconds."""

    name: str
    peak_rss: int
    estimate: int
    limit: int
    seconds: float
    report: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.peak_rss <= min(self.estimate, self.limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--model", type=Path, help="use this checkpoint instead of making one")
    parser.add_argument("--layers", type=int, default=32, help="of the checkpoint made (default 32)")
    parser.add_argument("--samples", type=int, default=8, help="windows of random tokens (default 8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default 256)")
    parser.add_argument("--jobs", default="rtn,gptq-lockstep,gptq-replay", help="which to run (default all three)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trace", action="store_true", help="show where in the code memory was highest")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    model = options.model or make_model(options)
    outcomes: list[Outcome] = []
    for method, mode, limit in _JOBS:
        if (f"{method}-{mode}" if mode else method) not in options.jobs.split(","):
            continue
        outcome = quantize(options, model, method, mode, limit)
        outcomes.append(outcome)
        print(f"{outcome.name}: {megabytes(outcome.peak_rss)}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
    pair = (options.work / "gptq-lockstep", options.work / "gptq-replay")
    same = same_files(*pair) if all(path.exists() for path in pair) else None
    for outcome in outcomes:
        shutil.rmtree(options.work / outcome.name)
    text = report_text(outcomes, same, model)
    print(text)
    if options.json:
        found = {"same_artifact": same, "runs": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(found, indent=2))
    if options.markdown:
        options.markdown.write_text(text + "\n")
    if same is False or not all(outcome.ok for outcome in outcomes):
        raise SystemExit(1)


def make_model(options: argparse.Namespace) -> Path:
    """The random checkpoint; one that is there from an earlier run is used again."""
    model: Path = options.work / f"llama-{options.layers}"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        command: list[str | Path] = [sys.executable, _HERE / "random_llama.py", model]
        command += ["--layers", str(options.layers)]
        run_measured(command, threads=options.threads, log=options.work / "make.log")
    return model


def quantize(options: argparse.Namespace, model: Path, method: str, mode: str | None, limit: int) -> Outcome:
    name = f"{method}-{mode}" if mode else method
    output, report = options.work / name, options.work / f"{name}.json"
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, _HERE / "quantize_once.py", "--model", model, "--output", output, "--method", method]
    command += ["--report", report, "--samples", str(options.samples), "--length", str(options.length)]
    command += ["--threads", str(options.threads)]
    command += ["--mode", mode] if mode else []
    command += ["--trace"] if options.trace else []
    cost = run_measured(command, threads=options.threads, log=options.work / f"{name}.log")
    found = json.loads(report.read_text())
    return Outcome(name, cost.peak_rss, sum(found["estimate"].values()), limit, found["seconds"], found)


def same_files(first: Path, second: Path) -> bool:
    """Whether two directories hold the same files with the same bytes."""
    names = sorted(path.name for path in first.iterdir())
    if names != sorted(path.name for path in second.iterdir()):
        return False
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def report_text(outcomes: list[Outcome], same: bool | None, model: Path) -> str:
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    parts = list(dict.fromkeys(part for outcome in outcomes for part in outcome.report["estimate"]))
    header = ["", "peak RSS", "estimate", "limit", "holds", "seconds", *parts]
    rows = [
        [
            outcome.name,
            megabytes(outcome.peak_rss),
            megabytes(outcome.estimate),
            megabytes(outcome.limit),
            "yes" if outcome.ok else "NO",
            f"{outcome.seconds:.0f}",
            *(megabytes(outcome.report["estimate"].get(part, 0)) for part in parts),
        ]
        for outcome in outcomes
    ]
    lines = [
        f"{model.name}: {size / 1e9:.2f} GB of weights. The columns after the seconds are the estimate's parts.",
        markdown_table(header, rows),
    ]
    if same is not None:
        lines.append(
            f"Lockstep and replay gave {'the same artifact, byte for byte' if same else 'DIFFERENT ARTIFACTS'}."
        )
    for outcome in outcomes:
        trace = outcome.report["trace"]
        if trace:
            lines.append(f"{outcome.name}, highest resident memory by line of code:")
            lines.append(markdown_table(["line", "RSS"], [[line, megabytes(nbytes)] for nbytes, line in trace[:12]]))
    return "\n\n".join(lines)


if __name__ == "__main__":
    main()
