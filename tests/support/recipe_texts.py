"""A recipe with every section, and what is said of one that is wrong."""

from __future__ import annotations

import pytest

from llmconvert.errors import RecipeError
from llmconvert.recipes.loading import parse_recipe

__all__ = ["FULL", "refusal"]

FULL = """\
model: meta-llama/Llama-2-7b-hf
convert:   {dtype: bfloat16}
attention: {kv_heads: 8, method: svd, heal: {steps: 200}}
calibrate: {dataset: HuggingFaceH4/ultrachat_200k, samples: 128, length: 2048, seed: 0}
quantize:  {method: gptq, scheme: w4a16-g128, format: compressed-tensors,
            overrides: [{match: "*.down_proj", scheme: w8a16-g128}]}
validate:  {perplexity: {dataset: wikitext-2, max_increase: 5%}, generation: true, attention: [eager, flash]}
publish:   {to: user/Llama-2-7b-GQA8-W4A16, private: true}
"""


def refusal(text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "x.yaml", overrides=overrides)
    return str(caught.value)
