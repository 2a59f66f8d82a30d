"""The dense weights that a tool itself makes of what it quantized."""

import json
from pathlib import Path

import torch
from job import versions
from safetensors.torch import save_file


def write_dense(path, weights):
    """Weight name → ``[rows, columns]``, into ``PATH.safetensors``, with versions beside it."""
    save_file({name: weight.detach().contiguous() for name, weight in weights.items()}, f"{path}.safetensors")
    Path(f"{path}.json").write_text(json.dumps(versions()))


def sample_ids(vocabulary, length, count):
    """Windows to calibrate on."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (count, length), generator=generator).tolist()
