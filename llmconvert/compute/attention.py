"""Ways to attend on a processor that are faster than torch's own: in float32, in tiles, or with gradients in tiles.

Flash attention of torch multiplies small pieces through MKL. Without AMX that has no products of bfloat16: it converts,
and neither 16 bits nor the half of the scores that a causal model ignores save anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from llmconvert.compute.attention_gradient import attend, rows_of_tile

__all__ = ["Attention", "use_attention"]

#: ``float32``: computed in float32, a third faster where 16 bits gain nothing, and no worse. ``tiled``: the products of
#: whole tiles of scores, for processors that multiply bfloat16 well and have no AMX. ``trained``: as torch does, but
#: for gradients, which are faster in tiles.
Attention = Literal["float32", "tiled", "trained"]


def use_attention(model: PreTrainedModel, attention: Attention) -> None:
    """Let a model that attends by ``sdpa`` do so in another way.

    Models that attend in ways of their own are left alone.
    """
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():
        name = f"llmconvert_{attention}"
        AttentionInterface.register(name, _FORWARDS[attention])
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)


def _wide_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``[1, length, heads, head size]`` in the dtype of ``query``, computed in float32."""
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output, _ = sdpa_attention_forward(module, query.float(), key.float(), value.float(), attention_mask, **settings)
    return output.to(query.dtype), None


def _tiled_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention ``[1, length, heads, head size]``, a tile of queries after the other; anything else by sdpa.

    Scores and probabilities are rounded to the dtype of ``query``, as in a model that attends ``eager``.
    """
    if not _causal_alone(module, query, key, attention_mask, settings) or _learns(query, key, value):
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
        return output, None
    _, heads, length, size = query.shape
    groups, width = key.shape[1], value.shape[3]
    scaling = settings.get("scaling") or size**-0.5
    keys, values = key[0], value[0]
    queries = query[0].view(groups, heads // groups, length, size)
    output = query.new_empty((1, length, heads, width))
    rows = rows_of_tile(heads, length)
    later = query.new_full((rows, rows), -torch.inf).triu_(1)
    for start in range(0, length, rows):
        end = min(start + rows, length)
        tile = queries[:, :, start:end].reshape(groups, -1, size)
        scores = torch.baddbmm(tile.new_zeros(()), tile, keys[:, :end].mT, beta=0, alpha=scaling)
        scores.view(groups, -1, end - start, end)[..., start:] += later[: end - start, : end - start]
        attended = (scores.softmax(-1) @ values[:, :end]).view(groups, -1, end - start, width)
        output[0, start:end].view(end - start, groups, -1, width).copy_(attended.permute(2, 0, 1, 3))
    return output, None


def _trained_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Attention ``[batch, length, heads, head size]`` by sdpa, and where it is causal and learned through by tiles."""
    kind = query.device.type
    if kind == "cpu" and torch.is_autocast_enabled(kind):
        query, key, value = (part.to(torch.get_autocast_dtype(kind)) for part in (query, key, value))
    alike = query.dtype == torch.bfloat16 and key.dtype == value.dtype == query.dtype
    alike = alike and kind == "cpu" and query.shape[3] == value.shape[3]
    if alike and _causal_alone(module, query, key, attention_mask, settings) and _learns(query, key, value):
        scaling = settings.get("scaling") or query.shape[3] ** -0.5
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return output, None


def _causal_alone(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    settings: Mapping[str, Any],
) -> bool:
    """Whether a query attends to itself and all before it, and nothing else is asked for."""
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = attention_mask is None and not settings.get("dropout") and settings.get("position_bias") is None
    return bool(causal and plain and query.shape[2] == key.shape[2])


def _learns(*parts: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(part.requires_grad for part in parts)


_FORWARDS: dict[Attention, Callable[..., tuple[torch.Tensor, None]]] = {
    "float32": _wide_attention,
    "tiled": _tiled_attention,
    "trained": _trained_attention,
}
