"""Cut the first windows of a text into a file of token ids; started by ``bench/peers.py``.

    python bench/peers/windows.py --model DIR --text FILE --samples N --length L --ids FILE.npy

Writes int64 ``[N, L]``: the text tokenized whole, consecutive windows, in order.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from llmconvert.text.datasets import load_dataset_text
from llmconvert.text.tokens import draw_windows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    corpus = load_dataset_text(options.text)
    drawn = draw_windows(tokenizer, corpus, samples=options.samples, length=options.length, order="sequential")
    if drawn.drawn < options.samples:
        raise SystemExit(
            f"{options.text}: holds {drawn.drawn} windows of {options.length} tokens, not {options.samples}"
        )
    np.save(options.ids, np.concatenate([window.numpy() for window in drawn.windows]))


if __name__ == "__main__":
    main()
