"""What a reader of quantized checkpoints understands of their config and their tensors; it refuses the rest by name.

A key or a tensor that is passed over can change every weight: a column order, a rotation that runs with the model, a
second scale. So nothing is passed over. What says nothing of how weights are stored is listed as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint, TensorInfo
from llmconvert.storage.dense import holds_codes
from llmconvert.storage.parsing import parse_json

__all__ = ["Declared", "declared_quantization", "left_out", "spell", "without_quantization"]

#: Scales of a quantized key-value cache. No weight depends on them.
_CACHE_SCALES: Final = ("k_scale", "v_scale", "kv_scale", "k_zero_point", "v_zero_point")
# Where compressed-tensors kept these once: as what the outputs of two linears are quantized with.
_CACHED_LINEARS: Final = (".k_proj", ".v_proj")
_OUTPUTS: Final = ("output_scale", "output_zero_point")
# What formats of quantized weights call their parts. None may be left when every linear has its own.
_PARTS: Final = frozenset(
    (
        *(
            "qweight",
            "qzeros",
            "scales",
            "biases",
            "g_idx",
            "SCB",
            "absmax",
            "quant_map",
            "nested_absmax",
            "nested_quant_map",
        ),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_zero_point", "weight_g_idx", "weight_shape"),
        *("weight_global_scale", "weight_bitmask", "input_scale", "input_zero_point", "input_global_scale"),
        *("weight_scale_2", "activation_scale", "input_scale_ub", "qscale_weight", "qscale_act", "pre_quant_scale"),
        *(*_OUTPUTS, "q_scale", "q_zero_point", "prob_scale"),
    )
)
# Of experts' parameters these follow the name at once.
_ENDINGS: Final = ("_scale_inv", "_activation_scale", "_input_scale_ub")
# Files in which producers said once what config.json says now, the method they meant, and what their tensors end in.
_OLD_FILES: Final = {
    "quantize_config.json": ("gptq", ".qweight"),
    "quant_config.json": ("awq", ".qweight"),
    "hf_quant_config.json": ("modelopt", ".weight_scale"),
}
_KEY: Final = "quantization_config"
_MLX_KEY: Final = "quantization"
_UNSET: Final[Sequence[Any]] = (None, False, "", [], {})
_SHOWN = 80


class Declared(BaseModel):
    """Settings as a reader understands them; a subclass has a field for each.

    Keys that have neither a field nor a place in :attr:`silent` are refused, unless they are unset (null, false, zero,
    empty).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    #: Keys that say nothing of how weights are stored.
    silent: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _heard(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        told = {key: value for key, value in values.items() if key not in cls.silent}
        return {key: value for key, value in told.items() if key in cls.model_fields or value not in _UNSET}

    @classmethod
    def read(cls, declared: Mapping[str, Any], where: str = "quantization_config") -> Self:
        """Understand what ``config.json`` has at ``where``.

        Raises:
            UnsupportedError: there is a key that is not understood.
            CheckpointError: a value is of the wrong kind, or missing.
        """
        try:
            return cls.model_validate(declared)
        except ValidationError as error:
            found = error.errors()[0]
        path = ".".join((where, *map(str, found["loc"])))
        if found["type"] == "extra_forbidden":
            raise UnsupportedError(
                f"config.json: {path} is {spell(found['input'])}, and this reader does not know that key; the weights "
                "might be read wrongly. Dequantize the model with the library that wrote it, or remove the key if it "
                "says nothing of how they are stored"
            )
        given = "" if found["type"] == "missing" else f", found {spell(found['input'])}"
        raise CheckpointError(f"config.json: {path}: {found['msg'][:1].lower()}{found['msg'][1:]}{given}")


def spell(value: object) -> str:
    """A value of a config for an error, in one short line."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def declared_quantization(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What a checkpoint says of how it is quantized; None where it says nothing, and is dense.

    That is the ``quantization_config`` of ``config.json`` or of the language model in it, or a file of its own as
    AutoGPTQ, AutoAWQ and ModelOpt wrote it.

    Raises:
        CheckpointError: it is no JSON object.
    """
    declared, where = _of_config(checkpoint.config)
    for name, (method, ending) in _OLD_FILES.items() if not declared else ():
        # A file that was left beside a dense model says nothing of it.
        if name in checkpoint.files and any(tensor.endswith(ending) for tensor in checkpoint):
            where = name
            try:
                declared = parse_json(checkpoint.read_file(name))
            except (ValueError, OSError) as error:
                raise CheckpointError(f"{name}: cannot be read: {error}") from error
            if isinstance(declared, Mapping):
                told = declared.get("quantization", declared)
                declared = {"quant_method": method, **(told if isinstance(told, Mapping) else declared)}
            break
    if not declared:
        return None
    if not isinstance(declared, Mapping):
        raise CheckpointError(f"{where} holds a JSON {type(declared).__name__}, expected an object")
    return declared


def _of_config(config: Mapping[str, Any]) -> tuple[Any, str]:
    """What a config declares, itself or in a submodel, and where."""
    mlx = config.get(_MLX_KEY)
    if isinstance(mlx, Mapping) and mlx:  # mlx-lm names no method, and says the same in the usual place again
        return {"quant_method": "mlx", **mlx}, f"config.json: {_MLX_KEY}"
    for name, part in ((None, config), *((name, part) for name, part in config.items() if isinstance(part, Mapping))):
        if part.get(_KEY):
            return part[_KEY], f"config.json: {_KEY if name is None else f'{name}.{_KEY}'}"
    return None, f"config.json: {_KEY}"


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that declares no quantization, itself or in a submodel."""
    dense = {key: value for key, value in config.items() if key not in (_KEY, _MLX_KEY)}
    return {key: without_quantization(value) if isinstance(value, Mapping) else value for key, value in dense.items()}


def left_out(checkpoint: Checkpoint, owned: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    """Tensors of a quantized checkpoint that no weight depends on: the scales of its key-value cache.

    Args:
        checkpoint: as stored.
        owned: the quantized linears, and the tensors that each is made of.

    Raises:
        UnsupportedError: a tensor that looks like part of a quantized weight is part of none.
    """
    parts = {part for linear in owned.values() for part in linear}
    cached: list[str] = []
    for name, info in checkpoint.infos.items():
        if name in parts:
            continue
        module, _, leaf = name.rpartition(".")
        if leaf in _CACHE_SCALES or (leaf in _OUTPUTS and module.endswith(_CACHED_LINEARS)):
            cached.append(name)
        elif _is_part(info, module, leaf, owned):
            raise UnsupportedError(
                f"tensor {name!r} ({str(info.dtype).removeprefix('torch.')} {list(info.shape)}) looks like part of a "
                "quantized weight, and this reader does not know what it does there; dequantize the model with the "
                "library that wrote it"
            )
    return tuple(cached)


def _is_part(info: TensorInfo, module: str, leaf: str, owned: Mapping[str, Iterable[str]]) -> bool:
    beside = module in owned or module.removesuffix(".weight") in owned
    return (beside and leaf != "bias") or leaf in _PARTS or leaf.endswith(_ENDINGS) or holds_codes(info)
