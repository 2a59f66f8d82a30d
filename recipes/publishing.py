"""Publishing an artifact where its recipe says: to a local directory here, to the Hub through ``llmconvert.hub``.

A local directory appears whole. One that holds files is replaced only if it is an earlier publication of the same
recipe and nobody has added to it or changed it since: ``llmconvert/publication.json`` lists what was put there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from llmconvert.errors import CapacityError, OutputError, RecipeError
from llmconvert.hub import PushOptions, check_push, push_folder
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.schema.recipe import PLACEHOLDERS, PublishSettings, Recipe
from llmconvert.storage.lock import locked
from llmconvert.storage.writer import check_output_directory, publish_directory, staging_directory, write_json

__all__ = [
    "PUBLICATION_FILE",
    "check_local_target",
    "check_target",
    "file_sizes",
    "fill_target",
    "publish_artifact",
    "publish_local",
]

PUBLICATION_FILE = Path("llmconvert") / "publication.json"
_SCHEMA = "llmconvert.publication/1"


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
        "model": Path(recipe.model.partition("@")[0].rstrip("/")).name.removesuffix(".gguf"),
        "method": quantize.method if quantize is not None else "convert",
        "scheme": quantize.label if quantize is not None else recipe.convert.dtype,
    }
    assert values.keys() == set(PLACEHOLDERS)
    filled = {
        key: value.format_map(values)
        for key in ("to", "revision", "folder", "tag", "message")
        if (value := getattr(settings, key)) is not None
    }
    target = settings.model_copy(update=filled)
    _refuse_own_source(recipe.model, target)
    return recipe.model_copy(update={"publish": target})


def _refuse_own_source(model: str, target: PublishSettings) -> None:
    """Whoever loads the original from there would get other weights under the same name."""
    origin, _, revision = model.partition("@")
    onto = target.to.lower() == origin.lower() and (target.revision or "main") == (revision or "main")
    if onto and target.folder is None:
        raise RecipeError(
            f"publish.to: found {target.to!r}, which is the model itself; its weights would be replaced. Name another "
            "repository, or give publish.revision or publish.folder, which leave the original where it is"
        )


def check_target(settings: PublishSettings, recipe: str) -> None:
    """Refuse, before any work, a target that could not be published to.

    Raises:
        OutputError: see :func:`check_local_target`.
        HubError: see :func:`llmconvert.hub.check_push`.
    """
    if settings.to.startswith("file:"):
        check_local_target(_directory(settings), recipe)
    else:
        check_push(settings.to, _options(settings))


def publish_artifact(artifact: Path, settings: PublishSettings, recipe: str, *, progress: Progress = SILENT) -> str:
    """Publish to where the recipe says; returns the place.

    Raises:
        OutputError, CapacityError: see :func:`publish_local`.
        HubError: the Hub refused or could not be reached.
    """
    if settings.to.startswith("file:"):
        publish_local(artifact, _directory(settings), recipe, progress=progress)
        return settings.to
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
    )


def _directory(settings: PublishSettings) -> Path:
    return Path(settings.to.removeprefix("file:")).expanduser()


def check_local_target(directory: Path, recipe: str) -> None:
    """Refuse a directory that :func:`publish_local` could not write or would not replace.

    Raises:
        OutputError: with what is in the way.
    """
    if not directory.is_dir() or not any(directory.iterdir()):
        check_output_directory(directory)
        return
    try:
        value = json.loads((directory / PUBLICATION_FILE).read_bytes())
        publisher, files = str(value["recipe"]), dict(value["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise OutputError(
            f"{directory}: is not empty and was not published by llmconvert; name another directory or empty it"
        ) from None
    if publisher != recipe:
        raise OutputError(
            f"{directory}: holds what recipe {publisher!r} published, not {recipe!r}; name another, or remove it"
        )
    found = file_sizes(directory)
    found.pop(str(PUBLICATION_FILE), None)
    changed = sorted(name for name in {**found, **files} if found.get(name) != files.get(name))
    if changed:
        raise OutputError(
            f"{directory}: {changed[0]} was added, changed or removed since it was published; "
            "move your changes away, or name another directory"
        )


def publish_local(artifact: Path, directory: Path, recipe: str, *, progress: Progress = SILENT) -> None:
    """Copy ``artifact`` to ``directory``, replacing what this recipe published there before.

    Raises:
        OutputError: see :func:`check_local_target`; or another process is publishing there.
        CapacityError: the disk is full.
    """
    with locked(directory):
        check_local_target(directory, recipe)
        files = file_sizes(artifact)
        staging = staging_directory(directory)
        try:
            shutil.rmtree(staging)
            staging.mkdir()
            with progress.task(f"publishing to {directory}", sum(files.values())) as task:
                for name, size in files.items():
                    _copy(artifact / name, staging / name)
                    task.advance(size, name)
            (staging / PUBLICATION_FILE).parent.mkdir(exist_ok=True)
            write_json(staging / PUBLICATION_FILE, {"schema": _SCHEMA, "recipe": recipe, "files": files})
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
        free = shutil.disk_usage(target.parent).free
        raise CapacityError(f"{target}: cannot be written: {error.strerror}; {free:,} bytes are free") from error


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


def file_sizes(directory: Path) -> dict[str, int]:
    """Relative name → bytes of every file below ``directory``, in order."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in paths}
