"""A progress that keeps what is logged."""

from __future__ import annotations

from contextlib import AbstractContextManager

from llmconvert.progress import SILENT, Progress, Task

__all__ = ["Heard"]


class Heard(Progress):
    """What was logged."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, description: str, total: float) -> AbstractContextManager[Task]:
        return SILENT.task(description, total)

    def log(self, message: str) -> None:
        self.lines.append(message)
