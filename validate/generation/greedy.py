"""Greedy continuations: do the original and the artifact still say the same, and does either get stuck?

Greedy decoding is deterministic, so the length of the common beginning measures how soon a difference in the logits
changes the text. Small differences change it sooner or later; loops and lost endings are what a user would notice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llmconvert.progress import SILENT, Progress
from llmconvert.text.chat import ChatTemplate, render_prompts
from llmconvert.text.tokenizer import tokenizer_errors
from llmconvert.validate.runtimes.transformers import Runtime

__all__ = [
    "PROMPTS",
    "Continuation",
    "GenerationComparison",
    "Generations",
    "compare",
    "encode",
    "generate",
    "is_looping",
]

#: Everyday requests of different kinds; the last two should make a chat model end by itself soon.
PROMPTS: tuple[str, ...] = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List three things to check before a long bicycle ride.",
    "A train leaves at 9:40 and the journey takes 85 minutes. When does it arrive?",
    "Write a Python function that returns the larger of two numbers.",
    "Translate into French: The library opens at eight in the morning.",
    "What is the capital of Japan? Answer with one word.",
    "Say hello.",
)

# A text is stuck when its end repeats one phrase at least this often, over at least this many tokens.
_LOOP_REPEATS = 3
_LOOP_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model said to one prompt: new token ids (the ending token included), their text, whether it ended."""

    prompt: str
    ids: tuple[int, ...]
    text: str
    ended: bool

    @property
    def looping(self) -> bool:
        """Whether it got stuck repeating a phrase."""
        return is_looping(self.ids)


@dataclass(frozen=True, slots=True)
class Generations:
    """All continuations of one model, and the pace: tokens per second reading prompts, and writing one by one."""

    continuations: tuple[Continuation, ...]
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    runtime: str


@dataclass(frozen=True, slots=True)
class GenerationComparison:
    """Two models on the same prompts.

    Attributes:
        prefix: mean number of tokens until the first difference.
        agreement: share of positions with the same token, of the longer text of each pair.
        looping, ended: number of texts that got stuck, and that ended by themselves: (reference, artifact).
    """

    prefix: float
    agreement: float
    looping: tuple[int, int]
    ended: tuple[int, int]


def generate(
    runtime: Runtime, prompts: Sequence[str] = PROMPTS, *, max_new_tokens: int = 64, progress: Progress = SILENT
) -> Generations:
    """Continue each prompt greedily, with the key-value cache, one at a time.

    Prompts go through the tokenizer's chat template where there is one. The loop takes the most likely token itself:
    ``generate`` would apply what the model's generation config asks for (repetition penalties, banned tokens), which
    hides the differences looked for here.

    Args:
        max_new_tokens: tokens per prompt, at least 1; a text that ends by itself is shorter.
    """
    if max_new_tokens < 1 or not prompts:
        raise ValueError(f"nothing to generate: {len(prompts)} prompts, {max_new_tokens} tokens")
    continuations: list[Continuation] = []
    prefill = decode = 0.0
    read = written = 0
    with progress.task("generation", len(prompts)) as task:
        for prompt, start in zip(prompts, encode(runtime.tokenizer, prompts), strict=True):
            ids = start.to(runtime.device)
            new, seconds = _continue(runtime, ids, max_new_tokens)
            read, written = read + ids.shape[1], written + len(new) - 1
            prefill, decode = prefill + seconds[0], decode + seconds[1]
            text = str(runtime.tokenizer.decode(new, skip_special_tokens=True))
            continuations.append(Continuation(prompt, new, text, new[-1] in runtime.end_tokens))
            task.advance(1, prompt)
    return Generations(tuple(continuations), read / prefill, written / decode if written else 0.0, runtime=runtime.name)


def encode(tokenizer: Any, prompts: Sequence[str]) -> list[torch.Tensor]:
    """Ids ``[1, tokens]`` of each prompt as a user would send it: through the chat template where there is one.

    Raises:
        SourceError: the tokenizer or its template fails.
    """
    template = ChatTemplate.of(tokenizer)
    texts = prompts if template is None else render_prompts(template, tuple(prompts))
    with tokenizer_errors():
        # What a template renders has its special tokens already.
        return [
            tokenizer(text, add_special_tokens=template is None, return_tensors="pt")["input_ids"] for text in texts
        ]


def _continue(runtime: Runtime, ids: torch.Tensor, limit: int) -> tuple[tuple[int, ...], tuple[float, float]]:
    """New ids (at least one), and the seconds for the first and for all others."""
    new: list[int] = []
    cache = None
    begin = time.perf_counter()
    first = 0.0
    with torch.inference_mode():
        while len(new) < limit and (not new or new[-1] not in runtime.end_tokens):
            output = runtime.model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            new.append(int(output.logits[0, -1].argmax()))
            ids = torch.tensor([[new[-1]]], device=runtime.device)
            first = first or time.perf_counter() - begin
    return tuple(new), (first, time.perf_counter() - begin - first)


def is_looping(ids: Sequence[int]) -> bool:
    """Whether a text ends in at least three repetitions of one phrase, twelve tokens or more in all."""
    for period in range(1, len(ids) // _LOOP_REPEATS + 1):
        needed = max(_LOOP_REPEATS * period, _LOOP_TOKENS)
        tail = ids[-needed:]
        if len(tail) == needed and tail[period:] == tail[:-period]:
            return True
    return False


def compare(reference: Generations, artifact: Generations) -> GenerationComparison:
    """Hold the continuations of two models against each other; prompts must be the same.

    Raises:
        ValueError: they are not.
    """
    pairs = list(zip(reference.continuations, artifact.continuations, strict=True))
    if any(ours.prompt != theirs.prompt for ours, theirs in pairs):
        raise ValueError("the continuations belong to different prompts")
    prefixes, shares = [], []
    for ours, theirs in pairs:
        same = [a == b for a, b in zip(ours.ids, theirs.ids, strict=False)]
        prefixes.append(same.index(False) if False in same else len(same))
        shares.append(sum(same) / max(len(ours.ids), len(theirs.ids)))
    return GenerationComparison(
        prefix=sum(prefixes) / len(pairs),
        agreement=sum(shares) / len(pairs),
        looping=(sum(ours.looping for ours, _ in pairs), sum(theirs.looping for _, theirs in pairs)),
        ended=(sum(ours.ended for ours, _ in pairs), sum(theirs.ended for _, theirs in pairs)),
    )
