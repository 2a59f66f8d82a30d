"""Publishing an artifact to a local directory; ``llmconvert.hub`` does it for the Hub.

The directory appears whole. One that holds files is replaced only if it is an earlier publication of the same recipe
and nobody has added to it or changed it since: ``llmconvert/publication.json`` lists what was put there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import get_token

from llmconvert.errors import CapacityError, HubError, OutputError
from llmconvert.hub import push_folder
from llmconvert.progress import SILENT, Progress
from llmconvert.recipes.recipe import PublishSettings
from llmconvert.writer import check_output_directory, publish_directory, staging_directory, write_json

__all__ = ["PUBLICATION_FILE", "check_local_target", "check_target", "file_sizes", "publish_artifact", "publish_local"]

PUBLICATION_FILE = Path("llmconvert") / "publication.json"
_SCHEMA = "llmconvert.publication/1"


def check_target(settings: PublishSettings, recipe: str) -> None:
    """Refuse, before any work, a target that could not be published to.

    Raises:
        OutputError: see :func:`check_local_target`.
        HubError: there is no token to publish with.
    """
    if settings.to.startswith("file:"):
        check_local_target(_directory(settings), recipe)
    elif get_token() is None:
        raise HubError(
            f"{settings.to}: publishing needs a token; set HF_TOKEN to one that may write, or add --no-publish"
        )


def publish_artifact(artifact: Path, settings: PublishSettings, recipe: str, *, progress: Progress = SILENT) -> str:
    """Publish to where the recipe says; returns the place.

    Raises:
        OutputError, CapacityError: see :func:`publish_local`.
        HubError: the Hub refused or could not be reached.
    """
    if settings.to.startswith("file:"):
        publish_local(artifact, _directory(settings), recipe, progress=progress)
        return settings.to
    return push_folder(
        artifact,
        settings.to,
        private=settings.private,
        revision=settings.revision,
        create_pr=settings.create_pr,
        tag=settings.tag,
        message=settings.message,
        progress=progress,
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
        OutputError: see :func:`check_local_target`.
        CapacityError: the disk is full.
    """
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
    """Put the new directory in the old one's place with two renames; a crash between them leaves the old one hidden."""
    old = directory.absolute().with_name(f".{directory.absolute().name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.rename(directory, old)
    publish_directory(staging, directory)
    shutil.rmtree(old, ignore_errors=True)


def file_sizes(directory: Path) -> dict[str, int]:
    """Relative name → bytes of every file below ``directory``, in order."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in paths}
