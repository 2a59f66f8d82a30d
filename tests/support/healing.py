"""Quick healing of tiny merged models, also in a process of its own that is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.kills import die_when_replaced
from support.tiny_architectures import ids

from llmconvert.convert.heal.job import heal_attention
from llmconvert.convert.heal.options import HealOptions
from llmconvert.report.steps import HealReport
from llmconvert.storage.checkpoint import SafetensorsCheckpoint

__all__ = ["QUICK", "WINDOWS", "heal", "heal_until_killed"]

WINDOWS = ids((24,) * 20, seed=3)
QUICK = HealOptions(steps=6, held_out=4, evaluate_every=3, save_every=2)


def heal(original: Path, merged: Path, output: Path, **options: Any) -> HealReport:
    settings = {"windows": WINDOWS, "options": QUICK, **options}
    with SafetensorsCheckpoint(original) as teacher, SafetensorsCheckpoint(merged) as student:
        return heal_attention(teacher, student, output, **settings)


def heal_until_killed(original: Path, merged: Path, output: Path, state: Path, kill_at: int) -> None:
    """In a process of its own; ends by SIGKILL when the state is being replaced for the ``kill_at``-th time."""
    die_when_replaced(state, kill_at)
    heal(original, merged, output, state=state)
