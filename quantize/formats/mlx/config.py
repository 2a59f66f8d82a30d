"""What ``config.json`` says of MLX's quantized layers: width and group size of all, and of each that differs.

mlx-lm writes it twice, as ``quantization``, which it reads, and as ``quantization_config`` for the Hub. The entry of a
layer has the name of its module, and there is none for dense layers: which are quantized is told by their tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.reading import Declared, spell
from llmconvert.quantize.numbers import AFFINE
from llmconvert.quantize.scheme import Scheme

__all__ = ["BITS", "GROUPS", "read_schemes", "with_plain_rope", "written"]

#: What ``mx.quantize`` takes.
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_SETTINGS = ("group_size", "bits", "mode")


class _Settings(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(("quant_method",))

    group_size: int
    bits: int
    mode: str = "affine"


def written(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """What is declared of layers, by their names: the commonest scheme, and those of the others."""
    (common, _), *_ = Counter(schemes.values()).most_common()
    others = {name: _settings(scheme) for name, scheme in schemes.items() if scheme != common}
    return {**_settings(common), **others}


def with_plain_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """A ``config.json`` that says where mlx-lm looks for them what rotary positions are.

    transformers 5 writes them as ``rope_parameters``; most of mlx-lm's modules know ``rope_theta``, ``rope_scaling``
    and ``partial_rotary_factor`` alone, and take their defaults where these are missing.

    Raises:
        UnsupportedError: they differ between layers in a way that has no such names.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping) or not rope:
        return dict(config)
    told = dict(config)
    if not any(isinstance(value, Mapping) for value in rope.values()):
        if "partial_rotary_factor" in rope:
            told.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        _tell(told, rope, "rope_theta", "rope_scaling")
    elif rope.keys() == {"full_attention", "sliding_attention"}:
        _tell(told, rope["full_attention"], "rope_theta", "rope_scaling")
        _tell(told, rope["sliding_attention"], "rope_local_base_freq", None)
    else:
        raise UnsupportedError(
            f"config.json: rope_parameters are {spell(rope)}, by kind of layer; mlx-lm has no names for these here. "
            "Use format: compressed-tensors or gguf"
        )
    return told


def _tell(told: dict[str, Any], rope: Mapping[str, Any], theta: str, scaling: str | None) -> None:
    kind = rope.get("rope_type", "default")
    if "rope_theta" in rope:
        told.setdefault(theta, rope["rope_theta"])
    if kind == "default":
        return
    if scaling is None:
        raise UnsupportedError(
            f"config.json: rope_parameters scale local attention ({kind}); mlx-lm has no name for it. Use "
            "format: compressed-tensors or gguf"
        )
    told.setdefault(scaling, {key: value for key, value in rope.items() if key != "rope_theta"})


def read_schemes(declared: Mapping[str, Any]) -> tuple[Scheme, Mapping[str, Scheme | None]]:
    """The scheme of layers that have no entry of their own, and those of the others; None of one that is dense.

    Raises:
        UnsupportedError: a key or a mode of quantization that is not known here.
        CheckpointError: a value is missing, or of the wrong kind.
    """
    layers = {key: value for key, value in declared.items() if isinstance(value, Mapping | bool) and key != "mode"}
    usual = _scheme({key: value for key, value in declared.items() if key not in layers}, "quantization")
    return usual, {name: _of_layer(name, value, usual) for name, value in layers.items()}


def _of_layer(name: str, value: Mapping[str, Any] | bool, usual: Scheme) -> Scheme | None:
    if isinstance(value, bool):
        return usual if value else None
    return _scheme(value, f"quantization.{name}")


def _scheme(declared: Mapping[str, Any], where: str) -> Scheme:
    found = _Settings.read(declared, where)
    if found.mode != "affine":
        raise UnsupportedError(
            f"config.json: {where}.mode is {found.mode!r}; this reader knows affine weights. Dequantize the model with "
            "mlx_lm.convert --dequantize, or take the unquantized one"
        )
    if found.bits not in BITS or found.group_size not in GROUPS:
        raise CheckpointError(
            f"config.json: {where} says {found.bits} bits in groups of {found.group_size}; MLX has "
            f"{', '.join(map(str, BITS))} bits in groups of {', '.join(map(str, GROUPS))}"
        )
    return Scheme(replace(AFFINE, bits=found.bits), found.group_size)


def _settings(scheme: Scheme) -> dict[str, Any]:
    return dict(zip(_SETTINGS, (scheme.group_size, scheme.bits, "affine"), strict=True))
