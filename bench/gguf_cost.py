"""What GGUF costs: rounding beside llama.cpp's own functions, GPTQ beside w4a16, validating beside safetensors.

    python bench/gguf_cost.py --model DIR --calibration FILE --evaluation FILE --work DIR
        [--samples 16] [--length 512] [--windows 4] [--window 512] [--threads 2] [--mix q4_k_m] [--rounds 1]

Three questions, the two sides of each in turn, every round:

- A mix under an importance matrix that is given: seconds inside llama.cpp's ``ggml_quantize_chunk`` (xllamacpp's
  library), rows of a tensor shared out among as many threads, against seconds inside our codecs on the same rows; and
  the whole process of ``llmconvert quantize --imatrix``, which starts, reads, checks and writes as well.
- ``gptq`` to the mix, against ``gptq`` to ``w4a16-g64`` of compressed-tensors, on the same tokens: whole processes.
- ``llmconvert validate`` of the two artifacts against the original: whole processes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from measured import Cost, markdown_table, megabytes, run_measured
from options import parser_of

_BINARIES = Path(sys.executable).parent


def main() -> None:
    parser = parser_of(__doc__, samples=16, length=512, threads=2, window=512)
    parser.set_defaults(windows=4)
    parser.add_argument("--mix", default="q4_k_m")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--step", choices=["importance", "functions"], help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["rounding", "gptq", "validate"], action="append")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.step == "importance":
        keep_importance(options)
    elif options.step == "functions":
        time_functions(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    wanted = options.only or ["rounding", "gptq", "validate"]
    costs: dict[str, list[Cost]] = {}
    work = options.work
    again = [*sys.argv, "--step"]
    imatrix = work / "imatrix.gguf"
    if "rounding" in wanted and not imatrix.exists():
        run_measured([sys.executable, *again, "importance"], threads=options.threads, log=work / "importance.log")
    text = ["--calibration", options.calibration, "--samples", str(options.samples), "--length", str(options.length)]
    text += ["--order", "sequential"]
    file, directory = work / "gptq.gguf", work / "gptq-w4a16"
    quantize = [_BINARIES / "llmconvert", "quantize", options.model]
    validate = ["--reference", options.model, "--text", options.evaluation]
    validate += ["--window", str(options.window), "--max-windows", str(options.windows)]
    functions: dict[str, list[float]] = {}

    def run(name: str, *command: str | Path) -> None:
        log = work / f"{name.replace(' ', '-')}.log"
        costs.setdefault(name, []).append(run_measured(command, threads=options.threads, log=log))
        print(f"{name}: {costs[name][-1]}", file=sys.stderr, flush=True)

    for _ in range(options.rounds):
        if "rounding" in wanted:
            log = work / "functions.log"
            run_measured([sys.executable, *again, "functions"], threads=options.threads, log=log)
            print(log.read_text(), file=sys.stderr, flush=True)
            for name, seconds in json.loads(log.read_text().splitlines()[-1]).items():
                functions.setdefault(name, []).append(seconds)
            clear(work / "imatrix-model.gguf")
            run("imatrix", *quantize, work / "imatrix-model.gguf", "--scheme", options.mix, "--imatrix", imatrix)
        if "gptq" in wanted:
            clear(file, directory)
            run("gptq gguf", *quantize, file, "--scheme", options.mix, "--method", "gptq", *text)
            run("gptq w4a16", *quantize, directory, "--scheme", "w4a16-g64", "--method", "gptq", *text)
        if "validate" in wanted:
            run("validate gguf", _BINARIES / "llmconvert", "validate", file, *validate)
            run("validate w4a16", _BINARIES / "llmconvert", "validate", directory, *validate)
    rows = [[name, f"{min(spent):.1f} s", "", ""] for name, spent in functions.items()]
    for name, several in costs.items():
        best = min(several, key=lambda cost: cost.seconds)
        rows.append([name, f"{best.seconds:.1f} s", f"{best.cpu:.1f} s", megabytes(best.peak_rss)])
    print(markdown_table(["", "wall clock", "CPU", "peak RSS"], rows))


def clear(*paths: Path) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def keep_importance(options: argparse.Namespace) -> None:
    """The importance matrix of the calibration text, in llama.cpp's format."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    from support.importance import collect_importance

    from llmconvert.gguf.file import plan_file
    from llmconvert.gguf.ggml.mix import GgmlMix
    from llmconvert.gguf.records.importance import ImportanceMatrix, write_importance
    from llmconvert.recipes.schema.recipe import CalibrateSettings
    from llmconvert.recipes.stages.windows import WindowRequest
    from llmconvert.storage.checkpoint import SafetensorsCheckpoint

    with SafetensorsCheckpoint(options.model) as source:
        settings = CalibrateSettings(
            dataset=str(options.calibration), samples=options.samples, length=options.length, order="sequential"
        )
        request = WindowRequest.calibration(settings)
        found = collect_importance(source, request.draw(source, request.corpus()).windows)
        file = plan_file(source, "x.gguf", "bench", GgmlMix.parse(options.mix), importance=True)
        squares = {
            name: found[planned.exported.pieces[0].name].numpy()
            for name, planned in file.tensors.items()
            if planned.exported.pieces[0].name in found
        }
        counts = {name: np.array([options.samples * options.length]) for name in squares}
        write_importance(options.work / "imatrix.gguf", ImportanceMatrix(squares, counts))


def time_functions(options: argparse.Namespace) -> None:
    """Seconds inside llama.cpp's functions, and inside ours, for all tensors of a file."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    import torch
    from support.ggml_reference import ggml_quantize

    from llmconvert.gguf.architectures.pieces import source_rows
    from llmconvert.gguf.file import plan_file
    from llmconvert.gguf.ggml.blocks import load_codec
    from llmconvert.gguf.ggml.mix import FLOATS, GgmlMix
    from llmconvert.gguf.records.importance import read_importance
    from llmconvert.storage.checkpoint import SafetensorsCheckpoint

    squares = read_importance(options.work / "imatrix.gguf").squares
    pool = ThreadPoolExecutor(options.threads)
    torch.set_num_threads(options.threads)

    def theirs(values: np.ndarray, kind: str, given: np.ndarray) -> None:
        list(pool.map(lambda part: ggml_quantize(part, kind, given), np.array_split(values, options.threads)))

    def ours(values: np.ndarray, kind: str, given: np.ndarray) -> None:
        load_codec(kind).encode(values, given)

    sides: dict[str, Callable[[np.ndarray, str, np.ndarray], None]] = {"llama.cpp's functions": theirs, "ours": ours}
    spent = dict.fromkeys(sides, 0.0)
    with SafetensorsCheckpoint(options.model) as source:
        file = plan_file(source, "x.gguf", "bench", GgmlMix.parse(options.mix), importance=True)
        ready: set[str] = set()
        for name, planned in file.tensors.items():
            kind = planned.spec.qtype
            if kind in FLOATS:
                continue
            for piece in planned.exported.pieces:
                read, length = partial(source.read_rows, piece.name), source.infos[piece.name].shape[0]
                for _, values in source_rows(piece, read, length, file.config, 1 << 13):
                    rows = values.reshape(-1, planned.spec.shape[-1]).contiguous().numpy()
                    given = squares.get(name, np.ones(rows.shape[1], np.float32))
                    for side, encode in sides.items():
                        if kind not in ready:
                            encode(rows[:256], kind, given)  # what compiles or is loaded once
                        begin = time.perf_counter()
                        encode(rows, kind, given)
                        spent[side] += time.perf_counter() - begin
                    ready.add(kind)
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
