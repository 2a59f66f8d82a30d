"""One timed run of the hqq package; started by ``bench/quality.py`` in an environment of its own.

    PYTHON bench/peers/hqq_package.py --model DIR --ids FILE.npy --output DIR --report FILE.json [--bits 4]
        [--group-size 64]

Its defaults, with scales along the input columns (``axis=1``), as its kernels want them. It needs no text; ``--ids`` is
not read. Nothing but hqq reads what hqq saves, so the weights are written as they are dequantized, in bfloat16, and
the report says what the codes would take: ``bits`` per weight and a scale and a zero point of two bytes per group. The
clock starts with everything imported, and stops with all layers quantized.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version

import torch
from arguments import run_parser
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from torch import nn
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = run_parser(text=False)
    parser.add_argument("--asymmetric", action="store_true", help="which it always is")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begin = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    config = BaseQuantizeConfig(nbits=options.bits, group_size=options.group_size, axis=1)
    saved = 0.0
    for name, linear in model.named_modules():
        if not isinstance(linear, nn.Linear) or name == "lm_head":
            continue
        quantized = HQQLinear(linear, config, compute_dtype=torch.bfloat16, device="cpu", del_orig=False)
        weight = linear.weight
        codes = weight.numel() * options.bits / 8 + 4 * weight.numel() / options.group_size
        saved += weight.numel() * weight.element_size() - codes
        with torch.no_grad():
            weight.copy_(quantized.dequantize())
    seconds = time.perf_counter() - begin
    model.save_pretrained(options.output)
    stored = sum(path.stat().st_size for path in options.output.glob("*.safetensors"))
    report = {
        "version": version("hqq"),
        "torch": torch.__version__,
        "seconds": seconds,
        "nbytes": round(stored - saved),
    }
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
