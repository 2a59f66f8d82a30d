"""Greedy decoding by the streaming engine, for models larger than memory: one pass over the weights per token.

The original is not made to write: it reads what the artifact wrote, and at each position one sees whether it would
have gone on the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmconvert.engine.evaluation import stream_logits
from llmconvert.errors import CheckpointError
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint
from llmconvert.storage.parsing import parse_json
from llmconvert.validate.generation.greedy import Continuation, encode
from llmconvert.validate.runtimes.transformers import end_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["STREAMED_TOKENS", "Scored", "score_continuations", "stream_continuations"]

#: Tokens written at most; each reads the whole model from disk.
STREAMED_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Scored:
    """What the original thinks of texts that another model wrote.

    Attributes:
        agreement: share of tokens that the original finds most likely after the prompt and the text so far.
        prefix: mean number of tokens until the first that it doesn't.
    """

    agreement: float
    prefix: float


def stream_continuations(
    checkpoint: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> tuple[Continuation, ...]:
    """Continue all prompts greedily at once, in the memory of one block; one pass over the weights per token.

    Args:
        checkpoint: dense weights.
        max_new_tokens: per prompt; at most :data:`STREAMED_TOKENS` are written.
    """
    texts = encode(tokenizer, prompts)
    starts = [text.shape[1] for text in texts]
    ends = _end_tokens(checkpoint, tokenizer)
    limit = min(max_new_tokens, STREAMED_TOKENS)
    with progress.task("generation, streamed", limit) as task:
        for _ in range(limit):
            going = [
                index
                for index, text in enumerate(texts)
                if text.shape[1] == starts[index] or int(text[0, -1]) not in ends
            ]
            if not going:
                break
            logits = stream_logits(checkpoint, [texts[index] for index in going], device=device, dtype=dtype)
            for index, scores in zip(going, logits, strict=True):
                token = scores[0, -1].argmax().reshape(1, 1).cpu()
                texts[index] = torch.cat([texts[index], token], dim=1)
            task.advance(1)
    found: list[Continuation] = []
    for prompt, text, start in zip(prompts, texts, starts, strict=True):
        new = tuple(text[0, start:].tolist())
        words = str(tokenizer.decode(new, skip_special_tokens=True))
        found.append(Continuation(prompt, new, words, new[-1] in ends))
    return tuple(found)


def score_continuations(
    original: Checkpoint,
    tokenizer: PreTrainedTokenizerBase,
    continuations: Sequence[Continuation],
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> Scored:
    """Let the original read prompts and continuations, all in one streamed pass.

    Args:
        original: dense weights.
        tokenizer: the one that the prompts were encoded with.
        continuations: at least one token each.
    """
    prompts = encode(tokenizer, [text.prompt for text in continuations])
    windows = [
        torch.cat([prompt, torch.tensor([text.ids])], dim=1)
        for prompt, text in zip(prompts, continuations, strict=True)
    ]
    same: list[list[bool]] = []
    logits = stream_logits(original, windows, device=device, dtype=dtype, progress=progress)
    for prompt, text, scores in zip(prompts, continuations, logits, strict=True):
        # The prediction of a token stands at the position before it.
        likely = scores[0, prompt.shape[1] - 1 : -1].argmax(-1).tolist()
        same.append([a == b for a, b in zip(likely, text.ids, strict=True)])
    prefixes = [flags.index(False) if False in flags else len(flags) for flags in same]
    return Scored(sum(map(sum, same)) / sum(map(len, same)), sum(prefixes) / len(prefixes))


def _end_tokens(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: those of the generation config (of the model's without one), and the tokenizer's."""
    config: Any = checkpoint.config
    if "generation_config.json" in checkpoint.files:
        try:
            config = parse_json(checkpoint.read_file("generation_config.json"))
        except ValueError as error:
            raise CheckpointError(f"generation_config.json: cannot be read: {error}") from error
    return end_tokens(config.get("eos_token_id") if isinstance(config, Mapping) else None, tokenizer)
