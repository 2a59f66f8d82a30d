"""What a GGUF checkpoint computes in transformers."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from llmconvert.checkpoint import Checkpoint

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
