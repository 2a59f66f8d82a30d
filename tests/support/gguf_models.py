"""What a GGUF checkpoint computes in transformers, and with inputs rounded as llama.cpp does."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmconvert.gguf.checkpoint import GgufCheckpoint
from llmconvert.storage.checkpoint import Checkpoint

IDS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(1))


def built(checkpoint: Checkpoint) -> PreTrainedModel:
    """The transformers model that a checkpoint's config and tensors make."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**checkpoint.config)).float().eval()
    missing, unexpected = model.load_state_dict(
        {name: tensor.float() for name, tensor in checkpoint.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if checkpoint.config["tie_word_embeddings"] else set())
    model.tie_weights()
    return model


@torch.no_grad()
def next_token(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits[0, -1].float().log_softmax(-1)


def round_inputs(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Let a model's linears round their inputs as llama.cpp does before multiplying weights of each type."""
    assert isinstance(checkpoint, GgufCheckpoint)
    types = {name: checkpoint.type_of(name).upper() for name in checkpoint}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            stored = types.get(f"{name}.weight") or types["model.embed_tokens.weight"]
            module.register_forward_pre_hook(lambda _, values, stored=stored: (rounded(values[0], stored),))


def rounded(values: torch.Tensor, stored: str) -> torch.Tensor:
    floats = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if stored in floats:
        return values.to(floats[stored]).float()
    groups = values.reshape(*values.shape[:-1], -1, 256 if stored.endswith("K") else 32)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.round(groups / scale.clamp(min=1e-30))
    return (codes * (scale if stored.endswith("K") else scale.half().float())).reshape(values.shape)
