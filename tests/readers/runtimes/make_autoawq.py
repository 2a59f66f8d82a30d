"""Artifacts of AutoAWQ, quantized on CPU, and what it dequantizes of its own linears.

    python make_autoawq.py JOB.json

``models`` maps directories to write to ``{"dense": path of the weights, "options": of the quant_config}``;
``source`` is the model.
"""

from awq import AutoAWQForCausalLM
from awq.modules.linear.gemm import WQLinear_GEMM
from awq.utils.packing_utils import dequantize_gemm
from dense import sample_ids, write_dense
from job import read_job

job = read_job()
for directory, asked in job["models"].items():
    model = AutoAWQForCausalLM.from_pretrained(job["source"], device_map="cpu", safetensors=True)
    model.quantize(None, quant_config=asked["options"], calib_data=sample_ids(job["vocabulary"], 512, 4))
    model.save_quantized(directory)
    weights = {}
    for name, module in model.model.named_modules():
        if isinstance(module, WQLinear_GEMM):
            parts = (module.qweight, module.qzeros, module.scales)
            weights[f"{name}.weight"] = dequantize_gemm(*parts, module.w_bit, module.group_size).T
    write_dense(asked["dense"], weights)
