"""One timed run of bitsandbytes' quantization through transformers; started by ``bench/quality.py``.

    PYTHON bench/peers/bits_and_bytes.py --model DIR --ids FILE.npy --output DIR --report FILE.json --kind nf4

Kinds are ``nf4``, ``nf4-dq`` (double quantization) and ``int8`` (LLM.int8). It needs no text; ``--ids`` is not read.
The clock starts with everything imported, and stops with the artifact saved.
"""

from __future__ import annotations

import json
import time

import torch
from arguments import run_parser
from bitsandbytes import __version__
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main() -> None:
    parser = run_parser(text=False, integers=False)
    parser.add_argument("--kind", choices=["nf4", "nf4-dq", "int8"], default="nf4")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=options.kind == "nf4-dq",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        options.model, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(options.output)
    seconds = time.perf_counter() - begin
    options.report.write_text(json.dumps({"version": __version__, "torch": torch.__version__, "seconds": seconds}))


if __name__ == "__main__":
    main()
