"""How much disk space something needs while it works."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class DiskUse:
    """The most bytes that lay below a directory at any of many looks, in all and in source shards being streamed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.most = self.most_in_shards = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def look(self) -> int:
        sizes: dict[int, int] = {}  # by inode: links take no room
        shards = 0
        for directory, _, files in os.walk(self._root):
            for name in files:
                try:
                    status = Path(directory, name).stat()
                except FileNotFoundError:
                    continue
                sizes[status.st_ino] = status.st_blocks * 512
                shards += sizes[status.st_ino] if "/shard-" in directory else 0
        total = sum(sizes.values())
        self.most, self.most_in_shards = max(self.most, total), max(self.most_in_shards, shards)
        return total

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.look()

    def __enter__(self) -> DiskUse:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
