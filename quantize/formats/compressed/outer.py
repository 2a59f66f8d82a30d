"""Embeddings and heads in compressed-tensors: how transformers and vLLM take them.

A head of its own is a linear like others (transformers 5.23; vLLM 0.32, where it is named). Of an embedding
transformers initializes ``weight``, which a packed one lacks, as it loads. So one of 8 bits is written unpacked
(``int-quantized``, ``float-quantized``: codes in ``weight``, scales in ``weight_scale``), and one of fewer bits packed
in a model whose weights transformers loads dense (``dequantize: true``). A head that is tied to it shares the codes; as
a module it has ``weight_scale`` of its own, which is stored twice where the embedding is not packed. At both vLLM 0.32
ends with an error.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from llmconvert.engine.sites import Site
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.numbers import E4M3, Int
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint, TensorSpec

__all__ = ["Outer", "check_outer", "orphans", "plain_specs", "tied_scales", "unpacked_layout"]

_SCALE = "weight_scale"
_PLAIN_BITS = 8


@dataclass(frozen=True, slots=True)
class Outer:
    """The embedding and the head of a model, as far as they are quantized.

    Attributes:
        heads: what configs call a head of its own.
        names: what they call the embedding and the head that is tied to it.
        embedding: what the checkpoint calls an embedding that is not packed.
        head: the module that is tied to the embedding.
    """

    heads: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    embedding: str = ""
    head: str = ""

    @classmethod
    def of(cls, sites: Mapping[str, Site], *, packed: bool) -> Outer:
        """Of sites by name; ``packed`` is whether an embedding is."""
        heads = [name for site in sites.values() if site.kind == "head" for name in (site.name, site.stored)]
        found = cls(tuple(dict.fromkeys(heads)))
        site = next((site for site in sites.values() if site.kind != "head"), None)
        if site is None:
            return found
        names = tuple(dict.fromkeys(name for name in (site.name, site.stored, site.head) if name))
        return replace(found, names=names, embedding="" if packed else site.stored, head=site.head)

    @property
    def remarks(self) -> tuple[str, ...]:
        """What users should know of an artifact with such an embedding, a sentence each."""
        if not self.names:
            return ()
        if self.embedding:
            return (
                f"the embedding is quantized ({self.embedding}): transformers loads it, vLLM 0.32 ends with an error",
            )
        return (
            f"the embedding is packed ({self.names[0]}), which transformers loads as dense weights only: config.json "
            "says so of all weights (dequantize: true), so they take as much memory there as before; vLLM 0.32 ends "
            "with an error at it",
        )


def check_outer(site: Site, scheme: Scheme) -> bool:
    """See :meth:`~llmconvert.quantize.formats.base.Format.check_outer`."""
    if scheme.input_kind is not None:
        what = "the head's inputs are not quantized here" if site.kind == "head" else "token ids are no activations"
        raise UnsupportedError(
            f"{site.name}: scheme {scheme} quantizes inputs, and {what}; take one with 16-bit activations "
            "(w8a16-channel, w4a16-g64)"
        )
    if site.kind == "head":
        return False
    if site.kind == "tied" and site.name != site.stored:
        raise UnsupportedError(
            f"{site.name}: the checkpoint calls it {site.stored!r}, and transformers was not seen to load a quantized "
            "embedding that is the head too under another name; leave it dense, or take format: gguf or mlx"
        )
    if not isinstance(scheme.number, Int) and (scheme.number != E4M3 or scheme.rows != 1):
        raise UnsupportedError(
            f"{site.name}: transformers loads embeddings in integers or in E4M3 with one scale per row "
            f"(w8a16-channel, w8a16-channel-fp8), not in {scheme}"
        )
    if not scheme.symmetric:
        raise UnsupportedError(
            f"{site.name}: transformers was not seen to load embeddings with zero points ({scheme}); take a symmetric "
            "scheme (w8a16-channel)"
        )
    return scheme.bits < _PLAIN_BITS


def plain_specs(outer: Outer, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype) -> list[TensorSpec]:
    """What an embedding of 8 bits is stored as, and the head that shares it."""
    rows, columns = shape
    scale = (rows, scheme.groups(columns))
    heads = (outer.head,) if outer.head else ()
    scales = [TensorSpec(f"{name}.{_SCALE}", scale_dtype, scale) for name in (outer.embedding, *heads)]
    return [TensorSpec(f"{outer.embedding}.weight", scheme.number.code_dtype, shape), *scales]


def unpacked_layout(scheme: Scheme) -> str:
    """What configs call the layout of an embedding of 8 bits."""
    return "int-quantized" if isinstance(scheme.number, Int) else "float-quantized"


def orphans(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Scales of modules that have no codes: of heads that are tied to an embedding."""
    if checkpoint.config.get("tie_word_embeddings") is not True:
        return ()
    ends = tuple(f".{part}" for part in ("weight", "weight_packed"))
    modules = (name.removesuffix(f".{_SCALE}") for name in checkpoint.infos if name.endswith(f".{_SCALE}"))
    return tuple(module for module in modules if not any(f"{module}{end}" in checkpoint for end in ends))


def tied_scales(
    checkpoint: Checkpoint, linear: str, targets: Collection[str], candidates: Collection[str]
) -> tuple[str, ...]:
    """The copies of a linear's scales that heads tied to it have, where a config group names both.

    Args:
        checkpoint: as stored.
        linear: whose codes there are.
        targets: of its group.
        candidates: of :func:`orphans`.

    Raises:
        CheckpointError: they differ: the head is not what it shares its codes with.
    """
    names = tuple(f"{module}.{_SCALE}" for module in candidates if {linear, module} <= {*targets})
    for name in names:
        if not torch.equal(checkpoint[f"{linear}.{_SCALE}"], checkpoint[name]):
            raise CheckpointError(f"tensor {name!r} differs from '{linear}.{_SCALE}', and the head is tied to {linear}")
    return names
