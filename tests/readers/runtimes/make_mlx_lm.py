"""``mlx_lm.convert -q`` as it is called from Python, and what MLX dequantizes of its layers, in float32.

    python make_mlx_lm.py JOB.json

with ``{"source": directory, "models": {directory: {"dense": file to write without its ending, "options": …}}}``.
"""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from job import read_job
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

job = read_job()
mx.set_default_device(mx.cpu)
for path, asked in job["models"].items():
    convert(job["source"], path, quantize=True, **asked["options"])
    model, _ = load_model(Path(path))
    dense = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            floats = (layer[part].astype(mx.float32) for part in ("scales", "biases"))
            dense[f"{name}.weight"] = mx.dequantize(layer["weight"], *floats, layer.group_size, layer.bits)
    mx.save_safetensors(asked["dense"], dense)
