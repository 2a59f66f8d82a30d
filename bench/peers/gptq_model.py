"""One timed run of GPTQModel's GPTQ; started by the benches in GPTQModel's own environment.

    GPTQMODEL_CPU_WORKERS=2 PYTHON bench/peers/gptq_model.py --model DIR --ids FILE.npy --output DIR --report FILE.json

Its defaults (group-aware act-order, true-sequential, damping 0.05), with scales searched by ``mse=2.4``. Without
``GPTQMODEL_CPU_WORKERS=2`` it does not start on a machine of two cores. The clock starts with everything imported,
tokenizer and token ids loaded, and stops with the artifact saved.
"""

from __future__ import annotations

import json
import time

import numpy as np
import torch
from arguments import run_parser
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.version import __version__
from transformers import AutoTokenizer


def main() -> None:
    parser = run_parser()
    parser.add_argument("--asymmetric", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = np.load(options.ids)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    config = QuantizeConfig(bits=options.bits, group_size=options.group_size, sym=not options.asymmetric, mse=2.4)
    begin = time.perf_counter()
    model = GPTQModel.load(options.model, config, device="cpu")
    loaded = time.perf_counter()
    model.quantize(windows, batch_size=1, tokenizer=tokenizer)
    quantized = time.perf_counter()
    model.save(str(options.output))
    saved = time.perf_counter()
    report = {
        "version": __version__,
        "torch": torch.__version__,
        "seconds": saved - begin,
        "quantize_seconds": quantized - loaded,
        "load_seconds": loaded - begin,
        "save_seconds": saved - quantized,
    }
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
