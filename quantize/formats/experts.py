"""Mixtures of experts in an artifact: what its readers take of them, and which of their linears stay dense."""

from __future__ import annotations

from collections.abc import Mapping

from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import SchemeError, UnsupportedError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.scheme import Scheme

__all__ = ["check_experts", "gates_of"]


def check_experts(skeleton: Skeleton, assigned: Mapping[str, Scheme | None], layout: Format) -> None:
    """Refuse what no reader of mixtures has.

    Args:
        skeleton: the model.
        assigned: the scheme of each of its sites; None stays dense.
        layout: of the artifact.

    Raises:
        UnsupportedError: the format holds no experts in this scheme or of this class.
        SchemeError: experts differ in their scheme.
    """
    experts = [site for site in skeleton.sites.values() if site.kind == "expert"]
    schemes = dict.fromkeys(assigned[site.name] for site in experts)
    if not experts:
        return
    if len(schemes) > 1:
        found = ", ".join("none" if scheme is None else str(scheme) for scheme in schemes)
        raise SchemeError(
            f"experts get different schemes ({found}); runtimes read one for the experts of all layers. "
            "Overrides have to match all of them, for example `*.experts.*`"
        )
    scheme = next(iter(schemes))
    if scheme is None:
        if any(site.stored_alone for site in experts):
            layout.check_dense_experts({chosen for chosen in assigned.values() if chosen is not None})
        return
    layout.check_experts(scheme)
    unread = [site for site in experts if not site.readable]
    if unread:
        raise UnsupportedError(
            f"architecture {skeleton.architecture.model_type!r}: transformers reads the experts of a layer from one "
            f"tensor ({unread[0].tensor}), which no format holds quantized, and has no names for each of them; leave "
            "them dense with an override (match: '*.experts.*', scheme: none), and the other linears are quantized"
        )


def gates_of(skeleton: Skeleton) -> set[str]:
    """The linears of a mixture that stay dense unless an override says otherwise."""
    experts = skeleton.architecture.experts if any(skeleton.experts) else 0
    return {name for name, site in skeleton.sites.items() if _is_gate(site, experts)}


def _is_gate(site: Site, experts: int) -> bool:
    """Whether a linear of a mixture decides where tokens go, or how much of a shared expert they get.

    Such stay dense: they are tiny, and a token that goes elsewhere is worse than any rounding of weights.
    """
    return site.kind == "linear" and experts > 0 and site.rows in (1, experts)
