"""How much of a model's blocks is in linears, which are what can be quantized one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from llmconvert.engine.experts import ExpertsSlot
from llmconvert.engine.sites import Site
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.scheme import Scheme

__all__ = ["check_coverage", "narrow_linears"]

# Tensors with more than two dimensions are experts of a layout that is not known, or a small part of a state space.
_HIGHER = 0.125
# Share of the weights that may stay dense unasked.
_NEXT_TO_NONE = 0.01
# What most weights may lie in besides, and what to do then.
_KNOWN: Mapping[str, str] = {
    "Conv1D": "which holds its weights transposed: compressed-tensors, with which transformers and vLLM read "
    "artifacts, packs Linear alone, and leaves these as they are even where a config names them. "
    "Use format: gguf, which llama.cpp reads",
}


def check_coverage(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    prefixes: Sequence[str],
    linears: Sequence[Mapping[str, nn.Module]],
) -> None:
    """Refuse a model with most weights outside linears: the artifact would look quantized and not be.

    Weights that several blocks share count as neither. Experts of a layout that is known count as linears.

    Args:
        model: on any device.
        blocks: of it.
        prefixes: what the names of each block's modules begin with.
        linears: of each block, by name.

    Raises:
        UnsupportedError: most weights of a block are elsewhere, or an eighth in tensors with more than two dimensions.
    """
    shared = {*model.all_tied_weights_keys, *model.all_tied_weights_keys.values()}
    for index, (block, prefix, inside) in enumerate(zip(blocks, prefixes, linears, strict=True)):
        others: dict[str, nn.Parameter] = {}
        for name, module in block.named_modules():
            if not isinstance(module, nn.Embedding | _ConvNd) and prefix + name not in inside:
                others |= {
                    f"{name}.{leaf}": value
                    for leaf, value in module.named_parameters(recurse=False)
                    if f"{prefix}{name}.{leaf}" not in shared
                }
        slots = [module for module in block.modules() if isinstance(module, ExpertsSlot)]
        quantized = sum(linear.get_parameter("weight").numel() for linear in inside.values())
        quantized += sum(slot.layout.count * slot.layout.numel for slot in slots)
        rest = sum(value.numel() for value in others.values())
        higher = sum(value.numel() for value in others.values() if sum(size > 1 for size in value.shape) > 2)
        if rest > quantized or higher > _HIGHER * (quantized + rest):
            largest = max(others, key=lambda name: others[name].numel())
            owner = type(block.get_submodule(largest.rpartition(".")[0])).__name__
            advice = _KNOWN.get(
                owner, "which is no layer of linears; convert can cast it to another dtype, and validate measure it"
            )
            raise UnsupportedError(
                f"architecture {model.config.model_type!r}: {rest / (quantized + rest):.0%} of the weights of block "
                f"{index} are not in linear layers, most of them in {owner} ({largest}), {advice}"
            )


def narrow_linears(sites: Mapping[str, Site], scheme: Scheme | Mapping[str, Scheme]) -> set[str]:
    """The linears with fewer columns than a group, where they have next to no weights: tables of coefficients."""
    size = scheme.group_size if isinstance(scheme, Scheme) else None
    linears = [site for site in sites.values() if site.kind == "linear"]
    found = {site.name: site.weights for site in linears if size is not None and site.columns < size}
    small = sum(found.values()) <= _NEXT_TO_NONE * sum(site.weights for site in sites.values())
    return set(found) if small else set()
