"""What benches are told that quantize one model, and measure what comes of it or not."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["parser_of"]


def parser_of(
    about: str | None, *, samples: int, length: int, threads: int, method: str | None = None, window: int | None = None
) -> argparse.ArgumentParser:
    """A parser of model, texts, scratch directory and threads; each bench adds what is its own.

    Args:
        about: the bench's docstring, whose first line is said.
        samples, length: of calibration text, by default.
        threads: by default.
        method: by default; a bench with one method of its own has no such option.
        window: tokens of a window of evaluation text by default; a bench that measures nothing reads no such text.
    """
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="scratch directory")
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--threads", type=int, default=threads)
    if method is not None:
        parser.add_argument("--method", default=method)
    if window is not None:
        parser.add_argument("--evaluation", type=Path, required=True)
        parser.add_argument("--windows", type=int, default=8)
        parser.add_argument("--window", type=int, default=window)
    return parser
