"""Artifacts of llm-compressor, and what compressed-tensors decompresses them to in transformers.

    python make_llmcompressor.py JOB.json

``models`` maps directories to write to ``{"dense": path of the weights, "options": of the GPTQModifier}``;
``source`` is the model.
"""

from datasets import Dataset
from dense import sample_ids, write_dense
from job import read_job
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

job = read_job()
rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sample_ids(job["vocabulary"], 64, 16)]
for directory, asked in job["models"].items():
    model = AutoModelForCausalLM.from_pretrained(job["source"], dtype="auto")
    oneshot(
        model=model,
        dataset=DataLoader(Dataset.from_list(rows).with_format("torch"), batch_size=1),
        recipe=GPTQModifier(ignore=["lm_head"], **asked["options"]),
        max_seq_length=64,
        num_calibration_samples=len(rows),
    )
    model.save_pretrained(directory, save_compressed=True)
    config = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", quantization_config=config)
    weights = {name: value for name, value in loaded.state_dict().items() if name.endswith("_proj.weight")}
    write_dense(asked["dense"], weights)
