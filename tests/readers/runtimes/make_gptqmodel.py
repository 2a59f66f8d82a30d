"""Artifacts of GPTQModel: a model quantized by it, and what its kernels in torch dequantize of it, loaded again.

    python make_gptqmodel.py JOB.json

``models`` maps directories to write to ``{"dense": path of the weights, "options": of the QuantizeConfig}``; ``source``
is the model.
"""

import torch
from dense import sample_ids, write_dense
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from job import read_job


def dense(linear):
    """Its weight ``[rows, columns]``, as its kernel in torch makes it."""
    if hasattr(linear, "dequantize_weight"):
        return linear.dequantize_weight().T
    return dequantize_gemm(linear.qweight, linear.qzeros, linear.scales, linear.bits, linear.group_size).T


job = read_job()
ids = sample_ids(job["vocabulary"], 64, 16)
for directory, asked in job["models"].items():
    options = asked["options"]
    model = GPTQModel.load(job["source"], QuantizeConfig(**options), device="cpu")
    model.quantize(ids, batch_size=4)
    model.save(directory)
    backend = BACKEND.TORCH_AWQ if options.get("quant_method") == "awq" else BACKEND.GPTQ_TORCH
    # In float16, as the scales are stored: in bfloat16 it would round them.
    loaded = GPTQModel.load(directory, device="cpu", backend=backend, dtype=torch.float16).model
    linears = {name: module for name, module in loaded.named_modules() if name.endswith("_proj")}
    write_dense(asked["dense"], {f"{name}.weight": dense(linear) for name, linear in linears.items()})
