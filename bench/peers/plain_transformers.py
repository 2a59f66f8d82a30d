"""What transformers alone takes to read a text, or to continue prompts; started by ``bench/evaluate.py``.

    python bench/peers/plain_transformers.py --model DIR [--model DIR] --report FILE.json [--threads 2]
        (--ids FILE.npy [--passes 2] | --new-tokens 64)

With ids: a forward pass over every window for each of the passes, one window at a time, logits made and dropped. With
``--new-tokens``: greedy continuations of the prompts that ``llmconvert validate --generation`` has, by ``generate``
with its key-value cache, one prompt at a time, by one model after the other.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

# The prompts alone come from llmconvert, before any clock runs.
from llmconvert.validate.generation.greedy import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--ids", type=Path)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts: dict[str, Any] = {"loading": 0.0, "computing": 0.0, "tokens": 0}
    for name in options.model:
        begin = time.perf_counter()
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).eval()
        loaded = time.perf_counter()
        with torch.inference_mode():
            if options.ids is not None:
                windows = torch.from_numpy(np.load(options.ids))
                for _ in range(options.passes):
                    for window in windows:
                        model(input_ids=window[None], use_cache=False)
                parts["tokens"] += options.passes * windows.numel()
            else:
                parts["tokens"] += continue_prompts(model, name, options.new_tokens)
        parts["loading"] += loaded - begin
        parts["computing"] += time.perf_counter() - loaded
    options.report.write_text(json.dumps(parts))


def continue_prompts(model: Any, name: str, count: int) -> int:
    """Continue every prompt; gives how many tokens were written."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=count, eos_token_id=model.generation_config.eos_token_id
    )
    written = 0
    for prompt in PROMPTS:
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
            "input_ids"
        ]
        written += model.generate(ids, generation_config=settings).shape[1] - ids.shape[1]
    return written


if __name__ == "__main__":
    main()
