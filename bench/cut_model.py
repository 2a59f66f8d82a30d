"""A model's first decoder blocks as a checkpoint of their own, for tools that take too long on all of them.

    python bench/cut_model.py SOURCE OUT --blocks 6

Embedding, last norm and head are the original's, and so is every remaining tensor to the byte; the config says how many
blocks there are. What such a model predicts is poor, but every tool is given the same, and how far an artifact's
predictions lie from it compares the tools. SOURCE is one file of safetensors in Hugging Face layout.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

_BLOCK = re.compile(r"model\.layers\.(\d+)\.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--blocks", type=int, default=6)
    options = parser.parse_args()
    config = json.loads((options.source / "config.json").read_text())
    if not 0 < options.blocks <= config["num_hidden_layers"]:
        raise SystemExit(f"{options.source} has {config['num_hidden_layers']} blocks")
    config["num_hidden_layers"] = options.blocks
    for listed in ("layer_types",):
        if listed in config:
            config[listed] = config[listed][: options.blocks]
    options.output.mkdir(parents=True)
    tensors = load_file(options.source / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if (found := _BLOCK.match(name)) is None or int(found[1]) < options.blocks
    }
    save_file(kept, options.output / "model.safetensors", metadata={"format": "pt"})
    (options.output / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (options.source / name).exists():
            shutil.copyfile(options.source / name, options.output / name)


if __name__ == "__main__":
    main()
