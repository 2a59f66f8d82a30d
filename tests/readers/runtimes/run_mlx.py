"""mlx-lm on the CPU, in float32: in bfloat16 the CPU's kernels add up in bfloat16, which a GPU's do not."""

import mlx.core as mx
from job import opened, read_job, write_report

job = read_job()
mx.set_default_device(mx.cpu)
for asked in job["models"].values():
    model = opened(asked["code"], "model")
    model.set_dtype(mx.float32)
    ids = mx.array(job["prompts"])
    logits = model(ids)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for _ in range(job["new"]):
        ids = mx.concatenate([ids, mx.argmax(model(ids)[:, -1:], axis=-1).astype(ids.dtype)], axis=1)
    linears = [type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")]
    tokens = ids[:, -job["new"] :]
    write_report(asked["report"], logprobs.tolist(), tokens.tolist(), linears)
