"""What transformers cannot load once it is packed: linears whose weights a class sets by name while it loads."""

from __future__ import annotations

from collections.abc import Collection

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.initialization import weights_asked_for
from llmconvert.engine.architecture.model import build_meta_model
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import UnsupportedError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.scheme import Scheme

__all__ = ["asked_for", "check_joined", "left_dense", "unloadable"]


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
    config = build_config(skeleton.checkpoint.config)
    return weights_asked_for(build_meta_model(config, skeleton.dtype, skeleton.attention), linears)


def check_joined(skeleton: Skeleton, layout: Format) -> None:
    """Refuse a model of whose tensors transformers joins some while it loads, at which it fails in quantized ones.

    Raises:
        UnsupportedError: with the tensors.
    """
    if layout.library == "transformers" and skeleton.joined:
        target, parts = next(iter(skeleton.joined.items()))
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: transformers makes {target!r} of {', '.join(parts)} "
            "while it loads, and fails at that in a quantized checkpoint, so it could not be read back; convert and "
            "validate take the model as it is"
        )


def left_dense(names: Collection[str]) -> str:
    """The note that says so."""
    return (
        f"{len(names)} linears stay dense ({min(names)}, …): transformers' class sets their weights by name while it "
        "loads, and cannot be loaded with packed ones; an override with a scheme packs them for other runtimes"
    )


def unloadable(model_type: str, names: Collection[str]) -> str:
    """The refusal of a model that has no other linears."""
    return (
        f"architecture {model_type!r}: transformers cannot load it with packed weights, since its class sets the "
        f"weights of its linears by name while it loads ({min(names)}, …). Take a scheme that is not packed, w8a8 or "
        "fp8; or, for another runtime, an override that gives `*` this scheme"
    )
