"""Models split over several GGUF files, as ``llama-gguf-split`` names them: ``NAME-00001-of-00003.gguf``.

The first part holds the metadata, every part its own tensors and its number (``split.no``, ``split.count``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from llmconvert.errors import CheckpointError
from llmconvert.gguf.header import GgufHeader, GgufTensor, read_gguf_header
from llmconvert.storage.directory import is_projector

__all__ = [
    "gguf_models",
    "join_headers",
    "model_files",
    "part_names",
    "part_paths",
    "projectors_beside",
    "read_model_header",
    "without_part",
]

_PART: Final = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def read_model_header(path: Path) -> GgufHeader:
    """The header of a GGUF model: of the file, or of all files of the split model that it belongs to.

    Raises:
        CheckpointError: see :func:`~llmconvert.gguf.header.read_gguf_header`; parts are missing or do not belong
            together.
        UnsupportedError: see there.
    """
    header = read_gguf_header(path)
    count = _count(header)
    if count == 1:
        return header
    paths = part_paths(path)
    if len(paths) != count:
        raise CheckpointError(
            f"{path}: is one of {count} parts of a split model, which are found by their names; expected one like "
            f"{without_part(path.name)}-00001-of-{count:05}.gguf"
        )
    if missing := [other.name for other in paths if not other.is_file()]:
        raise CheckpointError(f"{path}: {len(missing)} of the model's {count} parts are not there, first {missing[0]}")
    return join_headers([read_gguf_header(other) for other in paths], paths)


def part_paths(path: Path) -> tuple[Path, ...]:
    """The files of the model that a file belongs to, by its name, whether they exist or not; itself if it is whole."""
    match = _PART.fullmatch(path.name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return (path,)
    names = (f"{match['stem']}-{number:05}-of-{match['count']}.gguf" for number in range(1, int(match["count"]) + 1))
    return tuple(path.with_name(name) for name in names)


def part_names(stem: str, count: int) -> tuple[str, ...]:
    """The file names of a model in so many parts; of a whole one the stem and ``.gguf``."""
    if count == 1:
        return (f"{stem}.gguf",)
    return tuple(f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1))


def model_files(path: Path) -> tuple[Path, ...]:
    """The files that are there of the model that a file belongs to."""
    return tuple(part for part in part_paths(path) if part == path or part.is_file())


def without_part(name: str) -> str:
    """A file's name without ``.gguf`` and without the number of a part."""
    match = _PART.fullmatch(name)
    return match["stem"] if match is not None else name.removesuffix(".gguf")


def gguf_models(directory: Path) -> Sequence[Path]:
    """The GGUF models in a directory, a split one as its first part."""
    return sorted({part_paths(path)[0] for path in directory.glob("*.gguf") if not is_projector(path.name)})


def projectors_beside(path: Path) -> Sequence[Path]:
    """The files of parts for images or sound that lie beside a GGUF model's file."""
    return sorted(found for found in path.parent.glob("*.gguf") if is_projector(found.name))


def _count(header: GgufHeader) -> int:
    return max(1, header.metadata.integer("split.count", 1))


def join_headers(headers: Sequence[GgufHeader], paths: tuple[Path, ...]) -> GgufHeader:
    """The headers of a split model's parts as one.

    Raises:
        CheckpointError: they do not belong together.
    """
    tensors: dict[str, GgufTensor] = {}
    for number, header in enumerate(headers):
        said = header.metadata.integer("split.no"), _count(header)
        if said != (number, len(paths)):
            raise CheckpointError(
                f"{header.path}: says that it is part {said[0] + 1} of {said[1]}, expected {number + 1} of {len(paths)}"
            )
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{header.path}: tensor {name!r} is in {paths[tensors[name].part].name} too")
            tensors[name] = replace(tensor, part=number)
    total = headers[0].metadata.integer("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise CheckpointError(f"{paths[0]}: counts {total:,} tensors in all parts, there are {len(tensors):,}")
    return GgufHeader(paths[0], headers[0].metadata, MappingProxyType(tensors), paths)
