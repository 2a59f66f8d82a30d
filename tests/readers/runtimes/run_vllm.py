"""vLLM on CPU. Where it can't load a model or run it, what it says is in the place of the report, as ``refused``."""

import functools
import gc
import json
from pathlib import Path

import vllm
from job import opened, read_job, write_report

# To say the probabilities of all tokens, and without compiling for minutes; the rest is as documented.
vllm.LLM = functools.partial(vllm.LLM, max_logprobs=-1, enforce_eager=True, max_model_len=128, max_num_seqs=4)


def generated(code, prompts, new):
    """Log-probabilities of all tokens at each place of the prompts, and the tokens that are written behind them."""
    llm = opened(code, "llm")
    params = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=-1)
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    # One mapping token → log-probability for each place but the first, which nothing predicts.
    logprobs = [
        [[place[token].logprob for token in range(len(place))] for place in result.prompt_logprobs[1:]]
        for result in results
    ]
    return logprobs, [list(result.outputs[0].token_ids) for result in results]


def main():
    job = read_job()
    for asked in job["models"].values():
        refused = None
        try:
            found = generated(asked["code"], job["prompts"], job["new"])
        except Exception as error:
            refused = f"{type(error).__name__}: {error}"
        # An engine ends what all of them share when it goes, so it goes before the next one comes.
        gc.collect()
        if refused is None:
            write_report(asked["report"], *found)
        else:
            Path(asked["report"]).write_text(json.dumps({"refused": refused}))


if __name__ == "__main__":
    main()
