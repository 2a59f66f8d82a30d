"""Which schemes an embedding and a head get, and whether the format's readers take them so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from llmconvert.engine.sites import Site
from llmconvert.errors import SchemeError
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.scheme import Override, Scheme

__all__ = ["outer_schemes"]


def outer_schemes(
    outer: Mapping[str, Site], layout: Format, scheme: Scheme | Mapping[str, Scheme], overrides: Sequence[Override]
) -> dict[str, Scheme | None]:
    """The schemes of a model's embedding and head by name; none where the format has them as they are.

    Formats that hold them like linears have them in the scheme of linears unless an override matches. Others do where
    an override names one, by its module or by the words ``head`` and ``embedding``: a pattern for linears says nothing
    of them.

    Args:
        outer: sites of embedding and head, one that is both where they are tied.
        layout: of the artifact.
        scheme: of linears; a mapping, of types of a file's tensors, has theirs already.
        overrides: the first that matches wins.

    Raises:
        SchemeError: a tied matrix is given two schemes.
    """
    if layout.outer == "never" or not isinstance(scheme, Scheme):
        return {}
    found: dict[str, Scheme | None] = {}
    for name, site in outer.items():
        if layout.outer == "always":
            matches = [one for one in overrides if any(fnmatchcase(word, one.match) for word in site.called)]
            found[name] = matches[0].scheme if matches else scheme
            continue
        matches = [one for one in overrides if one.match in site.called]
        if matches:
            _check_tied(site, {one.match: one.scheme for one in reversed(matches)})
            found[name] = matches[0].scheme
    return found


def _check_tied(site: Site, given: Mapping[str, Scheme | None]) -> None:
    if len(set(given.values())) > 1:
        listed = ", ".join(f"{match} {scheme or 'none'}" for match, scheme in sorted(given.items()))
        raise SchemeError(
            f"{site.name} is embedding and output head of this model, one matrix that is stored once, and was given "
            f"several schemes ({listed}); give it one"
        )
