"""transformers, with whatever quantizer the config asks for."""

import json
from pathlib import Path

from job import read_job, run_transformers_model
from transformers import AutoModelForCausalLM, CompressedTensorsConfig


def options(directory):
    """compressed-tensors 0.20 prepares packed zero points in their unpacked shape, and then refuses what it reads."""
    declared = json.loads((Path(directory) / "config.json").read_text())["quantization_config"]
    groups = declared.get("config_groups", {}).values()
    if any(not group["weights"]["symmetric"] for group in groups):
        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


job = read_job()
for directory, path in job["models"].items():
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options(directory))
    run_transformers_model(model.eval(), job, path)
