"""GPTQModel on CPU."""

from job import opened, read_job, run_transformers_model

job = read_job()
for asked in job["models"].values():
    run_transformers_model(opened(asked["code"], "model").model, job, asked["report"])
