"""A transformers model without weights: its class on the ``meta`` device, and where its decoder blocks are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel

from llmconvert.engine.architecture.boundary import foreign_settings
from llmconvert.engine.architecture.config import read_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.families import LINEARS
from llmconvert.errors import UnsupportedError

__all__ = [
    "build_meta_model",
    "find_blocks",
    "find_linears",
    "fix_frequencies",
    "forget_lengths",
    "served_class",
    "served_model",
]

_LONGEST_SEEN = "max_seq_len_cached"


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The causal-LM class of ``config`` on the ``meta`` device, in evaluation mode.

    Args:
        config: of :func:`~llmconvert.engine.architecture.config.build_config`.
        dtype: of its parameters.
        attention: transformers' name of an implementation; eager takes its place where the class has no such.

    Raises:
        UnsupportedError: the class can't be built with these settings.
    """
    config.use_cache = False
    with foreign_settings(f"architecture {config.model_type!r} cannot be built"), torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        except ValueError as error:
            if attention == "eager" or "attention" not in str(error):
                raise
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    return model.eval()


def served_class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class that ``architectures`` of a parsed ``config.json`` names, which runtimes load.

    None for one without a language model's head, of another ``model_type``, or that transformers doesn't have.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    generates = isinstance(found, type) and issubclass(found, PreTrainedModel) and issubclass(found, GenerationMixin)
    model_type = config.get("model_type")
    if not generates or model_type not in CONFIG_MAPPING:
        return None
    served: type[PreTrainedModel] = found
    return served if CONFIG_MAPPING[model_type] is served.config_class else None


def served_model(config: Mapping[str, Any]) -> PreTrainedModel | None:
    """A model of :func:`served_class` on the ``meta`` device: beside the language model it may hold a vision tower.

    None where there is no such class, or it can't be built.
    """
    found = served_class(config)
    if found is None:
        return None
    try:
        with foreign_settings(f"architecture {found.__name__} cannot be built"), torch.device("meta"):
            return found(read_config(config))
    except UnsupportedError:
        return None


def find_linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a block, by their names inside it; nothing that only derives from one."""
    found = block.named_modules()
    return {name: part for name, part in found if isinstance(part, nn.Linear) and type(part).__name__ in LINEARS}


def fix_frequencies(model: PreTrainedModel) -> None:
    """Let rotary embeddings keep the frequencies that they have, however long the input.

    Dynamic scaling takes them from the longest position, a value; shapes don't depend on it. For models without data.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = "default"
        elif isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")


def forget_lengths(model: PreTrainedModel) -> None:
    """Let rotary embeddings with dynamic scaling take the frequencies of each input from its own length, from now on.

    As transformers has them they go on with those of the longest input so far, so that numbers depend on what came
    before, and with the order in which batches pass the blocks.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if any("dynamic" in kind for kind in (kinds.values() if isinstance(kinds, dict) else [kinds or ""])):
            module.register_forward_pre_hook(_forget_length)


def _forget_length(module: nn.Module, args: tuple[Any, ...]) -> None:
    for name in [name for name in vars(module) if name.endswith(_LONGEST_SEEN)]:
        frequencies = name.removesuffix(_LONGEST_SEEN)
        setattr(module, name, module.original_max_seq_len)
        setattr(module, f"{frequencies}inv_freq", getattr(module, f"{frequencies}original_inv_freq"))


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder blocks, and its name in the model.

    Raises:
        UnsupportedError: there is not exactly one list of as many blocks as the config says.
    """
    count = Architecture.of(model.config).layers
    kinds = set(model._no_split_modules or ())
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and all(type(block).__name__ in kinds for block in module)
    ]
    if len(found) != 1:
        raise UnsupportedError(
            f"architecture {model.config.model_type!r}: expected one list of {count} decoder blocks "
            f"({', '.join(sorted(kinds)) or 'none declared'}), found {len(found)}; the streaming engine cannot run it"
        )
    return found[0]
