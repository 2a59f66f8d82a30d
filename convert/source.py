"""Sources: a Hub id, a directory, a GGUF file or a packaged file as a checkpoint, and how they are told apart.

Four forms are understood: a directory in Hugging Face layout, a ``.gguf`` file, ``package:PKG/FILE`` (a file shipped
inside an installed Python package), and a Hub id ``org/name[@revision]``. What exists on disk wins over the Hub.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmconvert.errors import SourceError
from llmconvert.gguf.split import gguf_models, model_files, projectors_beside
from llmconvert.hub import fetch
from llmconvert.progress import SILENT, Progress
from llmconvert.storage.checkpoint import Checkpoint, SafetensorsCheckpoint
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME, files_of
from llmconvert.text.files import local_path

__all__ = ["Source", "SourceKind", "open_source", "parse_hub_id", "source_fingerprint"]

SourceKind = Literal["hub", "directory", "gguf", "package"]

# A page of the Hub, as it is copied from a browser.
_LINK = re.compile(r"https?://[^/]+/(?P<repo>[\w.-]+/[\w.-]+)")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[^@\s]+))?")
_PACKAGE = re.compile(r"package:(?P<package>[^/:]+)/(?P<file>.+)")
_FORMS = (
    "expected a model directory, a .gguf file, package:PKG/FILE (a file inside an installed Python package), "
    "or a Hub id org/name[@revision]"
)
# Of files without a header of known length, this much is hashed.
_HEAD_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Source:
    """An opened model.

    Attributes:
        kind: which of the four forms it was given in.
        origin: what to write into a record: ``org/name``, ``package:PKG/FILE``, or the path as given.
        revision: the commit hash for the Hub, None for local files.
        path: the directory or file on this disk.
        checkpoint: the weights, config and other files.
    """

    kind: SourceKind
    origin: str
    revision: str | None
    path: Path
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True)
class _Ways:
    """How models are opened; see :func:`open_source`."""

    allow_pickle: bool
    decoder_alone: bool


def open_source(
    text: str, *, allow_pickle: bool = False, decoder_alone: bool = False, progress: Progress = SILENT
) -> Source:
    """Find and open the model that ``text`` names; a Hub model is fetched first.

    Args:
        text: one of the four forms.
        allow_pickle: read ``.bin`` weights, with ``weights_only=True``, where there are no safetensors.
        decoder_alone: of a GGUF model take the decoder, whatever lies beside its file.

    Raises:
        SourceError: not one of the four forms, or not there.
        CheckpointError: the files are corrupt or incomplete.
        HubError: the Hub refused or could not be reached.
    """
    source = _open(text, _Ways(allow_pickle, decoder_alone), progress)
    if source.checkpoint.without_tokenizer:
        progress.log(f"note: {source.checkpoint.without_tokenizer}. The weights are read without it")
    if note := getattr(source.checkpoint, "alone", ""):
        progress.log(f"note: {note}")
    return source


def _open(text: str, ways: _Ways, progress: Progress) -> Source:
    package = _PACKAGE.fullmatch(text)
    if package is not None:
        path = _package_file(package["package"], package["file"])
        return Source("package", text, None, path, _open_path(path, ways))
    if text.startswith("package:"):
        raise SourceError(f"{text!r}: no file named; expected package:PKG/FILE")
    if not text.strip():
        raise SourceError(f"no model is named; {_FORMS}")
    path = local_path(text)
    if path.is_dir():
        return Source("directory", text, None, path, _open_path(path, ways))
    if path.exists() or text.endswith(".gguf"):
        return Source("gguf", text, None, path, _open_path(path, ways))
    hub = parse_hub_id(text)
    if hub is None:
        link = _LINK.match(text)
        slashed = text.replace("\\", "/")
        meant = f"; did you mean {link['repo']}?" if link is not None else ""
        meant = f"; folders are divided by slashes: did you mean {slashed}?" if slashed != text else meant
        raise SourceError(f"{text!r}: no such directory, and no Hub id; {_FORMS}{meant}")
    fetched = fetch(*hub, allow_pickle=ways.allow_pickle, progress=progress)
    checkpoint = _open_path(fetched.directory, ways)
    return Source("hub", fetched.repo_id, fetched.commit_hash, fetched.directory, checkpoint)


def parse_hub_id(text: str) -> tuple[str, str | None] | None:
    """``org/name[@revision]`` as its two parts; None if ``text`` has another form."""
    match = _HUB_ID.fullmatch(text)
    return (match["repo"], match["revision"]) if match is not None else None


def _open_path(path: Path, ways: _Ways) -> Checkpoint:
    if path.is_dir():
        ggufs = gguf_models(path)
        if len(ggufs) == 1 and not (path / "config.json").exists():
            return _open_path(ggufs[0], ways)
        if ggufs and not (path / "config.json").exists():
            raise SourceError(f"{path}: has no config.json but {ggufs[0].name}; to read that, name the file itself")
        if ways.allow_pickle and not (path / SINGLE_NAME).exists() and not (path / INDEX_NAME).exists():
            from llmconvert.convert.pickle import PickleCheckpoint

            return PickleCheckpoint(path)
        if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
            raise SourceError(
                f"{path}: is an adapter and no model; name the model that it was trained on, and this one with "
                "--adapter (in a recipe: adapter)"
            )
        return SafetensorsCheckpoint(path)
    if not path.exists():
        raise SourceError(f"{path}: no such file")
    if path.suffix != ".gguf":
        whole = path.parent if (path.parent / "config.json").is_file() else "the directory with config.json"
        raise SourceError(f"{path}: is a file, and not a .gguf; of other models name the directory: {whole}")
    from llmconvert.gguf.checkpoint import open_gguf
    from llmconvert.gguf.mmproj.checkpoint import open_whole

    return open_gguf(path) if ways.decoder_alone else open_whole(path)


def _package_file(package: str, file: str) -> Path:
    """The file inside the package, found without importing it.

    Raises:
        SourceError: no such package or file, or a path that leaves the package.
    """
    module = package.replace("-", "_")
    if not module.isidentifier():
        raise SourceError(f"package:{package}/{file}: {package!r} is no package name; expected package:PKG/FILE")
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise SourceError(f"package {package} is not installed; pip install {package.replace('_', '-')}")
    for location in spec.submodule_search_locations or ():
        root = Path(location).resolve()
        path = (root / file).resolve()
        if not path.is_relative_to(root):
            raise SourceError(f"package:{package}/{file}: the path leaves the package {root}")
        if path.exists():
            return path
    shipped = sorted(
        str(found.relative_to(location))
        for location in spec.submodule_search_locations or ()
        for found in Path(location).rglob("*.gguf")
    )
    found = f"it ships {', '.join(shipped[:5])}" if shipped else "it ships no .gguf file"
    raise SourceError(f"package {package} has no file {file!r}; {found}")


def source_fingerprint(source: Source) -> str:
    """A hash that changes when the model does: the key of everything computed from it.

    For the Hub it is made of repository and commit, which fix every byte. For local files it is made of names, sizes,
    modification times and the headers of weight files, so that gigabytes need not be read to know them again; a
    file rewritten in place with its size, header and time restored would go unnoticed.
    """
    digest = hashlib.sha256()
    if source.kind == "hub":
        digest.update(f"hub\0{source.origin}\0{source.revision}".encode())
        return digest.hexdigest()
    files = list(files_of(source.path).values()) if source.path.is_dir() else []
    for path in files or (*model_files(source.path), *projectors_beside(source.path)):
        status = path.stat()
        digest.update(f"{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(_head(path))
    return digest.hexdigest()


def _head(path: Path) -> bytes:
    """The hash of a safetensors file's header, of the first MiB of any other file."""
    with path.open("rb") as file:
        length = _HEAD_BYTES
        if path.suffix == ".safetensors":
            prefix = file.read(8)
            length = min(struct.unpack("<Q", prefix)[0], 100 * _HEAD_BYTES) if len(prefix) == 8 else 0
        return hashlib.sha256(file.read(length)).digest()
