"""One timed run of llmconvert; started by ``bench/peers.py`` and ``bench/quality.py``.

    python bench/peers/ours.py --model DIR --ids FILE.npy --output DIR --report FILE.json
        [--method gptq] [--scheme w4a16-g64] [--format compressed-tensors] [--options JSON]
        [--bits-per-weight 4.25] [--override "*.down_proj=w4a16-g32-asym" …]

Among the options, ``rotate`` is whether rotations are folded into the weights first.

The clock starts with everything imported and token ids loaded, and stops with the artifact in place: opening the
checkpoint, tracing, packing, journal and fsync included.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace

import numpy as np
import torch
from arguments import run_parser

import llmconvert
from llmconvert.quantize.job import plan_quantize
from llmconvert.quantize.mixed_precision.budget import Budget
from llmconvert.quantize.mixed_precision.job import plan_choice
from llmconvert.quantize.plan import Override, QuantizeRequest
from llmconvert.quantize.rotate import rotate_checkpoint
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import SafetensorsCheckpoint


def main() -> None:
    parser = run_parser()
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--scheme", help="instead of --bits and --group-size")
    parser.add_argument("--format", default="compressed-tensors")
    parser.add_argument("--options", type=json.loads, default={}, help="the method's own settings, as JSON")
    parser.add_argument("--bits-per-weight", type=float, help="a budget instead of a scheme")
    parser.add_argument("--override", action="append", default=[], metavar="PATTERN=SCHEME")
    options = parser.parse_args()
    rotate = options.options.pop("rotate", False)
    torch.set_num_threads(options.threads)
    windows = [torch.from_numpy(row).unsqueeze(0) for row in np.load(options.ids)]
    scheme = Scheme.parse(options.scheme or f"w{options.bits}a16-g{options.group_size}-sym")
    pairs = [text.rpartition("=") for text in options.override]
    overrides = tuple(Override(pattern, Scheme.parse(text)) for pattern, _, text in pairs)
    request = QuantizeRequest(options.method, scheme, options.format, overrides, options.options)
    begin = time.perf_counter()
    with SafetensorsCheckpoint(options.model) as original:
        source = rotate_checkpoint(original) if rotate else original
        if options.bits_per_weight is not None:
            work = options.output.with_name(f"{options.output.name}.sensitivity")
            allocation = plan_choice(source, work, Budget(options.bits_per_weight), request, windows=windows).run()
            request = replace(request, scheme=allocation.scheme, overrides=allocation.overrides)
            shutil.rmtree(work)
        result = plan_quantize(source, options.output, request, windows=windows).run()
    seconds = time.perf_counter() - begin
    report = {
        "version": llmconvert.__version__,
        "torch": torch.__version__,
        "seconds": seconds,
        "phases": dict(result.phases),
        "memory": {"mode": result.memory.mode, **result.memory.parts},
        "linears": [
            {"name": layer.name, "shape": layer.shape, "error": layer.error, "damping": layer.damping}
            for layer in result.layers
        ],
    }
    options.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
