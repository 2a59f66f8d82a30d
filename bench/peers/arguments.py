"""What every runner in this directory is told by the bench that starts it."""

from __future__ import annotations

import argparse
from pathlib import Path


def run_parser(*, text: bool = True, integers: bool = True) -> argparse.ArgumentParser:
    """A parser of what all runners are given; each adds what is its own.

    Args:
        text: whether the tool cannot do without calibration text.
        integers: whether it takes a width and a group size.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--ids", type=Path, required=text)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    if integers:
        parser.add_argument("--bits", type=int, default=4)
        parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    return parser
