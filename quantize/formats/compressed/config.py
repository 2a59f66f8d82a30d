"""The ``quantization_config`` of compressed-tensors, both ways: groups of linears and their schemes."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import Field

from llmconvert.compute.activations import InputKind
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.compressed.numbers import Numbers, Word, activation_args, weight_args, weight_scheme
from llmconvert.quantize.formats.reading import Declared, spell
from llmconvert.quantize.numbers import E4M3, MXFP4, MXFP8, NVFP4, Number
from llmconvert.quantize.scheme import Scheme

__all__ = ["Config", "Group", "has_zero_points", "read_config", "stored_layout", "written_config"]

_WHERE = "quantization_config"
_MXFP4 = "mxfp4-pack-quantized"
_LAYOUTS = (
    *("pack-quantized", "int-quantized", "float-quantized"),
    *("nvfp4-pack-quantized", _MXFP4, "mxfp8-quantized"),
)
# Of the library, and the first that wrote E8M0 as it is defined (its pull request 538).
_VERSION, _RIGHT_EXPONENTS = re.compile(r"(\d+)\.(\d+)"), (0, 14)
# "naive-quantized" is what a version of the library called the two unpacked ones; "dense" is what was decompressed.
_READ = (*_LAYOUTS, "naive-quantized", "mixed-precision", "dense")
_BY_NUMBER: Mapping[Number, str] = {
    E4M3: "float-quantized",
    NVFP4: "nvfp4-pack-quantized",
    MXFP4: _MXFP4,
    MXFP8: "mxfp8-quantized",
}
_CLASS = "Linear"
_PATTERN = "re:"
_EXPERT = re.compile(r"\.experts\.\d+\.")
_EXPERTS = rf"{_PATTERN}.*{_EXPERT.pattern}"
_LAYER_OF_EXPERTS = ".experts"
# Of a rotation: fused into the weights, so that nothing is left of it. All other places turn what the model computes.
_FUSED = ("weight_input", "weight_output")


class _Group(Declared):
    targets: list[str]
    weights: Numbers | None = None
    input_activations: Numbers | None = None
    output_activations: Numbers | None = None
    format: str | None = None


class _Rotated(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(("ignore", "inverse"))

    targets: tuple[str, ...] | str = ()
    location: Word = ""


class _Rotation(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(("type", "randomize", "requires_grad", "head_dim", "precision"))

    apply: tuple[_Rotated, ...] = ()


class _Rotations(Declared):
    config_groups: dict[str, _Rotation] = Field(default_factory=dict)


class _Sparsity(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(
        ("registry_requires_subclass", "targets", "ignore", "global_sparsity", "sparsity_structure")
    )

    format: str = "dense"


class _Config(Declared):
    silent: ClassVar[frozenset[str]] = frozenset(
        (
            *("quant_method", "global_compression_ratio", "kv_cache_scheme"),
            # Of transformers, which writes how it was asked to load.
            *("run_compressed", "dequantize", "use_optimized_inference"),
        )
    )

    config_groups: dict[str, _Group]
    format: str | None = None
    version: str | None = None
    quantization_status: Word = "initialized"
    ignore: list[str] | None = None
    sparsity_config: _Sparsity | None = None
    transform_config: _Rotations | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """A config group: the linears it names, by pattern or by class, and their scheme.

    Attributes:
        ordered: whether each linear has the group of every column beside it (``weight_g_idx``).
        inputs: how inputs are quantized while the model runs: a kind, or words for what nothing here does; None if they
            are not.
    """

    targets: tuple[str, ...]
    scheme: Scheme
    ordered: bool
    inputs: InputKind | str | None = None

    @property
    def input_kind(self) -> InputKind | None:
        """How inputs are quantized, where evaluation does it."""
        return self.inputs if isinstance(self.inputs, InputKind) else None

    @property
    def unmeasured(self) -> str:
        """How they are where nothing here does that; "" otherwise."""
        return self.inputs if isinstance(self.inputs, str) else ""

    def names(self, linear: str) -> bool:
        """Whether the group names a linear. A checkpoint's names may lack the prefix that its modules' names have."""
        return any(
            re.match(target.removeprefix(_PATTERN), linear) is not None
            if target.startswith(_PATTERN)
            else target == linear or target.endswith(f".{linear}")
            for target in self.targets
        )


@dataclass(frozen=True, slots=True)
class Config:
    """A config as it is understood.

    Attributes:
        groups: in their order.
        status: of the weights: ``decompressed`` ones are dense again, and have their scales beside them.
    """

    groups: tuple[Group, ...]
    status: str

    @property
    def decompressed(self) -> bool:
        """Whether dense weights with scales beside them have their final values."""
        return self.status == "decompressed"

    def group_of(self, linear: str) -> Group:
        """The group of a linear. Names and patterns come before classes, as in every reader of the format.

        Raises:
            CheckpointError: there is none.
        """
        named = (group for group in self.groups if group.names(linear))
        classed = (group for group in self.groups if _CLASS in group.targets)
        found = next(named, None) or next(classed, None)
        if found is None:
            raise CheckpointError(f"linear {linear!r} is stored quantized, but no config group of config.json names it")
        return found


def read_config(declared: Mapping[str, Any]) -> Config:
    """Understand a config, whoever wrote it.

    Raises:
        UnsupportedError: something in it is not understood, or is and can't be read: by name.
        CheckpointError: a value is of the wrong kind, or missing.
    """
    found = _Config.read(declared)
    for layout in (found.format, *(group.format for group in found.config_groups.values())):
        if layout is not None and layout not in _READ:
            raise UnsupportedError(
                f"config.json: compressed-tensors format {spell(layout)}; this reader knows {', '.join(_LAYOUTS)}"
            )
    version = _VERSION.match(found.version or "")
    mx = _MXFP4 in (found.format, *(group.format for group in found.config_groups.values()))
    if mx and version is not None and tuple(map(int, version.groups())) < _RIGHT_EXPONENTS:
        raise UnsupportedError(
            f"config.json: {_WHERE}.version is {spell(found.version)}: before 0.14 compressed-tensors wrote the scales "
            f"of {_MXFP4} two exponents too small, and every reader since has weights of a quarter of their size; "
            "quantize the original anew"
        )
    if found.sparsity_config is not None and found.sparsity_config.format != "dense":
        raise UnsupportedError(
            f"config.json: {_WHERE}.sparsity_config.format is {spell(found.sparsity_config.format)}; this reader knows "
            "no sparse weights"
        )
    _check_rotations(found.transform_config)
    groups = tuple(_group(f"{_WHERE}.config_groups.{name}", group) for name, group in found.config_groups.items())
    return Config(groups, found.quantization_status)


def has_zero_points(declared: object) -> bool:
    """Whether what a config declares is compressed weights that are packed with zero points."""
    if not isinstance(declared, Mapping) or declared.get("quant_method") != "compressed-tensors":
        return False
    groups = declared.get("config_groups")
    weights = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
    return any(isinstance(entry, Mapping) and entry.get("symmetric") is False for entry in weights)


def _check_rotations(rotations: _Rotations | None) -> None:
    """Refuse those that turn activations while the model runs: its weights alone compute something else."""
    for name, rotation in rotations.config_groups.items() if rotations else ():
        for place in rotation.apply:
            if place.location not in _FUSED:
                raise UnsupportedError(
                    f"config.json: {_WHERE}.transform_config.config_groups.{name} turns what the model computes while "
                    f"it runs (location {spell(place.location)} of {spell(place.targets)}); this reader knows "
                    f"rotations that are fused into the weights ({' and '.join(_FUSED)}) alone"
                )


def _group(where: str, group: _Group) -> Group:
    weights = group.weights
    if weights is None:
        raise UnsupportedError(
            f"config.json: {where} quantizes activations of {spell(group.targets)} and no weights; this reader knows "
            "activations beside quantized weights"
        )
    for target in group.targets:
        try:
            re.compile(target.removeprefix(_PATTERN) if target.startswith(_PATTERN) else "")
        except (re.error, RecursionError, OverflowError) as error:
            raise CheckpointError(f"config.json: {where}.targets: {spell(target)} is no pattern: {error}") from error
    if group.output_activations is not None:
        raise UnsupportedError(f"config.json: {where}.output_activations: this reader knows no quantized outputs")
    scheme, inputs = weight_scheme(where, weights, group.input_activations)
    return Group(tuple(group.targets), scheme, weights.ordered and weights.grouping == "group", inputs)


def stored_layout(scheme: Scheme) -> str:
    """How weights of a scheme are written."""
    plain = "int-quantized" if scheme.activation_bits == 8 and not scheme.float_inputs else "pack-quantized"
    return _BY_NUMBER.get(scheme.number, plain)


def written_config(
    schemes: Mapping[str, Scheme], kept: Sequence[str], outer: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The config to write.

    Args:
        schemes: by linear.
        kept: the linears left unquantized.
        outer: how embedding and head are written, by their names. No class stands for an embedding, nor in vLLM for a
            head.
    """
    outer = outer or {}
    alike: dict[tuple[Scheme, str], list[str]] = {}
    for linear, scheme in schemes.items():
        alike.setdefault((scheme, outer.get(linear) or stored_layout(scheme)), []).append(linear)
    # The commonest scheme is for every linear that nothing else names. It comes last: names win over classes in every
    # reader, but transformers looks for the first match and warns of each name that it found to be a Linear before.
    ordered = sorted(alike, key=lambda kind: -len(alike[kind]))
    groups = {
        f"group_{index}": {
            "targets": _targets(alike[kind], outer, rest=kind == ordered[0], alone=len(ordered) == 1),
            "weights": weight_args(kind[0]),
            "input_activations": activation_args(kind[0]),
            "output_activations": None,
            "format": kind[1],
        }
        for index, kind in enumerate((*ordered[1:], ordered[0]))
    }
    layouts = {layout for _, layout in ordered}
    some = any(map(_EXPERT.search, schemes))
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(dict.fromkeys(_ignored(name, alone=some) for name in kept)),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _ignored(name: str, *, alone: bool) -> str:
    """What says that a linear is dense, or the experts of a layer: those of all, or of this one ``alone``."""
    if not name.endswith(_LAYER_OF_EXPERTS):
        return name
    return rf"{_PATTERN}.*{re.escape(name)}\.\d+\." if alone else _EXPERTS


def _targets(linears: Sequence[str], outer: Collection[str], *, rest: bool, alone: bool) -> list[str]:
    """What a group applies to: linears by name, experts by a pattern, in which readers look for the word.

    Args:
        linears: module names.
        outer: those of embedding and head.
        rest: whether it is for all linears that no other group names.
        alone: whether there is no other group.
    """
    named = [linear for linear in linears if not _EXPERT.search(linear)]
    experts = [_EXPERTS] if len(named) < len(linears) and not alone else []
    return [*experts, *([_CLASS, *(linear for linear in named if linear in outer)] if rest else named)]
