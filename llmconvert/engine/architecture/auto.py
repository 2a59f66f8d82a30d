"""transformers' tables of classes that write text: which one a ``config.json`` is for, and by which name it is loaded.

transformers is loaded when a table is asked for, not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["auto_class", "has_parts", "language_classes"]

_CAUSAL = "AutoModelForCausalLM"
_WHOLE = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")


def has_parts(config: Mapping[str, Any]) -> bool:
    """Whether a parsed ``config.json`` is of a model with parts: a decoder, and towers for images or sound.

    What some families put into a config of its own, the settings of their attention for one, is no model.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    parts = CONFIG_MAPPING[model_type].sub_configs.values()
    return any(part is AutoConfig or part.model_type in CONFIG_MAPPING for part in parts)


def language_classes(config: Mapping[str, Any]) -> Mapping[str, str]:
    """transformers' automatic class → the one that it loads a ``model_type`` with.

    Of a model with parts the classes of the whole come first. A decoder taken out of such a model may have a class that
    no automatic one knows: it is the one that ``architectures`` names, for that type, and stands for itself.
    """
    from transformers.models.auto import modeling_auto as auto

    tables = {
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForMultimodalLM": auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        _CAUSAL: auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    }
    order = (*_WHOLE, _CAUSAL) if has_parts(config) else (_CAUSAL, *_WHOLE)
    model_type = config.get("model_type")
    found = {name: str(tables[name][model_type]) for name in order if model_type in tables[name]}
    return found or _own_class(config)


def _own_class(config: Mapping[str, Any]) -> Mapping[str, str]:
    """The class that ``architectures`` names, if it is of the ``model_type`` and writes text."""
    import transformers
    from transformers import CONFIG_MAPPING, GenerationMixin

    model_type, named = config.get("model_type"), config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None
    found: Any = getattr(transformers, name, None) if name is not None and model_type in CONFIG_MAPPING else None
    if name is None or not isinstance(found, type) or not issubclass(found, GenerationMixin):
        return {}
    return {name: name} if getattr(found, "config_class", None) is CONFIG_MAPPING[model_type] else {}


def auto_class(config: Mapping[str, Any]) -> str:
    """The automatic class that loads what a parsed ``config.json`` names under ``architectures``."""
    found, named = language_classes(config), config.get("architectures")
    wanted = named[0] if isinstance(named, list) and named else None
    exact = (name for name in (_CAUSAL, *_WHOLE) if found.get(name) == wanted)
    return next(exact, None) or next(iter(found), _CAUSAL)
