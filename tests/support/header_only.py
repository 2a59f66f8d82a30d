"""Checkpoints of models that no test could hold: an index and the headers of all shards, and holes for data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SHARD_NBYTES = 5_000_000_000


def qwen3_moe(layers: int, experts: int, hidden: int, width: int, vocabulary: int = 151_936) -> dict[str, Any]:
    """A config of the Qwen3 mixtures' shape: ``experts`` of ``width`` in each layer, 8 of them for a token."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "torch_dtype": "bfloat16",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": vocabulary,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
    }


def _tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width, head = config["hidden_size"], config["moe_intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        for name, shape in (
            ("q_proj", (queries, hidden)),
            ("k_proj", (keys, hidden)),
            ("v_proj", (keys, hidden)),
            ("o_proj", (hidden, queries)),
            ("q_norm", (head,)),
            ("k_norm", (head,)),
        ):
            yield f"{prefix}self_attn.{name}.weight", shape
        yield f"{prefix}mlp.gate.weight", (config["num_experts"], hidden)
        for expert in range(config["num_experts"]):
            for name, shape in (
                ("gate_proj", (width, hidden)),
                ("up_proj", (width, hidden)),
                ("down_proj", (hidden, width)),
            ):
                yield f"{prefix}mlp.experts.{expert}.{name}.weight", shape
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def make_header_only(directory: Path, config: dict[str, Any]) -> int:
    """Write the checkpoint in bfloat16, in shards of 5 GB; gives the number of parameters."""
    directory.mkdir(parents=True)
    shards: list[dict[str, Any]] = [{}]
    filled = total = 0
    for name, shape in _tensors(config):
        nbytes = 2 * math.prod(shape)
        total += nbytes
        if filled + nbytes > _SHARD_NBYTES and filled:
            shards.append({})
            filled = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [filled, filled + nbytes]}
        filled += nbytes
    index: dict[str, str] = {}
    for number, header in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= dict.fromkeys(header, file_name)
        raw = json.dumps(header).encode()
        with (directory / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + max(entry["data_offsets"][1] for entry in header.values()))
    about = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(about))
    (directory / "config.json").write_text(json.dumps(config))
    return total // 2
