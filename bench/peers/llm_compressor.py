"""One timed run of llm-compressor; started by ``bench/peers.py`` and ``bench/quality.py`` in its own environment.

    PYTHON bench/peers/llm_compressor.py --model DIR --ids FILE.npy --output DIR --report FILE.json
        [--method gptq|awq|rtn] [--bits 4] [--group-size 64] [--asymmetric] [--preset NVFP4] [--stored pack-quantized]
        [--routed] [--evaluation-ids FILE.npy]

Its defaults (for GPTQ static act-order, true-sequential per decoder layer, damping 0.01; for AWQ 20 points of its
grid), with the ``mse`` observer for scales; ``--preset`` takes a scheme of its own names instead, with the observers
that it gives it; ``--stored`` is the layout of its file, where it would choose another (codes of W4AFP8 one to a byte).
A mixture's experts are calibrated on all tokens each, unless
``--routed``. The clock starts with everything imported, tokenizer and token
ids loaded, and stops with the artifact saved; with ``--evaluation-ids`` it stands still while the perplexity of what is
in memory is measured, before that is saved.
"""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from arguments import run_parser
from datasets import Dataset
from llmcompressor import __version__, oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = run_parser()
    parser.add_argument("--method", choices=["gptq", "awq", "rtn"], default="gptq")
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--routed", action="store_true", help="calibrate experts on the tokens that are routed to them")
    parser.add_argument("--preset", help="one of its own schemes: NVFP4, MXFP4, FP8_BLOCK, W4AFP8, …")
    parser.add_argument("--stored", help="layout of the file: pack-quantized, …")
    parser.add_argument("--evaluation-ids", type=Path, help="token ids to measure the model in memory on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    ids = np.load(options.ids)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": not options.asymmetric,
        "strategy": "group",
        "group_size": options.group_size,
        "observer": "mse",
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifier = GPTQModifier if options.method == "gptq" else QuantizationModifier
    chosen = {"scheme": options.preset, "targets": ["Linear"]} if options.preset else {"config_groups": groups}
    recipe: list[Any] = [modifier(**chosen, ignore=["lm_head"])]
    if options.method == "awq":
        recipe.insert(0, AWQModifier())
    begin = time.perf_counter()
    mixture = hasattr(AutoConfig.from_pretrained(options.model), "num_experts_per_tok")
    with load_quantizable_moe() if mixture else nullcontext():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
    loaded = time.perf_counter()
    # Its AWQ pins memory for copies to an accelerator, and fails where there is none to copy to.
    with nullcontext() if torch.accelerator.is_available() else patch.object(IntermediatesCache, "pin_memory"):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=loader(ids),
            recipe=recipe,
            max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
            shuffle_calibration_samples=False,
            moe_calibrate_all_experts=not options.routed,
        )
    quantized = time.perf_counter()
    in_memory = None if options.evaluation_ids is None else perplexity(model, np.load(options.evaluation_ids))
    measured = time.perf_counter() - quantized
    model.save_pretrained(options.output, save_compressed=True, quantization_format=options.stored)
    tokenizer.save_pretrained(options.output)
    saved = time.perf_counter()
    report = {
        "version": __version__,
        "torch": torch.__version__,
        "seconds": saved - begin - measured,
        "quantize_seconds": quantized - loaded,
        "load_seconds": loaded - begin,
        "save_seconds": saved - quantized - measured,
        "perplexity_in_memory": in_memory,
    }
    options.report.write_text(json.dumps(report))


def perplexity(model: torch.nn.Module, ids: np.ndarray) -> float:
    """Of windows ``[N, L]``, by the model's own forward, losses in float32."""
    loss = 0.0
    with torch.no_grad():
        for row in ids:
            window = torch.from_numpy(row)[None]
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            loss += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
    return float(np.exp(loss / (ids.shape[0] * (ids.shape[1] - 1))))


def loader(ids: np.ndarray) -> DataLoader[Any]:
    """Batches of one window each, in order."""
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]
    return DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=1, shuffle=False)


if __name__ == "__main__":
    main()
