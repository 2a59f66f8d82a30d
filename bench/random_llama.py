"""Make a Llama- or Mixtral-shaped checkpoint of random weights, in constant memory: by default 7B, 13.5 GB of bfloat16.

    python bench/random_llama.py OUTPUT [--layers 32] [--hidden 4096] [--intermediate 11008] [--heads 32]
        [--kv-heads 32] [--vocabulary 32000] [--experts 0] [--chosen 2] [--seed 0] [--shard-gigabytes 5]

With ``--experts`` it is a Mixtral, in which every token is sent to ``--chosen`` of them. Weights are normal with the
``initializer_range`` of 0.02, norms are one. Every row of every tensor depends on the seed and the tensor's name alone.
There is no tokenizer: feed it random token ids.
"""

from __future__ import annotations

import argparse
import time
import zlib
from pathlib import Path

import torch

from llmconvert.storage.checkpoint import TensorSpec
from llmconvert.storage.writer import TensorWriter, check_output_directory, plan_layout, write_json

INITIALIZER_RANGE = 0.02
# Normal numbers cost more than writing them: a million are drawn per tensor, and repeated shifted.
_POOL = 1 << 20
_SLICE_NBYTES = 1 << 25


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0, help="of every layer (default 0: a dense MLP)")
    parser.add_argument("--chosen", type=int, default=2, help="experts that a token is sent to (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    options = parser.parse_args()
    begin = time.perf_counter()
    config = make_config(options)
    nbytes = write_checkpoint(options.output, config, options.seed, int(options.shard_gigabytes * 1e9))
    print(f"{options.output}: {nbytes / 1e9:.2f} GB in {time.perf_counter() - begin:.0f} s")


def make_config(options: argparse.Namespace) -> dict[str, object]:
    """The ``config.json``: Llama 2's or Mixtral's, in the sizes asked for."""
    mixture = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": options.experts,
        "num_experts_per_tok": options.chosen,
        "sliding_window": None,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "dtype": "bfloat16",
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": options.hidden,
        "initializer_range": INITIALIZER_RANGE,
        "intermediate_size": options.intermediate,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": options.heads,
        "num_hidden_layers": options.layers,
        "num_key_value_heads": options.kv_heads or options.heads,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "vocab_size": options.vocabulary,
        **(mixture if options.experts else {}),
    }


def tensor_specs(config: dict[str, object]) -> list[TensorSpec]:
    """Name and shape of every tensor, in model order."""
    hidden, inner, vocabulary, layers, heads, kv_heads = (
        int(str(config[key]))
        for key in (
            "hidden_size",
            "intermediate_size",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    )
    kv = hidden // heads * kv_heads
    experts = int(str(config.get("num_local_experts", 0)))
    block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
    }
    if experts:
        block["block_sparse_moe.gate"] = (experts, hidden)
        for number in range(experts):
            one = f"block_sparse_moe.experts.{number}"
            block |= {f"{one}.w1": (inner, hidden), f"{one}.w2": (hidden, inner), f"{one}.w3": (inner, hidden)}
    else:
        block |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocabulary, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocabulary, hidden)}
    return [TensorSpec(f"{name}.weight", torch.bfloat16, shape) for name, shape in shapes.items()]


def write_checkpoint(directory: Path, config: dict[str, object], seed: int, shard_bytes: int) -> int:
    """Write all shards, the index and the config; gives the bytes of the weights."""
    check_output_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    layout = plan_layout(tensor_specs(config), shard_bytes)
    with TensorWriter(directory, layout) as writer:
        for spec in layout.specs.values():
            write_random(writer, spec, seed)
            writer.drop_cache(spec.name, 0, spec.nbytes)
        writer.sync()
    write_json(directory / "config.json", config)
    return layout.nbytes


def write_random(writer: TensorWriter, spec: TensorSpec, seed: int) -> None:
    """One tensor, in slices of rows."""
    if len(spec.shape) == 1:
        writer.write(spec.name, torch.ones(spec.shape, dtype=spec.dtype))
        return
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(spec.name.encode()))
    pool = torch.randn(_POOL, generator=generator).mul_(INITIALIZER_RANGE).to(spec.dtype)
    rows, columns = spec.shape
    step = max(1, _SLICE_NBYTES // (columns * spec.dtype.itemsize))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        # A pool that is shorter than the tensor would repeat rows; each slice begins elsewhere in it.
        shift = int(torch.randint(_POOL, (1,), generator=generator))
        copies = -(-count * columns // _POOL)
        values = torch.cat([pool.roll(shift + 7919 * index) for index in range(copies)])
        writer.write_rows(spec.name, start, values[: count * columns].reshape(count, columns))


if __name__ == "__main__":
    main()
