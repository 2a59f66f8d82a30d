"""One timed run of mlx-lm's quantization; started by ``bench/quality.py`` in an environment of its own.

    PYTHON bench/peers/mlx_lm_quant.py --model DIR --ids FILE.npy --output DIR --report FILE.json [--bits 4]
        [--group-size 64] [--method convert|gptq|awq|dwq] [--recipe mixed_4_6]

Environment: ``pip install "mlx[cpu]==0.32.4" mlx-lm==0.32.2``. ``convert`` is ``mlx_lm.convert -q``, which rounds to
nearest, embedding and head included. ``gptq``, ``awq`` and ``dwq`` are the functions of ``mlx_lm.quant`` on our tokens
in the place of the text that they would download; what they give embedding and head (6 bits, or 4 in groups of 32) is
set to the width and groups of the rest, so that files have the same size. DWQ learns from the logits of the model on
the same tokens, with its own defaults (Adam at 1e-6) and ``--batch`` windows a step, and begins with ``convert``'s.

On a CPU mlx adds up products of bfloat16 in bfloat16, which leaves nothing of a Hessian over thousands of tokens, and
without BLAS. So these three compute in float32, and what they give is cast to the model's dtype as it is saved.

mlx-lm takes the base of rotary positions from ``rope_theta``, which transformers 5 calls otherwise, and has a default
where that is missing; it is given the right one.
"""

from __future__ import annotations

import json
import time
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
from arguments import run_parser
from mlx.utils import tree_flatten
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config
from mlx_lm.quant.dwq import dwq_quantize
from mlx_lm.quant.gptq import gptq_quantize
from mlx_lm.utils import load, quantize_model, save


def main() -> None:
    parser = run_parser(text=False)
    parser.add_argument("--method", choices=("convert", "gptq", "awq", "dwq"), default="convert")
    parser.add_argument("--recipe")
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    mx.set_default_device(mx.cpu)
    mx.random.seed(123)
    ids = np.load(options.ids)
    begin = time.perf_counter()
    rope = json.loads((Path(options.model) / "config.json").read_text()).get("rope_parameters") or {}
    told = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    model, tokenizer, config = load(options.model, lazy=True, return_config=True, model_config=told)
    size, bits = options.group_size, options.bits
    tokens = mx.array(ids)
    stored = next(value.dtype for _, value in tree_flatten(model.parameters()))
    if options.method != "convert":
        model.set_dtype(mx.float32)
    if options.method == "gptq":
        model, config["quantization"] = gptq_quantize(model, tokens, bits, size, bits, size)
    elif options.method == "awq":
        chosen = AWQ_MODEL_CONFIGS[config["model_type"]]
        awq_quantize(model, tokens, chosen, bits=bits, group_size=size, embed_bits=bits, embed_group_size=size)
        config = update_config(model, config)
    else:
        recipe = options.recipe and mixed_quant_predicate_builder(options.recipe, model, size)
        student, config = quantize_model(model, config, size, bits, quant_predicate=recipe)
        if options.method == "dwq":
            teacher, *_ = load(options.model, model_config=told)
            teacher.set_dtype(mx.float32)
            learn(student, teacher, ids, options.batch)
        model = student
    model.set_dtype(stored)
    save(options.output, options.model, model, tokenizer, config)
    report = {"version": version("mlx-lm"), "mlx": version("mlx"), "seconds": time.perf_counter() - begin}
    options.report.write_text(json.dumps(report))


def learn(student: object, teacher: object, ids: np.ndarray, batch: int) -> None:
    """DWQ; the last eighth of the windows is its validation set."""
    held = len(ids) // 8
    sets = [[(window.tolist(), 0) for window in part] for part in (ids[:-held], ids[-held:])]

    def target(batch: mx.array, index: int, split: str) -> mx.array:
        return mx.stop_gradient(teacher(batch))

    optimizer = optimizers.Adam(learning_rate=1e-6, bias_correction=True)
    dwq_quantize(student, target, optimizer, *sets, batch_size=batch, max_seq_length=ids.shape[1], seed=123)


if __name__ == "__main__":
    main()
