"""vLLM on CPU."""

from job import read_job, write_report
from vllm import LLM, SamplingParams


def main():
    job = read_job()
    options = {"temperature": 0, "max_tokens": job["new"], "ignore_eos": True, "prompt_logprobs": -1}
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for directory, path in job["models"].items():
        llm = LLM(model=directory, enforce_eager=True, max_model_len=128, max_num_seqs=4, max_logprobs=-1)
        results = llm.generate(prompts, SamplingParams(**options))
        # One mapping token → log-probability for each place but the first, which nothing predicts.
        logprobs = [
            [[place[token].logprob for token in range(len(place))] for place in result.prompt_logprobs[1:]]
            for result in results
        ]
        write_report(path, logprobs, [list(result.outputs[0].token_ids) for result in results])
        del llm


if __name__ == "__main__":
    main()
