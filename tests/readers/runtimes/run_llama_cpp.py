"""llama.cpp, through xllamacpp; it runs in the package's own environment."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))
from job import read_job, write_report
from support.llama_cpp import LlamaCpp

job = read_job()
vocabulary = job["vocabulary"]
for path, asked in job["models"].items():
    model = LlamaCpp(Path(path))
    logprobs = [
        [model.log_probabilities(prompt[: place + 1], vocabulary).tolist() for place in range(len(prompt))]
        for prompt in job["prompts"]
    ]
    tokens = [model.continuation(prompt, job["new"], vocabulary)[0] for prompt in job["prompts"]]
    write_report(asked["report"], logprobs, tokens)
