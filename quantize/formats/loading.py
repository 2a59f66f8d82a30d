"""What transformers cannot load once it is packed: linears whose weights a class sets by name while it loads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache

import torch
from transformers.core_model_loading import MergeModulelist

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.expert_storage import Conversion
from llmconvert.engine.architecture.loading.held import HeldTensors, Made, made_tensors
from llmconvert.engine.architecture.loading.initialization import weights_asked_for
from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError, UnsupportedError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.scheme import Scheme
from llmconvert.storage.checkpoint import Checkpoint

__all__ = [
    "as_loaded",
    "asked_for",
    "check_loadable",
    "unloadable",
    "unloadable_outer",
    "what_is_left",
    "written_as_held",
]

# Models whose answer is kept for who asks the same again.
_KEPT = 16


def asked_for(skeleton: Skeleton, scheme: Scheme, layout: Format) -> frozenset[str]:
    """The linears that transformers cannot load packed; none where the format has their weights, or others read it."""
    linears = {name: site for name, site in skeleton.sites.items() if site.kind == "linear"}
    if layout.library != "transformers" or not linears:
        return frozenset()
    # Of a shape that every format takes: what counts are the names.
    name, size = next(iter(linears.values())).stored, 256 * (scheme.group_size or 1)
    specs = layout.specs(name, (size, size), scheme, layout.scale_dtype(scheme, skeleton.dtype))
    if any(spec.name == f"{name}.weight" for spec in specs):
        return frozenset()
    return _asked_for(json.dumps(skeleton.checkpoint.config), skeleton.dtype, skeleton.attention, frozenset(linears))


@lru_cache(maxsize=_KEPT)
def _asked_for(config: str, dtype: torch.dtype, attention: str, linears: frozenset[str]) -> frozenset[str]:
    """The same, of the class of a ``config.json``: all plans and variants of one model ask it."""
    return weights_asked_for(build_meta_model(build_config(json.loads(config)), dtype, attention), linears)


def as_loaded(skeleton: Skeleton, layout: Format, *, dense_experts: bool = False) -> Checkpoint:
    """The checkpoint of a model as transformers can load it in a format: with tensors as the class holds them.

    In a quantized checkpoint transformers takes the weights that it makes parameters of for quantized ones, and fails
    or drops those that are not: joined tensors, routers that it turns around, dense experts in tensors of their own.
    And it doesn't find the scales of a linear whose weight alone it calls otherwise.

    Args:
        skeleton: the model.
        layout: the format.
        dense_experts: whether the experts that text reaches stay dense, beside linears in a scheme that makes
            transformers look for codes in their tensors.

    Raises:
        UnsupportedError: the format is one in which nobody has seen transformers load such a class.
        CheckpointError: tensors that it joins do not fit behind each other.
    """
    stored, own = skeleton.checkpoint, isinstance(skeleton.checkpoint, HeldTensors)
    if layout.library != "transformers" or not (layout.joins or skeleton.joined or own):
        return stored
    if not layout.joins:
        joined = skeleton.joined or {name: made.sources for name, made in _made_of(stored).items()}
        target, parts = next(iter(joined.items()))
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: transformers makes {target!r} of {', '.join(parts)} "
            f"while it loads, which was not seen to work in a quantized checkpoint of {type(layout).__name__.lower()}; "
            "use format: compressed-tensors"
        )

    def wanted(target: str, conversion: Conversion) -> bool:
        weights = all(source.endswith(".weight") for source in conversion.converter._original_source_patterns)
        alone = MergeModulelist in conversion.kinds and skeleton.reach.needs(target) and not dense_experts
        return target in skeleton.joined or (weights and not alone)

    conversions = skeleton.conversions
    made = made_tensors(conversions, stored, wanted) if conversions.converters else {}
    for site in skeleton.sites.values():
        if site.kind == "linear" and not conversions.loads_beside(site.tensor, site.parameter):
            made[site.parameter] = Made(((site.tensor,),), stored.infos[site.tensor].shape)
    left = next((target for target in skeleton.joined if target not in made), None)
    if left is not None:
        infos = [stored.infos[part] for part in skeleton.joined[left]]
        found = ", ".join(f"{info.name} {str(info.dtype).removeprefix('torch.')} {list(info.shape)}" for info in infos)
        raise CheckpointError(f"{left!r} is made of tensors that do not fit behind each other: {found}")
    return HeldTensors(stored, made) if made else stored


def check_loadable(skeleton: Skeleton, quantized: Collection[Site], layout: Format) -> None:
    """Refuse a class with a weight that becomes several: transformers 5.23 finds no place for its scales, and fails.

    That is so whether or not a checkpoint has that weight, unless linears of such names are quantized elsewhere in the
    model (the queries of the decoder beside those of a vision tower): their scales are a place then.

    Args:
        skeleton: the model.
        quantized: sites that are.
        layout: the format.

    Raises:
        UnsupportedError: the model is of such a class.
    """
    if not layout.joins:
        return
    scales = "\n".join(f"{site.name}.weight_scale" for site in quantized if site.kind == "linear")
    for converter in skeleton.conversions.converters:
        sources, targets = converter._original_source_patterns, converter._original_target_patterns
        split = len(targets) > 1 and all(source.endswith(".weight") for source in sources)
        placed = split and re.search(rf"{targets[0]}_scale$", scales, re.MULTILINE)
        if split and not placed and not any(operation.supports_many_to_many for operation in converter.operations):
            raise UnsupportedError(
                f"architecture {str(skeleton.checkpoint.config.get('model_type'))!r}: transformers makes several "
                f"weights ({', '.join(targets)}) of {sources[0]!r} while it loads this class, and cannot load it from "
                "compressed-tensors for that, whatever is quantized; take another format, "
                "for example nf4 in bitsandbytes (scheme: nf4)"
            )


def _made_of(checkpoint: Checkpoint) -> Mapping[str, Made]:
    return checkpoint.made if isinstance(checkpoint, HeldTensors) else {}


def written_as_held(checkpoint: Checkpoint) -> tuple[str, ...]:
    """The note on tensors that an artifact of a checkpoint has as the class holds them; none where it has no such."""
    made = _made_of(checkpoint)
    if not made:
        return ()
    target, one = next(iter(made.items()))
    sources = f"{', '.join(one.sources[:3])}{', …' if len(one.sources) > 3 else ''}"
    return (
        f"{len(made)} tensors are in the artifact as transformers makes them while it loads ({target}, of {sources}): "
        "it cannot make them in a quantized checkpoint. Other runtimes may look for what they are made of",
    )


def what_is_left(
    sites: Mapping[str, Site],
    schemes: Collection[str],
    asked: Collection[str],
    repeated: Collection[str],
    narrow: Collection[str],
    *,
    dense: bool,
) -> tuple[str, ...]:
    """What is said of linears that stay dense unasked, or that transformers loads dense: a sentence for each reason.

    Args:
        sites: of the model.
        schemes: names of those that are quantized.
        asked: of :func:`asked_for`.
        repeated: those that the forward calls more than once.
        narrow: of :func:`~llmconvert.quantize.formats.coverage.narrow_linears`.
        dense: whether the config tells transformers to load all weights dense.
    """
    said: list[str] = []

    def say(names: Sequence[str], reason: str) -> None:
        if names:
            said.append(f"{len(names)} linears stay dense ({names[0]}, …): {reason}")

    left = [name for name in sites if name not in schemes]
    say(
        [name for name in left if name in repeated],
        "the forward calls them more than once, and a calibrated method would see the first call's inputs alone; an "
        "override with a scheme rounds them to nearest",
    )
    say([name for name in left if name in narrow], "they have fewer columns than a group, and next to no weights")
    say(
        [name for name in left if name in asked],
        "transformers' class sets their weights by name while it loads, and cannot be loaded with packed ones; an "
        "override with a scheme packs them for other runtimes",
    )
    forced = [name for name in sites if dense and name in asked and name in schemes]
    if forced:
        said.append(
            f"transformers' class sets the weights of {len(forced)} linears by name while it loads ({forced[0]}, …), "
            "and cannot be loaded with packed ones: config.json tells transformers to load them dense (dequantize: "
            "true), so they take as much memory there as before; the file is small, and other runtimes load it packed"
        )
    return tuple(said)


def unloadable(model_type: str, names: Collection[str]) -> str:
    """The refusal of a model that has no other linears."""
    return (
        f"architecture {model_type!r}: transformers cannot load it with packed weights, since its class sets the "
        f"weights of its linears by name while it loads ({min(names)}, …). Take a scheme that is not packed, w8a8 or "
        "fp8; or, for another runtime, an override that gives `*` this scheme"
    )


def unloadable_outer(site: Site, scheme: Scheme | None, schemes: Collection[Scheme]) -> str:
    """The refusal of an embedding that transformers loads dense alone, beside linears that keep it from that."""
    others = ", ".join(sorted(str(one) for one in schemes if one != scheme)) or "quantized inputs"
    return (
        f"{site.name}: transformers loads an embedding in {scheme} only where all that is quantized is in this one "
        f"scheme with 16-bit inputs, and here are {others} beside it; give it 8 bits (w8a16-channel, which is not "
        "packed), or the linears' scheme; or take format: gguf or mlx"
    )
