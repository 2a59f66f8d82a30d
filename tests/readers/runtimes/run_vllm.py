"""vLLM on CPU. Where it can't load a model, what it says is written in the place of the report, as ``refused``."""

import functools
import json
from pathlib import Path

import vllm
from job import opened, read_job, write_report

# To say the probabilities of all tokens, and without compiling for minutes; the rest is as documented.
vllm.LLM = functools.partial(vllm.LLM, max_logprobs=-1, enforce_eager=True, max_model_len=128, max_num_seqs=4)


def main():
    job = read_job()
    options = {"temperature": 0, "max_tokens": job["new"], "ignore_eos": True, "prompt_logprobs": -1}
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for asked in job["models"].values():
        try:
            llm = opened(asked["code"], "llm")
        except Exception as error:
            Path(asked["report"]).write_text(json.dumps({"refused": f"{type(error).__name__}: {error}"}))
            continue
        results = llm.generate(prompts, vllm.SamplingParams(**options))
        # One mapping token → log-probability for each place but the first, which nothing predicts.
        logprobs = [
            [[place[token].logprob for token in range(len(place))] for place in result.prompt_logprobs[1:]]
            for result in results
        ]
        write_report(asked["report"], logprobs, [list(result.outputs[0].token_ids) for result in results])
        del llm


if __name__ == "__main__":
    main()
