"""Publishing an artifact where its recipe says: to a local directory here, to the Hub through ``llmconvert.hub``.

A local directory appears whole. One that holds files is replaced only if it is an earlier publication of the same
recipe and nobody has added to it or changed it since: ``llmconvert/publication.json`` lists what was put there, with
the hash of each file. Only the files that the artifact's stage wrote are published, and only as it wrote them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llmconvert.errors import MachineError, OutputError, RecipeError
from llmconvert.gguf.split import without_part
from llmconvert.hub import PushOptions, PushPlan, check_card, check_push, push_folder
from llmconvert.hub import plan_push as plan_files
from llmconvert.hub.card import CARD, require_other_base
from llmconvert.progress import SILENT, Bytes, Progress
from llmconvert.recipes.schema.recipe import PLACEHOLDERS, PublishSettings, Recipe
from llmconvert.recipes.stages.artifact import card_for
from llmconvert.storage.contents import Contents, Hashes
from llmconvert.storage.disk import disk_error
from llmconvert.storage.lock import locked
from llmconvert.storage.writer import check_output_directory, publish_directory, staging_directory, write_json
from llmconvert.text.files import local_path
from llmconvert.validate.render.card import Address

__all__ = [
    "PUBLICATION_FILE",
    "card_there",
    "check_local_target",
    "check_metadata",
    "check_target",
    "fill_target",
    "plan_push",
    "publish_artifact",
    "publish_local",
]

PUBLICATION_FILE = Path("llmconvert") / "publication.json"
_SCHEMA = "llmconvert.publication/2"


def fill_target(recipe: Recipe) -> Recipe:
    """The recipe with the placeholders of its publishing target filled in, ``{scheme}`` with ``w4a16-g64``.

    ``{name}`` is the recipe's, ``{model}`` the last part of the model's, and ``{scheme}`` the dtype if nothing is
    quantized.

    Raises:
        RecipeError: the artifact would take the place of the model that it is made from.
    """
    settings, quantize = recipe.publish, recipe.quantize
    if settings is None:
        return recipe
    values = {
        "name": recipe.name,
        "model": without_part(Path(recipe.model.partition("@")[0].rstrip("/")).name),
        "method": quantize.method if quantize is not None else "convert",
        "scheme": quantize.label if quantize is not None else recipe.convert.dtype,
    }
    assert values.keys() == set(PLACEHOLDERS)
    filled = {
        key: value.format_map(values)
        for key in ("to", "revision", "folder", "tag", "message", "collection")
        if (value := getattr(settings, key)) is not None
    }
    target = settings.model_copy(update=filled)
    _refuse_own_source(recipe.model, target)
    return recipe.model_copy(update={"publish": target})


def _refuse_own_source(model: str, target: PublishSettings) -> None:
    """Whoever loads the original from there would get other weights under the same name."""
    origin, _, revision = model.partition("@")
    onto = target.to.lower() == origin.lower() and (target.revision or "main") in ("main", revision)
    if onto and target.folder is None:
        raise RecipeError(
            f"publish.to: found {target.to!r}, which is the model itself; its weights would be replaced. Name another "
            "repository, or give publish.revision or publish.folder, which leave the original where it is"
        )


def check_target(settings: PublishSettings, recipe: str, hashes: Hashes) -> None:
    """Refuse, before any work, a target that could not be published to.

    Raises:
        OutputError: see :func:`check_local_target`.
        HubError: see :func:`llmconvert.hub.check_push`.
    """
    if settings.to.startswith("file:"):
        check_local_target(_directory(settings), recipe, hashes)
    else:
        check_push(settings.to, _options(settings))


def plan_push(
    directory: str | Path, repository: str, *, revision: str | None = None, folder: str | None = None
) -> PushPlan:
    """List what :func:`llmconvert.push_model` would send, and the card, without a token and without the network.

    Example::

        for file in llmconvert.plan_push("out/w4", "user/name-W4A16").files:
            print(file.name, file.size)

    Args:
        directory: the artifact.
        repository: ``user/name``.
        revision: branch; the main branch by default.
        folder: of the repository, for one of several variants; its root by default.

    Raises:
        SourceError: the directory is missing or empty, or a link in it leads out of it.
        HubError: a name can't be one on the Hub, a file holds a Hub token, or the card's front matter can't be read.
    """
    instead = card_there(Path(directory), repository, revision, folder)
    return plan_files(Path(directory), repository, revision=revision, folder=folder, instead=instead)


def card_there(directory: Path, repository: str, revision: str | None, folder: str | None) -> Mapping[str, bytes]:
    """The card that was written for the artifact, if nobody has touched it, with the lines that load it from there."""
    branch = revision if (revision or "main") != "main" else None
    card = card_for(directory, Address(repository, folder, branch)) if directory.is_dir() else None
    return {CARD: card} if card is not None else {}


def check_metadata(settings: PublishSettings, front_matter: str) -> None:
    """Refuse, before any work, a card that the Hub would not take, by what it will begin with, or whose base model the
    artifact would replace.

    Raises:
        HubError: saying which.
    """
    if settings.to.startswith("file:"):
        return
    if settings.folder is None and (settings.revision or "main") == "main":
        require_other_base(front_matter, settings.to)
    check_card(settings.to, front_matter)


def publish_artifact(
    artifact: Path,
    contents: Contents,
    settings: PublishSettings,
    recipe: str,
    hashes: Hashes,
    *,
    progress: Progress = SILENT,
) -> str:
    """Publish to where the recipe says; returns the place.

    Args:
        artifact: its directory.
        contents: of its files when they were written.

    Raises:
        OutputError, MachineError: see :func:`publish_local`.
        HubError: the Hub refused or could not be reached.
    """
    if settings.to.startswith("file:"):
        publish_local(artifact, contents, _directory(settings), recipe, hashes, progress=progress)
        return settings.to
    if damage := hashes.damage(artifact, contents):
        raise _damaged(artifact, damage)
    return push_folder(artifact, settings.to, _options(settings), progress=progress)


def _options(settings: PublishSettings) -> PushOptions:
    return PushOptions(
        private=settings.private,
        revision=settings.revision,
        folder=settings.folder,
        create_pr=settings.create_pr,
        tag=settings.tag,
        message=settings.message,
        replace=settings.replace,
        verify_download=settings.verify_download,
        gated=settings.gated,
        collection=settings.collection,
    )


def _directory(settings: PublishSettings) -> Path:
    return local_path(settings.to.removeprefix("file:"))


def check_local_target(directory: Path, recipe: str, hashes: Hashes) -> None:
    """Refuse a directory that :func:`publish_local` could not write or would not replace.

    Raises:
        OutputError: with what is in the way.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        check_output_directory(directory)
        return
    path = directory / PUBLICATION_FILE
    try:
        value = json.loads(path.read_bytes())
        publisher, files = str(value["recipe"]), Contents.from_mapping(value["files"])
    except OSError as error:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise MachineError(f"{path}: cannot be read: {error.strerror}; run the same command again") from error
        files = None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        files = None
    if files is None:
        raise OutputError(
            f"{directory}: is not empty and was not published by llmconvert; name another directory or empty it"
        )
    if publisher != recipe:
        raise OutputError(
            f"{directory}: holds what recipe {publisher!r} published, not {recipe!r}; name another, or remove it"
        )
    if damage := hashes.damage(directory, files, but=str(PUBLICATION_FILE), hidden=True):
        raise OutputError(
            f"{directory}: is not as it was published, {damage}; move your changes away, or name another directory"
        )


def publish_local(
    artifact: Path,
    contents: Contents,
    directory: Path,
    recipe: str,
    hashes: Hashes,
    *,
    progress: Progress = SILENT,
) -> None:
    """Copy ``artifact`` to ``directory``, replacing what this recipe published there before.

    Args:
        contents: of the artifact's files when they were written; these are copied, and what lies in ``directory``
            afterwards is what was written.

    Raises:
        OutputError: see :func:`check_local_target`; or another process is publishing there.
        MachineError: a file of the artifact was changed since it was written, or the disk fails or is full.
    """
    with locked(directory):
        check_local_target(directory, recipe, hashes)
        staging = staging_directory(directory)
        try:
            shutil.rmtree(staging)
            staging.mkdir()
            with progress.task(
                f"publishing to {directory}", Bytes(sum(content.nbytes for content in contents.files.values()))
            ) as task:
                for name, content in contents.files.items():
                    _copy(artifact / name, staging / name)
                    task.advance(content.nbytes, name)
            if damage := hashes.damage(staging, contents):
                raise _damaged(artifact, damage)
            (staging / PUBLICATION_FILE).parent.mkdir(exist_ok=True)
            write_json(
                staging / PUBLICATION_FILE, {"schema": _SCHEMA, "recipe": recipe, "files": contents.to_mapping()}
            )
            _replace(staging, directory)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def _copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())
    except OSError as error:
        if not source.exists():
            raise _damaged(source.parent, f"{source.name} is missing") from error
        raise disk_error(error, target) from error


def _damaged(artifact: Path, damage: str) -> MachineError:
    return MachineError(
        f"{artifact}: is not as it was written, {damage}; nothing was published, run it again to build it anew"
    )


def _replace(staging: Path, directory: Path) -> None:
    """Put the new directory in the old one's place with two renames.

    When the second one fails, the old one comes back; after a crash between them, the next run puts the new one there.
    """
    old = directory.absolute().with_name(f".{directory.absolute().name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    try:
        publish_directory(staging, directory)
    except BaseException:
        if old.exists() and not directory.exists():
            os.rename(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)
