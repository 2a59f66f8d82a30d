"""Log-probabilities of prompts by vLLM, in a process of its own: its engine keeps memory and threads until it ends.

Run as a script by :mod:`llmconvert.validate.runtimes.vllm`. It imports nothing of this package, so that an environment
in which vLLM alone is installed can run it. Arguments: a JSON file ``{"model", "dtype", "top", "windows"}``, and the
file to write ``{"version", "windows": [[{token id: log-probability}, …], …]}`` to, where the first token
of a window, which nothing predicts, is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(request_file: str, answer_file: str) -> None:
    """Score every window of the request, one at a time; see the module for both files."""
    import vllm  # type: ignore[import-not-found,unused-ignore]

    request = json.loads(Path(request_file).read_text())
    windows: list[list[int]] = request["windows"]
    llm = vllm.LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=max(map(len, windows)) + 1,
        max_logprobs=request["top"],
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=False,
        seed=0,
    )
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=request["top"], detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in windows], sampling, use_tqdm=False)
    scored: list[list[dict[int, float]]] = []
    for output in outputs:
        positions: list[Any] = output.prompt_logprobs[1:]
        scored.append([{int(token): float(entry.logprob) for token, entry in found.items()} for found in positions])
    found = {"version": vllm.__version__, "windows": scored}
    Path(answer_file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
