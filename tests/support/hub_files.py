"""What directories hold, and what a repository should hold after a push."""

from __future__ import annotations

from pathlib import Path

from support.hub_server import HubServer

MANIFEST = "llmconvert/upload.json"


def names(directory: str | Path) -> list[str]:
    root = Path(directory)
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def sent(artifact: Path) -> dict[str, bytes]:
    """What a push of ``artifact`` sends, but for its manifest."""
    return {name: (artifact / name).read_bytes() for name in names(artifact) if not name.startswith(".")}


def published(hub: HubServer, repo_id: str, revision: str = "main") -> dict[str, bytes]:
    """What a reader finds, but for the manifest."""
    return {path: content for path, content in hub.files(repo_id, revision).items() if path != MANIFEST}
