"""One timed run of AutoRound; started by ``bench/quality.py`` in an environment of its own.

    PYTHON bench/peers/autoround.py --model DIR --ids FILE.npy --output DIR --report FILE.json [--iters 200]
        [--bits 4] [--group-size 64] [--asymmetric]

Its defaults beside the number of steps, which takes most of its time. The artifact is in the GPTQ layout. The clock
starts with everything imported, tokenizer and token ids loaded, and stops with the artifact saved.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from arguments import run_parser
from auto_round import AutoRound
from auto_round.version import __version__
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = run_parser()
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--iters", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = np.load(options.ids)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    rounding = AutoRound(
        model,
        tokenizer,
        bits=options.bits,
        group_size=options.group_size,
        sym=not options.asymmetric,
        iters=options.iters,
        dataset=[torch.from_numpy(row).unsqueeze(0) for row in ids],
        nsamples=len(ids),
        seqlen=ids.shape[1],
        batch_size=min(8, len(ids)),
        device_map="cpu",
    )
    rounding.quantize_and_save(str(options.output), format="auto_gptq")
    seconds = time.perf_counter() - begin
    flatten(options.output)
    options.report.write_text(json.dumps({"version": __version__, "torch": torch.__version__, "seconds": seconds}))


def flatten(output: Path) -> None:
    """Some versions save into a folder of their own inside the output."""
    for weights in list(output.glob("*/*.safetensors")):
        folder = weights.parent
        if folder.exists():
            for path in folder.iterdir():
                shutil.move(path, output / path.name)
            folder.rmdir()


if __name__ == "__main__":
    main()
