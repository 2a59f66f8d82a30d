"""Tiny seeded models for the tests: a trained tokenizer and a random Llama, made in well under a second.

``from tiny_models import tiny_llama_dir`` (``tests/`` is on pytest's path).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def tiny_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocabulary`` tokens, trained on a piece of the standard library's prose."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[key][:2000] for key in sorted(topics)[:20]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
    )


def tiny_llama(*, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama in float32: hidden 64, 2 layers, 4 heads over 2 key-value heads, tied embeddings.

    Keyword arguments override :class:`transformers.LlamaConfig` keys.
    """
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        # Wider than the usual 0.02, so that the layers do something to the logits.
        "initializer_range": 0.1,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config})).eval()


def tiny_llama_dir(
    directory: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    **config: Any,
) -> Path:
    """Save :func:`tiny_llama` with :func:`tiny_tokenizer` in Hugging Face layout, and return ``directory``.

    A small ``max_shard_size`` (``"100KB"``) gives several shards with an index.
    """
    model = tiny_llama(seed=seed, **config).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer(model.config.vocab_size).save_pretrained(directory)
    return directory
