"""Mixtures of experts in an artifact: what its readers take of them, and which of their linears stay dense."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from llmconvert.engine.architecture.expert_names import RUNTIME
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import CheckpointError, SchemeError, UnsupportedError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.methods.base import Method
from llmconvert.quantize.scheme import Override, Scheme, SchemeOrMix

__all__ = ["check_experts", "experts_in_one", "for_vllm_alone", "gates_of"]

_IN_GGUF = "; or take one of llama.cpp's types, which hold all of them (scheme: q4_k_m)"


def check_experts(skeleton: Skeleton, assigned: Mapping[str, Scheme | None], method: Method, layout: Format) -> None:
    """Refuse what no reader of mixtures has, or what a method can't do to them.

    Args:
        skeleton: the model.
        assigned: the scheme of each of its sites; None stays dense.
        method: what chooses codes.
        layout: of the artifact.

    Raises:
        UnsupportedError: the format holds no experts in this scheme or of this class, or the method needs more of them
            than the class gives.
        SchemeError: experts differ in their scheme.
    """
    experts = [site for site in skeleton.sites.values() if site.kind == "expert"]
    schemes = dict.fromkeys(assigned[site.name] for site in experts)
    if not experts:
        return
    if layout.stacks_experts:
        schemes.pop(None, None)
    elif len(schemes) > 1:
        found = ", ".join("none" if scheme is None else str(scheme) for scheme in schemes)
        raise SchemeError(
            f"experts get different schemes ({found}); runtimes read one for the experts of all layers. "
            "Overrides have to match all of them, for example `*.experts.*`"
        )
    scheme = next(iter(schemes), None)
    apart = any(site.experts is not None and site.experts.apart for site in experts)
    if scheme is None:
        if apart or any(site.stored_alone for site in experts):
            try:
                layout.check_dense_experts({chosen for chosen in assigned.values() if chosen is not None}, apart=apart)
            except UnsupportedError as error:
                raise UnsupportedError(f"architecture {skeleton.architecture.model_type!r}: {error}") from error
        return
    layout.check_experts(scheme, apart=apart)
    elsewhere = all(site.experts is not None and site.experts.elsewhere for site in experts)
    layers = {id(site.experts): site.experts for site in experts if site.experts is not None}
    unread = next((layer.unread for layer in layers.values() if layer.unread), "")
    if unread and not layout.stacks_experts and not (elsewhere and layout.library == RUNTIME):
        other = f"; or have them one by one, for vLLM alone, which has such names (runtime: {RUNTIME})"
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: {unread}; leave them dense with an override "
            "(match: '*.experts.*', scheme: none), and the other linears are quantized"
            f"{other if elsewhere else ''}{_IN_GGUF if _is_held_by_gguf(skeleton) else ''}"
        )
    kind = skeleton.architecture.model_type
    if method.original and any(slot.layout.stacked for slots in skeleton.experts for slot in slots.values()):
        raise UnsupportedError(
            f"architecture {kind!r}: {type(method).__name__.lower()} compares what comes to an expert with "
            "what the original model has at the same tokens, and these experts get tokens only where the router sends "
            "them; use gptq, awq, hqq or rtn"
        )


def _is_held_by_gguf(skeleton: Skeleton) -> bool:
    """Whether llama.cpp runs the model, which has types for all experts of a layer in one tensor."""
    from llmconvert.gguf.architectures.decoder import find_decoder

    try:
        return not find_decoder(skeleton.checkpoint).arch.gap
    except (UnsupportedError, CheckpointError):
        return False


def for_vllm_alone(quantized: Iterable[Site]) -> tuple[str, ...]:
    """What is said of an artifact that has experts under names that transformers does not know; else nothing."""
    first = next((site for site in quantized if site.experts is not None and site.experts.elsewhere), None)
    if first is None:
        return ()
    return (
        f"transformers can't load it: it has no names for single experts of this class ({first.stored}, …), and would "
        "leave all of them random. vLLM has these names, and llm-compressor writes them",
    )


def experts_in_one(skeleton: Skeleton, scheme: SchemeOrMix, overrides: Sequence[Override], layout: Format) -> bool:
    """Whether experts are to be in one tensor of their layer: dense ones where readers take none in several."""
    if not isinstance(scheme, Scheme):
        return False
    chosen: dict[str, set[Scheme | None]] = {"expert": set(), "linear": set()}
    for site in skeleton.sites.values():
        chosen[site.kind].add(Override.chosen((site.name,), scheme, overrides))
    if chosen["expert"] != {None}:
        return False
    try:
        layout.check_dense_experts({one for one in chosen["linear"] if one is not None}, apart=False)
    except UnsupportedError:
        return True
    return False


def gates_of(skeleton: Skeleton) -> set[str]:
    """The linears of a mixture that stay dense unless an override says otherwise."""
    counts = {slot.ends for slots in skeleton.experts for slot in slots.values()}
    if counts:
        counts.add(skeleton.architecture.experts)
    return {name for name, site in skeleton.sites.items() if counts and _is_gate(site, counts)}


def _is_gate(site: Site, experts: Collection[int]) -> bool:
    """Whether a linear of a mixture decides where tokens go, or how much of a shared expert they get.

    Such stay dense: they are tiny, and a token that goes elsewhere is worse than any rounding of weights.
    """
    return site.kind == "linear" and site.rows in (1, *experts)
