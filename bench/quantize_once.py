"""One quantization in a process of its own, with what its memory did; started by ``bench/memory.py``.

    python bench/quantize_once.py --model DIR --output DIR --method gptq --report FILE.json
        [--mode lockstep|replay] [--samples 8] [--length 256] [--seed 0] [--scheme w4a16-g128] [--trace]

Calibration tokens are random ids, by seed. With ``--trace`` a thread samples resident memory every few milliseconds
together with the line of llmconvert's code that is running, and the report names the lines where memory was highest.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import torch

from llmconvert.quantize.job import quantize_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

_INTERVAL_SECONDS = 0.004
_LINES_KEPT = 25


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--mode", choices=["lockstep", "replay"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scheme", default="w4a16-g128")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trace", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    idle = resident()
    trace = Trace(threading.main_thread().ident or 0) if options.trace else None
    with SafetensorsCheckpoint(options.model) as source:
        windows: list[torch.Tensor] = []
        if options.method != "rtn":
            generator = torch.Generator().manual_seed(options.seed)
            shape = (1, options.length)
            windows = [
                torch.randint(int(source.config["vocab_size"]), shape, generator=generator)
                for _ in range(options.samples)
            ]
        result = quantize_checkpoint(
            source,
            options.output,
            method=options.method,
            scheme=Scheme.parse(options.scheme),
            windows=windows,
            mode=options.mode if windows else None,
        )
    report = {
        "seconds": result.seconds,
        "phases": dict(result.phases),
        "mode": result.memory.mode,
        "estimate": dict(result.memory.parts),
        "idle_rss": idle,
        "trace": trace.stop() if trace else None,
    }
    options.report.write_text(json.dumps(report))


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Trace:
    """Samples resident memory, and keeps the most that was seen at each line of llmconvert's code."""

    def __init__(self, thread: int) -> None:
        self._watched = thread
        self._highest: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> list[tuple[int, str]]:
        """``(bytes, line)``, highest first."""
        self._done.set()
        self._thread.join()
        ranked = sorted(((size, line) for line, size in self._highest.items()), reverse=True)
        return ranked[:_LINES_KEPT]

    def _sample(self) -> None:
        while not self._done.is_set():
            place = _place(sys._current_frames().get(self._watched))
            size = resident()
            self._highest[place] = max(size, self._highest.get(place, 0))
            time.sleep(_INTERVAL_SECONDS)


def _place(frame: FrameType | None) -> str:
    """The three innermost lines of llmconvert's code on a stack, innermost last."""
    found: list[str] = []
    while frame is not None and len(found) < 3:
        code = frame.f_code
        if "llmconvert" in str(frame.f_globals.get("__name__", "")):
            found.append(f"{Path(code.co_filename).name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(found)) or "elsewhere"


if __name__ == "__main__":
    main()
