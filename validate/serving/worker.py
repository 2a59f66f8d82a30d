"""Time and memory of one model in one runtime, in a process of its own, which serves nothing else.

Run as a script by :mod:`llmconvert.validate.serving.runtimes`. It imports nothing of this package, so that an
environment in which the runtime alone is installed can run it. Arguments: the runtime's name; a JSON file ``{"model",
"contexts", "tokens", "seed", "vocabulary", "options"}``; and the file to write ``{"version", "load", "memory", "turns":
[{"context", "reading", "writing"}, …]}`` to: seconds until the model answered for the first time, bytes of the process
at most, and tokens per second.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

#: Reads a prompt and writes so many tokens behind it; gives the seconds of both.
Turn = Callable[[list[int], int], tuple[float, float]]

# Read and written before anything counts, at first use of kernels.
_WARMUP = 8


def _transformers(request: dict[str, Any]) -> Turn:
    import torch
    import transformers

    loading: dict[str, Any] = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False}
    if request["options"].get("dequantize"):
        loading["quantization_config"] = transformers.CompressedTensorsConfig(dequantize=True)
    device = request["options"].get("device", "cpu")
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], **loading).to(device).eval()

    def turn(ids: list[int], count: int) -> tuple[float, float]:
        with torch.inference_mode():
            begin = time.perf_counter()
            output = model(torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1)
            last = output.logits[:, -1:].argmax(-1)
            last.cpu()  # waits for a device that works on its own
            read = time.perf_counter()
            for _ in range(count):
                output = model(last, past_key_values=output.past_key_values, use_cache=True)
                last = output.logits[:, -1:].argmax(-1)
                last.cpu()
        return read - begin, time.perf_counter() - read

    return turn


def _mlx(request: dict[str, Any]) -> Turn:
    import mlx.core as mx  # type: ignore[import-not-found,unused-ignore]
    from mlx_lm.models.cache import make_prompt_cache  # type: ignore[import-not-found,unused-ignore]
    from mlx_lm.utils import load_model  # type: ignore[import-not-found,unused-ignore]

    model, _ = load_model(Path(request["model"]))

    def turn(ids: list[int], count: int) -> tuple[float, float]:
        begin = time.perf_counter()
        cache = make_prompt_cache(model)
        last = mx.argmax(model(mx.array([ids]), cache=cache)[:, -1:], axis=-1)
        mx.eval(last)
        read = time.perf_counter()
        for _ in range(count):
            last = mx.argmax(model(last, cache=cache)[:, -1:], axis=-1)
            mx.eval(last)
        return read - begin, time.perf_counter() - read

    return turn


def _llama_cpp(request: dict[str, Any]) -> Turn:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = request["model"]
    params.n_ctx = max(request["contexts"]) + request["tokens"] + 2 * _WARMUP
    params.n_parallel = 1
    params.verbosity = -1
    params.fit_params = False
    server = xllamacpp.Server(params)

    def turn(ids: list[int], count: int) -> tuple[float, float]:
        # The first token comes with the prompt.
        asked = {"prompt": ids, "n_predict": count + 1, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        times = server.handle_completions(asked)["timings"]
        read, written = times["prompt_ms"] / times["prompt_n"], times["predicted_ms"] / times["predicted_n"]
        return read * len(ids) / 1000, written * count / 1000

    return turn


def _vllm(request: dict[str, Any]) -> Turn:
    import vllm  # type: ignore[import-not-found,unused-ignore]

    llm = vllm.LLM(
        model=request["model"],
        max_model_len=max(request["contexts"]) + request["tokens"] + 2 * _WARMUP,
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        trust_remote_code=False,
        skip_tokenizer_init=True,
        seed=0,
    )

    engine = llm.llm_engine

    def turn(ids: list[int], count: int) -> tuple[float, float]:
        # The first token comes with the prompt. Steps that read a part of the prompt give none.
        sampling = vllm.SamplingParams(max_tokens=1 + count, temperature=0, ignore_eos=True, detokenize=False)
        read = None
        begin = time.perf_counter()
        engine.add_request(f"{begin}", {"prompt_token_ids": ids}, sampling)
        while engine.has_unfinished_requests():
            wrote = any(answer.outputs and answer.outputs[0].token_ids for answer in engine.step())
            read = time.perf_counter() if read is None and wrote else read
        if read is None:
            raise RuntimeError("the request ended without a token")
        return read - begin, time.perf_counter() - read

    return turn


_RUNTIMES: dict[str, tuple[str, Callable[[dict[str, Any]], Turn]]] = {
    "transformers": ("transformers", _transformers),
    "vllm": ("vllm", _vllm),
    "llama.cpp": ("xllamacpp", _llama_cpp),
    "mlx": ("mlx-lm", _mlx),
}


def _turns(request: dict[str, Any], turn: Turn) -> Iterator[dict[str, float]]:
    draw = random.Random(request["seed"])
    for context in request["contexts"]:
        ids = [draw.randrange(request["vocabulary"]) for _ in range(context)]
        read, written = turn(ids, request["tokens"])
        if read <= 0 or written <= 0:
            raise RuntimeError(f"{context} tokens were read in {read} s and {request['tokens']} written in {written} s")
        yield {"context": context, "reading": context / read, "writing": request["tokens"] / written}


def _peak() -> int:
    """Bytes of this process at most. What getrusage says on Linux may be its parent's, of before this program began."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str:
    for name in (package, f"{package}-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def main(name: str, request_file: str, answer_file: str) -> None:
    """Measure what the request says; see the module for both files."""
    request = json.loads(Path(request_file).read_text())
    package, load = _RUNTIMES[name]
    begin = time.perf_counter()
    turn = load(request)
    turn(list(range(1, 1 + _WARMUP)), _WARMUP)
    loaded = time.perf_counter() - begin
    turns = list(_turns(request, turn))
    answer = {"version": _version(package), "load": loaded, "memory": _peak(), "turns": turns}
    Path(answer_file).write_text(json.dumps(answer))
    # Servers of xllamacpp may wait for each other when they are destroyed.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
