"""SmolLM2-135M as a model of width 768 that computes the same: every linear then has a multiple of 256 columns.

    python bench/wide_model.py SOURCE OUT

GGUF's K types (super-blocks of 256) and groups of 128 don't fit the original's 576 columns, and its linears lie on the
4-bit lattice of the file that they came from. Here the residual stream is padded with zeros to 768 and turned by a
seeded random orthogonal matrix, which is folded into the weights; norms' gains are folded into the linears behind them,
and the output head gets a matrix of its own. Heads grow from 9 to 12 (3 key-value heads to 4) by heads that output
nothing. So all weights are off the lattice, perplexity is the original's up to bfloat16, and a method's gain can't come
from the lattice. SOURCE is the bf16 checkpoint in Hugging Face layout that ``llmconvert convert`` makes of the GGUF.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WIDTH, HEADS, KV_HEADS, SEED = 768, 12, 4, 0


def main(source: Path, out: Path) -> None:
    out.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    old = config["hidden_size"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or old // heads
    weights = {name: tensor.double() for name, tensor in load_file(source / "model.safetensors").items()}
    generator = torch.Generator().manual_seed(SEED)
    turn, upper = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.double))
    turn = (turn * upper.diagonal().sign())[:old]  # [old, WIDTH], orthonormal rows: pads and turns at once
    gain = (old / WIDTH) ** 0.5  # the mean square is now over WIDTH values
    result: dict[str, torch.Tensor] = {}

    def reads(name: str, norm: torch.Tensor) -> torch.Tensor:
        """A linear behind a norm: takes over the norm's gain, reads the turned stream."""
        return (weights[name] * norm) @ turn

    def grow(matrix: torch.Tensor, count: int, dim: int) -> torch.Tensor:
        """More heads, which are zero."""
        shape = list(matrix.shape)
        shape[dim] = count * size - shape[dim]
        return torch.cat([matrix, matrix.new_zeros(shape)], dim)

    result["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ turn
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        norm = weights[prefix + "input_layernorm.weight"]
        for part, count in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            name = f"{prefix}self_attn.{part}_proj.weight"
            result[name] = grow(reads(name, norm), count, 0)
        name = prefix + "self_attn.o_proj.weight"
        result[name] = grow(turn.T @ weights[name], HEADS, 1)
        norm = weights[prefix + "post_attention_layernorm.weight"]
        for part in ("gate", "up"):
            name = f"{prefix}mlp.{part}_proj.weight"
            result[name] = reads(name, norm)
        name = prefix + "mlp.down_proj.weight"
        result[name] = turn.T @ weights[name]
        for part in ("input_layernorm", "post_attention_layernorm"):
            result[f"{prefix}{part}.weight"] = torch.full((WIDTH,), gain, dtype=torch.double)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    result["lm_head.weight"] = (head * weights["model.norm.weight"]) @ turn
    result["model.norm.weight"] = torch.full((WIDTH,), gain, dtype=torch.double)
    save_file(
        {k: v.to(torch.bfloat16).contiguous() for k, v in result.items()}, out / "model.safetensors", {"format": "pt"}
    )
    config.update(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=size,
        tie_word_embeddings=False,
        rms_norm_eps=config["rms_norm_eps"] * old / WIDTH,
        dtype="bfloat16",
    )
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2))
    for path in source.iterdir():
        if path.name != "config.json" and path.suffix in (".json", ".jinja") and "safetensors" not in path.name:
            shutil.copy(path, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
