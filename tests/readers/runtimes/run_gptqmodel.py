"""GPTQModel on CPU, with its torch kernels."""

from gptqmodel import GPTQModel
from job import read_job, run_transformers_model

job = read_job()
for directory, path in job["models"].items():
    model = GPTQModel.load(directory, device="cpu")
    run_transformers_model(model.model, job, path)
