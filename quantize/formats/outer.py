"""Which schemes an embedding and a head get, and whether they are one matrix or two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch

from llmconvert.engine.architecture.config import with_split_embeddings
from llmconvert.engine.sites import Site
from llmconvert.engine.skeleton import Skeleton
from llmconvert.errors import SchemeError
from llmconvert.memory import row_slices
from llmconvert.quantize.formats.base import Format
from llmconvert.quantize.scheme import Override, Scheme
from llmconvert.storage.checkpoint import Checkpoint, CheckpointView

__all__ = ["outer_schemes", "with_head_settled"]

_COMPARED_AT_ONCE = 1 << 24
_WORDS = ("head", "embedding")


def with_head_settled(skeleton: Skeleton, layout: Format, overrides: Sequence[Override]) -> Checkpoint:
    """The checkpoint of a model whose config and tensors say the same of its head, where that will be quantized.

    Where a config ties the head to the embedding and the file has both, transformers compares them: equal ones are one
    matrix, others two. Runtimes that go by the config alone take the embedding for the head in any case. So a copy is
    left out, and a config that is wrong is put right; only rows up to the first that differ are read.

    Args:
        skeleton: the model.
        layout: of the artifact.
        overrides: those that name head or embedding have them quantized in formats that leave them dense otherwise.
    """
    stored, names, model = skeleton.checkpoint, skeleton.names, skeleton.model
    output = model.get_output_embeddings()
    head = next((f"{name}.weight" for name, module in model.named_modules() if module is output), "")
    embedding = model.all_tied_weights_keys.get(head, "")
    called = {*_WORDS, head.removesuffix(".weight"), embedding.removesuffix(".weight")}
    wanted = layout.outer == "always" or (
        layout.outer != "never" and any(override.match in called for override in overrides)
    )
    if not wanted or head not in names or embedding not in names:
        return stored
    one, other = names[head], names[embedding]
    shape = stored.infos[one].shape
    equal = shape == stored.infos[other].shape and all(
        torch.equal(*(stored.read_rows(name, part.start, part.stop) for name in (one, other)))
        for part in row_slices(shape, _COMPARED_AT_ONCE)
    )
    view = CheckpointView(stored)
    if equal:
        view.infos = {name: info for name, info in stored.infos.items() if name != one}
    else:
        view.config = with_split_embeddings(stored.config)
    return view


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
