"""Artifacts of GPTQModel: a model quantized by it, and what its logits are once loaded again.

    python make_gptqmodel.py JOB.json

``models`` maps directories to write to reports, as in ``job.py``; ``source`` is the model, and ``options`` go with the
directories.
"""

import random

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from job import read_job, run_transformers_model

job = read_job()
random.seed(0)
texts = [[random.randrange(320) for _ in range(64)] for _ in range(16)]
for directory, path in job["models"].items():
    model = GPTQModel.load(job["source"], QuantizeConfig(**job["options"][directory]), device="cpu")
    model.quantize(texts, batch_size=4)
    model.save(directory)
    loaded = GPTQModel.load(directory, device="cpu", backend=BACKEND.GPTQ_TORCH)
    run_transformers_model(loaded.model, job, path)
