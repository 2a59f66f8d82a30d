"""What the number of threads changes in an artifact: bytes that differ, codes that differ, and by how much.

    python bench/determinism.py MODEL_DIR SCRATCH_DIR

Quantizes the model twice with each of 1 and 2 threads (GPTQ, random calibration tokens by seed) and compares. The same
number of threads must give the same bytes; another one may round sums of products differently.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

from measured import markdown_table, run_measured

RUNS = {"1 thread": 1, "1 thread, again": 1, "2 threads": 2, "2 threads, again": 2}
HERE = Path(__file__).parent

COMPARE = """
import json, sys
from llmconvert.storage.checkpoint import SafetensorsCheckpoint
from llmconvert.quantize.formats.dense_view import open_dense
first, second = (open_dense(SafetensorsCheckpoint(path)) for path in sys.argv[1:3])
codes = differing = 0
for name in first.quantized:
    one, other = first.read_quantized(name).codes, second.read_quantized(name).codes
    codes += one.numel()
    differing += int((one != other).sum())
print(json.dumps([codes, differing]))
"""


def main() -> None:
    model, scratch = sys.argv[1], Path(sys.argv[2])
    scratch.mkdir(parents=True, exist_ok=True)
    outputs: list[Path] = []
    rows: list[list[str]] = []
    for name, threads in RUNS.items():
        output = scratch / name.replace(" ", "-").replace(",", "")
        shutil.rmtree(output, ignore_errors=True)
        command: list[str | Path] = [sys.executable, HERE / "quantize_once.py", "--model", model, "--output", output]
        command += [
            "--method",
            "gptq",
            "--scheme",
            "w4a16-g64",
            "--threads",
            str(threads),
            "--report",
            scratch / "report.json",
        ]
        run_measured(command, threads=threads, log=scratch / "log.txt")
        outputs.append(output)
        compared = subprocess.run(
            [sys.executable, "-P", "-c", COMPARE, outputs[0], output], check=True, capture_output=True, text=True
        )
        codes, differing = json.loads(compared.stdout)
        digest = hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()[:12]
        rows.append([name, digest, f"{differing:,} of {codes:,} ({differing / codes:.2%})"])
    print(markdown_table(["run", "sha256 of model.safetensors", "codes unlike the first run's"], rows))


if __name__ == "__main__":
    main()
