"""``config.json`` on its way into transformers' config classes and back: the only place where one is built or changed.

transformers is loaded when a config is built, not before.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from llmconvert.engine.architecture.auto import language_classes
from llmconvert.engine.architecture.boundary import WHOLE, foreign_settings
from llmconvert.engine.architecture.families import CONTEXT, QUIRKS, Quirks
from llmconvert.engine.architecture.settings import check_counts, check_settings
from llmconvert.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "build_config",
    "declared_class",
    "declared_dtype",
    "declared_number",
    "declares_tied_embeddings",
    "language_model",
    "read_config",
    "with_kv_heads",
    "with_rope",
    "with_size",
    "with_split_embeddings",
]

_PARTS = ("text_config",)
_TIED = "tie_word_embeddings"
_FLOAT, _FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")
_LAYERS, _VOCABULARY = "num_hidden_layers", "vocab_size"


def language_model(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a parsed ``config.json``, as it is written; the whole where there are no parts."""
    parts = (config.get(name) for name in _PARTS)
    return next((part for part in parts if isinstance(part, Mapping)), config)


def read_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config object of a parsed ``config.json``, of any model; ``config`` stays as it is.

    Raises:
        UnsupportedError: unknown ``model_type``, remote code, or settings that the config's class refuses.
        CheckpointError: settings that no model can have.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type is None:
        raise UnsupportedError(
            "config.json says no model_type, which every model of transformers has; is it that of another library's, "
            "or of a part of one?"
        )
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        remote = "; it needs code from its repository, which is never run" if "auto_map" in config else ""
        remote += "; a newer transformers may know it (pip install -U transformers)"
        raise UnsupportedError(f"architecture {model_type!r} is not known to the installed transformers{remote}")
    check_counts(config)
    # The classes complete nested settings in place.
    values = copy.deepcopy({key: value for key, value in config.items() if key != "quantization_config"})
    with foreign_settings(f"config.json: model type {model_type!r}"):
        built: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(_with_floats(values))
        check_settings(built.get_text_config().to_dict())
    return built


def _with_floats(value: Any) -> Any:
    """``value`` with the floats that JSON lacks, which transformers writes as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if value.keys() == {_FLOAT} and value[_FLOAT] in _FLOATS:
            return float(value[_FLOAT])
        return {key: _with_floats(part) for key, part in value.items()}
    return [_with_floats(part) for part in value] if isinstance(value, list) else value


def build_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """The transformers config object of a decoder that the engine may run, or of a model around one.

    Raises:
        UnsupportedError: as :func:`read_config`; no language model's class, or an encoder-decoder.
    """
    built = read_config(config)
    model_type = config["model_type"]
    if not language_classes(config):
        raise UnsupportedError(
            f"architecture {model_type!r} has no causal language model in transformers: no class of it writes text "
            f"from text; {WHOLE}"
        )
    if built.is_encoder_decoder or built.get_text_config().is_encoder_decoder:
        raise UnsupportedError(
            f"architecture {model_type!r} is an encoder-decoder; only decoders can be streamed, whose blocks follow "
            f"each other; {WHOLE}"
        )
    return built


def declared_number(config: Mapping[str, Any], name: str) -> int | None:
    """A number of the language model as a parsed ``config.json`` states it; None if it doesn't."""
    value = language_model(config).get(name)
    return value if isinstance(value, int) else None


def declared_class(config: Mapping[str, Any]) -> str | None:
    """transformers' class that a parsed ``config.json`` names first under ``architectures``; None if it names none."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a parsed ``config.json`` states, of the whole or of the language model, as it is spelled there."""
    stated = [part.get(key) for part in (config, language_model(config)) for key in ("dtype", "torch_dtype")]
    return next((str(value) for value in stated if value), None)


def declares_tied_embeddings(config: Mapping[str, Any]) -> bool | None:
    """Whether a parsed ``config.json`` says that input and output embedding are one; None if it doesn't say."""
    tied = config.get(_TIED)
    return tied if isinstance(tied, bool) else None


def with_split_embeddings(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` of the same model with an output embedding of its own."""
    text = language_model(config)
    parts = {key: {**part, _TIED: False} for key, part in config.items() if part is text and _TIED in text}
    return {**config, **parts, _TIED: False}


def with_kv_heads(config: Mapping[str, Any], kv_heads: int) -> dict[str, Any]:
    """``config`` declaring ``kv_heads`` key-value heads."""
    quirks = QUIRKS.get(str(config.get("model_type")), Quirks())
    if quirks.multi_query and not (quirks.grouped_by and config.get(quirks.grouped_by)):
        return {**config, "multi_query": True}  # one key-value head is all that these layouts can have
    return {**config, quirks.kv_heads: kv_heads}


def with_rope(config: Mapping[str, Any], parameters: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    """``config`` with other RoPE parameters, and with ``context`` as its longest input unless that stays."""
    changed = copy.deepcopy(dict(config))
    part = cast("dict[str, Any]", language_model(changed))
    part.pop("rope_scaling", None)
    part["rope_parameters"] = dict(parameters)
    if context is not None:
        part[CONTEXT] = context
    return changed


def with_size(config: Mapping[str, Any], depth: int, *, layers: int, vocabulary: int) -> dict[str, Any]:
    """``config`` of the first ``layers`` of a model of ``depth``, with ``vocabulary`` tokens and no special ones."""
    small: dict[str, Any] = {
        key: value[:layers] if isinstance(value, list) and len(value) == depth else value
        for key, value in config.items()
    }
    small |= {_LAYERS: min(layers, depth), _VOCABULARY: vocabulary}
    return small | {key: None for key in config if key.endswith("_token_id")}
