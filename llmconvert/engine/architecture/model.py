"""A transformers model without weights: its class on the ``meta`` device, and where its decoder blocks are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmconvert.engine.architecture.auto import language_classes
from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.engine.architecture.families import LINEARS
from llmconvert.errors import UnsupportedError

__all__ = [
    "build_meta_model",
    "find_blocks",
    "find_decoder",
    "find_linears",
    "fix_frequencies",
    "forget_lengths",
    "loaded_class",
    "main_blocks",
]


# A list with this share of the weights of all lists that text passes is the decoder's blocks.
_MOST_WEIGHTS = 0.9
_LONGEST_SEEN = "max_seq_len_cached"
_SETTINGS = "mend these settings in config.json, or install the transformers that the checkpoint was made with"


def loaded_class(config: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """The class that runtimes load a parsed ``config.json`` with: a decoder's, or the whole model's around one.

    It is the one that ``architectures`` names, where that is a language model of the same ``model_type``; otherwise
    the one that transformers' tables have for the type. None where they have none.
    """
    model_type, named = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return None
    found = _transformers_class(named[0]) if isinstance(named, list) and named else None
    if found is not None and found.config_class is CONFIG_MAPPING[model_type]:
        return found
    names = language_classes(config).values()
    return next((found for name in names if (found := _transformers_class(name)) is not None), None)


def _transformers_class(name: Any) -> type[PreTrainedModel] | None:
    """A class of a model that writes text, by its name."""
    found: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    written = isinstance(found, type) and issubclass(found, PreTrainedModel) and issubclass(found, GenerationMixin)
    return found if written else None


def build_meta_model(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The class of ``config`` that runtimes load, on the ``meta`` device, in evaluation mode.

    Args:
        config: of :func:`~llmconvert.engine.architecture.config.build_config`.
        dtype: of its parameters.
        attention: transformers' name of an implementation. ``sdpa`` is what it takes by itself, eager in the parts that
            have no such; others than these two are for the decoder alone.

    Raises:
        UnsupportedError: transformers has no such class, or it can't be built with these settings.
    """
    kind = config.model_type
    found = loaded_class({"model_type": kind, "architectures": config.architectures})
    if found is None:
        raise UnsupportedError(
            f"architecture {kind!r}: no class that transformers has for it writes one token after the other "
            f"(GenerationMixin), and only such models are run here; {WHOLE}"
        )
    config.use_cache = False
    chosen = {"attn_implementation": attention} if attention == "eager" else {}
    with foreign_settings(f"architecture {kind!r} cannot be built", _SETTINGS), torch.device("meta"):
        model = found._from_config(config, dtype=dtype, **chosen)
        if attention not in ("eager", "sdpa"):
            find_decoder(model).set_attn_implementation(attention)
    return model.eval()


def find_decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that the language model's config is for; the model itself if there is no such part."""
    config = model.config.get_text_config()
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part.config is config)
    return next(parts, model)


def find_linears(block: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The linear layers of a block, by their names inside it; nothing that only derives from one.

    GPT-2's ``Conv1D`` computes what a linear does, and holds its weight ``[inputs, outputs]``.
    """
    return {
        name: part
        for name, part in block.named_modules()
        if type(part) is Conv1D or (isinstance(part, nn.Linear) and type(part).__name__ in LINEARS)
    }


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


def find_blocks(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The lists that can be the one of decoder blocks, by their names in the model.

    They have as many modules as the config says, of the classes that the model declares as its blocks; in classes that
    declare none, or whose config counts another part's layers, all lists with weights that no other list holds can be.
    """
    count = Architecture.of(model.config).blocks
    kinds = set(model._no_split_modules or ())
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside and next(module.parameters(), None) is not None:
            lists[name] = module
    declared = {
        name: blocks
        for name, blocks in lists.items()
        if len(blocks) == count and all(type(block).__name__ in kinds for block in blocks)
    }
    return declared or lists


def main_blocks(model: PreTrainedModel, lists: Mapping[str, nn.ModuleList]) -> str:
    """The name of the list of decoder blocks: the one that holds nearly all of the weights of those that text passes.

    Args:
        model: for errors.
        lists: of :func:`find_blocks`, those that text passes.

    Raises:
        UnsupportedError: there is no such list.
    """
    weights = {name: sum(value.numel() for value in blocks.parameters()) for name, blocks in lists.items()}
    largest = max(weights, key=lambda name: weights[name], default=None)
    if largest is None or weights[largest] < _MOST_WEIGHTS * sum(weights.values()):
        found = ", ".join(f"{name} with {len(blocks)}" for name, blocks in lists.items()) or "none"
        raise UnsupportedError(
            f"architecture {model.config.model_type!r}: its layers are not one list of decoder blocks, and only such a "
            f"list can be run block by block; lists in {type(model).__name__} that text passes: {found}. {WHOLE}"
        )
    return largest
