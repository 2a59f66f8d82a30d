"""A command's options as the recipe that says the same: names, defaults and refusals are those of recipe files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmconvert.errors import UsageError
from llmconvert.quantize.catalog.formats import require_format
from llmconvert.quantize.catalog.methods import require_method, usual_method
from llmconvert.recipes.consistency import KeyPath
from llmconvert.recipes.loading import make_recipe
from llmconvert.recipes.schema.recipe import Recipe

__all__ = ["convert_recipe", "quantize_recipe", "validate_recipe"]

# Where each option stands in a recipe.
_CALIBRATE = {
    "calibration": "calibrate.dataset",
    **{name: f"calibrate.{name}" for name in ("samples", "length", "order", "seed")},
}
_EVERYWHERE = {name: name for name in ("model", "adapter", "allow_pickle", "device", "stream")}
_CONVERT = {
    **_EVERYWHERE,
    **{name: f"convert.{name}" for name in ("dtype", "overflow", "rope_scaling")},
    "kv_heads": "attention.kv_heads",
    "gqa_method": "attention.method",
    "refit": "attention.refit",
    "heal_steps": "attention.heal.steps",
    "heal_length": "attention.heal.length",
    "heal_train": "attention.heal.train",
    **_CALIBRATE,
}
#: Options that a command takes one by one, and hands on together.
_SPELT = {"overrides": "override"}
_QUANTIZE = {
    **_EVERYWHERE,
    **{name: f"quantize.{name}" for name in ("method", "scheme", "format", "overrides", "rotate")},
    "imatrix": "quantize.options.file",
    "split_max_size": "quantize.split_max_size",
    "experts": "quantize.experts",
    "min_tokens_per_expert": "quantize.min_tokens_per_expert",
    "preset": "preset",
    "distil_steps": "quantize.distil.steps",
    "distil_length": "quantize.distil.length",
    "kv_cache": "quantize.kv_cache",
    "runtime": "quantize.runtime",
    "requantize": "requantize",
    "bits_per_weight": "quantize.budget.bits_per_weight",
    "dtype": "convert.dtype",
    "memory": "memory",
    **_CALIBRATE,
}
_VALIDATE = {
    "model": "model",
    "device": "device",
    "text": "validate.perplexity.dataset",
    **{name: f"validate.perplexity.{name}" for name in ("window", "stride", "max_windows", "max_increase")},
    **{name: f"validate.{name}" for name in ("max_kl", "min_top1", "max_saturated", "activations", "max_bytes")},
    **{name: f"validate.{name}" for name in ("generation", "positions", "memory")},
    "min_agreement": "validate.generation.min_agreement",
    "tasks": "validate.tasks.names",
    "task_samples": "validate.tasks.samples",
    "attention": "validate.attention.backends",
    "attention_lengths": "validate.attention.lengths",
    "positions_window": "validate.positions.window",
    "serve": "validate.serve.runtimes",
}
# Options that are off unless they are given.
_SWITCHES = ("allow_pickle", "stream", "requantize", "rotate", "generation", "positions", "memory")
_KEYS = {"convert": _CONVERT, "quantize": _QUANTIZE, "validate": _VALIDATE}


# Tokens per window of healing and distillation, where those of the calibration text are not fewer.
_LESSON_LENGTH = 512


def convert_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of ``convert``; see :func:`_recipe_of`."""
    length = _lesson_length(options["length"], options["heal_steps"])
    return _recipe_of("convert", {**options, "calibration": _mix(options["calibration"]), "heal_length": length})


def quantize_recipe(options: Mapping[str, Any], output: Path) -> Recipe:
    """The recipe of ``quantize``, with what can be only one thing; see :func:`_recipe_of`.

    Raises:
        UsageError: neither scheme nor budget is given.
        RecipeError: naming the option.
    """
    scheme, calibration, format = options["scheme"], options["calibration"], options["format"]
    imatrix = options["imatrix"]
    preset = options["preset"]
    if preset is None and scheme is None and options["bits_per_weight"] is None:
        if options["method"] is not None:
            require_method(options["method"])
        if format is not None:
            require_format(format)
        if options["method"] is not None or output.suffix == ".gguf" or format is not None:
            raise UsageError(
                "give a scheme, bits per weight (--bits-per-weight) to have schemes chosen by layer, or a preset "
                "(--preset balanced)"
            )
        preset = "balanced"
    usual = None if preset is not None else usual_method(scheme, text=calibration is not None)
    if imatrix:
        usual = "imatrix"
    given = {
        "preset": preset,
        "method": options["method"] or usual,
        "imatrix": None if imatrix is None else str(imatrix),
        "format": "gguf" if format is None and output.suffix == ".gguf" else format,
        "calibration": _mix(calibration),
        "overrides": _overrides(options["overrides"]),
        "distil_length": _lesson_length(options["length"], options["distil_steps"]),
    }
    return _recipe_of("quantize", {**options, **given})


def validate_recipe(options: Mapping[str, Any]) -> Recipe:
    """The recipe of ``validate``; see :func:`_recipe_of`.

    Raises:
        UsageError: prompts of some lengths, and nothing to compare on them.
        RecipeError: naming the option.
    """
    if options["attention_lengths"] and not options["attention"]:
        raise UsageError("--attention-lengths goes with --attention")
    return _recipe_of("validate", options)


def _lesson_length(length: int | None, steps: int | None) -> int | None:
    """Tokens per window of a training; None for the usual number, or where there is no training."""
    return length if steps and length is not None and length < _LESSON_LENGTH else None


def _mix(calibration: Any) -> Any:
    """Datasets with shares as a recipe lists them."""
    if isinstance(calibration, Mapping):
        return [{"name": name, "share": share} for name, share in calibration.items()]
    return calibration


def _overrides(overrides: Mapping[str, str] | None) -> list[dict[str, str]] | None:
    """The recipe's list; none of none, so that a format that has no overrides is not asked for any."""
    return [{"match": pattern, "scheme": scheme} for pattern, scheme in overrides.items()] if overrides else None


def _recipe_of(command: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe that a command's options describe.

    Each is put at its key, its section made if need be: an option whose section lacks what it needs is thereby refused
    like the recipe that says the same. Options that were not given are left out, so that the recipe's defaults are the
    only ones: None, and switches that are off.

    Args:
        command: ``convert``, ``quantize`` or ``validate``.
        options: by name; others than the command's are left alone.

    Raises:
        RecipeError: naming the option.
    """
    keys = _KEYS[command]
    values: dict[str, Any] = {"validate": {}} if command == "validate" else {}
    for option, key in keys.items():
        value = options[option]
        if value is None or (value is False and option in _SWITCHES) or value in ((), []):
            continue
        *path, last = key.split(".")
        section = values
        for part in path:
            if not isinstance(section.get(part), dict):  # missing, or a switch that is on
                section[part] = {}
            section = section[part]
        if not (value is True and isinstance(section.get(last), dict)):
            section[last] = _plain(value)
    names: dict[KeyPath, str] = {
        tuple(key.split(".")): f"--{_SPELT.get(name, name).replace('_', '-')}" for name, key in keys.items()
    }
    return make_recipe(values, command, options=names)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
