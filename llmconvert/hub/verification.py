"""Verification of a push: published files fetched again and compared with those on this disk, byte for byte."""

from __future__ import annotations

import io
from collections.abc import Mapping

from llmconvert.errors import HubError
from llmconvert.hub.repository import Content
from llmconvert.hub.retry import Backoff
from llmconvert.hub.transfer import RemoteFile, iterate_content
from llmconvert.progress import SILENT, Bytes, Progress

__all__ = ["compare_bytes"]


def compare_bytes(
    files: Mapping[str, RemoteFile],
    contents: Mapping[str, Content],
    *,
    backoff: Backoff | None = None,
    progress: Progress = SILENT,
) -> None:
    """Download ``files`` and compare each with the content of the same name; nothing is kept on disk.

    Raises:
        HubError: naming the file and the first byte that differs.
    """
    with progress.task("verifying the download", Bytes(sum(file.size for file in files.values()))) as task:
        for name, file in files.items():
            source = contents[name].source
            with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as local:
                position = 0
                for piece in iterate_content(file, backoff=backoff):
                    expected = local.read(len(piece))
                    if piece != expected:
                        pairs = enumerate(zip(piece, expected, strict=False))
                        at = next((i for i, (served, sent) in pairs if served != sent), len(expected))
                        raise HubError(
                            f"{file.repo_id}: {name} as served differs from the file sent from byte "
                            f"{position + at:,} on; push again"
                        )
                    position += len(piece)
                    task.advance(len(piece))
                if local.read(1):
                    raise HubError(f"{file.repo_id}: {name} as served ends after {position:,} bytes; push again")
