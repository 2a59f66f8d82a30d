"""Writing artifacts: laid out before the first byte, streamed in any order, visible whole or not at all.

The names, dtypes and shapes of an artifact are known before any work, so its shards, their headers and every
tensor's offset are too (:func:`plan_layout`). Disk space is reserved up front, so a long job can't run out of it
at the end. Tensors may arrive in any order, in rows if they are large, and again after a restart: the same bytes go
to the same place.

An output directory is built in a hidden sibling and renamed into place by :func:`publish_directory`.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path

import torch

from llmconvert.errors import CheckpointError, OutputError
from llmconvert.storage.checkpoint import DTYPE_NAMES, TensorSpec
from llmconvert.storage.directory import INDEX_NAME, SINGLE_NAME
from llmconvert.storage.disk import disk_error, put_in_place, require_slashes, sync_directory

__all__ = [
    "DEFAULT_SHARD_BYTES",
    "Layout",
    "Shard",
    "TensorWriter",
    "check_output_directory",
    "check_output_file",
    "json_bytes",
    "plan_layout",
    "plan_shard",
    "publish_directory",
    "staging_directory",
    "write_file",
    "write_json",
    "write_side_files",
]

#: Shards are filled up to this many bytes, transformers' own default.
DEFAULT_SHARD_BYTES = 5_000_000_000
_COPY_NBYTES = 1 << 20
# Data starts at a multiple of this, as the reference writer pads its header.
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file to be: its name, its header bytes (length prefix included) and its tensors' offsets."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where every tensor of an artifact goes. ``nbytes`` counts all shards with their headers."""

    shards: tuple[Shard, ...]
    specs: Mapping[str, TensorSpec]
    shard_of: Mapping[str, Shard]
    index: bytes | None

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.shards) + len(self.index or b"")


def plan_layout(specs: Iterable[TensorSpec], max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> Layout:
    """Distribute tensors over shards in the order given; a tensor larger than a shard gets one to itself.

    Raises:
        ValueError: two specs share a name.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = total = 0
    by_name: dict[str, TensorSpec] = {}
    for spec in specs:
        if spec.name in by_name:
            raise ValueError(f"tensor {spec.name!r} is laid out twice")
        by_name[spec.name] = spec
        nbytes = spec.nbytes
        if groups[-1] and filled + nbytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += nbytes
        total += nbytes
    count = len(groups)
    names = [SINGLE_NAME] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    shards = tuple(plan_shard(name, group) for name, group in zip(names, groups, strict=True))
    shard_of = {name: shard for shard in shards for name in shard.offsets}
    index = None
    if count > 1:
        index = _index_bytes(total, {name: shard_of[name].name for name in sorted(shard_of)})
    return Layout(shards, by_name, shard_of, index)


def _index_bytes(total: int, weight_map: Mapping[str, str]) -> bytes:
    """As :func:`json_bytes` has it; that takes ten times as long, since Python indents and C does not."""
    entries = json.dumps(weight_map, ensure_ascii=False, separators=(",\n    ", ": "))[1:-1]
    about = f'"metadata": {{\n    "total_size": {total}\n  }}'
    return f'{{\n  {about},\n  "weight_map": {{\n    {entries}\n  }}\n}}\n'.encode()


def plan_shard(name: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> Shard:
    """One file of tensors, with what its header says beside them: ``format: pt`` by default."""
    # Wide elements first, as the reference writer orders them, keeps every tensor aligned to its element size.
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    # Put together here: json.dumps of a value for each tensor takes five times as long. Most tensors of a model are of
    # a few kinds, and what is said of a kind is put together once.
    entries = [f'"__metadata__":{json.dumps(dict(metadata or {"format": "pt"}), separators=(",", ":"))}']
    kinds: dict[tuple[torch.dtype, tuple[int, ...]], tuple[str, int]] = {}
    position = 0
    begins: dict[str, int] = {}
    for spec in ordered:
        kind = kinds.get((spec.dtype, spec.shape))
        if kind is None:
            said = f'"dtype":"{DTYPE_NAMES[spec.dtype]}","shape":[{",".join(map(str, spec.shape))}]'
            kind = kinds[spec.dtype, spec.shape] = said, spec.nbytes
        end = position + kind[1]
        entries.append(f'{encode_basestring_ascii(spec.name)}:{{{kind[0]},"data_offsets":[{position},{end}]}}')
        begins[spec.name], position = position, end
    raw = f"{{{','.join(entries)}}}".encode()
    raw += b" " * (-len(raw) % _HEADER_ALIGNMENT)
    header = struct.pack("<Q", len(raw)) + raw
    return Shard(name, header, {key: len(header) + begin for key, begin in begins.items()}, len(header) + position)


class TensorWriter:
    """Writes the tensors of a layout into a directory, in any order, each any number of times.

    Opening it a second time on the same directory and layout (after a kill) keeps what was written.

    Raises:
        CapacityError: the disk cannot hold the layout.
        OutputError: the directory cannot be written.
    """

    def __init__(self, directory: Path, layout: Layout) -> None:
        self.directory = directory
        self.layout = layout
        self._fds: dict[str, int] = {}
        try:
            for shard in layout.shards:
                self._fds[shard.name] = self._reserve(shard)
            if layout.index is not None:
                write_file(directory / INDEX_NAME, layout.index)
        except BaseException:
            self.close()
            raise

    def _reserve(self, shard: Shard) -> int:
        path = self.directory / shard.name
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"{path}: cannot be created: {error.strerror}") from error
        try:
            if os.fstat(fd).st_size != shard.nbytes:
                os.ftruncate(fd, 0)
                _allocate(fd, shard.nbytes)
            _write_all(fd, memoryview(shard.header), 0)
        except OSError as error:
            os.close(fd)
            raise disk_error(error, path, shard.nbytes) from error
        return fd

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor.

        Raises:
            ValueError: its dtype or shape is not what the layout says.
            CapacityError: the disk is full.
        """
        spec = self.layout.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(tensor.shape)}, was laid out as {spec.shape}")
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write consecutive rows of a tensor (along its first dimension) from row ``start`` on."""
        spec = self.layout.specs[name]
        if rows.dtype != spec.dtype or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise ValueError(
                f"rows of {name!r} are {rows.dtype} {tuple(rows.shape)}, laid out as {spec.dtype} {spec.shape}"
            )
        row_bytes = math.prod(spec.shape[1:]) * spec.dtype.itemsize
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self.write_bytes(name, start * row_bytes, data)

    def write_bytes(self, name: str, offset: int, data: memoryview) -> None:
        """Write raw bytes of a tensor from byte ``offset`` on: any part of it, however large its rows."""
        shard = self.layout.shard_of[name]
        if not 0 <= offset <= offset + len(data) <= self.layout.specs[name].nbytes:
            raise ValueError(f"bytes {offset:,}–{offset + len(data):,} do not lie within tensor {name!r}")
        try:
            _write_all(self._fds[shard.name], data, shard.offsets[name] + offset)
        except OSError as error:
            raise disk_error(error, self.directory / shard.name, len(data)) from error

    def read_bytes(self, name: str, offset: int, nbytes: int) -> bytes:
        """Raw bytes of a tensor that were written before, from byte ``offset`` on.

        Raises:
            MachineError: the disk fails.
        """
        shard = self.layout.shard_of[name]
        try:
            found = os.pread(self._fds[shard.name], nbytes, shard.offsets[name] + offset)
        except OSError as error:
            raise disk_error(error, self.directory / shard.name, nbytes) from error
        if len(found) != nbytes:
            raise ValueError(f"bytes {offset:,}–{offset + nbytes:,} of tensor {name!r} are not all there")
        return found

    def drop_cache(self, name: str, offset: int, nbytes: int) -> None:
        """Start writing these bytes to disk; pages that are there already leave the page cache."""
        shard = self.layout.shard_of[name]
        if nbytes > 0:  # zero would mean the rest of the file
            start = shard.offsets[name] + offset
            os.posix_fadvise(self._fds[shard.name], start, nbytes, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Force everything written so far to disk.

        Raises:
            MachineError: the disk fails.
            CapacityError: it is full.
        """
        for shard, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as error:
                path = self.directory / shard
                raise disk_error(error, path, os.fstat(fd).st_size) from error

    def close(self) -> None:
        """Close the files; call :meth:`sync` before to have them on disk."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _allocate(fd: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        # Some network file systems cannot reserve; there a full disk shows when it is reached.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, nbytes)


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def write_file(path: Path, content: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file, in pieces where it is large, so that it is there whole or not at all, on disk when this returns."""
    temporary = path.with_name(f".{path.name}.tmp")
    pieces, written = [content] if isinstance(content, bytes) else content, 0
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                written += len(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise disk_error(error, path, written) from error


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, with :func:`write_file`'s guarantees."""
    write_file(path, json_bytes(value))


def write_side_files(directory: Path, files: Mapping[str, Path | bytes]) -> int:
    """Write a checkpoint's non-weight files (:attr:`Checkpoint.files`) into ``directory``; returns their bytes."""
    total = 0
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            write_file(path, content)
        else:
            _copy_file(content, path)
        total += path.stat().st_size
    return total


def _copy_file(source: Path, path: Path) -> None:
    try:
        with path.open("wb") as writer:
            for piece in _pieces(source):
                writer.write(piece)
            writer.flush()
            os.fsync(writer.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise disk_error(error, path, source.stat().st_size) from error


def _pieces(source: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as reader:
            while piece := reader.read(_COPY_NBYTES):
                yield piece
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror}") from error


def json_bytes(value: object) -> bytes:
    """Indented JSON with a newline at its end, as :func:`write_json` writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check_output_directory(path: Path) -> None:
    """Refuse, before any work, an output directory that exists and is not empty, or whose parent cannot be written.

    Raises:
        OutputError: with what to do.
    """
    require_slashes(path)
    try:
        if path.is_symlink() or path.exists():
            if not path.is_dir():
                raise OutputError(f"{path}: exists and is no directory; name another output")
            if any(path.iterdir()):
                raise OutputError(f"{path}: exists and is not empty; name another output or remove it first")
        parent = path.absolute().parent
        while not parent.exists():
            parent = parent.parent
    except OSError as error:
        raise OutputError(f"{path}: cannot be used as output: {error.strerror}") from error
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: cannot be created, {parent} is not a writable directory")


def check_output_file(path: Path) -> None:
    """Refuse, before any work, a file whose directory does not exist or cannot be written.

    Raises:
        OutputError: with what to do.
    """
    require_slashes(path)
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path}: {parent} is not a writable directory; make it first or name another file")


def staging_directory(path: Path) -> Path:
    """The hidden sibling in which the output directory ``path`` is built; created if need be."""
    absolute = path.absolute()
    staging = absolute.parent / f".{absolute.name}.partial"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path}: cannot be created: {error.strerror}") from error
    return staging


def publish_directory(staging: Path, path: Path) -> None:
    """Make a finished directory appear under its final name: sync its entries, then one rename.

    Raises:
        OutputError: something is in its place.
        MachineError: the disk fails, or the directory is gone.
    """
    sync_directory(staging)
    absolute = path.absolute()
    put_in_place(staging, absolute)  # rename(2) replaces an empty directory and refuses a filled one
    sync_directory(absolute.parent)
