"""The attention geometry of a checkpoint: heads, rotary pairs, projections, from its config and tensor names.

Which tensors are query, key, value and output, and how positions enter, is a matter of the architecture; the table
in :mod:`~llmconvert.convert.gqa.families` holds it as data.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from llmconvert.convert.gqa.families import (
    FAMILIES,
    FORBIDDEN,
    NO_SETTING,
    REASONS,
    Family,
    Fusion,
    Norm,
    Pairing,
)
from llmconvert.engine.architecture.auto import has_parts
from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.storage.checkpoint import Checkpoint

__all__ = ["AttentionGeometry", "Norm", "Projections", "Rotary", "read_geometry", "require_kv_heads"]

_INSTEAD = "leave kv_heads out, and quantize it as it is"


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary position embedding of one layer: the first ``dims`` of a head are rotated, in pairs.

    ``half`` pairs dimension i with i + dims/2 (Llama), ``interleaved`` 2i with 2i + 1 (Cohere, GLM). ``dims`` is 0
    where a layer has no rotary embedding.
    """

    pairing: Pairing
    dims: int


@dataclass(frozen=True, slots=True)
class Projections:
    """Tensor names of one layer, without ``.weight`` and ``.bias``; the first three are equal when fused.

    ``query_norm`` and ``key_norm`` are of the norms' weights: none, one, or one per head.
    """

    query: str
    key: str
    value: str
    output: str
    query_norm: tuple[str, ...] = ()
    key_norm: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AttentionGeometry:
    """How the attention layers of a checkpoint are built.

    Attributes:
        model_type: the architecture.
        query_heads: per layer.
        kv_heads: per layer.
        head_dim: of queries, keys and values.
        hidden_size: width of the attention input.
        rotary: per layer.
        fusion: how query, key and value share tensors.
        multi_query_only: whether the layout holds either one key-value head or as many as there are query heads.
        norm: of queries and keys after the projection, or None.
        plain: whether projections are torch's own linear layers.
        movable: whether heads may change places; not where a query head has a slope (ALiBi) or a sink of its own.
        projections: per layer.
    """

    model_type: str
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    rotary: tuple[Rotary, ...]
    fusion: Fusion
    multi_query_only: bool
    norm: Norm | None
    plain: bool
    movable: bool
    projections: tuple[Projections, ...]

    @property
    def layers(self) -> int:
        """Number of attention layers."""
        return len(self.projections)

    @property
    def blocks(self) -> tuple[str, ...]:
        """What the names of each block's tensors begin with, with a dot at the end."""
        return tuple(names.query.rsplit(".", 2)[0] + "." for names in self.projections)

    def kv_bytes_per_token(self, kv_heads: int, itemsize: int = 2) -> int:
        """Bytes of keys and values that a token leaves in the cache, over all layers."""
        return 2 * self.layers * kv_heads * self.head_dim * itemsize


def read_geometry(checkpoint: Checkpoint) -> AttentionGeometry:
    """The geometry of ``checkpoint``, from its config and its tensors' headers.

    Raises:
        UnsupportedError: an architecture, or a setting of it, whose heads cannot be merged.
        CheckpointError: tensors are missing or contradict the config.
    """
    config = build_config(checkpoint.config)
    found = Architecture.of(config)
    family = _family(str(config.model_type), found)
    norm = family.norm
    if family.switched_norm is not None and not found.switch(family.switched_norm):
        norm = None
    geometry = AttentionGeometry(
        model_type=found.model_type,
        query_heads=found.query_heads,
        kv_heads=found.kv_heads,
        head_dim=found.head_dim,
        hidden_size=found.hidden_size,
        rotary=tuple(_rotary(found, family, layer) for layer in range(found.layers)),
        fusion=family.fusion,
        multi_query_only=found.multi_query_only,
        norm=norm,
        plain=family.plain,
        movable=not (found.uses_alibi or family.sinks),
        projections=_projections(checkpoint, family, found.layers, norm, (found.query_heads, found.kv_heads)),
    )
    _check_shapes(checkpoint, geometry)
    return geometry


def require_kv_heads(geometry: AttentionGeometry, kv_heads: int) -> None:
    """Refuse a number of key-value heads that ``geometry`` cannot be merged to.

    Raises:
        UnsupportedError: naming the numbers that it can be merged to.
    """
    now = geometry.kv_heads
    possible = [count for count in range(1, now) if now % count == 0]
    if geometry.multi_query_only and now == geometry.query_heads and now > 1:
        possible = [1]
    if kv_heads in possible:
        return
    ways = f"possible: {', '.join(map(str, possible))}" if possible else "it is multi-query attention already"
    if kv_heads == now and possible:
        raise UnsupportedError(
            f"{geometry.model_type} has {now} key-value heads already, and merging leaves fewer; to keep them, ask for "
            f"none (in a recipe's matrix, attention: [null, {{kv_heads: {possible[-1]}}}]); {ways}"
        )
    raise UnsupportedError(
        f"{geometry.model_type} with {now} key-value heads cannot be merged to {kv_heads}: whole groups of equal size "
        f"become one; {ways}"
    )


def _family(kind: str, architecture: Architecture) -> Family:
    family = FAMILIES.get(kind)
    if family is None and has_parts({"model_type": kind}):
        raise UnsupportedError(
            f"attention heads of architecture {kind!r} cannot be merged: it has parts for images or sound beside "
            f"its decoder ({architecture.model_type}), and heads are merged in decoders without such parts; quantize "
            "it as it is"
        )
    if family is None:
        known = f"known are {', '.join(FAMILIES)}" if architecture.has_kv_heads_setting else NO_SETTING
        reason = REASONS.get(kind) or known
        raise UnsupportedError(f"attention heads of architecture {kind!r} cannot be merged: {reason}; {_INSTEAD}")
    for key in family.forbidden:
        if architecture.switch(key):
            raise UnsupportedError(
                f"attention heads of this {kind} model cannot be merged: {key} {FORBIDDEN[key]}; {_INSTEAD}"
            )
    return family


def _rotary(architecture: Architecture, family: Family, layer: int) -> Rotary:
    if family.pairing is None:
        return Rotary("half", 0)
    dims = int(architecture.head_dim * architecture.rotary_share)
    return Rotary(family.pairing, dims if architecture.has_rotary(layer) else 0)


def _projections(
    checkpoint: Checkpoint, family: Family, layers: int, norm: Norm | None, heads: tuple[int, int]
) -> tuple[Projections, ...]:
    """Names by layer. What stands before the layer's number is found out from the output projections."""
    pattern = re.compile(rf"(?P<list>.*\.|)(?P<index>\d+)\.{family.parent}\.{family.output}\.weight")
    found = {int(m["index"]): m["list"] for m in map(pattern.fullmatch, checkpoint) if m is not None}
    missing = [layer for layer in range(layers) if layer not in found]
    if missing:
        raise CheckpointError(
            f"layer {missing[0]} has no tensor …{family.parent}.{family.output}.weight; config.json names {layers} "
            "layers, and the weights do not go with it"
        )
    stems = [f"{found[layer]}{layer}.{family.parent}." for layer in range(layers)]
    queries, keys = (_norm_names(norm, name, count) for name, count in zip(_norm_modules(norm), heads, strict=True))
    return tuple(
        Projections(
            stem + family.query,
            stem + family.key,
            stem + family.value,
            stem + family.output,
            tuple(stem + name for name in queries),
            tuple(stem + name for name in keys),
        )
        for stem in stems
    )


def _norm_modules(norm: Norm | None) -> tuple[str, str]:
    return (norm.query, norm.key) if norm is not None else ("", "")


def _norm_names(norm: Norm | None, module: str, heads: int) -> tuple[str, ...]:
    """Names of a norm's weights below the attention module, without ``.weight``."""
    if norm is None or not module:
        return ()
    return tuple(f"{module}.norms.{head}" for head in range(heads)) if norm.weights == "modules" else (module,)


def _check_shapes(checkpoint: Checkpoint, geometry: AttentionGeometry) -> None:
    queries, keys = geometry.query_heads * geometry.head_dim, geometry.kv_heads * geometry.head_dim
    for names in geometry.projections:
        if geometry.fusion == "separate":
            expected = {names.query: queries, names.key: keys, names.value: keys}
        else:
            expected = {names.query: queries + 2 * keys}
        for name, rows in expected.items():
            info = checkpoint.infos.get(f"{name}.weight")
            if info is None:
                raise CheckpointError(f"the checkpoint has no tensor {name}.weight, which {geometry.model_type} needs")
            if info.shape != (rows, geometry.hidden_size):
                raise CheckpointError(
                    f"tensor {info.name} has shape {list(info.shape)}, config.json says {[rows, geometry.hidden_size]}"
                )
        for stems, numbers in ((names.query_norm, queries), (names.key_norm, keys)):
            _check_norms(checkpoint, geometry, stems, numbers)


def _check_norms(checkpoint: Checkpoint, geometry: AttentionGeometry, stems: tuple[str, ...], numbers: int) -> None:
    for stem in stems:
        info = checkpoint.infos.get(f"{stem}.weight")
        if info is None:
            raise CheckpointError(f"the checkpoint has no tensor {stem}.weight, which {geometry.model_type} needs")
        expected = numbers if geometry.norm is not None and geometry.norm.weights == "own" else geometry.head_dim
        if math.prod(info.shape) != expected:
            raise CheckpointError(
                f"tensor {info.name} has shape {list(info.shape)}, config.json says {expected} numbers"
            )
