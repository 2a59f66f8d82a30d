"""A sweep's variants as one repository: GGUF files side by side, other artifacts in folders, and one card for all.

::

    README.md                                  the table, which one to take, sizes against quality
    NAME-Q4_K_M.gguf, NAME-Q6_K.gguf           of variants that are GGUF files
    mmproj-NAME-f16.gguf                       of models with a part for images, one for all of these
    VARIANT/                                   of others, as they are alone
    llmconvert/VARIANT/report.json, …          what was measured on each file

Variants that have a repository, branch or folder each are there as they are alone, and the card of each compares all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import huggingface_hub

from llmconvert.engine.architecture.config import build_config
from llmconvert.engine.architecture.decoder import Architecture
from llmconvert.errors import LlmconvertError, RecipeError
from llmconvert.gguf.checkpoint import open_artifact
from llmconvert.gguf.split import gguf_models
from llmconvert.hub.card import CARD, front_matter
from llmconvert.recipes.publishing import fill_target
from llmconvert.recipes.schema.recipe import PublishSettings
from llmconvert.recipes.sweep.expand import Sweep
from llmconvert.report.report import Report
from llmconvert.storage.contents import Contents, Hashes
from llmconvert.storage.directory import is_projector
from llmconvert.storage.writer import write_file
from llmconvert.validate.render.card import card_metadata, runtime_of
from llmconvert.validate.render.plots import comparison_plot
from llmconvert.validate.render.set_card import SetMember, render_set_card, with_set

__all__ = ["MadeVariant", "SetTargets", "set_targets", "write_apart", "write_set"]

_PLOT = "llmconvert/sizes.png"
_OWN = "llmconvert"


@dataclass(frozen=True, slots=True)
class MadeVariant:
    """A variant's artifact.

    Attributes:
        directory: where it is.
        contents: of its files when they were written.
        report: what was measured on it.
    """

    directory: Path
    contents: Contents
    report: Report


@dataclass(frozen=True, slots=True)
class SetTargets:
    """Where the variants of a set go.

    Attributes:
        together: the one place of all; None where each has its own.
        apart: places by variant, where each has its own.
    """

    together: PublishSettings | None
    apart: Mapping[str, PublishSettings]


def set_targets(sweep: Sweep) -> SetTargets | None:
    """Where the variants of a set go; None where they are no set, or nothing is published.

    Raises:
        RecipeError: some go to one place and others don't, or the sweep picks one of them.
    """
    targets: dict[str, PublishSettings] = {}
    for variant in sweep.variants:
        if variant.recipe is not None and variant.recipe.publish is not None:
            target = fill_target(variant.recipe).publish
            assert target is not None
            targets[variant.name] = target
    if not any(target.set for target in targets.values()):
        return None
    if sweep.pick is not None:
        raise RecipeError(f"{sweep.name}: publish.set publishes all variants, and pick one of them; leave one out")
    places = [(target.to, target.revision or "", target.folder or "") for target in targets.values()]
    first = next(iter(targets.values()))
    if len(set(places)) == 1:
        return SetTargets(first, {})
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise RecipeError(
            f"{sweep.name}: publish.set: all variants go to one place, or each to its own; found several for "
            f"{twice[0]} and others elsewhere; leave {{scheme}} and the like out, or tell all apart by {{name}}"
        )
    return SetTargets(None, targets)


def write_apart(
    sweep: Sweep,
    folder: Path,
    variants: Mapping[str, MadeVariant],
    targets: Mapping[str, PublishSettings],
    hashes: Hashes,
) -> dict[str, Contents]:
    """Put each variant into a directory of its own, with links where the disk has them, and a card that compares all.

    Args:
        folder: is made anew.
        variants: by name, at least one.
        targets: where each goes.

    Returns:
        of the directories, by variant: what was written then, and the card of now.

    Raises:
        MachineError: the disk fails or is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    members: dict[str, SetMember] = {}
    for name, made in variants.items():
        place = name.removeprefix(f"{sweep.name}-")
        members[name] = SetMember(place, made.report, _token_nbytes(made.directory), _link_to(targets[name]))
    found = {}
    for name, made in variants.items():
        directory = folder / name
        directory.mkdir(parents=True)
        for inside in made.contents.files:
            if inside != CARD:
                _link(made.directory / inside, directory / inside)
        card = (made.directory / CARD).read_text(encoding="utf-8")
        write_file(directory / CARD, with_set(card, members).encode())
        files = {**made.contents.files, CARD: hashes.read(directory).files[CARD]}
        found[name] = Contents(files)
    return found


def _link_to(target: PublishSettings) -> str:
    """The page of a place on the Hub; empty of a directory, which may be moved."""
    if target.to.startswith("file:"):
        return ""
    page = f"{huggingface_hub.constants.ENDPOINT}/{target.to}"
    branch, inside = target.revision or "main", f"/{target.folder}" if target.folder else ""
    return page if branch == "main" and not inside else f"{page}/tree/{quote(branch, safe='')}{inside}"


def write_set(sweep: Sweep, folder: Path, variants: Mapping[str, MadeVariant], hashes: Hashes) -> Contents:
    """Put variants into one directory, with links where the disk has them, and a card.

    Args:
        folder: is made anew.
        variants: by name, at least one.

    Returns:
        of the directory.

    Raises:
        RecipeError: two variants have a file of one name.
        MachineError: the disk fails or is full.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    members: dict[str, SetMember] = {}
    placed: dict[str, str] = {}
    for name, made in variants.items():
        short = name.removeprefix(f"{sweep.name}-")
        files = {path.name for path in gguf_models(made.directory)}
        for inside in made.contents.files:
            if inside == CARD and files:
                continue
            place = _place(inside, short, gguf=bool(files))
            if is_projector(place) and place in placed and _same(variants[placed[place]], made, inside):
                continue  # the part for images of all is one
            if place in placed:
                raise RecipeError(f"{sweep.name}: publish.set: {placed[place]} and {name} both have a file {place}")
            placed[place] = name
            _link(made.directory / inside, folder / place)
        members[name] = SetMember(next(iter(sorted(files)), short), made.report, _token_nbytes(made.directory))
    reports = {members[name].place: made.report for name, made in variants.items()}
    picture = comparison_plot(reports, "png")
    if picture is not None:
        (folder / _PLOT).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / _PLOT, picture)
    source = next(iter(variants.values())).report.model.source.partition("@")[0]
    card = render_set_card(_front_matter(variants), Path(source).name, members, _PLOT if picture else None)
    write_file(folder / CARD, card.encode())
    return hashes.read(folder)


def _same(first: MadeVariant, second: MadeVariant, inside: str) -> bool:
    return first.contents.files[inside] == second.contents.files[inside]


def _place(inside: str, variant: str, *, gguf: bool) -> str:
    """Where a variant's file goes: models of one file stand beside each other, what is theirs under their names."""
    if not gguf:
        return f"{variant}/{inside}"
    if inside.startswith(f"{_OWN}/"):
        return f"{_OWN}/{variant}/{inside.removeprefix(f'{_OWN}/')}"
    return inside if inside.endswith(".gguf") else f"{_OWN}/{variant}/{inside}"


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _front_matter(variants: Mapping[str, MadeVariant]) -> str:
    """That of the first variant, with the tags of all."""
    first = next(iter(variants.values()))
    fields = front_matter((first.directory / CARD).read_text(encoding="utf-8"), CARD)
    tags = [tag for made in variants.values() for tag in _tags(made)]
    return card_metadata(first.report.model, {**fields, "tags": list(dict.fromkeys(tags))}, runtime_of(first.report))


def _tags(made: MadeVariant) -> list[str]:
    found = front_matter((made.directory / CARD).read_text(encoding="utf-8"), CARD).get("tags", [])
    return [str(tag) for tag in found]


def _token_nbytes(directory: Path) -> int | None:
    """Bytes of keys and values of a token in 16 bits, where every layer keeps those of all tokens."""
    try:
        with open_artifact(directory) as stored:
            model = Architecture.of(build_config(stored.config))
            return 2 * 2 * model.layers * model.kv_heads * model.head_dim if model.has_attention else None
    except LlmconvertError:
        return None
